"""Every rule that chooses a range or a step, on every degenerate block of numbers.

Columns are blocks of 64 numbers (one has one), all together the channels of one matrix, so that
every method runs once per format and number of rows. A cell is the largest |Q(x) - x| in steps of
the grid that the method chose, in float64, the worst over the formats int2, int4, int8, uint4 and
uint8 (those that the method takes).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.situations import Cell, Table
from jaxcompress import quantize
from jaxcompress.formats import Integer, integer
from jaxcompress.quantize.ranges.min_max import range_of

PROMISE = (
    "The step is finite and not 0, and the largest error is at most half of it; what cuts tails "
    "off may cut an outlier or the ends of one side, if the squared error is at most that of the "
    "whole range (learned steps: if the numbers within the grid keep the promise)"
)
SMALLEST = float(np.finfo(np.float32).tiny)  # what is below is zero to XLA
FORMATS = (*map(integer, (2, 4, 8)), *(integer(b, symmetric=False) for b in (4, 8)))
CALIBRATORS = {
    "min_max": quantize.min_max(),
    "moving_average": quantize.moving_average(),
    "percentile": quantize.percentile(),
    "percentile(75)": quantize.percentile(75),
    "mse": quantize.mse(),
    "octav": quantize.octav(),
    "kl": quantize.kl(),
}
TAILS = ("one-sided", "other side", "outlier", "sparse")

# (format, blocks [n, k]) -> (what the blocks become, their steps [k])
Method = Callable[[Integer, jax.Array], tuple[jax.Array, jax.Array]]


def blocks(seed: int) -> dict[str, np.ndarray]:
    """name -> float32 numbers."""
    rng = np.random.default_rng(seed)
    found = {
        "constant": np.full(64, 0.4),
        "negative": np.full(64, -0.4),
        "saturated": np.where(np.arange(64) % 2, 0.4, -0.4),
        "one element": np.array([0.37]),
        "one-sided": rng.uniform(0, 1, 64),
        "other side": -rng.uniform(0, 1, 64),
        "zeros": np.zeros(64),
        "sparse": np.r_[np.zeros(63), 0.7],
        "outlier": np.r_[0.01 * rng.normal(size=63), 100.0],
        "subnormal": np.full(64, 1e-40),
        "tiny": np.full(64, 1.2e-38),
        "huge": np.full(64, 3.3e38),
    }
    return {name: block.astype(np.float32) for name, block in found.items()}


def methods() -> dict[str, tuple[Method, tuple[Integer, ...]]]:
    """name -> the method and the formats that it takes."""
    found = {}
    for name, calibrate in CALIBRATORS.items():
        found[name] = (_calibrated(calibrate, streamed=False), FORMATS)
        found[f"{name}, streamed"] = (_calibrated(calibrate, streamed=True), FORMATS)
    symmetric, whole = FORMATS[:3], FORMATS[3:]
    found["hqq"] = (_hqq, FORMATS)
    found["ema_ranges"] = (lambda f, x: _view(quantize.ema_ranges(f, axis=-1), x), FORMATS)
    for name, comp in (("lsq", quantize.lsq), ("lsq_plus", quantize.lsq_plus)):
        found[name] = (lambda f, x, comp=comp: _view(comp(f.bits, axis=-1), x), symmetric)
    for name in ("lsq_activations", "lsq_plus_activations", "pact_activations"):
        found[name] = (_learned(getattr(quantize, name)), whole)
    return found


def _calibrated(calibrate: quantize.Calibrator, *, streamed: bool) -> Method:
    @jax.jit
    def updated(x):
        state = calibrate.init((1, x.shape[1]))
        return calibrate.update(state, x, axes=(0,), where=None)

    def run(format, x):
        if streamed:
            low, high = calibrate.range(updated(x), format)
        else:
            low, high = range_of(calibrate, x, format, axes=(0,))
        qparams = format.qparams(low, high)
        return format.fake_quant(x, qparams), qparams.scale

    return run


def _view(comp, x):
    state = comp.init(x)
    return comp.apply(x, state), comp.pack(x, state).qparams.scale


def _hqq(format, x):
    where = quantize.Spec(format, axis=-1)
    inputs = [(jnp.ones((2, len(x))),)]
    params, state = quantize.hqq(lambda p, a: a @ p["w"], {"w": x}, inputs, {"w": where})
    packed = quantize.recipe({"w": where}).pack(params, state)["w"]
    return jc.core.unpack(packed), packed.qparams.scale


def _learned(factory: Callable) -> Method:
    def run(format, x):
        act = factory(lambda p, a: a @ p["w"], format.bits)
        seen = [act.grids(act.init({"w": jnp.ones((1, 1))}, block[:, None]))["w"] for block in x.T]
        views = [grid.snap(block) for grid, block in zip(seen, x.T[..., None], strict=True)]
        return jnp.concatenate(views, axis=1), jnp.stack([g.qparams.scale for g in seen])

    return run


def table(seed: int, progress: Callable) -> Table:
    """Methods x blocks."""
    columns = blocks(seed)
    cells = {}
    for name, (method, formats) in progress(list(methods().items())):
        worst: dict[str, Cell] = {}
        errors: dict[str, float] = {}
        for format in formats:
            for column, (error, holds) in _judged(name, method, format, columns).items():
                before = worst.get(column, Cell("", True))
                errors[column] = max(errors.get(column, 0.0), error)
                worst[column] = Cell(f"{errors[column]:.3f}", before.holds and holds)
        cells[name] = tuple(worst[column] for column in columns)
    return Table(PROMISE, tuple(columns), cells)


def _judged(name: str, method: Method, format: Integer, columns: dict[str, np.ndarray]):
    # column -> (largest error in steps, whether the promise holds)
    found = {}
    for rows in sorted({len(block) for block in columns.values()}):
        names = [column for column, block in columns.items() if len(block) == rows]
        x = np.stack([columns[column] for column in names], axis=1)
        view, step = method(format, jnp.asarray(x))
        view, step = (np.asarray(a, np.float64).reshape(-1, len(names)) for a in (view, step))
        for k, column in enumerate(names):
            block = x[:, k].astype(np.float64)
            found[column] = _one(name, format, column, block, view[:, k], step[0, k])
    return found


def _one(name, format, column, x, view, step):
    if not (np.isfinite(view).all() and np.isfinite(step) and step > 0):
        return np.inf, False
    error = np.abs(view - x)
    allowed = 0.5005 * step + SMALLEST
    holds = bool((error <= allowed).all())
    if not holds and column in TAILS:
        if name.startswith(("lsq", "pact")):
            inside = np.abs(x) <= np.abs(view).max()
            holds = bool((error <= allowed)[inside].all())
        elif name.startswith("percentile(75)"):
            holds = bool((error <= allowed)[_kept(format, x)].all())
        else:
            holds = bool(np.sum(error**2) <= 1.0001 * np.sum(_whole_range_error(format, x) ** 2))
    return float(error.max() / step), holds


def _kept(format: Integer, x: np.ndarray) -> np.ndarray:
    # what a percentile of 75 is to cover, by NumPy
    rank = lambda v: np.percentile(v, 75, method="inverted_cdf")
    if format.symmetric:
        return np.abs(x) <= rank(np.abs(x))
    return (x <= max(rank(x), 0.0)) & (-x <= max(rank(-x), 0.0))


def _whole_range_error(format: Integer, x: np.ndarray) -> np.ndarray:
    low, high = format.bounds
    ends = min(x.min(), 0.0), max(x.max(), 0.0)
    if format.symmetric:
        step, zero = max(-ends[0], ends[1]) / high, 0.0
    else:
        step = (ends[1] - ends[0]) / (high - low)
        zero = np.round(-ends[0] / step)
    codes = np.clip(np.round(x / step), low - zero, high - zero)
    return codes * step - x
