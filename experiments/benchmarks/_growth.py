"""One measurement of `growth` in a process of its own, so that nothing is compiled beforehand.

    python -P experiments/benchmarks/_growth.py ENTRY LAYERS SEED

Imports the package from the folder in PYTHONPATH, which may be an older version of it: what is
called here has been there for long. Prints one line of JSON.
"""

import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

import jaxcompress as jc
from jaxcompress.formats import integer
from jaxcompress.prune.channels.smaller_networks import shrink
from jaxcompress.quantize import Spec

ROWS, WIDTH, CLASSES = 32, 32, 10


def main(entry: str, layers: int, seed: int) -> dict:
    """Seconds, calls of `jax.make_jaxpr` and compilations of one call."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape) / WIDTH**0.5, jnp.float32)
    params = {f"{k:02}": {"w": draw(WIDTH, WIDTH), "b": draw(WIDTH)} for k in range(layers)}
    params["out"] = {"w": draw(WIDTH, CLASSES), "b": draw(CLASSES)}
    x, traces, compiled = draw(ROWS, WIDTH) * WIDTH**0.5, [], []

    def network(params, x):
        for name in sorted(params):
            x = x @ params[name]["w"] + params[name]["b"]
            x = jax.nn.relu(x) if name != "out" else x
        return x

    make_jaxpr = jax.make_jaxpr

    def counted(*args, **kwargs):
        traces.append(1)
        return make_jaxpr(*args, **kwargs)

    jax.make_jaxpr = counted
    backend = "/jax/core/compile/backend_compile_duration"
    monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(1) if event == backend else None
    )
    jax.block_until_ready(x)
    compiled.clear()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.block_until_ready(jax.tree.leaves(ENTRIES[entry](network, params, x)))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "traces": len(traces), "compilations": len(compiled)}


def _narrow(fn, params, x):
    found = jc.search.narrow(fn, params, [(x,)], 0.6, allocation="loss")
    return found.params


def _shrink(fn, params, x):
    groups = jc.graph.axes(fn, params, x).groups
    kept = {name: np.arange(g.size) % 2 == 0 for name, g in groups.items() if g.size == WIDTH}
    return shrink(fn, params, kept, x)[1]


def _compress(fn, params, x):
    floats = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    budget = jc.search.Budget(weight_bytes=floats // 5)
    found = jc.search.compress(fn, params, [(x,)], device="stm32h743", budget=budget, candidates=2)
    return found.packed


def _onnx(fn, params, x):
    with tempfile.TemporaryDirectory() as folder:
        jc.export.onnx(fn, params, x, path=Path(folder) / "f.onnx", verify=False)
    return ()


def _gptq(fn, params, x):
    return jc.quantize.gptq(fn, params, [(x,)], {".*w": Spec(integer(4))})[0]


ENTRIES = {
    "trace": lambda fn, params, x: (jc.graph.trace(fn, params, x), ())[1],
    "cost": lambda fn, params, x: (jc.cost.estimate(fn, params, x, device="stm32h743"), ())[1],
    "axes": lambda fn, params, x: (jc.graph.axes(fn, params, x), ())[1],
    "shrink": _shrink,
    "gptq": _gptq,
    "compress": _compress,
    "narrow": _narrow,
    "onnx": _onnx,
}

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
