"""The loop around the step: data, log, evaluation, checkpoints, and an exact resume."""

import collections
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jaxcompress.train.log import Metrics, Recorder
from jaxcompress.train.made_by import batch_text, made_by
from jaxcompress.train.train_checkpoint import (
    Checkpoints,
    Saver,
    check_storable,
    non_finite,
    opened,
)
from jaxcompress.train.train_state import TrainState

_AHEAD = 2  # steps in flight: enough to keep the device busy, few batches in its memory


def fit(
    step: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    teacher_params: Any = (),
    log: str | os.PathLike | None = None,
    log_every: int = 1,
    fetch_every: int = 50,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    evaluate_every: int | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> TrainState:
    """Trains up to step `steps`, from the latest checkpoint where there is one.

    Step n takes the batch of n - 1, adds its metrics to the log, evaluates, saves. A run that is
    killed at any moment (SIGKILL, while it saves too) and started again with the same arguments
    ends with the same state and log, bit for bit: batches and keys are functions of the step, a
    checkpoint is complete or absent, and the log is cut to the checkpoint. With several processes
    each calls `fit` alike; the first one writes the log.

    Args:
      step: of `make_step`; it consumes the state. `optax.MultiSteps` accumulates gradients.
      state: of `create`; on a mesh, `place` it there first, and the teacher too.
      batch_at: step (from 0) -> batch, a pure function, such as `batches(...)`.
      steps: to have done at the end, earlier runs included.
      teacher_params: the teacher's, not consumed; () without a teacher.
      log: JSON lines {"step": n, "loss": ...}; rows of an earlier run behind the start are cut.
      log_every: steps between rows.
      fetch_every: steps between transfers of metrics to the host; NaN is found there.
      checkpoints: where and how often to save; a directory that has some of the same run is
        resumed. A checkpoint knows what made it: names and numbers of recipe, optimizer, schedules
        and losses, `batches`' arguments and the bytes of its data, teacher and first params.
      evaluate: state -> scalars, rows of the log with the prefix "eval_".
      evaluate_every: steps between evaluations; None: after the last step alone.
      progress: wraps the iterable of steps; see `progress_bar`.

    Returns:
      The state after `steps`.

    Raises:
      TypeError: a leaf of a dtype that checkpoints cannot store, before the first step.
      FloatingPointError: a metric or, at a checkpoint, the state is not finite; names step and
        metric, or path. Nothing bad is saved: the last good checkpoint stays.
      ValueError: the checkpoint is of another run (recipe, optimizer, schedule, loss, data,
        teacher, start), network or `about`, with what differs, before anything is changed; a count
        is below 1; a metric is no scalar.

    >>> import jax.numpy as jnp, numpy as np, optax, jaxcompress as jc
    >>> tx = optax.sgd(0.1)
    >>> step = jc.train.make_step(jc.train.stateless(lambda p, x: x @ p), tx)
    >>> data = jc.train.batches((np.eye(4, dtype="f4"), np.arange(4) % 2), size=2, seed=0)
    >>> state = jc.train.create(jnp.zeros((4, 2)), jc.identity(), tx)
    >>> int(fit(step, state, data, steps=3).step)
    3
    """
    counts = {"log_every": log_every, "fetch_every": fetch_every, "evaluate_every": evaluate_every}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if checkpoints:
        check_storable(state)  # not only at the first checkpoint
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(opened(checkpoints)) if checkpoints else None
        made: dict[str, str] = {}
        if saver is not None:
            about = saver.settings.about
            made = made_by(step, state, batch_at, teacher_params, about=about)
            if saver.latest is not None:
                state = saver.restore(state, saver.latest, made_by=made, batch_at=batch_at)
        start = int(jax.device_get(state.step))
        path = log if jax.process_index() == 0 else None
        recorder = Recorder(path, step=start, every=log_every)
        in_flight = collections.deque()
        todo = range(start + 1, steps + 1)
        for at in todo if progress is None else progress(todo):
            batch = batch_at(at - 1)
            state, metrics = step(state, teacher_params, batch)
            recorder.add(at, metrics)
            in_flight.append(metrics)
            if len(in_flight) > _AHEAD:
                jax.block_until_ready(in_flight.popleft())
            if evaluate is not None and _due(evaluate_every, at, steps):
                found = evaluate(state)
                recorder.add(at, {f"eval_{k}": v for k, v in found.items()}, always=True)
            save = saver is not None and _due(saver.settings.every, at, steps)
            if save or _due(fetch_every, at, steps):
                _check(recorder, saver, state if save else None, at)
            if saver is not None and save:
                saver.save(at, state, made_by=made, batch=batch_text(batch))
    return state


def _due(every: int | None, at: int, steps: int) -> bool:
    return at == steps or (every is not None and at % every == 0)


def _check(recorder: Recorder, saver: Saver | None, state: Any, at: int) -> None:
    # Before every checkpoint: one that is saved is good, and the log on the disk reaches as far.
    try:
        recorder.flush()
        bad = non_finite(state)
        if bad is not None:
            raise FloatingPointError(f"step {at}: {bad} of the state is not finite")
    except FloatingPointError as error:
        kept = "no checkpoint is kept"
        if saver is not None and saver.latest is not None:
            kept = f"the last good checkpoint is step {saver.latest} in {saver.directory}"
        raise FloatingPointError(f"{error}; {kept}") from None


def progress_bar(description: str = "training") -> Callable[[Iterable[int]], Iterator[int]]:
    """A bar on standard error for `fit(progress=...)`, gone when it is done.

    Raises:
      ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError as error:
        raise ImportError(
            'a progress bar needs rich: pip install "jaxcompress[experiments]"'
        ) from error

    def bar(steps: Iterable[int]) -> Iterator[int]:
        yield from track(steps, description, console=Console(stderr=True), transient=True)

    return bar
