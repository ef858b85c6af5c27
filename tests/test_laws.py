"""The laws that every Compressor obeys; add each new method to REGISTRY.

1 the view keeps structure, shapes, dtypes      6 jit == eager
2 unpack(pack(p, s)) == apply(p, s), bit for bit 7 apply is idempotent
3 update keeps the state's avals                 8 shardings are kept
4 update never touches `learned`                 9 packed bytes are the predicted bytes
5 eval_shape(init) agrees with init
Where axes of a mesh are explicit, 3 and 8 are of types, and all results those of one device.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _trees import avals, bits_equal, small_tree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
import jaxcompress.prune as P
from jaxcompress import formats, quantize
from jaxcompress.formats import fixed_point, granularity_for, integer, predicted_bytes, row_bytes
from jaxcompress.quantize import ptq
from jaxcompress.quantize.qat.dorefa_net import dorefa_format


class Case(NamedTuple):
    make: Callable[[], jc.Compressor]
    # What a leaf of a shape weighs when packed densely: (format, axis, group), or None for floats.
    stored: Callable[[str], tuple | None] = lambda path: None
    breaks: dict[int, str] = {}  # law -> why the method breaks it by its definition


def _everywhere(*spec):
    return lambda path: spec


def _kernels(*spec):
    return lambda path: spec if path.endswith("kernel") else None


def _weights(format, axis=None, group=None, block=None, breaks=None, **options):
    return Case(
        lambda: quantize.weights(format, axis=axis, group=group, block=block, **options),
        _everywhere(format, axis, group, block),
        breaks or {},
    )


_UINT4 = integer(4, symmetric=False)


def _learned(make, bits, axis=None, group=None, **options):
    return Case(
        lambda: make(bits, axis=axis, group=group, **options),
        _everywhere(bits if bits is _UINT4 else integer(bits), axis, group),
    )


NOT_ON_THE_GRID = {7: "a number of the grid may be an ulp beside it, and then rounds at random"}


def _recipe(*, first, scope):
    prune = jc.prune.magnitude(jc.prune.cubic(0.3, 0.8, start=0, end=4), scope=scope)
    quant = jc.by_path(
        {".*kernel": jc.quantize.weights(integer(4), axis=-1)}, default=jc.identity()
    )
    return jc.chain(prune, quant) if first == "prune" else jc.chain(quant, prune)


def _some_scores():
    return jax.tree.map(lambda w: jnp.sin(w.astype(jnp.float32)), small_tree())


REGISTRY = {
    "identity": Case(jc.identity),
    **{f"int{b}": _weights(integer(b)) for b in (1, 2, 4, 8)},
    "int8_full": _weights(integer(8, narrow=False)),
    "int4_channel": _weights(integer(4), -1),
    "int3_first_axis": _weights(integer(3), 0),
    "int4_group_ragged": _weights(integer(4), -1, 7),
    "int8_group_middle_axis": _weights(integer(8), 0, 5),
    "uint8": _weights(integer(8, symmetric=False)),
    "uint3_channel": _weights(integer(3, symmetric=False), -1),
    "uint4_group": _weights(integer(4, symmetric=False), -1, 8),
    "q2.5": _weights(fixed_point(2, 5)),
    "q0.2": _weights(fixed_point(0, 2)),
    "q3.9": _weights(fixed_point(3, 9)),
    "pot4_channel": _weights(formats.power_of_two(4), -1),
    "apot5": _weights(formats.additive_power_of_two(5), -1),
    "ternary_channel": _weights(formats.ternary(), -1),
    "ternary_ttq_group": _weights(formats.ternary_ttq(), -1, 7),
    "binary_channel": _weights(formats.binary(), -1),
    "nf4": _weights(formats.nf4(), -1),
    "k_means3": _weights(formats.k_means(3), -1),
    "float8_e4m3_channel": _weights(formats.float8_e4m3(), -1),
    "mxfp4": _weights(formats.mxfp4(), -1),
    "nvfp4": _weights(formats.nvfp4(), -1),
    "int4_block": _weights(integer(4), block=(5, 3)),
    "int4_mse": _weights(integer(4), -1, calibrate=quantize.mse()),
    "uint8_percentile": _weights(
        integer(8, symmetric=False), calibrate=quantize.percentile(95), rounding=formats.half_away
    ),
    "int4_stochastic": _weights(
        integer(4), -1, rounding=formats.stochastic, breaks=NOT_ON_THE_GRID
    ),
    "lsq2": _learned(quantize.lsq, 2),
    "lsq4_channel": _learned(quantize.lsq, 4, -1),
    "lsq_plus3_group": _learned(quantize.lsq_plus, 3, -1, 7, narrow=True),
    "ema_uint4_group": _learned(
        lambda bits, **options: quantize.ema_ranges(_UINT4, decay=0.5, **options), _UINT4, -1, 8
    ),
    "annealed": Case(
        lambda: quantize.annealed_bits(
            lambda bits: quantize.weights(integer(bits), axis=-1), lambda step: 8 - step
        ),
        _everywhere(integer(8), -1),
    ),
    "annealed_lsq": Case(
        lambda: quantize.annealed_bits(
            lambda bits: quantize.lsq(bits, axis=-1, from_bits=8), lambda step: 8 - 2 * step
        ),
        _everywhere(integer(8), -1),
    ),
    "a2q8": Case(
        lambda: quantize.a2q(8, accumulator_bits=14, input_bits=8),
        _everywhere(integer(8), -1),
        {7: "the l1 norm that truncation made smaller is restored"},
    ),
    "ttq_channel": Case(lambda: quantize.ttq(axis=-1), _everywhere(formats.ternary_ttq(), -1)),
    "dorefa3": Case(
        lambda: quantize.dorefa(3),
        _everywhere(dorefa_format(3)),
        {7: "tanh is applied to what it gave"},
    ),
    "dorefa1": Case(lambda: quantize.dorefa(1), _everywhere(formats.binary())),
    "twn": Case(quantize.twn, _everywhere(formats.ternary())),
    "bitnet_b158": Case(quantize.bitnet_b158, _everywhere(formats.ternary_absmean())),
    "xnor": Case(quantize.xnor, _everywhere(formats.binary(), -1)),
    "magnitude_layer": Case(lambda: jc.prune.magnitude(0.6)),
    "magnitude_few_left": Case(lambda: jc.prune.magnitude(0.98)),  # stored as csr:1 and csr:0
    "magnitude_global": Case(lambda: jc.prune.magnitude(0.6, scope="global")),
    "magnitude_cubic": Case(lambda: jc.prune.magnitude(jc.prune.cubic(0.2, 0.9, start=1, end=3))),
    "magnitude_all": Case(lambda: jc.prune.magnitude(1.0)),
    "magnitude_block": Case(
        lambda: P.magnitude(0.6, structure=P.block((5, 3)), scope="global"),
    ),
    "magnitude_channel": Case(
        lambda: P.magnitude(P.cubic(0.2, 0.9, start=1, end=3), structure=P.channel(-2))
    ),
    "magnitude_head": Case(lambda: P.magnitude(0.5, structure=P.head(4))),
    "magnitude_erk": Case(
        lambda: P.magnitude(P.cubic(0.2, 0.9, start=1, end=3), scope=P.erk(dense=["conv/.*"]))
    ),
    "magnitude_cost_weighted": Case(
        lambda: P.magnitude(1.0, scope=P.cost_weighted({"dense.*": 2.0, ".*": 1.0}, 400.0))
    ),
    "magnitude_one_shot": Case(lambda: P.magnitude(P.one_shot(0.7, at=2))),
    "2:4": Case(lambda: P.magnitude(structure=P.n_m(2, 4))),
    "1:5_ragged": Case(lambda: P.magnitude(0.8, structure=P.n_m(1, 5, axis=-1))),
    "threshold": Case(lambda: P.threshold(1.2)),
    "filter_norm": Case(lambda: P.filter_norm(0.5)),
    "random": Case(
        lambda: P.random(P.cubic(0.2, 0.9, start=1, end=3), key=jax.random.key(3)),
    ),
    "taylor": Case(lambda: P.taylor(P.linear(0.0, 0.7, end=2))),
    "movement": Case(lambda: P.movement(P.exponential(0.0, 0.7, end=2))),
    "lamp": Case(lambda: P.lamp(0.6)),
    "scored": Case(lambda: P.scored(_some_scores(), P.cubic(0.2, 0.9, start=1, end=3))),
    "static_sparse": Case(lambda: P.static_sparse(0.7, key=jax.random.key(0))),
    "sparse_evolutionary": Case(lambda: P.sparse_evolutionary(0.7, key=jax.random.key(0), every=2)),
    "rigl": Case(lambda: P.rigl(0.7, key=jax.random.key(0), end=9, every=2)),
    "snfs": Case(lambda: P.snfs(0.7, key=jax.random.key(0), end=9, every=2)),
    "ac_dc": Case(lambda: P.ac_dc(0.7, start=1, sparse=1, dense=1, end=9)),
    "ste": Case(lambda: P.ste(P.cubic(0.2, 0.9, start=1, end=3))),
    "sr_ste": Case(lambda: P.sr_ste(2, 4)),
    "top_kast": Case(lambda: P.top_kast(0.8, 0.5)),
    "soft_threshold": Case(
        lambda: P.soft_threshold(initial=-1.0),
        breaks={7: "the threshold is taken off what stays, so it is taken off again"},
    ),
    "l0": Case(
        lambda: P.l0(open_rate=0.4),
        breaks={7: "gates between 0 and 1 multiply what they multiplied before"},
    ),
    "soft_movement": Case(lambda: P.soft_movement(axis=-1, initial=-3.0)),
    "by_path": Case(
        lambda: jc.by_path(
            {
                "dense/kernel": jc.quantize.weights(integer(2), axis=-1),
                "conv/.*": jc.prune.magnitude(0.5),
            },
            default=jc.identity(),
        ),
        lambda path: (integer(2), -1, None) if path == "dense/kernel" else None,
    ),
    "partition": Case(
        lambda: jc.partition(
            lambda p: jax.tree.map(lambda x: "matrix" if jnp.ndim(x) > 1 else "rest", p),
            {
                "matrix": jc.chain(
                    jc.prune.magnitude(0.5, scope="global"), jc.quantize.weights(integer(8))
                ),
                "rest": jc.identity(),
            },
        ),
        lambda path: (integer(8), None, None) if "kernel" in path or path == "empty" else None,
    ),
    "prune_then_lsq": Case(
        lambda: jc.chain(
            jc.prune.magnitude(jc.prune.cubic(0.3, 0.8, start=0, end=4)),
            jc.by_path({".*kernel": quantize.lsq(4, axis=-1)}, default=jc.identity()),
        ),
        _kernels(integer(4), -1, None),
    ),
    "prune_then_quantize": Case(
        lambda: _recipe(first="prune", scope="global"), _kernels(integer(4), -1, None)
    ),
    "quantize_then_prune": Case(
        lambda: _recipe(first="quantize", scope="layer"), _kernels(integer(4), -1, None)
    ),
}


# On every interpreter; the others on one.
EVERYWHERE = frozenset(
    """identity int4_channel uint4_group mxfp4 magnitude_few_left magnitude_global magnitude_cubic
    2:4 random rigl l0 by_path partition prune_then_quantize prune_then_lsq""".split()
)
CASES = [
    pytest.param(name, marks=() if name in EVERYWHERE else pytest.mark.broad) for name in REGISTRY
]


class Made(NamedTuple):
    """A method, and its programs, which all tests of it share."""

    case: Case
    comp: jc.Compressor
    update: Callable  # jitted, as is
    apply: Callable


@pytest.fixture(params=CASES, scope="module")
def made(request):
    case = REGISTRY[request.param]
    comp = case.make()
    return Made(case, comp, jax.jit(comp.update), jax.jit(comp.apply))


@pytest.fixture(params=[jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def _tree(dtype):
    """All kinds of leaves in float32, the matrices in bfloat16."""
    tree = small_tree(dtype)
    if dtype == jnp.float32:
        return tree
    return {"dense": {"kernel": tree["dense"]["kernel"]}, "conv": tree["conv"]}


def _some_updates(comp, params, state, steps=3):
    for _ in range(steps):
        params = jax.tree.map(lambda w: w * 9 // 10 if w.dtype == jnp.int32 else w * 0.9, params)
        state = comp.update(params, state, grads=params)
    return params, state


def _predicted(case, path, leaf):
    spec = case.stored(path) if jnp.issubdtype(leaf.dtype, jnp.floating) else None
    if spec is None:
        return math.prod(leaf.shape) * leaf.dtype.itemsize, leaf.dtype.itemsize * 8, 0
    format, *place = spec
    where = granularity_for(format, *place)
    scales = format.metadata_bytes(math.prod(where.scale_shape(leaf.shape)))
    return predicted_bytes(leaf.shape, format, where), format.bits, scales


def _positions_bytes(leaf):
    # The bits of FORMULAS 2.8, from the number of elements and what the storage is called.
    kind, *numbers = leaf.positions.name.split(":")
    if kind == "bitmask":
        return row_bytes(leaf.size, 1)
    if kind == "csr":  # columns of rows of all axes from `split` on, and a count for every row
        rows = math.prod(leaf.shape[: int(numbers[0])])
        index, pointer = _whole_bytes(leaf.size // rows - 1), _whole_bytes(leaf.nnz)
        return index * leaf.nnz + pointer * (rows + 1)
    assert kind == "groups"  # N:M along axes: the place of each of the N among M
    return row_bytes(leaf.nnz, math.ceil(math.log2(int(numbers[1]))))


def _whole_bytes(largest):
    return 1 if largest < 2**8 else 2 if largest < 2**16 else 4


def test_laws_of_values(made, dtype):
    comp, params = made.comp, _tree(dtype)
    state = comp.init(params)
    params, state = _some_updates(comp, params, state)
    view = comp.apply(params, state)
    assert avals(view) == avals(params)  # 1
    packed = comp.pack(params, state)
    assert bits_equal(jc.unpack(packed), view)  # 2
    assert bits_equal(jax.jit(jc.unpack)(packed), view)
    assert bits_equal(made.apply(params, state), view)  # 6
    if 7 not in made.case.breaks:
        assert bits_equal(comp.apply(view, state), view)  # 7


def test_laws_of_state(made, dtype):
    comp, params = made.comp, _tree(dtype)
    state = comp.init(params)
    assert avals(jax.eval_shape(comp.init, params)) == avals(state)  # 5
    new = comp.update(params, state, grads=params)
    assert avals(new) == avals(state)  # 3
    assert bits_equal(new.learned, state.learned)  # 4
    jitted = made.update(params, state)
    assert bits_equal(jitted, comp.update(params, state))  # 6
    # 3, as a scan would use it
    loop = lambda s: jax.lax.scan(lambda s, _: (comp.update(params, s), None), s, length=2)[0]
    assert avals(jax.eval_shape(loop, state)) == avals(state)


def test_law_of_bytes(made):
    comp, params = made.comp, _tree(jnp.float32)
    state = comp.init(params)
    view, packed = comp.apply(params, state), comp.pack(params, state)
    leaves = jc.core.leaves_with_paths(packed, is_leaf=jc.core.is_packed)
    for (path, leaf), w in zip(leaves, jax.tree.leaves(view), strict=True):
        dense_bytes, bits, scale_bytes = _predicted(made.case, path, w)
        nnz = int(np.count_nonzero(np.asarray(w)))
        if isinstance(leaf, jc.Masked):  # where the elements kept lie, and their codes
            places = _positions_bytes(leaf)
            assert nnz <= leaf.nnz and places <= row_bytes(w.size, 1)
            expected = places + row_bytes(leaf.nnz, bits) + scale_bytes
            assert expected < dense_bytes
        else:
            expected = dense_bytes
        assert jc.packed_bytes(leaf) == expected, path  # 9


def _place(params, axis_type):
    """The params on eight devices, those that divide in eight parts."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    specs = {1: ("d",), 2: ("d", None), 4: (None,) * 3 + ("d",)}

    def place(w):
        spec = specs.get(w.ndim, ()) if w.size and w.dtype != jnp.int32 else ()
        return jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, params)


def test_law_of_shardings(made):
    comp, params = made.comp, _tree(jnp.float32)
    state = comp.init(params)
    placed = _place(params, AxisType.Auto)
    state_placed = made.update(placed, comp.init(placed))
    assert bits_equal(jax.device_get(state_placed), jax.device_get(made.update(params, state)))
    view = made.apply(placed, state_placed)
    assert bits_equal(
        jax.device_get(view), jax.device_get(comp.apply(params, comp.update(params, state)))
    )
    for w, v in zip(jax.tree.leaves(placed), jax.tree.leaves(view), strict=True):
        assert v.sharding.is_equivalent_to(w.sharding, w.ndim)  # 8


# One of each way to move elements; all others, marked long, run the same wrapper.
ON_MESHES = """int4_channel 2:4 prune_then_quantize mxfp4 int4_block uint8_percentile k_means3 lamp
    magnitude_channel rigl l0""".split()
MESH_CASES = [
    pytest.param(n, marks=() if i < 3 else pytest.mark.broad) for i, n in enumerate(ON_MESHES)
] + [pytest.param(n, marks=pytest.mark.long) for n in REGISTRY if n not in ON_MESHES]


@pytest.mark.parametrize("made", MESH_CASES, indirect=True, scope="module")
def test_law_of_explicit_meshes(made):
    # Shardings are part of the types here, so laws 3 and 8 are laws of types.
    comp, params = made.comp, _tree(jnp.float32)
    placed = _place(params, AxisType.Explicit)
    init = jax.jit(comp.init)
    with jax.set_mesh(placed["scalar"].sharding.mesh):  # where init needs no values, jit needs it
        start = init(placed)
    state = made.update(params, init(params), grads=params)
    state_placed = made.update(placed, start, grads=placed)
    assert bits_equal(jax.device_get(state_placed), jax.device_get(state))
    types = lambda tree: [jax.typeof(x) for x in jax.tree.leaves(tree)]
    assert types(state_placed) == types(start)
    view, packed = made.apply(placed, state_placed), comp.pack(placed, state_placed)
    assert types(view) == types(placed)
    assert bits_equal(jax.device_get(view), jax.device_get(made.apply(params, state)))
    assert bits_equal(jax.device_get(packed), jax.device_get(comp.pack(params, state)))
    assert bits_equal(jax.device_get(jax.jit(jc.unpack)(packed)), jax.device_get(view))


INT4 = {"w": quantize.Spec(integer(4))}
DATA_DRIVEN = {
    "gptq": ptq.gptq,
    "gptq_act_order": lambda *a: ptq.gptq(*a, act_order=True),
    "gptq_current": lambda *a: ptq.gptq(*a, groups="current"),
    "gptq_sweeps": lambda *a: ptq.gptq(*a, sweeps=2),
    "gptq_quantized_inputs": lambda *a: ptq.gptq(*a, inputs="quantized"),
    "adaround": lambda *a: ptq.adaround(*a, steps=100),
    "awq": ptq.awq,
    "correct_bias": ptq.correct_bias,
    "reconstruct": lambda *a: ptq.reconstruct(*a, epochs=5, learning_rate=3e-3),
    "sparse_gpt": lambda fn, p, data, _: P.sparse_gpt(fn, p, data, {"w": 0.5}),
    "sparse_gpt_2:4": lambda fn, p, data, _: P.sparse_gpt(fn, p, data, {"w": (2, 4)}),
    "sparse_gpt_int4": lambda fn, p, data, spec: P.sparse_gpt(
        fn, p, data, {"w": 0.5}, quantize=spec
    ),
}


def _two_sites(p, a, b):
    return tuple((x * p["s"][None]) @ p["w"] + p["b"][None] for x in (a, b))


@pytest.mark.parametrize("name", DATA_DRIVEN)
def test_law_of_uses(name):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    params = {"w": draw(16, 6), "s": jnp.exp(draw(16)), "b": draw(6)}
    a, b = draw(40, 16) @ draw(16, 16) + draw(1, 16), 5 * draw(24, 16) @ draw(16, 16)
    new, state = DATA_DRIVEN[name](_two_sites, params, [(a, b)], INT4)
    comp, plain = ptq.recipe(INT4), params
    view = new
    if name.startswith("sparse_gpt"):
        plain = params | {"w": jnp.where(new["w"] != 0, params["w"], 0)}
    else:
        view = comp.apply(new, state)
    if not name.startswith("sparse_gpt") or name.endswith("int4"):
        kept = plain["w"] != 0
        plain = comp.apply(plain, comp.init(params))
        plain |= {"w": jnp.where(kept, plain["w"], 0)}

    def outputs(p):
        w, s, bias = (np.asarray(p[key], np.float64) for key in ("w", "s", "b"))
        return np.concatenate([np.asarray(x, np.float64) * s for x in (a, b)]) @ w + bias

    error = lambda p: np.sum((outputs(p) - outputs(params)) ** 2)
    assert error(view) <= error(plain) * (1 + 1e-5)
