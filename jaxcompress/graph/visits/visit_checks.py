"""What `walk` demands of its states and of its visitor."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.paths import leaves_with_paths, near_misses
from jaxcompress.graph.sites import Tap
from jaxcompress.graph.tracing import Program


def check_states(states: Mapping[str, Any], program: Program) -> None:
    """Raises ValueError unless every state belongs to a tap and has the axes of its scans."""
    taps = {tap.name: tap for tap in program.graph.taps}
    for name, state in states.items():
        if name in taps:
            _check_loops(taps[name], state)
            continue
        if name in program.unreachable:
            raise ValueError(
                f"states: {name!r} cannot be visited, it is inside {program.unreachable[name]}, "
                "which walk does not enter"
            )
        nearest = ", ".join(map(repr, near_misses(str(name), taps) or list(taps)[:3]))
        beyond = program.graph.unentered
        raise ValueError(
            f"states: {name!r} is no tap of the function; nearest: {nearest or 'there are none'}"
            + (f"; contractions that walk cannot reach: {'; '.join(beyond)}" if beyond else "")
        )


def _check_loops(tap: Tap, state: Any) -> None:
    loops = tap.site.loops
    for path, leaf in leaves_with_paths(state):
        if jnp.shape(leaf)[: len(loops)] != loops:
            raise ValueError(
                f"states: {_where(tap, path)} must have the leading axes {loops}, one for each "
                f"scan around it, got the shape {jnp.shape(leaf)}"
            )


def _where(tap: Tap, path: str) -> str:
    return f"{tap.name!r}" + (f", leaf {path!r}," if path else "")


def check_answer(tap: Tap, x: Any, state: Any, *, answer: Any) -> None:
    """Raises ValueError unless a visitor's answer is a pair with the avals of `x` and `state`."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(
            f"visit must return (x, state) at {tap.name!r}, got {type(answer).__name__}"
        )
    new_x, new_state = answer
    if _aval(x) != _aval(new_x):
        raise ValueError(
            f"visit changed the activation at {tap.name!r} from {_aval(x)} to {_aval(new_x)}; it "
            "must keep shape and dtype"
        )
    old_tree, new_tree = jax.tree.structure(state), jax.tree.structure(new_state)
    if old_tree != new_tree:
        raise ValueError(
            f"visit changed the structure of the state of {tap.name!r} from {old_tree} to "
            f"{new_tree}"
        )
    pairs = zip(leaves_with_paths(state), jax.tree.leaves(new_state), strict=True)
    for (path, old), new in pairs:
        if _aval(old) != _aval(new):
            raise ValueError(
                f"visit changed the state of {_where(tap, path)} from {_aval(old)} to "
                f"{_aval(new)}; it must keep shape and dtype"
            )


def _aval(x: Any) -> str:
    return f"{jnp.result_type(x).name}{list(jnp.shape(x))}"
