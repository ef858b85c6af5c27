"""Tables of every method in every situation of a kind of fault, a module for each kind.

A module has `table(seed, progress)`, which returns a `Table`: numbers computed by the method beside
those that an independent reference gives, and whether the promise of the kind holds.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One method in one situation.

    Attributes:
      text: what the table shows: a number with its unit, or what the method says that it left.
      holds: whether the promise of the kind holds here.
    """

    text: str
    holds: bool


class Table(NamedTuple):
    """Methods x situations.

    Attributes:
      promise: what every cell must show, in one sentence.
      situations: the columns, in order.
      cells: method -> its cells, one for each situation.
    """

    promise: str
    situations: tuple[str, ...]
    cells: dict[str, tuple[Cell, ...]]
