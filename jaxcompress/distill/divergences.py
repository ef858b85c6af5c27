"""Divergences other than KL(teacher || student): reverse, skewed, Jensen-Shannon."""

import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.masks import kept_rows, reduced, zeroed
from jaxcompress.distill.probabilities import (
    both_log_probs,
    check_logits,
    check_share,
    kl,
)

Number = float | Array


def reverse_kd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Number = 1.0,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """KL(softmax(z_s / T) || softmax(z_t / T)), the mean over examples.

    Seeks a mode of the teacher rather than covering all of them. Not multiplied by T^2, as none
    of the divergences of this module.

    Args:
      student_logits, teacher_logits: [..., classes], any float dtype; the loss is float32.
      temperature: T > 0, may be traced.
      where: [...], nonzero where an example counts; None: everywhere. Others have no influence and
        no gradient; the mean is over those that count, 0 if none does.
      per_example: give [...] instead of the mean.

    Raises:
      ValueError: the shapes differ, there is no class axis, or a Python temperature is not above 0.

    Source: Gu et al. 2023, MiniLLM, arXiv 2306.08543, eq. 1.
    """
    check_logits(student_logits, teacher_logits)
    keep = kept_rows(where, student_logits.shape[:-1])
    student_logits, teacher_logits = zeroed(keep, student_logits, teacher_logits)
    log_s, log_t = both_log_probs(student_logits, teacher_logits, temperature)
    return reduced(kl(log_s, log_t), per_example, keep)


def skew_kd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    skew: Number = 0.1,
    temperature: Number = 1.0,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """KL(t || skew t + (1 - skew) s): at most -log(skew), the KL divergence at skew 0.

    Args:
      student_logits, teacher_logits, temperature, where, per_example: as in `reverse_kd`.
      skew: in [0, 1], may be traced.

    Raises:
      ValueError: as `reverse_kd`; a Python skew outside [0, 1].

    Source: Ko et al. 2024, DistiLLM, arXiv 2402.03898, eq. 4; with the constant sum of p_t log p_t
    that its code leaves out.
    """
    check_logits(student_logits, teacher_logits)
    check_share("skew", skew)
    keep = kept_rows(where, student_logits.shape[:-1])
    student_logits, teacher_logits = zeroed(keep, student_logits, teacher_logits)
    log_s, log_t = both_log_probs(student_logits, teacher_logits, temperature)
    return reduced(kl(log_t, _mixed(log_t, log_s, skew)), per_example, keep)


def reverse_skew_kd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    skew: Number = 0.1,
    temperature: Number = 1.0,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """KL(s || (1 - skew) t + skew s): at most -log(skew), `reverse_kd` at skew 0.

    Args, Raises and Source: as `skew_kd`.
    """
    check_logits(student_logits, teacher_logits)
    check_share("skew", skew)
    keep = kept_rows(where, student_logits.shape[:-1])
    student_logits, teacher_logits = zeroed(keep, student_logits, teacher_logits)
    log_s, log_t = both_log_probs(student_logits, teacher_logits, temperature)
    return reduced(kl(log_s, _mixed(log_s, log_t, skew)), per_example, keep)


def generalized_jsd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    beta: Number = 0.5,
    temperature: Number = 1.0,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s.

    At most ln 2 at beta 0.5. As in the paper's code, KL(t || s) at beta 0 and KL(s || t) at beta 1,
    which are the limits of the divergence over beta, and over 1 - beta: the value jumps there.

    Args:
      student_logits, teacher_logits, temperature, where, per_example: as in `reverse_kd`; the
        paper uses temperature 0.9.
      beta: in [0, 1], may be traced.

    Raises:
      ValueError: as `reverse_kd`; a Python beta outside [0, 1].

    Source: Agarwal et al. 2023, On-Policy Distillation (GKD), arXiv 2306.13649, eq. 1.
    """
    check_logits(student_logits, teacher_logits)
    check_share("beta", beta)
    keep = kept_rows(where, student_logits.shape[:-1])
    student_logits, teacher_logits = zeroed(keep, student_logits, teacher_logits)
    log_s, log_t = both_log_probs(student_logits, teacher_logits, temperature)
    weight = jnp.asarray(beta, jnp.float32)
    ends = (weight == 0) | (weight == 1)
    inner = jnp.where(ends, 0.5, weight)
    mixture = _mixed(log_t, log_s, inner)
    losses = inner * kl(log_t, mixture) + (1.0 - inner) * kl(log_s, mixture)
    losses = jnp.where(weight == 0, kl(log_t, log_s), losses)
    return reduced(jnp.where(weight == 1, kl(log_s, log_t), losses), per_example, keep)


def _mixed(log_p: Array, log_q: Array, share: Number) -> Array:
    # log(share p + (1 - share) q), exact where p or q underflow.
    weight = jnp.asarray(share, jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    one, other = (jnp.log(jnp.maximum(w, tiny)) for w in (weight, 1.0 - weight))
    mixed = jnp.logaddexp(log_p + one, log_q + other)
    return jnp.where(weight == 0, log_q, jnp.where(weight == 1, log_p, mixed))
