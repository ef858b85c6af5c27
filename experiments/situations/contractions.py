"""Passes that go by contractions x kinds of contractions: right, or named.

Each network multiplies [rows, 12] by "in", one of the kinds, then "up" and "down" densely. Beside
the error that a method leaves stands that of a NumPy float64 reference, or "named": the pass warned
or raised with the leaf, and left the contraction as it was. Integers are the operand of "mask".
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from experiments.situations import Cell, Table
from jaxcompress.core import leaves_with_paths
from jaxcompress.formats import integer
from jaxcompress.quantize import Spec

ROWS, INPUTS, WIDTH, EXPERTS = 48, 12, 16, 3
SIZES = (17, 5, 26)  # rows of each expert
FOUR, EIGHT = integer(4), integer(8)


def _dot(x, w):
    return x @ w


def _ragged(x, w):
    return lax.ragged_dot(x, w, jnp.array(SIZES))


def _pallas(x, w):
    body = lambda x, w, o: o.__setitem__(..., x[...] @ w[...])
    shape = jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True)(x, w)


def _sharded(x, w):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P(), P()), out_specs=P())(x, w)


def _foreign(x, w):
    shape = jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
    return jax.pure_callback(lambda x, w: np.asarray(x) @ np.asarray(w), shape, x, w)


def _integers(x, w):
    mask = (x > 0).astype(jnp.int32)
    product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    return product(mask, w, (((1,), (0,)), ((), ())))


KINDS: dict[str, Callable[..., Any]] = {
    "dot": _dot,
    "ragged_dot": _ragged,
    "pallas_call": _pallas,
    "shard_map": _sharded,
    "pure_callback": _foreign,
    "integer operand": _integers,
}
SHUT = ("pallas_call", "shard_map", "pure_callback")


class Case:
    """One network, its data, and float64 copies of both."""

    def __init__(self, kind: str, seed: int):
        keys = jax.random.split(jax.random.key(seed), 4)
        lead = (EXPERTS,) if kind == "ragged_dot" else ()
        self.kind, self.x = kind, jax.random.normal(keys[0], (ROWS, INPUTS))
        self.params = {
            "in": jax.random.normal(keys[1], (*lead, INPUTS, WIDTH)) / 3,
            "up": jax.random.normal(keys[2], (WIDTH, WIDTH)) / 4,
            "down": jax.random.normal(keys[3], (WIDTH, 4)) / 4,
        }
        product = KINDS[kind]
        self.fn = lambda p, x: jax.nn.relu(product(x, p["in"]) @ p["up"]) @ p["down"]
        experts = (0, 2) if lead else -1
        self.spec = {"in": Spec(FOUR, axis=experts), "up|down": Spec(FOUR)}
        rows = np.asarray(self.x, np.float64)
        self.rows = (rows > 0).astype(np.float64) if kind == "integer operand" else rows

    def first(self, w: Any, rows: Any = None) -> np.ndarray:
        """The first product in float64."""
        w, rows = np.asarray(w, np.float64), self.rows if rows is None else rows
        if w.ndim == 2:
            return rows @ w
        parts = np.split(rows, np.cumsum(SIZES)[:-1])
        return np.concatenate([part @ one for part, one in zip(parts, w, strict=True)])

    def error(self, w: Any) -> float:
        """Squared error of the first product with these weights."""
        return float(np.sum((self.first(w) - self.first(self.params["in"])) ** 2))

    def nearest(self) -> np.ndarray:
        """The first weights on the symmetric 4-bit grid of each output, float64."""
        w = np.asarray(self.params["in"], np.float64)
        step = np.abs(w).max(axis=-2, keepdims=True) / 7
        return np.round(w / step) * step


def _grids(case: Case) -> Cell:
    # the grid of the first activations: largest magnitude over 127
    made = jc.quantize.activations(case.fn, EIGHT)
    grids = made.grids(made.observe(made.init(case.params, case.x), case.params, case.x))
    if "in" not in grids:
        return Cell("left alone", case.kind == "integer operand")
    step = float(np.asarray(grids["in"].qparams.scale).reshape(()))
    off = abs(step / (np.abs(case.rows).max() / 127) - 1)
    return Cell(f"step {off:.0e} off", off < 1e-6)


def _per_token(case: Case) -> Cell:
    fn = lambda p, x: KINDS[case.kind](x, p["in"])
    try:
        got = np.asarray(jc.quantize.per_token(fn)(case.params, case.x), np.float64)
    except ValueError as error:  # no other contraction is there
        said = "int32" in str(error)
        return Cell("left alone", said and case.kind == "integer operand")
    step = np.abs(case.rows).max(axis=-1, keepdims=True) / 127
    codes = case.rows / step
    want = case.first(case.params["in"], np.round(codes) * step)
    # a code between two integers may fall to either in float32
    clear = (np.abs(codes - np.floor(codes) - 0.5) > 1e-4).all(axis=-1)
    off = float(np.abs(got - want)[clear].max())
    return Cell(f"{off:.0e} off", off < 1e-4)


def _sensitivity(case: Case) -> Cell:
    four = {"int4": jc.quantize.weights(FOUR)}
    found = jc.search.sensitivity(case.fn, case.params, [(case.x,)], weights=four)
    return Cell("measured" if "in" in found.weights else "left out", "in" in found.weights)


def _compress(case: Case) -> Cell:
    size = sum(w.size for w in case.params.values())
    found = jc.search.compress(
        case.fn, case.params, [(case.x,)], device="h100", candidates=1, fitted=False,
        budget=jc.Budget(weight_bytes=2 * size), options=jc.search.integer_options((4, 8)),
    )  # fmt: skip
    return Cell("planned" if "in" in found.plan.weights else "left out", "in" in found.plan.weights)


def _solver(method: Callable[..., Any], **how: Any) -> Callable[[Case], Cell]:
    # squared error on the data over that of rounding to nearest
    def judge(case: Case) -> Cell:
        params, state = method(case.fn, case.params, [(case.x,)], case.spec, **how)
        view = jc.quantize.recipe(case.spec).apply(params, state)
        share = case.error(view["in"]) / case.error(case.nearest())
        return Cell(f"{share:.2f} of nearest", share < 1 + 1e-5)

    return judge


def _scaled(method: Callable[..., Any]) -> Callable[[Case], Cell]:
    # float weights before and after: the function stays
    def judge(case: Case) -> Cell:
        params, _ = method(case.fn, case.params, [(case.x,)], case.spec)
        want = np.maximum(case.first(case.params["in"]) @ np.asarray(case.params["up"]), 0)
        want = want @ np.asarray(case.params["down"], np.float64)
        off = float(np.abs(np.asarray(case.fn(params, case.x)) - want).max())
        return Cell(f"{off:.0e} off", off < 1e-4)

    return judge


def _wanda(case: Case) -> Cell:
    # |w_ij| ||x_i|| of the rows that reach an expert, the smaller half of each output goes
    got, _ = jc.prune.wanda(case.fn, case.params, [(case.x,)], 0.5)
    w = np.asarray(case.params["in"], np.float64)
    parts = np.split(case.rows, np.cumsum(SIZES)[:-1]) if w.ndim == 3 else [case.rows]
    wrong = 0
    for rows, one, mine in zip(
        parts, w.reshape(-1, INPUTS, WIDTH), np.asarray(got["in"]).reshape(-1, INPUTS, WIDTH),
        strict=True,
    ):  # fmt: skip
        scores = np.abs(one) * np.linalg.norm(rows, axis=0)[:, None]
        kept = np.argsort(np.argsort(-scores, axis=0), axis=0) < INPUTS // 2
        wrong += int((kept != (mine != 0)).sum())
    return Cell(f"{wrong} of {w.size} differ", wrong == 0)


def _sparse_gpt(case: Case) -> Cell:
    got, _ = jc.prune.sparse_gpt(case.fn, case.params, [(case.x,)], (2, 4))
    kept = np.asarray(got["in"]) != 0
    masked = np.where(kept, np.asarray(case.params["in"], np.float64), 0)
    share = case.error(got["in"]) / max(case.error(masked), 1e-12)
    return Cell(f"{share:.2f} of its mask", share < 1 and kept.mean() == 0.5)


def _cost(case: Case) -> Cell:
    # multiply-accumulates: every row meets one matrix
    cost = jc.cost.estimate(case.fn, case.params, case.x, device="h100")
    want = ROWS * (INPUTS * WIDTH + WIDTH * WIDTH + WIDTH * 4)
    return Cell(f"{cost.macs} of {want} MACs", cost.macs == want)


PASSES: dict[str, Callable[[Case], Cell]] = {
    "activations": _grids,
    "per_token": _per_token,
    "sensitivity": _sensitivity,
    "compress": _compress,
    "gptq": _solver(jc.quantize.gptq),
    "adaround": _solver(jc.quantize.adaround, steps=50),
    "smooth_quant": _scaled(jc.quantize.smooth_quant),
    "awq": _scaled(jc.quantize.awq),
    "equalize": _scaled(jc.quantize.equalize),
    "wanda": _wanda,
    "sparse_gpt": _sparse_gpt,
    "cost.estimate": _cost,
}


def judged(name: str, case: Case) -> Cell:
    """What a pass does with a network, or says of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            cell = PASSES[name](case)
        except ValueError as error:
            cell, caught = Cell(f"error: {error}", False), [*caught]
            named = "in" in str(error) and "not looked into" in str(error)
            return Cell("named in an error", True) if named else cell
    said = [str(w.message) for w in caught if issubclass(w.category, jc.graph.Unentered)]
    if case.kind not in SHUT or (cell.holds and not said):
        return cell
    once = said == [f"not looked into, left as they are: {case.kind}: in"]
    return Cell("named" if once else f"said {len(said)} times: {said}", once)


def table(seed: int, progress: Callable[[Iterable], Iterable]) -> Table:
    """Every pass with every kind of contraction."""
    cases = [Case(kind, seed) for kind in KINDS]
    for case in cases:
        assert set(dict(leaves_with_paths(case.params))) == {"in", "up", "down"}
    cells = {name: tuple(judged(name, case) for case in cases) for name in progress(list(PASSES))}
    promise = "right against a float64 reference, or named with its leaf, once"
    return Table(promise, tuple(KINDS), cells)
