"""What exported programs have in common: lowering, and names of what they take and give."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


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


def lowered(
    exporter: str, fn: Callable[..., Any], inputs: Sequence[Any], *, platforms: Sequence[str]
) -> Any:
    """`fn` as a `jax.export.Exported`, inputs that it does not use among its arguments.

    Raises:
      ValueError: callbacks, or an operation that needs the size of a free axis; with the exporter.
    """
    # A function of its own: JAX would find an older trace, with other constants, by `fn`.
    jitted = jax.jit(lambda *inputs: fn(*inputs), keep_unused=True)
    try:
        return jax.export.export(jitted, platforms=platforms)(*inputs)
    except (NotImplementedError, jax.errors.InconclusiveDimensionOperation) as error:
        raise ValueError(f"{exporter}: JAX cannot export the program: {error}") from error
