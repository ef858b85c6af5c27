"""Feature taps: what modules of a Flax network return, by a regular expression on their paths.

Losses on features need tensors from inside two networks. `linen_features` and `nnx_features` hand
them out beside the outputs, without a change to the network, and cost nothing that is not asked
for: the function without taps is the one given, and a feature that nobody uses is no part of the
compiled program.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
from flax import nnx
from flax.core import tracers

from jaxcompress.core.paths import match_rules

Features = dict[str, Any]


class _Record:
    """Outputs of the matched modules, in the order of their calls."""

    def __init__(self, pattern: str):
        try:
            self.regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        self.pattern = pattern
        self.trace = tracers.current_trace()
        self.seen: dict[str, None] = {}
        self.calls: dict[str, list[Any]] = {}

    def note(self, path: str, call: Callable[[], Any]) -> Any:
        """Runs a call of the module at `path` and keeps what it returns, if the path matches."""
        self.seen[path] = None
        # Inside a lifted transformation (scan, remat, jit) the values cannot leave it.
        reachable = tracers.current_trace() == self.trace
        wanted = self.regex.fullmatch(path) is not None
        calls = self.calls.setdefault(path, []) if wanted else []
        if not (wanted and reachable):
            return call()
        place = len(calls)
        calls.append(None)
        calls[place] = call()
        return calls[place]

    def features(self) -> Features:
        """By path; the second call of a module is `path#1`, and so on."""
        match_rules({self.pattern: None}, self.seen, what="module")
        inside = [path for path, calls in self.calls.items() if not calls]
        if inside:
            raise ValueError(
                f"pattern {self.pattern!r}: module {inside[0]!r} runs inside a scan, remat or jit "
                "of the network, its outputs cannot be taken from there; tap a module around it"
            )
        return {
            f"{path}#{number}" if number else path: value
            for path, calls in self.calls.items()
            for number, value in enumerate(calls)
        }


def linen_features(fn: Callable[..., Any], pattern: str) -> Callable[..., tuple[Any, Features]]:
    """`fn(*args)` with the outputs of the Linen modules it calls: (fn(*args), features).

    pattern: a regular expression that matches whole module paths, `layer2_0/conv1` say; "" is the
    outermost module. features: a dict from the path to what the module's `__call__` returns; the
    second call of the same module is under `path#1`, and so on. Works under jit, grad, vmap and
    with any collections of variables.

    Raises:
      ValueError: not a regular expression; (when called) no module matches, the nearest paths are
        named; a matching module runs only inside a lifted transformation.

    >>> import jax, jax.numpy as jnp
    >>> mlp = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
    >>> params = mlp.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> tapped = linen_features(mlp.apply, "layers_0")
    >>> outputs, features = tapped(params, jnp.ones((5, 3)))
    >>> outputs.shape, jax.tree.map(jnp.shape, features)
    ((5, 2), {'layers_0': (5, 4)})
    """
    _Record(pattern)  # an early error

    @functools.wraps(fn)
    def tapped(*args: Any, **kwargs: Any) -> tuple[Any, Features]:
        record = _Record(pattern)

        def intercept(next_fn, args, kwargs, context):
            call = lambda: next_fn(*args, **kwargs)
            if context.method_name != "__call__":
                return call()
            return record.note("/".join(context.module.path), call)

        with nn.intercept_methods(intercept):
            outputs = fn(*args, **kwargs)
        return outputs, record.features()

    return tapped


def nnx_features(fn: Callable[..., Any], pattern: str) -> Callable[..., tuple[Any, Features]]:
    """`fn(model, *args)` with the outputs of modules of an NNX model: (fn(...), features).

    As `linen_features`; paths are those of the attributes, `layers/0/conv` say. In a pure function
    of the parameters the model is merged inside:

    >>> import jax, jax.numpy as jnp
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
    >>> tapped = nnx_features(lambda model, x: model(x), "layers/0")
    >>> graphdef, params = nnx.split(model)
    >>> forward = lambda params, x: tapped(nnx.merge(graphdef, params), x)
    >>> _, features = forward(params, jnp.ones((5, 3)))
    >>> jax.tree.map(jnp.shape, features)
    {'layers/0': (5, 4)}
    """
    _Record(pattern)

    @functools.wraps(fn)
    def tapped(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Any, Features]:
        record = _Record(pattern)
        with contextlib.ExitStack() as stack:
            for path, module in nnx.iter_modules(model):
                stack.enter_context(_noted(module, "/".join(map(str, path)), record))
            outputs = fn(model, *args, **kwargs)
        return outputs, record.features()

    return tapped


@contextlib.contextmanager
def _noted(module: nnx.Module, path: str, record: _Record) -> Iterator[None]:
    # Python looks `__call__` up on the class: the module is of a subclass of its own meanwhile.
    cls = type(module)
    if "__call__" not in dir(cls):
        yield
        return

    def call(self, *args, **kwargs):
        return record.note(path, lambda: cls.__call__(self, *args, **kwargs))

    tapped = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
    object.__setattr__(module, "__class__", tapped)  # past NNX's own record of attributes
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", cls)
