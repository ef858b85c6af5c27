#!/usr/bin/env bash
# JAX 0.10.2 on CPU (Python 3.11); the same with JAX 0.12.0.1 (Python 3.12).
#
# Guess: sums and means of float8 arrays are accumulated in float32 and rounded once, as those of
# bfloat16 and float16 are (the mean of any number of ones is 1).
# Seen: they are accumulated in float8 itself. The sum stops growing where the step between two
# numbers exceeds the addend, so a mean of ones falls as their number grows; once the number of elements
# is beyond the largest float8 (448), the mean of a float8_e4m3fn array is NaN.
#
#   float8_e4m3fn: mean of 16 ones 1.0, of 20 0.8125, of 96 0.5, of 1000 nan
#   float8_e5m2:   mean of 16 ones 0.5, of 96 0.25
#   bfloat16:      1.0 every time
#
# What to do: jnp.mean(x, dtype=jnp.float32), for statistics of float8 weights and activations too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax.numpy as jnp

mean = lambda count, dtype: float(jnp.mean(jnp.ones(count, dtype)))
for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16):
    print(dtype.__name__, {count: mean(count, dtype) for count in (16, 20, 96, 1000)})
assert mean(96, jnp.float8_e4m3fn) == 0.5
assert mean(96, jnp.float8_e5m2) == 0.25
assert mean(1000, jnp.float8_e4m3fn) != mean(1000, jnp.float8_e4m3fn)  # NaN
assert mean(96, jnp.bfloat16) == 1.0
assert float(jnp.mean(jnp.ones(96, jnp.float8_e4m3fn), dtype=jnp.float32)) == 1.0
PY
