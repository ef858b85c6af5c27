"""Batches and random keys as functions of (seed, step): nothing to store, nothing to skip."""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxcompress.core.paths import leaves_with_paths


def key_at(root: jax.Array, stream: str, step: Any) -> jax.Array:
    """The key of a named stream of random numbers at a step: fold_in(fold_in(root, stream), step).

    Streams of other names and steps are independent; no key is ever stored, so a run that starts
    again at a step draws what the undisturbed run drew there. The step may be traced.

    >>> root = jax.random.key(0)
    >>> bool(key_at(root, "dropout", 3) == key_at(root, "augment", 3))
    False
    """
    # The name as a number that is the same in every process: Python's hash is not.
    number = np.uint32(zlib.crc32(stream.encode()))
    return jax.random.fold_in(jax.random.fold_in(root, number), step)


def place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Arrays that every process holds whole, laid out as `sharding` says.

    With several processes (`jax.distributed`) each one passes the same values and keeps its part.
    `NamedSharding(mesh, PartitionSpec())` copies a state or a teacher to all devices of a mesh.
    Transfers are explicit: they pass under `jax.transfer_guard("disallow")`.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    >>> place({"w": np.ones(2)}, everywhere)["w"].is_fully_replicated
    True
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree)


@dataclass(frozen=True)
class Batches:
    """What `batches` builds: call it with a step.

    Attributes:
      steps_per_epoch: batches in one pass over the data.
    """

    steps_per_epoch: int
    _at: Callable[[int], Any]

    def __call__(self, step: int) -> Any:
        """The batch of a step, on the device."""
        return self._at(step)


def batches(
    data: Any,
    *,
    size: int,
    seed: int,
    augment: Callable[[jax.Array, Any], Any] | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Batches:
    """Shuffled batches of arrays in memory; a batch depends on `seed` and the step alone.

    Every epoch goes through all examples in an order of its own and leaves out the rest that does
    not fill a batch; the order is drawn from (seed, epoch), so that any step is reached at once.

    Args:
      data: pytree of arrays with the examples along axis 0, usually (inputs, labels).
      size: examples in a batch, over all devices and processes.
      seed: of the orders, and of the keys of `augment`.
      augment: (key, batch) -> batch, jitted; see `jaxcompress.train.augment`. Teacher and student
        both get what it returns.
      sharding: of each array of a batch, such as NamedSharding(mesh, PartitionSpec("data")); None:
        the default device.

    Raises:
      ValueError: arrays of different lengths, fewer examples than a batch holds, a size that does
        not divide over the devices.

    >>> at = batches(np.arange(5), size=2, seed=0)
    >>> at.steps_per_epoch, bool((at(7) == at(7)).all())
    (2, True)
    >>> sorted(np.concatenate([at(0), at(1)]).tolist())
    [0, 2, 3, 4]
    """
    data = jax.tree.map(np.asarray, data)
    n = _check(data, size, sharding)
    per_epoch = n // size

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(n)

    @jax.jit
    def augmented(step, batch):
        assert augment is not None
        return augment(key_at(jax.random.key(seed), "augment", step), batch)

    def at(step: int) -> Any:
        epoch, index = divmod(int(step), per_epoch)
        rows = order(epoch)[index * size : (index + 1) * size]
        batch = jax.tree.map(lambda a: a[rows], data)
        batch = jax.device_put(batch) if sharding is None else place(batch, sharding)
        if augment is None:
            return batch
        number = np.uint32(step)
        everywhere = _everywhere(sharding)
        number = jax.device_put(number) if everywhere is None else place(number, everywhere)
        return augmented(number, batch)

    return Batches(per_epoch, at)


def _everywhere(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def _check(data: Any, size: int, sharding: jax.sharding.Sharding | None) -> int:
    found = leaves_with_paths(data)
    if not found:
        raise ValueError("data holds no arrays")
    for path, leaf in found:
        if leaf.ndim == 0:
            raise ValueError(f"data: {path or 'the array'} is a scalar; axis 0 must be examples")
    (first, leaf), n = found[0], len(found[0][1])
    for path, other in found:
        if len(other) != n:
            raise ValueError(
                f"data: {first} has {len(leaf)} examples, {path} has {len(other)}; "
                "all arrays must have the same"
            )
    if not 1 <= size <= n:
        raise ValueError(f"size must be 1 to {n}, the number of examples, got {size}")
    if sharding is not None:
        for path, leaf in found:
            try:
                sharding.shard_shape((size, *leaf.shape[1:]))
            except ValueError as error:
                raise ValueError(
                    f"size={size} does not divide over the devices of data: {path}: {error}"
                ) from error
    return n
