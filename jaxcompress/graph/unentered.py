"""What passes over contractions cannot enter: they say so, once, by `report`.

Kernels (`pallas_call`), bodies for each device (`shard_map`) and calls of foreign code hold, or may
hold, contractions that `walk` cannot change. A pass that works on contractions leaves them as they
are, so whoever calls it has to know. A pass that runs others says it for all of them, and runs them
`silent`ly.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator

from jaxcompress.core.notices import warn


class Unentered(UserWarning):
    """A network has contractions that a pass did not look into."""


def report(places: Iterable[str]) -> None:
    """Warns of contractions that a pass leaves as they are; does nothing if there are none.

    Args:
      places: `Graph.unentered`, "primitive at 'name stack': leaves" each.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     report(["shard_map at 'block': w"])
    >>> str(caught[0].message)
    "not looked into, left as they are: shard_map at 'block': w"
    """
    places = tuple(dict.fromkeys(places))
    if places:
        warn(f"not looked into, left as they are: {'; '.join(places)}", Unentered)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What runs inside does not say it: who called has said it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unentered)
        yield
