"""Counts as others print them, with the tolerance that the printed digits imply."""

import re
from typing import NamedTuple


class Figure(NamedTuple):
    """A count as printed somewhere: its value, and what one step of its last digit is worth.

    >>> printed("4.089 G")
    Figure(value=4089000000, step=1000000)
    >>> printed("4.089 G").equals(4_089_184_256), printed("4.089 G").equals(4_089_600_000)
    (True, False)
    """

    value: int
    step: int

    def equals(self, count: int) -> bool:
        """Whether `count` rounds to the printed digits: it is within half a step."""
        return 2 * abs(count - self.value) <= self.step


def printed(text: str) -> Figure:
    """Reads a count such as '25,557,032', '5.7 M' or '4.089 G'.

    Raises:
      ValueError: `text` is none.
    """
    match = re.fullmatch(r"(\d[\d,]*)(?:\.(\d+))?( [MG])?", text)
    if match is None:
        raise ValueError(f"a count must look like '25,557,032', '5.7 M' or '4.089 G', got {text!r}")
    digits, decimals, unit = match[1].replace(",", ""), match[2] or "", match[3]
    exponent = {None: 0, " M": 6, " G": 9}[unit] - len(decimals)
    if exponent < 0:
        raise ValueError(f"a count must be an integer, got {text!r}")
    return Figure(int(digits + decimals) * 10**exponent, 10**exponent)
