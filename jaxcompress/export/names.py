"""Names of what an exported program takes and gives."""

from collections.abc import Sequence


def port_names(argument: str, given: Sequence[str] | None, letter: str, count: int) -> list[str]:
    """The caller's names, or `x` for one array and `x0`, `x1`, ... for several.

    Raises:
      ValueError: another number of names, or one twice; `argument` says which they are.

    >>> port_names("names", None, "x", 2), port_names("names", ["image"], "x", 1)
    (['x0', 'x1'], ['image'])
    """
    if given is None:
        return [letter] if count == 1 else [f"{letter}{i}" for i in range(count)]
    names = [given] if isinstance(given, str) else list(given)
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"{argument}: needs {count} different names, got {names}")
    return names
