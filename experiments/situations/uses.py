"""Uses of a leaf: what every calibrated method leaves of the error over all contractions with it.

A weight [24, 8] is used in one place, in several, or across itself; one use has inputs five times
as large as another. The reference is the squared error of all outputs, in NumPy float64, beside
that of rounding to nearest (for SparseGPT: of its mask alone; for Wanda: of the largest |w| of each
output). A method either is not worse, or it says which leaf it leaves alone.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.situations import Cell, Table
from jaxcompress.formats import integer
from jaxcompress.prune.from_calibration.sparsegpt import sparse_gpt
from jaxcompress.prune.from_calibration.wanda_masks import wanda
from jaxcompress.quantize import Spec, ptq

K, N, ROWS = 24, 8, 64
SPEC = {"w": Spec(integer(4))}


def _scan(w, a, b):
    return jax.lax.scan(lambda _, x: (0, x @ w), 0, jnp.stack([a, b]))[1]


SITUATIONS = {
    "one site": lambda w, a, b: a @ w,
    "two sites": lambda w, a, b: (a @ w, b @ w),
    "three sites": lambda w, a, b: (a @ w, b @ w, (a - b) @ w),
    "scan": _scan,
    "slices": lambda w, a, b: (a @ w, b[:, :9] @ w[:9], a[:, 9:] @ w[9:]),
    "outputs of a slice": lambda w, a, b: (a @ w, b @ w[:, :3]),
    "tied transpose": lambda w, a, b: (a @ w, b[:, :N] @ w.T),
    "lookup": lambda w, a, b: (a @ w, 5 * w[jnp.arange(12)]),
}
QUANTIZERS = {
    "gptq": ptq.gptq,
    "gptq, act_order": lambda *a: ptq.gptq(*a, act_order=True),
    "gptq, current groups": lambda *a: ptq.gptq(*a, groups="current"),
    "gptq, sweeps=2": lambda *a: ptq.gptq(*a, sweeps=2),
    "gptq, quantized inputs": lambda *a: ptq.gptq(*a, inputs="quantized"),
    "adaround": lambda *a: ptq.adaround(*a, steps=200),
    "awq": ptq.awq,
    "reconstruct": lambda *a: ptq.reconstruct(*a, epochs=20, learning_rate=3e-3),
    "correct_bias": ptq.correct_bias,
}
PRUNERS = {"sparse_gpt": sparse_gpt, "wanda": wanda}


def table(seed: int, progress: Callable) -> Table:
    """Methods x uses: total squared error over that of the reference, or "left" with a warning."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    params = {"w": draw(K, N), "s": jnp.exp(draw(K)), "b": jnp.zeros(N)}
    mixed = lambda: draw(ROWS, K) @ draw(K, K) * 0.3 + draw(1, K)
    a, b = mixed(), 5 * mixed()
    cells = {}
    for name in progress([*QUANTIZERS, *PRUNERS]):
        row = [_cell(name, use, params, a, b) for use in SITUATIONS.values()]
        cells[name] = tuple(row)
    promise = (
        "the total squared error over all uses is at most the reference's, or the leaf is named"
    )
    return Table(promise, tuple(SITUATIONS), cells)


def _network(name: str, use: Callable) -> Callable:
    # Inputs that AWQ can scale; a bias behind the first outputs for the correction.
    def fn(p, a, b):
        if name == "awq":
            a, b = a * p["s"][None], b * p["s"][None]
        out = use(p["w"], a, b)
        if name != "correct_bias":
            return out
        return jax.tree.map(lambda y: y + p["b"] if y.shape[-1] == N and y.ndim < 3 else y, out)

    return fn


def _cell(name: str, use: Callable, params: Any, a: jax.Array, b: jax.Array) -> Cell:
    fn = _network(name, use)
    rules = 0.5 if name in PRUNERS else SPEC
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            new, state = (QUANTIZERS | PRUNERS)[name](fn, params, [(a, b)], rules)
        except ValueError as error:
            return Cell(f"refused: {error}"[:40], True)
    named = any("w" in str(warning.message) for warning in said)
    view = new if name in PRUNERS else ptq.recipe(SPEC).apply(new, state)
    if name in PRUNERS and bool(jnp.all(view["w"] == params["w"])):
        return Cell("left dense, named", named)
    plain = _reference(name, params, view)
    mine, theirs = (_error(fn, params, p, a, b) for p in (view, plain))
    text = f"{mine / theirs:.3f}"
    left = " named" if said and name != "awq" else ""
    return Cell(text + left, mine <= theirs * (1 + 1e-5))


def _reference(name: str, params: Any, view: Any) -> Any:
    if name == "sparse_gpt":
        return params | {"w": jnp.where(view["w"] != 0, params["w"], 0)}
    if name == "wanda":
        order = jnp.argsort(jnp.argsort(jnp.abs(params["w"]), axis=0), axis=0)
        return params | {"w": jnp.where(order >= K // 2, params["w"], 0)}
    comp = ptq.recipe(SPEC)
    return comp.apply(params, comp.init(params))


def _error(fn: Callable, params: Any, other: Any, a: jax.Array, b: jax.Array) -> float:
    """Squared error of all outputs, float64: the functions are linear in what changes."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.float64(x)), tree)
        run = lambda p: jax.tree.leaves(fn(wide(p), *wide((a, b))))
        pairs = zip(run(other), run(params), strict=True)
        return float(sum(np.sum((np.asarray(x) - np.asarray(y)) ** 2) for x, y in pairs))
