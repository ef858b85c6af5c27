"""Checkpoints of the whole train state with Orbax: written beside training, whole or not at all."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.compressor import Maker
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.train.made_by import batch_text, check_made_by

_SHOWN = 3  # leaves named in an error

_NOT_STORED = {
    "uint2": "int4",
    "uint4": "uint8",
    "float8_e4m3": "bfloat16",
}
"""dtype that Orbax has no name for -> what holds the same numbers."""


@dataclass(frozen=True)
class Checkpoints:
    """Where, when and how many; `fit` saves and resumes by it.

    Attributes:
      directory: made if it is missing; one run in each.
      every: steps from one checkpoint to the next; the last step is saved in any case.
      keep: how many of the latest stay.
      about: what else must be the same to go on, as JSON: seed, batch size, bits. A run that
        resumes with another value is refused.

    Raises:
      ValueError: `every` or `keep` is below 1, `about` is not JSON.
    """

    directory: str | Path
    every: int = 1000
    keep: int = 2
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(
                f"every and keep must be at least 1, got every={self.every}, keep={self.keep}"
            )
        try:
            json.dumps(dict(self.about), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"about must be JSON: {error}") from error


class Saver:
    """An open directory of checkpoints; `opened` makes one.

    Saving copies the state off the device, then writes in another thread to a temporary folder that
    is renamed when it is complete: a process killed at any moment leaves whole checkpoints.
    """

    def __init__(self, settings: Checkpoints, *, read_only: bool = False):
        import orbax.checkpoint as ocp  # slow to import

        self._args, self.settings = ocp.args, settings
        self.directory = Path(settings.directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep, cleanup_tmp_directories=not read_only, create=not read_only
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("leaves", "about")
        )

    @property
    def latest(self) -> int | None:
        """The latest step with a checkpoint, one that is being written included."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, *, made_by: Mapping[str, str] | None = None, batch: str = ""
    ) -> None:
        """Starts to write the state of a step; returns as soon as the state may be donated.

        Args:
          step: of the state.
          state: a pytree of arrays.
          made_by: what makes the run, see made_by.py.
          batch: the hash of the batch that the last step took.

        Raises:
          TypeError: a leaf of a dtype that Orbax cannot store; nothing is written then.
        """
        found = leaves_with_paths(state)
        check_storable(state)
        arrays = {f"{i}": _data(leaf) for i, (_, leaf) in enumerate(found) if leaf.size}
        about: dict[str, Any] = {"leaves": _specs(state), "about": dict(self.settings.about)}
        if made_by is not None:
            about |= {"made_by": dict(made_by), "batch": batch}
        with jax.transfer_guard("allow"):
            # What Orbax still reads is not overwritten by donation: JAX gives the step new memory.
            self._manager.save(
                step,
                args=self._args.Composite(
                    leaves=self._args.StandardSave(arrays), about=self._args.JsonSave(about)
                ),
                force=True,
            )

    def restore(
        self,
        like: Any,
        step: int,
        *,
        made_by: Mapping[str, str] | None = None,
        batch_at: Callable[[int], Any] | None = None,
    ) -> Any:
        """The state of a step, with the tree, dtypes and shardings of `like`.

        Args:
          like: a state of the same kind.
          step: of a checkpoint that is there.
          made_by: what makes this run; None: any run will do.
          batch_at: of this run.

        Raises:
          ValueError: the checkpoint is of another tree, another `about` or another run.
        """
        args = self._args
        saved = self._manager.restore(step, args=args.Composite(about=args.JsonRestore()))
        where = f"checkpoint {self.directory}, step {step}"
        about = saved["about"]
        _check_about(where, about["about"], dict(self.settings.about))
        found = leaves_with_paths(like)
        _check_leaves(where, about["leaves"], _specs(like))
        if made_by is not None:
            check_made_by(where, about.get("made_by"), made_by)
            if batch_at is not None and about["batch"] != batch_text(batch_at(step - 1)):
                raise ValueError(
                    f"{where} is of another run: the batch of step {step - 1} was another one; "
                    "use another directory"
                )
        wanted = {f"{i}": _abstract(leaf) for i, (_, leaf) in enumerate(found) if leaf.size}
        with jax.transfer_guard("allow"):
            arrays = self._manager.restore(
                step, args=args.Composite(leaves=args.StandardRestore(wanted))
            )["leaves"]
            leaves = [_as(arrays.get(f"{i}"), leaf) for i, (_, leaf) in enumerate(found)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


@contextlib.contextmanager
def opened(settings: Checkpoints, *, read_only: bool = False) -> Iterator[Saver]:
    """A `Saver`, closed at the end: what is being written then is finished first."""
    saver = Saver(settings, read_only=read_only)
    try:
        yield saver
    finally:
        saver.close()


def restore(checkpoints: Checkpoints, like: Any, *, step: int | None = None) -> Any:
    """A saved state, to evaluate or to pack.

    Args:
      checkpoints: as they were given to `fit`.
      like: a state with the same tree, dtypes and shardings; values do not count.
      step: which one; None: the latest.

    Raises:
      FileNotFoundError: there is no such checkpoint; the message lists those that are there.
      ValueError: it is of another recipe, network or `about`; the message names the paths.
    """
    directory = Path(checkpoints.directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoints: {directory} does not exist")
    with opened(checkpoints, read_only=True) as saver:
        there = sorted(saver._manager.all_steps())
        wanted = saver.latest if step is None else step
        if wanted not in there:
            raise FileNotFoundError(f"{directory}: no checkpoint of step {step}; there: {there}")
        return saver.restore(like, wanted)


def check_storable(state: Any) -> None:
    """Refuses what Orbax refuses itself only when a file is half written, without the leaf's path.

    Raises:
      TypeError: a leaf has a dtype that Orbax cannot store.
    """
    for path, leaf in leaves_with_paths(state):
        instead = _NOT_STORED.get(np.dtype(leaf.dtype).name) if not _is_key(leaf) else None
        if instead and leaf.size:
            raise TypeError(
                f"state: {path}: Orbax cannot store {leaf.dtype}{list(leaf.shape)}; keep it as "
                f"{instead}, or out of the state"
            )


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _specs(state: Any) -> list[list[str]]:
    # What made a state is no leaf, but two states of other formats must not be mixed up.
    found = leaves_with_paths(state, is_leaf=lambda x: isinstance(x, Maker))
    return [
        [path, leaf.name if isinstance(leaf, Maker) else f"{leaf.dtype}{list(leaf.shape)}"]
        for path, leaf in found
    ]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    data = _data(leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=data.sharding)


def _as(array: Any, leaf: Any) -> jax.Array:
    if array is None:  # of size 0, which Orbax does not store
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    if not leaf.committed:
        # Free to move to other devices, as in the run that saved it.
        array = jnp.asarray(np.asarray(array))
    if _is_key(leaf):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    return array


def _check_about(where: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))  # tuples become lists, as they did in the file
    for key in sorted({*saved, *now}):
        if key not in saved or key not in now or saved[key] != now[key]:
            raise ValueError(
                f"{where} is of another run: {key} was {saved.get(key)!r}, is {now.get(key)!r}; "
                "use another directory"
            )


def _check_leaves(where: str, saved: list[list[str]], now: list[list[str]]) -> None:
    there, here = dict(saved), dict(now)
    lacks = [path for path in here if path not in there]
    extra = [path for path in there if path not in here]
    other = [
        f"{path} ({there[path]} there, {here[path]} here)"
        for path in here
        if path in there and there[path] != here[path]
    ]
    faults = [
        f"{what} {', '.join(paths[:_SHOWN])}"
        + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
        for what, paths in (
            ("it lacks", lacks),
            ("it has", extra),
            ("these differ:", other),
        )
        if paths
    ]
    if saved != now:
        why = "; ".join(faults) or "its leaves are in another order"
        raise ValueError(f"{where} is of another recipe, optimizer or network: {why}")


def non_finite(state: Any) -> str | None:
    """The path of the first leaf of a state that holds NaN, or infinity among the params."""
    found = [(p, x) for p, x in leaves_with_paths(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not found:
        return None
    flags = jax.device_get(_flags([leaf for _, leaf in found]))
    for (path, _), (nan, inf) in zip(found, flags, strict=True):
        if nan or (inf and path.split("/")[0] == "params"):
            return path
    return None


@jax.jit
def _flags(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return [(jnp.any(jnp.isnan(x)), jnp.any(jnp.isinf(x))) for x in leaves]
