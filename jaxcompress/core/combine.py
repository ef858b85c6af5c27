"""Combinators: one Compressor after another, and different ones for different leaves."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    absent_if_empty,
    identity,
    is_absent,
    is_float_array,
    quartet,
)
from jaxcompress.core.notices import warn
from jaxcompress.core.packed import (
    Masked,
    QTensor,
    dense,
    is_packed,
    kept,
    mask_leaf,
    packed_bytes,
    quantize,
    unpack,
)
from jaxcompress.core.paths import leaves_with_paths, match_rules, refuse_twins
from jaxcompress.core.sparse import Bitmask


def chain(*compressors: Compressor) -> Compressor:
    """Applies compressors one after another: each sees the view of those before it.

    A mask and a quantizer pack into one leaf, in either order: the codes of the kept elements.

    >>> chain(identity(), identity()).init({"w": 1.0})
    CompressState(learned=(), buffers=(), maker=())
    """

    for index, compressor in enumerate(compressors):
        _need_compressor(f"chain: argument {index + 1}", compressor)

    def states(state):
        count = len(compressors)
        learned = [()] * count if is_absent(state.learned) else state.learned
        buffers = [()] * count if is_absent(state.buffers) else state.buffers
        makers = [()] * count if is_absent(state.maker) else state.maker
        return [CompressState(*parts) for parts in zip(learned, buffers, makers, strict=True)]

    def join(parts):
        return CompressState(
            absent_if_empty(tuple(p.learned for p in parts)),
            absent_if_empty(tuple(p.buffers for p in parts)),
            absent_if_empty(tuple(p.maker for p in parts)),
        )

    def init(params):
        parts = []
        for compressor in compressors:
            parts.append(compressor.init(params))
            params = compressor.apply(params, parts[-1])
        return join(parts)

    def apply(params, state):
        for compressor, part in zip(compressors, states(state), strict=True):
            params = compressor.apply(params, part)
        return params

    def update(params, state, *, grads=None, **extra):
        parts = []
        for compressor, part in zip(compressors, states(state), strict=True):
            parts.append(compressor.update(params, part, grads=grads, **extra))
            params = compressor.apply(params, parts[-1])
        return join(parts)

    def pack(params, state):
        packed = params
        for compressor, part in zip(compressors, states(state), strict=True):
            view, new = compressor.apply(params, part), compressor.pack(params, part)
            packed = jax.tree.map(_merge, params, view, packed, new)
            params = view
        return packed

    return quartet(init, apply, update, pack)


def _need_compressor(what: str, compressor: Any) -> None:
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"{what} must be a Compressor such as quantize.weights(format), "
            f"got {type(compressor).__name__}"
        )


def _merge(before: Any, view: Any, packed: Any, new: Any) -> Any:
    # One compressor turned `before` into `view`; `packed` stores before, `new` stores view.
    # Gives the smallest storage of view that the two know: new's or else packed's codes, masked
    # if either is.
    if new is before:
        return packed
    if not is_packed(packed):
        return new
    values, codes = dense(new), dense(packed)
    if isinstance(codes, QTensor) and not isinstance(values, QTensor):
        # A mask on quantized values leaves them on the grid; anything else may not.
        if isinstance(view, Tracer):
            raise TypeError(
                "pack of a quantizer before another compressor compares values; "
                "call it outside jit and eval_shape"
            )
        again = quantize(view, codes.qparams, format=codes.format, granularity=codes.granularity)
        values = again if bool(jnp.all(unpack(again) == view)) else view
    if isinstance(packed, Masked) or isinstance(new, Masked):
        return _smallest_masked(view, values, packed, new)
    return values


def _smallest_masked(view: Any, values: Any, *leaves: Any) -> Any:
    # Zeros of the view need not be stored; but a mask with structure, N:M say, that keeps some of
    # them may be smaller as it is. One that is stored as a bitmask is not.
    nonzero = (view != 0) | jnp.signbit(view)
    smallest = mask_leaf(nonzero, values)
    for leaf in leaves:
        if isinstance(leaf, Masked) and not isinstance(leaf.positions, Bitmask):
            mask = kept(leaf)
            if not bool(jnp.any(nonzero & ~mask)):
                smallest = min(smallest, mask_leaf(mask, values), key=packed_bytes)
    return smallest


def partition(
    labels: Any, compressors: Mapping[str, Compressor] | Callable[[str], Compressor]
) -> Compressor:
    """Different compressors for different leaves.

    Args:
      labels: a tree of strings with the params' structure, or a function params -> such a tree.
      compressors: label -> Compressor. Each one sees its leaves as one dict {path: leaf}, so that
        a global criterion ranges over all of them, and rules inside see the same paths.

    Raises:
      ValueError: (at init) a label without a compressor.
    """

    if isinstance(compressors, Mapping):
        for label, compressor in compressors.items():
            _need_compressor(f"the compressor of {label!r}", compressor)

    def groups(params):
        tree = labels(params) if callable(labels) else labels
        try:
            named = jax.tree.structure(params).flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(f"labels do not have the params' structure: {error}") from error
        members: dict[str, list[int]] = {}
        for index, label in enumerate(named):
            members.setdefault(label, []).append(index)
        return members

    def pick(label, paths):
        try:
            return compressors(label) if callable(compressors) else compressors[label]
        except KeyError:
            known = list(compressors) if isinstance(compressors, Mapping) else []
            raise ValueError(
                f"label {label!r} of {paths[0]!r} has no compressor; {known=}"
            ) from None

    def each(params):
        flat = leaves_with_paths(params)
        for label, indices in groups(params).items():
            refuse_twins("params", [flat[i][0] for i in indices])
            part = {flat[i][0]: flat[i][1] for i in indices}
            yield label, indices, part, pick(label, list(part))

    def sub(state, label):
        return CompressState(*(() if is_absent(part) else part[label] for part in state))

    def join(parts):
        return CompressState(
            absent_if_empty({label: s.learned for label, s in parts.items()}),
            absent_if_empty({label: s.buffers for label, s in parts.items()}),
            absent_if_empty({label: s.maker for label, s in parts.items()}),
        )

    def rebuild(params, run):
        leaves, treedef = jax.tree.flatten(params)
        for label, indices, part, compressor in each(params):
            result = run(compressor, part, label)
            for index, path in zip(indices, part, strict=True):
                leaves[index] = result[path]
        return treedef.unflatten(leaves)

    def init(params):
        return join({label: c.init(part) for label, _, part, c in each(params)})

    def apply(params, state):
        return rebuild(params, lambda c, part, label: c.apply(part, sub(state, label)))

    def update(params, state, *, grads=None, **extra):
        gradients = None if grads is None else jax.tree.structure(params).flatten_up_to(grads)
        parts = {}
        for label, indices, part, compressor in each(params):
            own = gradients and {p: gradients[i] for p, i in zip(part, indices, strict=True)}
            parts[label] = compressor.update(part, sub(state, label), grads=own, **extra)
        return join(parts)

    def pack(params, state):
        return rebuild(params, lambda c, part, label: c.pack(part, sub(state, label)))

    return quartet(init, apply, update, pack)


_REST = "(no rule)"


def by_path(rules: Mapping[str, Compressor], *, default: Compressor | None = None) -> Compressor:
    """Compressors by regular expressions on the whole path `a/b/kernel`; first match wins.

    Args:
      rules: regex -> Compressor.
      default: for leaves that no rule matches. None leaves them as they are, and `init` warns
        with the list of weights (floating point, two axes or more) that no rule covers;
        pass `identity()` to say that this is meant.

    Raises:
      ValueError: (at init) a rule is the first match of no leaf; the nearest paths are named.

    >>> from jaxcompress.core.compressor import identity
    >>> by_path({"conv.*": identity()}).init({"Conv_0": {"kernel": 1.0}})
    Traceback (most recent call last):
    ValueError: rule 'conv.*' matches no parameter; nearest: 'Conv_0/kernel' (rules are regular \
expressions that match the whole path)
    """
    compressors = {**rules, _REST: default or identity()}

    def labels(params):
        flat = leaves_with_paths(params)
        matched = match_rules(rules, [path for path, _ in flat])
        named = [_REST if matched[path] is None else matched[path] for path, _ in flat]
        return jax.tree.structure(params).unflatten(named)

    inner = partition(labels, compressors)

    def init(params):
        uncovered = uncovered_weights(rules, params)
        if default is None and uncovered:
            warn(
                f"no rule covers these weights, they stay as they are: {', '.join(uncovered)} "
                "(pass default=identity() if that is meant)"
            )
        return inner.init(params)

    return inner._replace(init=init)


def uncovered_weights(rules: Mapping[str, Any], params: Any) -> list[str]:
    """Paths of the floating point leaves with two axes or more that no rule matches."""
    flat = leaves_with_paths(params)
    matched = match_rules(rules, [path for path, _ in flat])
    return [
        path
        for path, leaf in flat
        if matched[path] is None and is_float_array(leaf) and len(leaf.shape) >= 2
    ]
