"""Losses on relations against float64 NumPy, invariances, degenerate batches, sharded batches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _distill import agrees, bounded, gradient, largest_gradient, normal, numeric_gradient
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import distill

pytestmark = pytest.mark.broad


def f32(x):
    return jnp.asarray(x, jnp.float32)


# --- float64 references, by loops over examples


def flat(x):
    return x.reshape(len(x), -1)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sp_reference(s, t):
    g = [unit(flat(x) @ flat(x).T) for x in (s, t)]
    return np.linalg.norm(g[1] - g[0]) ** 2 / len(s) ** 2


def huber(d):
    return np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5)


def distance_reference(s, t):
    def relative(x):
        d = np.array([[np.linalg.norm(a - b) for a in flat(x)] for b in flat(x)])
        return d / d[d > 0].mean()

    return huber(relative(s) - relative(t)).mean()


def angle_reference(s, t):
    n, total = len(s), np.zeros(())
    s, t = flat(s), flat(t)
    for i in range(n):
        for j in range(n):
            for k in range(n):
                if i in (j, k):
                    continue
                cos = [np.dot(unit(x[j] - x[i]), unit(x[k] - x[i])) for x in (s, t)]
                total += huber(cos[0] - cos[1])
    return total / n**3


def cosines(x):
    return unit(flat(x)) @ unit(flat(x)).T


def pkt_reference(s, t):
    p = [(cosines(x) + 1) / 2 for x in (s, t)]
    p_s, p_t = (q / q.sum(1, keepdims=True) for q in p)
    return (p_t * np.log((p_t + 1e-7) / (p_s + 1e-7))).mean()


def cckd_reference(s, t, gamma=0.4, order=2):
    def kernel(x):
        terms = [(2 * gamma) ** p / math.factorial(p) * cosines(x) ** p for p in range(order + 1)]
        return math.exp(-2 * gamma) * np.sum(terms, axis=0)

    return ((kernel(s) - kernel(t)) ** 2).mean()


def bilinear_reference(s, t):
    return ((flat(s) @ flat(s).T - flat(t) @ flat(t).T) ** 2).mean()


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def minilm_reference(s, t):
    def relation(x):
        x, y = x if isinstance(x, tuple) else (x, x)
        return softmax(np.einsum("bhid,bhjd->bhij", x, y) / math.sqrt(x.shape[-1]))

    r_s, r_t = relation(s), relation(t)
    return (r_t * np.log(r_t / r_s)).sum(-1).mean()


CASES = {
    "similarity_preserving": (distill.similarity_preserving, sp_reference),
    "rkd_distance": (distill.rkd_distance, distance_reference),
    "rkd_angle": (distill.rkd_angle, angle_reference),
    "pkt": (distill.pkt, pkt_reference),
    "cckd": (distill.cckd, cckd_reference),
    "cckd_bilinear": (distill.cckd_bilinear, bilinear_reference),
}
SCALE_FREE = [name for name in CASES if name != "cckd_bilinear"]


@pytest.mark.parametrize("name", CASES)
def test_equals_float64_and_so_does_the_gradient(name):
    loss, reference = CASES[name]
    agrees(loss, reference, normal(0, 5, 3), 4 * normal(1, 5, 2, 3) + 0.5, rtol=5e-5)


def test_minilm_equals_float64_and_so_does_the_gradient():
    s, t = normal(2, 2, 2, 3, 2), normal(3, 2, 2, 3, 5)
    agrees(distill.minilm_relation, minilm_reference, s, t, rtol=5e-5)
    q, k = normal(4, 2, 2, 3, 5), normal(5, 2, 2, 3, 5)
    value = distill.minilm_relation((f32(s), f32(s)), (f32(q), f32(k)))
    np.testing.assert_allclose(value, minilm_reference(s, (q, k)), rtol=2e-5)


# --- invariances


def rotation(seed, size):
    return np.linalg.qr(normal(seed, size, size))[0]


@pytest.mark.parametrize("name", CASES)
def test_rotations_change_nothing_and_examples_may_change_places(name):
    loss = jax.jit(CASES[name][0])
    s, t = normal(6, 6, 8), normal(7, 6, 8)
    base = loss(f32(s), f32(t))
    np.testing.assert_allclose(loss(f32(s @ rotation(8, 8)), f32(t)), base, rtol=2e-5)
    order = np.random.default_rng(9).permutation(6)
    np.testing.assert_allclose(loss(f32(s[order]), f32(t[order])), base, rtol=2e-5)
    if name in SCALE_FREE:
        for scale in (1e-6, 1e6, 1e15):
            np.testing.assert_allclose(loss(f32(scale * s), f32(t)), base, rtol=2e-5)
    each = np.array([0.1, 1, 5, 2, 0.3, 10])[:, None]
    if name in ("pkt", "cckd"):
        np.testing.assert_allclose(loss(f32(each * s), f32(t)), base, rtol=2e-5)
    else:
        assert abs(float(loss(f32(each * s), f32(t))) / float(base) - 1) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_same_relations_in_more_dimensions_are_free(name):
    loss = jax.jit(CASES[name][0])
    t = normal(10, 6, 8)
    embedded = t @ rotation(11, 12)[:8]
    other = float(loss(f32(normal(12, 6, 8)), f32(t)))
    assert other > 1e-5
    assert abs(float(loss(f32(embedded), f32(t)))) < 1e-5 * other
    if name.startswith("rkd"):
        assert float(loss(f32(3 * embedded + 7), f32(t))) < 1e-5 * other
    elif name in SCALE_FREE:
        assert float(loss(f32(embedded + 2), f32(t))) > 1e-3 * other, "not invariant to shifts"


def test_bounds():
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0]])
    aligned = np.array([[1.0, 0.0], [1.0, 0.0]])
    # rows (1, -1) / sqrt 2 and (1, 1) / sqrt 2 differ by 2 in one entry of each row: 2 * 2 / 4
    np.testing.assert_allclose(
        distill.similarity_preserving(f32(opposite), f32(aligned)), 1.0, rtol=1e-6
    )
    for seed in range(5):
        s, t = f32(normal(seed, 6, 3)), f32(normal(seed + 50, 6, 3))
        assert 0 <= float(distill.similarity_preserving(s, t)) <= 4 / 6
        assert float(distill.pkt(s, t)) >= -1e-7  # KL of rows, up to epsilon


def test_many_terms_are_the_gaussian_kernel():
    s, t = normal(13, 4, 3), normal(14, 4, 3)
    gauss = lambda x: np.exp(-0.7 * ((unit(x)[:, None] - unit(x)[None]) ** 2).sum(-1))
    expected = ((gauss(s) - gauss(t)) ** 2).mean()
    np.testing.assert_allclose(
        distill.cckd(f32(s), f32(t), gamma=0.7, order=14), expected, rtol=1e-4
    )
    np.testing.assert_allclose(
        jax.jit(distill.cckd)(f32(s), f32(t), gamma=0.7), cckd_reference(s, t, gamma=0.7), rtol=1e-4
    )


# --- degenerate batches


def degenerate():
    s = normal(15, 6, 4)
    equal = np.ones((6, 4)) * normal(16, 4)
    pair = s.copy()
    pair[1] = pair[0]
    dead = s.copy()
    dead[2] = 0
    opposite = s.copy()
    opposite[3] = -opposite[4]
    return {
        "duplicates": pair,
        "near duplicates": np.where(np.arange(6)[:, None] == 1, s[:1] * (1 + 1e-6), s),
        "equal": equal,
        "nearly equal": equal * (1 + 1e-7 * s),
        "dead example": dead,
        "nearly dead example": dead + 1e-9 * (dead == 0),
        "dead": np.zeros((6, 4)),
        "tiny": 1e-25 * s,
        "opposite": opposite,
        "constant rows": s[:, :1] * np.ones(4),
    }


@pytest.mark.parametrize("name", SCALE_FREE)
def test_degenerate_batches_have_bounded_gradients(name):
    loss = CASES[name][0]
    s, t = normal(17, 6, 4), normal(18, 6, 4)
    usual = largest_gradient(loss, s, t)
    for kind, batch in degenerate().items():
        scale = np.abs(batch).mean() or 1.0
        batch = batch if kind == "tiny" else batch / scale
        bound = 1e4 * usual * (1e25 if kind == "tiny" else 1)
        bounded(loss, batch, t, bound)
        bounded(loss, batch, batch, bound)
        bounded(loss, s, batch, 10 * usual)


def test_minilm_of_far_and_equal_tokens_has_bounded_gradients():
    far = np.array([[[[400.0, -400.0], [0.0, 400.0], [1.0, 1.0]]]])
    for s, t in ((far, -far), (0 * far, far), (far, 0 * far), (0 * far, 0 * far)):
        bounded(distill.minilm_relation, s, t, 1e3)


def test_equal_embeddings_of_the_student_do_not_move_by_rkd():
    # the only direction in sight is rounding: torch's original has gradients of 1e10 there
    equal, t = jnp.ones((4, 3)), f32(normal(19, 4, 3))
    for loss in (distill.rkd_distance, distill.rkd_angle):
        value, grad = gradient(loss)(equal, t)
        assert float(value) > 0 and not np.any(np.asarray(grad))


# --- MiniLM's mask


def test_padding_is_not_attended_to_and_extending_it_changes_nothing():
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    s, t = normal(20, 2, 2, 3, 2), normal(21, 2, 2, 3, 5)
    expected = [minilm_reference(s[:1, :, :2], t[:1, :, :2]), 0.0]  # one token: its relation is 1
    loss = jax.jit(distill.minilm_relation, static_argnames="per_example")
    each = loss(f32(s), f32(t), where=mask, per_example=True)
    np.testing.assert_allclose(each, expected, rtol=2e-5, atol=1e-7)
    base = loss(f32(s), f32(t), where=mask)
    np.testing.assert_allclose(base, (2 * expected[0] + expected[1]) / 3, rtol=2e-5)
    gone = np.asarray(mask == 0)[:, None, :, None]
    spoiled = [f32(np.where(gone, np.nan, x)) for x in (s, t)]
    value, grad = jax.value_and_grad(lambda s: loss(s, spoiled[1], where=mask))(spoiled[0])
    np.testing.assert_allclose(value, base, rtol=1e-6)
    assert np.all(np.isfinite(grad)) and np.any(np.asarray(grad))
    assert not np.any(np.where(gone, grad, 0))
    longer = [f32(np.pad(x, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=3.0)) for x in (s, t)]
    np.testing.assert_allclose(
        loss(*longer, where=jnp.pad(mask, ((0, 0), (0, 2)))), base, rtol=1e-6
    )
    assert float(loss(f32(s), f32(t), where=0 * mask)) == 0.0
    plain = loss(f32(s), f32(t))
    np.testing.assert_allclose(loss(f32(s), f32(t), where=0 * mask + 1), plain, rtol=1e-6)
    np.testing.assert_allclose(loss(f32(s), f32(t), per_example=True).mean(), plain, rtol=1e-6)


# --- CRD

N, B, K = 20, 4, 6
INDICES = np.array([3, 0, 19, 7])


def crd_case(width=5):
    s, t = normal(22, B, 6), normal(23, B, 2, 3)
    learned, memory = distill.crd_init(
        jax.random.key(0), s, jax.ShapeDtypeStruct(t.shape, jnp.float32), examples=N, width=width
    )
    negatives = np.random.default_rng(24).integers(0, N, (B, K))
    return s, t, learned, memory, jnp.asarray(negatives)


def crd_reference(s, t, learned, memory, negatives, z=None):
    learned, memory = jax.tree.map(lambda a: np.asarray(a, np.float64), (learned, memory))
    embed = lambda x, p: unit(flat(x) @ p["kernel"] + p["bias"])
    e_s, e_t = embed(s, learned.student), embed(t, learned.teacher)
    rows = np.concatenate([INDICES[:, None], np.asarray(negatives)], axis=1)
    total, zs = np.zeros(B), []
    for i, (e, m) in enumerate(((e_s, memory.teacher), (e_t, memory.student))):
        o = np.exp(np.array([[m[r] @ e[b] / 0.07 for r in rows[b]] for b in range(B)]))
        zs.append(o.mean() * N if z is None else z[i])
        o, c = o / zs[-1], K / N
        total -= np.log(o[:, 0] / (o[:, 0] + c + 1e-7))
        total -= np.log(c / (o[:, 1:] + c + 1e-7)).sum(1)
    moved = [m.copy() for m in (memory.student, memory.teacher)]
    for m, e in zip(moved, (e_s, e_t), strict=True):
        m[INDICES] = unit(0.5 * m[INDICES] + 0.5 * e)
    return total, moved, zs


@functools.cache
def crd_program():
    return jax.jit(distill.crd, static_argnames="per_example")


def test_crd_equals_float64_over_two_batches():
    s, t, learned, memory, negatives = crd_case()
    expected, moved, z = crd_reference(s, t, learned, memory, negatives)
    args = (jnp.asarray(INDICES), negatives, learned)
    each, memory = crd_program()(f32(s), f32(t), *args, memory, per_example=True)
    np.testing.assert_allclose(each, expected, rtol=1e-4)
    np.testing.assert_allclose(memory.student, moved[0], atol=1e-6)
    np.testing.assert_allclose(memory.teacher, moved[1], atol=1e-6)
    np.testing.assert_allclose(jnp.exp(memory.log_z_student), z[0], rtol=1e-4)
    # the second batch keeps Z
    s, t = normal(25, B, 6), normal(26, B, 2, 3)
    expected, _, _ = crd_reference(s, t, learned, memory, negatives, z)
    value, later = crd_program()(f32(s), f32(t), *args, memory)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)
    assert later.log_z_student == memory.log_z_student
    assert later.log_z_teacher == memory.log_z_teacher


def test_settings_that_are_numbers_are_traced():
    s, t, learned, memory, negatives = crd_case()
    traces = []

    @jax.jit
    def run(temperature, momentum, gamma, epsilon, power):
        traces.append(1)
        args = (f32(s), f32(t), jnp.asarray(INDICES), negatives, learned, memory)
        crd, _ = distill.crd(*args, temperature=temperature, momentum=momentum)
        maps = f32(s)[:, None, None], f32(t)[:, None]
        return (
            crd,
            distill.cckd(f32(s), f32(t), gamma=gamma),
            distill.pkt(f32(s), f32(t), epsilon=epsilon),
            distill.attention_transfer(maps[1], 2 + maps[1] * maps[1], power=power),
        )

    first, second = run(0.07, 0.5, 0.4, 1e-7, 2.0), run(0.2, 0.1, 0.7, 1e-2, 3.0)
    assert len(traces) == 1
    assert all(float(abs(a - b)) > 1e-9 for a, b in zip(first, second, strict=True))


def test_crd_gradients_reach_features_and_both_projections():
    s, t, learned, memory, negatives = crd_case(width=3)
    _, known = crd_program()(f32(s), f32(t), jnp.asarray(INDICES), negatives, learned, memory)
    z = [float(jnp.exp(known.log_z_student)), float(jnp.exp(known.log_z_teacher))]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def grads(s, t, learned):
        return distill.crd(s, t, jnp.asarray(INDICES), negatives, learned, known)[0]

    by_s, by_t, by_learned = grads(f32(s), f32(t), learned)

    def reference(point):
        s, p_s, p_t = point
        changed = learned._replace(
            student=learned.student | {"kernel": p_s}, teacher=learned.teacher | {"kernel": p_t}
        )
        return crd_reference(s, t, changed, known, negatives, z)[0].mean()

    point = [s, *(np.asarray(p["kernel"], np.float64) for p in learned)]
    found = [by_s, *(p["kernel"] for p in by_learned)]
    for i, grad in enumerate(found):
        at = lambda x, i=i: reference([*point[:i], x, *point[i + 1 :]])
        numeric = numeric_gradient(at, point[i])
        np.testing.assert_allclose(grad, numeric, atol=1e-3 * np.abs(numeric).max())
    assert not np.any(np.asarray(by_t)), "the teacher's features get no gradient"


def test_crd_memory_rows_have_length_one_and_only_those_of_the_batch_change():
    s, t, learned, memory, negatives = crd_case()
    _, later = crd_program()(f32(s), f32(t), jnp.asarray(INDICES), negatives, learned, memory)
    for before, after in ((memory.student, later.student), (memory.teacher, later.teacher)):
        np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1.0, rtol=1e-6)
        changed = np.flatnonzero(np.any(np.asarray(before != after), axis=1))
        np.testing.assert_array_equal(changed, np.sort(INDICES))
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, later)
    assert not memory.ready and later.ready
    donated = jax.jit(lambda m: m, donate_argnums=0)(memory)
    assert jax.tree.map(jnp.shape, donated) == jax.tree.map(jnp.shape, later)


def test_crd_training_pulls_the_pairs_together_and_scans():
    s, t, learned, memory, negatives = crd_case()
    tx = optax.sgd(0.05)

    def step(carry, _):
        learned, memory, opt = carry

        def loss(learned):
            return distill.crd(f32(s), f32(t), jnp.asarray(INDICES), negatives, learned, memory)

        (value, memory), grads = jax.value_and_grad(loss, has_aux=True)(learned)
        updates, opt = tx.update(grads, opt)
        return (optax.apply_updates(learned, updates), memory, opt), value

    start = (learned, memory, tx.init(learned))
    (_, memory, _), values = jax.jit(lambda c: jax.lax.scan(step, c, length=30))(start)
    assert float(values[-1]) < float(values[0]) - 1
    pairs = np.sum(np.asarray(memory.student * memory.teacher)[INDICES], axis=1)
    assert np.all(pairs > 0.5)


def test_crd_of_dead_features_and_extreme_temperatures_has_bounded_gradients():
    s, t, learned, memory, negatives = crd_case()

    @jax.jit
    def both(s, temperature, learned):
        loss = lambda s, p: distill.crd(
            s, f32(t), jnp.asarray(INDICES), negatives, p, memory, temperature=temperature
        )
        (value, new), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(s, learned)
        return value, new, grads

    largest = lambda tree: max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))
    usual = largest(both(f32(s), 0.07, learned)[2])
    dead = largest(both(f32(0 * s), 0.07, learned)[2])
    assert dead < 1e4 * usual
    for temperature in (1e-3, 1e3):
        value, new, grads = both(f32(s), temperature, learned)
        assert np.isfinite(value) and largest((new, grads)) < 1e5
    low = crd_program()(
        jnp.asarray(s, jnp.bfloat16), f32(t), jnp.asarray(INDICES), negatives, learned, memory
    )
    assert low[0].dtype == jnp.float32 and low[1].student.dtype == jnp.float32


def test_negatives_are_of_other_classes_and_even():
    labels = jnp.array([2, 0, 1, 0, 2, 2, 1, 0])
    indices = jnp.array([0, 1, 2])
    draw = jax.jit(distill.crd_negatives, static_argnames="count")
    drawn = np.asarray(draw(jax.random.key(0), indices, labels, count=4000))
    assert drawn.shape == (3, 4000)
    for i, row in zip(indices, drawn, strict=True):
        others = np.flatnonzero(np.asarray(labels) != int(labels[i]))
        counts = np.bincount(row, minlength=8)
        assert set(np.flatnonzero(counts)) == set(others)
        expected = 4000 / len(others)
        assert np.all(np.abs(counts[others] - expected) < 5 * math.sqrt(expected))
    alone = np.asarray(draw(jax.random.key(1), indices, jnp.arange(8), count=200))
    assert all(set(row) == set(range(8)) - {int(i)} for i, row in zip(indices, alone, strict=True))
    same = np.asarray(draw(jax.random.key(2), indices, jnp.zeros(8, jnp.int32), count=200))
    assert set(same.ravel()) == set(range(8))


# --- sharded batches


def on_devices(count):
    mesh = jax.make_mesh(
        (count,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
    along = NamedSharding(mesh, PartitionSpec("d"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return (lambda tree: jax.device_put(tree, along)), (
        lambda tree: jax.device_put(tree, everywhere)
    )


@pytest.mark.broad
def test_one_to_eight_devices_agree_in_values_and_gradients():
    s, t = normal(27, 16, 3, 4).astype(np.float32), normal(28, 16, 5).astype(np.float32)
    s[9] = s[2]  # equal examples, on different devices
    tokens = normal(29, 16, 2, 3, 4).astype(np.float32), normal(30, 16, 2, 3, 5).astype(np.float32)
    learned, memory = distill.crd_init(jax.random.key(3), s, t, examples=24, width=8)
    indices = np.random.default_rng(31).permutation(24)[:16]
    negatives = np.random.default_rng(32).integers(0, 24, (16, 5))

    @jax.jit
    def run(s, t, tokens, indices, negatives, learned, memory):
        found = {name: jax.value_and_grad(loss)(s, t) for name, (loss, _) in CASES.items()}
        found["minilm_relation"] = jax.value_and_grad(distill.minilm_relation)(*tokens)
        found["crd"] = jax.value_and_grad(distill.crd, argnums=(0, 4), has_aux=True)(
            s, t, indices, negatives, learned, memory
        )
        return found

    results = []
    for count in (1, 2, 4, 8):
        along, everywhere = on_devices(count)
        found = run(*along((s, t, tokens, indices, negatives)), *everywhere((learned, memory)))
        assert len(found["rkd_angle"][1].sharding.device_set) == count
        results.append(jax.tree.map(lambda x: np.asarray(x, np.float64), found))
    for other in results[1:]:
        for name, alone in results[0].items():
            pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(other[name]), strict=True)
            for one, many in pairs:
                scale = max(np.abs(one).max(), 1e-30)
                np.testing.assert_allclose(many / scale, one / scale, atol=1e-6, err_msg=name)


# --- dtypes and errors


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_features_are_computed_in_float32(name):
    loss = CASES[name][0]
    s, t = (jnp.asarray(normal(i, 6, 4), jnp.bfloat16) for i in (33, 34))
    value = loss(s, t)
    np.testing.assert_allclose(value, loss(s.astype(jnp.float32), t.astype(jnp.float32)), rtol=1e-6)
    assert value.dtype == jnp.float32


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distill.similarity_preserving(X, X[:1]), r"same N, got \(2, 3\) and \(1, 3\)"),
        (lambda: distill.pkt(X[0], X[0]), r"must be \[N, \.\.\.\] with the same N, got \(3,\)"),
        (lambda: distill.cckd_bilinear(X[:0], X[:0]), r"with the same N, got \(0, 3\)"),
        (lambda: distill.rkd_distance(X[:1], X[:1]), "at least 2 examples, got 1"),
        (lambda: distill.rkd_angle(X, X), "at least 3 examples, got 2"),
        (lambda: distill.cckd(X, X, order=0), "order must be at least 1, got 0"),
        (
            lambda: distill.minilm_relation(X, X),
            r"student must be \[B, heads, T, d\] or two such arrays, got \(2, 3\)",
        ),
        (
            lambda: distill.minilm_relation(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 4, 3, 2))),
            r"agree in \[B, heads, T\], got \(1, 2, 3, 4\) and \(1, 4, 3, 2\); reshape",
        ),
        (
            lambda: distill.minilm_relation(*[jnp.ones((1, 2, 3, 4))] * 2, where=jnp.ones((1, 2))),
            r"where must be a mask of shape \(1, 3\), got \(1, 2\)",
        ),
        (
            lambda: distill.crd_init(jax.random.key(0), X, X, examples=0),
            "examples must be at least 1",
        ),
    ],
)
def test_errors_say_what_would_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_errors_of_crd():
    s, t, learned, memory, negatives = crd_case()
    s, t, indices = f32(s), f32(t), jnp.asarray(INDICES)
    with pytest.raises(
        ValueError, match=r"indices must be \[B\] .* B = 4, got \(3,\) and \(4, 6\)"
    ):
        distill.crd(s, t, indices[:3], negatives, learned, memory)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        distill.crd(s, t, indices, negatives, learned, memory, temperature=0)
    with pytest.raises(ValueError, match=r"initialized for 6 channels, got features \(4, 5\)"):
        distill.crd(s[:, :5], t, indices, negatives, learned, memory)
