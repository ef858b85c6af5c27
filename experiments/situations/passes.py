"""What lies between two layers: every pass over a network meets every primitive that people use.

A network is x @ up, then the operation, then @ down. Of every pass a cell says

  ok       it went through: sites named, numbers of the visited, cut, rescaled, quantized, lowered
           network equal to the function's (float64, the simulation, ONNX Runtime)
  stops    the mathematics of the operation ends what the pass follows, and it says so
  refused  it has no such operation, and says so
  unknown  it does not know the primitive
  wrong    its numbers are not those of the function

The promise: nothing is wrong, nothing that only moves elements or maps them one by one is unknown,
and identities are identities in all passes.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxcompress as jc
from experiments.situations import Cell, Table
from jaxcompress.cost.estimation import counts
from jaxcompress.formats import integer
from jaxcompress.graph.coupling.terms import keep_of
from jaxcompress.graph.scaling.migration import absorbable, rescale
from jaxcompress.prune.channels.smaller_networks import shrink
from jaxcompress.quantize import Spec, ptq
from jaxcompress.quantize.integer.integer_program import integer_only

ROWS, IN, MID, OUT = 32, 6, 8, 5


@jax.custom_jvp
def _clipped(h):
    return jnp.clip(h, 0, 3)


_clipped.defjvp(lambda h, dh: (_clipped(*h), dh[0]))


@jax.custom_vjp
def _straight(h):
    return h * 1.0


_straight.defvjp(lambda h: (_straight(h), None), lambda _, dy: (dy,))


def _rope(h):
    a, b = h[:, ::2], h[:, 1::2]
    return jnp.stack([a * 0.8 - b * 0.6, a * 0.6 + b * 0.8], -1).reshape(h.shape)


def _attention(h):
    scores = jax.nn.softmax(h @ h.T / 3)
    return scores @ h


def _by_horner(h, coefficients):
    return jnp.polyval(jnp.array(coefficients), h)


_polynomial = getattr(lax, "polynomial", _by_horner)


def _layer_norm(h):
    mean = h.mean(-1, keepdims=True)
    return (h - mean) * lax.rsqrt(((h - mean) ** 2).mean(-1, keepdims=True) + 1e-3)


_first = jnp.array([3, 0, 5, 1, 1, 7, 2, 4])
IDENTITIES: dict[str, Callable] = {
    "stop_gradient": lax.stop_gradient,
    "device_put": lambda h: jax.device_put(h, jax.devices()[0]),
    "barrier": lambda h: lax.optimization_barrier(h),
    "name": lambda h: checkpoint_name(h, "middle"),
    "copy": lambda h: jnp.array(h, copy=True),
    "constraint": lambda h: lax.with_sharding_constraint(
        h, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "jit": jax.jit(lambda h: h + 0.0),
    "remat": jax.checkpoint(lambda h: lax.stop_gradient(h)),
    "custom_jvp": _clipped,
    "custom_vjp": _straight,
}
MOVES: dict[str, Callable] = {
    "transpose": lambda h: h.T[::1].T,
    "swapaxes": lambda h: h.reshape(ROWS, 2, 4).swapaxes(1, 2).swapaxes(2, 1).reshape(h.shape),
    "reshape": lambda h: h.reshape(ROWS, 2, 2, 2).reshape(h.shape),
    "squeeze": lambda h: lax.squeeze(h[:, None], (1,)),
    "expand_dims": lambda h: jnp.expand_dims(h, 0)[0],
    "broadcast": lambda h: jnp.broadcast_to(h[:, None], (ROWS, 1, MID))[:, 0],
    "flip": lambda h: h[:, ::-1],
    "slice": lambda h: h[:, 2:6],
    "strided slice": lambda h: h[:, ::2],
    "pad": lambda h: jnp.pad(h, ((0, 0), (0, 3))),
    "concatenate": lambda h: jnp.concatenate([h, h], -1),
    "split": lambda h: jnp.split(h, 2, -1)[1],
    "stack": lambda h: jnp.stack([h, h], -1).reshape(ROWS, -1),
    "unstack": lambda h: jnp.unstack(h.reshape(ROWS, 2, 4), axis=1)[1],
    "tile": lambda h: jnp.tile(h, (1, 2)),
    "repeat": lambda h: jnp.repeat(h, 2, axis=-1),
    "roll": lambda h: jnp.roll(h, 1, axis=-1),
    "take": lambda h: h[:, _first],
    "dynamic_slice": lambda h: lax.dynamic_slice(h, (0, 2), (ROWS, 4)),
    "rope": _rope,
}
MAPS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "clip": lambda h: jnp.clip(h, -1, 1),
    "abs": jnp.abs,
    "maximum": lambda h: jnp.maximum(h, -h),
    "where": lambda h: jnp.where(h > 0, h, 0.1 * h),
    "cast": lambda h: h.astype(jnp.bfloat16).astype(h.dtype),
    "reduce_precision": lambda h: lax.reduce_precision(h, 8, 10),
    "add": lambda h: h + h[::-1],
    "square": jnp.square,
    "cube": lambda h: h**3,
    "sqrt": lambda h: jnp.sqrt(jnp.abs(h)),
    "div": lambda h: h / (1 + jnp.abs(h)),
    "exp": jnp.exp,
    "log": lambda h: jnp.log(1 + jnp.abs(h)),
    "log2": lambda h: jnp.log2(1 + jnp.abs(h)),
    # Primitives since JAX 0.12.
    "polynomial": lambda h: _polynomial(h, (0.5, 0.0, 1.0)),
    "one_minus_square": getattr(lax, "one_minus_square", lambda h: 1 - h * h),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "erf": lax.erf,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "sin": jnp.sin,
    "sign": jnp.sign,
    "round": jnp.round,
    "glu": lambda h: jax.nn.glu(h, -1),
}
OTHERS: dict[str, Callable] = {
    "dynamic_update": lambda h: lax.dynamic_update_slice(h, jnp.zeros((ROWS, 2)), (0, 1)),
    "scatter": lambda h: h.at[:, _first[:2]].set(0.0),
    "max pool": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID"),
    "cumsum": lambda h: jnp.cumsum(h, -1),
    "sort": lambda h: jnp.sort(h, -1),
    "top_k": lambda h: lax.top_k(h, 4)[0],
    "softmax": jax.nn.softmax,
    "layer norm": _layer_norm,
    "mean": lambda h: h - h.mean(0, keepdims=True),
    "attention": _attention,
    "scan": lambda h: lax.scan(lambda c, _: (jax.nn.relu(c) + 0.5 * c, None), h, None, 2)[0],
    "cond": lambda h: lax.cond(h[0, 0] > 1e9, jnp.negative, jax.nn.relu, h),
    "while": lambda h: lax.fori_loop(0, 2, lambda i, c: jax.nn.relu(c) + c, h),
}
# Between a weight and its contraction.
WEIGHTS: dict[str, Callable] = {
    f"weight, {name}": IDENTITIES[name]
    for name in ("stop_gradient", "device_put", "barrier", "name", "copy", "constraint", "remat")
} | {
    "weight, transpose": lambda w: w.T.reshape(w.shape[::-1]).T,
    "weight, stacked": lambda w: jnp.stack(jnp.unstack(w, axis=1), 1),
    "weight, split": lambda w: jnp.concatenate(jnp.split(w, 2), 0),
}
NETWORKS = {**IDENTITIES, **MOVES, **MAPS, **OTHERS, **WEIGHTS}
MEANT = frozenset([("custom_jvp", "absorb")])
"""Where more than an identity is computed: a clip at 3 fixes the scale."""
PASSES = ("trace", "walk", "cost", "axes", "absorb", "gptq", "integer", "onnx")
ORDER = ("wrong", "unknown", "refused", "stops", "ok")
"""From worst to best."""


def network(name: str, seed: int = 0) -> tuple[Callable, Any, jax.Array]:
    """The function, its parameters and inputs [ROWS, IN] of a row of the table."""
    middle, random = NETWORKS[name], np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    up, x = draw(IN, MID), draw(ROWS, IN)
    if name in WEIGHTS:
        params = {"down": draw(MID, OUT), "up": up}
        return lambda p, x: jax.nn.relu(x @ p["up"]) @ middle(p["down"]), params, x
    params = {"down": draw(middle(x @ up).shape[-1], OUT), "up": up}
    return lambda p, x: middle(x @ p["up"]) @ p["down"], params, x


def table(seed: int, progress: Callable) -> Table:
    """Networks x passes."""
    cells = {}
    for name in progress(list(NETWORKS)):
        fn, params, x = network(name, seed)
        found = [cell(kind, fn, params, x) for kind in PASSES]
        plain, same = name not in OTHERS, name in IDENTITIES or name[8:] in IDENTITIES
        cells[name] = tuple(
            Cell(
                text,
                text != "wrong"
                and (text != "unknown" or not plain)
                and (text == "ok" or not same or (name, kind) in MEANT),
            )
            for kind, text in zip(PASSES, found, strict=True)
        )
    return Table("nothing is wrong, moves and maps are known, identities pass", PASSES, cells)


def cell(kind: str, fn: Callable, params: Any, x: jax.Array) -> str:
    """What one pass makes of a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _PASSES[kind](fn, params, x)


def _trace(fn: Callable, params: Any, x: jax.Array) -> str:
    graph = jc.graph.trace(fn, params, x)
    named = {site.name for site in graph.sites}
    return "ok" if {"up", "down"} <= named and not graph.unentered else "unknown"


def _walk(fn: Callable, params: Any, x: jax.Array) -> str:
    seen = jc.graph.walk(fn, lambda tap, h, state: (h, state + 1))
    states = {name: jnp.int32(0) for name in ("up", "down")}
    out, states = jax.jit(seen)(states, params, x)
    same = np.array_equal(out, jax.jit(fn)(params, x), equal_nan=True)
    return "ok" if same and all(int(n) == 1 for n in states.values()) else "wrong"


def _cost(fn: Callable, params: Any, x: jax.Array) -> str:
    return "unknown" if counts(fn, params, x).unruled else "ok"


def _axes(fn: Callable, params: Any, x: jax.Array) -> str:
    found = jc.graph.axes(fn, params, x)
    groups = [g for g in found.groups.values() if any(m.path == "up" for m in g.members)]
    if not groups:
        return "unknown" if found.unknown else "stops"
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, x))
        kept = {g.name: np.arange(g.size) % 2 == 0 for g in groups if g.size > 1}
        small, small_params, report = shrink(fn, wide[0], kept, wide[1], allow_inexact=True)
        masks = {p: np.ones(a.shape, bool) for p, a in params.items()}
        for g in groups:
            if g.name in kept and g.name not in report.held:
                _mask(masks, g, kept[g.name], found)
        masked = {p: jnp.where(masks[p], wide[0][p], 0) for p in params}
        want, got = fn(masked, wide[1]), small(small_params, wide[1])
    same = np.allclose(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    if not same and not report.inexact:
        return "wrong"
    return "stops" if report.inexact or report.params == report.params_before else "ok"


def _mask(masks: Any, group: Any, keep: np.ndarray, found: Any) -> None:
    # Of all parameters that have the group.
    atom = found.program.atoms[group.name]
    for path, terms in found.program.leaves.items():
        for axis, term in enumerate(terms):
            stays = keep_of(term, lambda a: keep if a is atom else np.ones(a.size, bool))
            shape = [1, 1]
            shape[axis] = len(stays)
            masks[path] &= stays.reshape(shape)


def _absorb(fn: Callable, params: Any, x: jax.Array) -> str:
    found = absorbable(fn, params, x)
    groups = [g for g in found.groups if "down" in g.layers]
    if not groups:
        why = found.refused.get("down", "")
        return "unknown" if "does not pass a scale on" in why and _moves_only(fn) else "stops"
    t = 2.0 ** (1 + np.arange(groups[0].channels) % 3)  # exact
    got = fn(rescale(params, groups[0], jnp.asarray(t, jnp.float32)), x)
    return "ok" if np.allclose(got, fn(params, x), rtol=1e-5, atol=1e-5) else "wrong"


def _moves_only(fn: Callable) -> bool:
    middle = next(c.cell_contents for c in fn.__closure__ or () if callable(c.cell_contents))
    return middle in (*IDENTITIES.values(), *MOVES.values(), *WEIGHTS.values())


def _gptq(fn: Callable, params: Any, x: jax.Array) -> str:
    spec = {"down": Spec(integer(2))}
    recipe = ptq.recipe(spec)
    try:
        new, state = ptq.gptq(fn, params, [(x,)], spec)
    except ValueError as error:
        assert "the weight of no layer" in str(error), error
        return "unknown"
    mine, nearest = recipe.apply(new, state), recipe.apply(params, recipe.init(params))
    if bool(jnp.all(mine["down"] == nearest["down"])):
        return "unknown"
    error = lambda p: float(jnp.sum((fn({**params, "down": p["down"]}, x) - fn(params, x)) ** 2))
    return "ok" if error(mine) <= error(nearest) * (1 + 1e-5) else "wrong"


def _integer(fn: Callable, params: Any, x: jax.Array) -> str:
    try:
        program = integer_only(fn, params, [x])
    except (ValueError, TypeError, NotImplementedError) as error:
        return "unknown" if "cannot run" in str(error) and _moves_only(fn) else "refused"
    codes = program.quantize_input(x)
    out = jax.jit(program.run)(codes)
    if not np.array_equal(out, program.simulate(codes)):
        return "wrong"
    want, got = fn(params, x), program.dequantize(out)
    return "ok" if float(jnp.abs(got - want).max()) <= 0.1 * float(jnp.abs(want).max()) else "wrong"


def _onnx(fn: Callable, params: Any, x: jax.Array) -> str:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.onnx"
        try:
            jc.export.onnx(fn, params, x, path=path, shapes=None, verify=False)
        except (ValueError, NotImplementedError):
            return "refused"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    same = np.allclose(np.asarray(got), fn(params, x), rtol=1e-4, atol=1e-4, equal_nan=True)
    return "ok" if same else "wrong"


_PASSES = {
    "trace": _trace, "walk": _walk, "cost": _cost, "axes": _axes, "absorb": _absorb,
    "gptq": _gptq, "integer": _integer, "onnx": _onnx,
}  # fmt: skip
