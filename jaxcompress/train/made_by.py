"""What makes a run: its step, teacher, data and start, as rows that a checkpoint keeps."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress.core.notices import warn
from jaxcompress.graph.fingerprint import Unidentified, of_arrays, of_function
from jaxcompress.graph.identity import describe, differences
from jaxcompress.train.data import Batches

_SHOWN = 3  # differences named in an error


def made_by(
    step: Callable[..., Any],
    state: Any,
    batch_at: Callable[[int], Any],
    teacher_params: Any,
    *,
    about: Mapping[str, Any],
) -> dict[str, str]:
    """{place: name, number or hash} of all that decides what a run of `fit` makes.

    Of the step (recipe, optimizer, schedules, losses) names and numbers of its closures; where one
    has no contents to look at, the fingerprint of the whole program. Of `batches(...)` its
    arguments, of any data the first batch. Of teacher and start the hash of all bytes; a state that
    is past step 0 is a start of its own and not compared.

    Warns where a part cannot be identified and `about` is empty: such a run is not resumed.
    """
    rows, first = {}, batch_at(0)
    found = describe(step)
    unknown = list(found.unidentified)
    rows |= {f"step.{place}".rstrip("."): text for place, text in found.rows.items()}
    if unknown:
        try:
            rows["step's program"] = of_function(step, state, teacher_params, first)
            unknown = []
        except Unidentified:
            pass
    if isinstance(batch_at, Batches):
        data = describe(batch_at)
        unknown += data.unidentified
        rows |= {f"data.{place}": text for place, text in data.rows.items()}
    rows["data's first batch"] = batch_text(first)
    rows["teacher_params"] = of_arrays(teacher_params)
    if int(jax.device_get(state.step)) == 0:
        rows["start.params"] = of_arrays((state.params, state.model_state))
    if unknown and not about:
        rows["unidentified"] = unknown[0]
        warn(
            f"checkpoints of this run will not be resumed: {unknown[0]} cannot be identified; say "
            "what it is in Checkpoints(about=...)"
        )
    return rows


def batch_text(batch: Any) -> str:
    """The hash of a batch."""
    found = describe(batch)
    return hashlib.sha256(repr(sorted(found.rows.items())).encode()).hexdigest()


def check_made_by(where: str, there: Mapping[str, str] | None, here: Mapping[str, str]) -> None:
    """Refuses the checkpoint of another run.

    Raises:
      ValueError: what differs, numbers first; or one of the runs cannot be identified.
    """
    advice = (
        "use another directory; or take its state with `train.restore` and train on from that, "
        "with a directory of its own"
    )
    if there is None:
        raise ValueError(f"{where} does not say what made it, as those of old versions; {advice}")
    for rows in (there, here):
        if "unidentified" in rows:
            raise ValueError(
                f"{where}: {rows['unidentified']} cannot be identified, so whether it is of this "
                f"run is not known: say what it is in Checkpoints(about=...), or {advice}"
            )
    # A start past step 0 has no row, nor have data of another kind (a function around `batches`):
    # then their batches alone are compared.
    for kind in ("start.", "data."):
        if not all(any(place.startswith(kind) for place in rows) for rows in (there, here)):
            there, here = (
                {place: text for place, text in rows.items() if not place.startswith(kind)}
                for rows in (there, here)
            )
    found = differences(there, here)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"{where} is of another run: {'; '.join(found[:_SHOWN])}{more}. Nothing was changed; "
            f"{advice}"
        )
