#!/usr/bin/env bash
# safetensors 0.8.0, safetensors.numpy (NumPy 2.4.6, Python 3.11).
#
# Guess: `save` writes the elements of an array in the order in which NumPy indexes them, or refuses
# an array that is not C-contiguous (as the PyTorch front end does).
# Seen: it writes the memory of the array and the shape of the view, without an error. A transposed
# or Fortran-ordered array comes back with its elements permuted, a strided slice with the values of
# its neighbours. `safetensors.flax` is right, since it makes a new array first.
#
#   transposed [[0, 3], [1, 4], [2, 5]] comes back as [[0, 1], [2, 3], [4, 5]]
#   every second column [[0, 2], [3, 5]] comes back as [[0, 1], [2, 3]]
#
# What to do: np.ascontiguousarray(x) before `save`; a kernel read as [out, in] and transposed for
# JAX is the usual case.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import numpy as np
from safetensors.numpy import load, save

base = np.arange(6, dtype=np.float32).reshape(2, 3)
views = {"transposed": base.T, "every second column": base[:, ::2], "Fortran": np.asfortranarray(base)}
seen = {name: load(save({"x": view}))["x"] for name, view in views.items()}
for name, view in views.items():
    print(f"{name} {view.tolist()} comes back as {seen[name].tolist()}")
assert seen["transposed"].tolist() == [[0, 1], [2, 3], [4, 5]]
assert seen["every second column"].tolist() == [[0, 1], [2, 3]]
assert seen["Fortran"].tolist() == [[0, 3, 1], [4, 2, 5]]
right = load(save({"x": np.ascontiguousarray(base.T)}))["x"]
assert np.array_equal(right, base.T)
PY
