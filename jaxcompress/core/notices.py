"""Warnings that point at the code that called the package, however deep inside they arise."""

import contextlib
import functools
import os
import sys
import warnings

import jax

# Whose calls are passed over: this package, and what calls it back on its behalf.
_INSIDE = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (os.path.dirname(os.path.abspath(__file__)), jax.__file__)
)
_WRAPPERS = frozenset(module.__file__ for module in (contextlib, functools))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that is neither of this package nor of JAX.

    A number of frames, as `warnings.warn` takes it, is wrong as soon as a decorator or a function
    comes between; Python 3.12 has `skip_file_prefixes` for that.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn("nothing to fold")
    >>> str(caught[0].message), os.path.basename(caught[0].filename)[:8]
    ('nothing to fold', '<doctest')
    """
    frame, level = sys._getframe(1), 2  # 1 is this line
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_inside(filename: str) -> bool:
    return filename in _WRAPPERS or os.path.abspath(filename).startswith(_INSIDE)
