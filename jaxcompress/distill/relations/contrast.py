"""Contrastive representation distillation (CRD), with memories of all examples' embeddings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.features.feature_arrays import check_same_examples, over_examples, unit
from jaxcompress.distill.features.projectors import linear_projector
from jaxcompress.distill.masks import count_of, kept_rows, zeroed

_FLOOR = 1e-4  # lengths of embeddings count as no less


class CRDMemory(NamedTuple):
    """What `crd` remembers: kept in `TrainState.distill`, saved and resumed with it."""

    student: Array  # float32 [examples, width], rows of length 1
    teacher: Array  # float32 [examples, width], rows of length 1
    log_z_student: Array  # float32 [], log of the normalizer Z of the student's scores
    log_z_teacher: Array  # float32 []
    ready: Array  # bool [], Z is known


class CRDProjections(NamedTuple):
    """The learned part of `crd`: `linear_projector` params of both networks."""

    student: Any
    teacher: Any


def crd_init(
    key: Array, student: Any, teacher: Any, *, examples: int, width: int = 128
) -> tuple[CRDProjections, CRDMemory]:
    """Projections and memories for features of the given shapes.

    Args:
      key: of `jax.random`.
      student, teacher: features [N, ...], or their `jax.ShapeDtypeStruct`.
      examples: size of the training set.
      width: of the embeddings.

    Raises:
      ValueError: `examples` or `width` is below 1.
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    projector = linear_projector(width)
    keys = jax.random.split(key, 4)
    projections = [
        projector.init(k, _flat(f)) for k, f in zip(keys[:2], (student, teacher), strict=True)
    ]
    memory_s, memory_t = (
        unit(jax.random.normal(k, (examples, width), jnp.float32), _FLOOR) for k in keys[2:]
    )
    memory = CRDMemory(
        student=memory_s,
        teacher=memory_t,
        log_z_student=jnp.zeros((), jnp.float32),
        log_z_teacher=jnp.zeros((), jnp.float32),
        ready=jnp.zeros((), bool),
    )
    return CRDProjections(*projections), memory


def crd_negatives(key: Array, indices: Array, labels: Array, *, count: int) -> Array:
    """Draws examples of other classes, evenly and with replacement: int32 [B, count].

    Args:
      key: of `jax.random`.
      indices: [B] integers, the examples of the batch.
      labels: [examples] integers, the class of every example. `jnp.arange(examples)` makes each
        its own class: anything but the example itself.
      count: negatives per example; the paper takes 16384.

    A class that holds all examples has no negatives: they are then drawn from it.

    >>> labels = jnp.array([0, 1, 0, 1])
    >>> crd_negatives(jax.random.key(0), jnp.array([0]), labels, count=50)[0].tolist().count(1) > 9
    True
    """
    order = jnp.argsort(labels)
    ranked = labels[order]
    own = labels[indices]
    start = jnp.searchsorted(ranked, own, side="left")[:, None]
    size = jnp.searchsorted(ranked, own, side="right")[:, None] - start
    size = jnp.where(size == len(labels), 0, size)
    # A place among the sorted examples, with those of the own class skipped.
    shape = (len(indices), count)
    place = jax.random.randint(key, shape, 0, len(labels) - size)
    return order[jnp.where(place >= start, place + size, place)]


def crd(
    student: Array,
    teacher: Array,
    indices: Array,
    negatives: Array,
    projections: CRDProjections,
    memory: CRDMemory,
    *,
    temperature: float | Array = 0.07,
    momentum: float | Array = 0.5,
    where: Array | None = None,
    per_example: bool = False,
) -> tuple[Array, CRDMemory]:
    """(loss, memory): tells an example's embedding by the other network from those of others.

    With K negatives of n examples and o = exp(m . e / temperature) / Z, the scores of an embedding
    e with the other network's remembered m, Z = n times their mean in the first batch, the loss is
      -log(o_0 / (o_0 + K/n + 1e-7)) - sum_k log((K/n) / (o_k + K/n + 1e-7)),
    with the student's and with the teacher's embedding as the anchor, added. Then the memories of
    the batch's examples move: m <- unit(momentum m + (1 - momentum) e). The usual weight is 0.8.

    Args:
      student, teacher: [B, ...] features, flattened, any float dtype; the loss is float32.
      indices: [B] integers, which examples of the training set these are, each once.
      negatives: [B, K] integers, see `crd_negatives`.
      projections, memory: from `crd_init`; Optax trains the projections, also the teacher's.
      temperature: above 0, may be traced.
      momentum: in [0, 1], may be traced.
      where: [B], nonzero where an example counts; None: all. Others have no influence, no gradient
        and keep their memories; the mean is over those that count, 0 if none does.
      per_example: give [B] instead of the mean.

    The teacher's features get no gradient, nor do the memories. An index outside of the training
    set is not noticed.

    Raises:
      ValueError: not the same B; features of other shapes than at `crd_init`; a Python temperature
        not above 0.

    Source: Tian et al. 2020, Contrastive representation distillation, arXiv 1910.10699, section 3,
    memories and normalizers as in its code.
    """
    check_same_examples(student, teacher)
    if indices.shape != student.shape[:1] or negatives.ndim != 2 or len(negatives) != len(student):
        raise ValueError(
            f"indices must be [B] and negatives [B, K] with B = {len(student)}, got "
            f"{indices.shape} and {negatives.shape}"
        )
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    keep = kept_rows(where, indices.shape)
    student, teacher = zeroed(keep, student, jax.lax.stop_gradient(teacher))
    e_s, e_t = _embed(projections.student, student), _embed(projections.teacher, teacher)
    known = jax.tree.map(jax.lax.stop_gradient, memory)
    rows = jnp.concatenate([indices[:, None], negatives.astype(indices.dtype)], axis=1)
    n = len(known.student)
    t = jnp.asarray(temperature, jnp.float32)
    log_z = known.log_z_student, known.log_z_teacher
    loss_s, log_z_s = _contrast(known.teacher[rows], e_s, t, n, log_z[0], known.ready, keep)
    loss_t, log_z_t = _contrast(known.student[rows], e_t, t, n, log_z[1], known.ready, keep)
    memory = CRDMemory(
        _moved(known.student, indices, e_s, momentum, keep),
        _moved(known.teacher, indices, e_t, momentum, keep),
        log_z_s,
        log_z_t,
        jnp.ones((), bool) if keep is None else known.ready | jnp.any(keep),
    )
    return over_examples((loss_s + loss_t)[:, None], per_example, keep), memory


def _flat(features: Any) -> jax.ShapeDtypeStruct:
    size = 1
    for n in features.shape[1:]:
        size *= n
    return jax.ShapeDtypeStruct((features.shape[0], size), features.dtype)


def _embed(params: Any, features: Array) -> Array:
    width = params["bias"].shape[0]
    return unit(linear_projector(width).apply(params, features.reshape(len(features), -1)), _FLOOR)


def _contrast(
    remembered: Array,
    e: Array,
    temperature: Array,
    n: int,
    log_z: Array,
    ready: Array,
    keep: Array | None,
) -> tuple[Array, Array]:
    # remembered [B, 1 + K, width], e [B, width] -> the loss [B] and log Z
    high = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bkd,bd->bk", remembered, e, precision=high) / temperature
    seen = jax.lax.stop_gradient(scores)
    seen = seen if keep is None else jnp.where(keep[:, None], seen, -jnp.inf)
    size = count_of(keep, len(scores)) * scores.shape[1]
    first = jax.nn.logsumexp(seen) - jnp.log(size / n)
    known = ready if keep is None else ready | ~jnp.any(keep)
    log_z = jnp.where(known, log_z, first)
    log_o = scores - log_z
    noise = (scores.shape[1] - 1) / n
    # log(o / (o + c)) = log sigmoid(log o - log c), which neither overflows nor vanishes
    log_c = jnp.log(jnp.float32(noise + 1e-7))
    positive = jax.nn.log_sigmoid(log_o[:, 0] - log_c)
    negative = jnp.log(jnp.float32(noise)) - log_c + jax.nn.log_sigmoid(log_c - log_o[:, 1:])
    return -positive - jnp.sum(negative, axis=1), log_z


def _moved(
    memory: Array, indices: Array, e: Array, momentum: float | Array, keep: Array | None
) -> Array:
    m = jnp.asarray(momentum, jnp.float32)
    e = jax.lax.stop_gradient(e)
    new = unit(m * memory[indices] + (1 - m) * e, _FLOOR)
    new = new if keep is None else jnp.where(keep[:, None], new, memory[indices])
    return memory.at[indices].set(new)
