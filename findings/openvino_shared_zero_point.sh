#!/usr/bin/env bash
# OpenVINO gives another result when two grids share one zero point initializer around a mean.
#
# openvino 2026.4.0, onnx 1.23.2, numpy 2.4.6; CPU plugin, x86-64.
# int8 tensor -> DequantizeLinear -> ReduceSum -> Mul by 1/N -> QuantizeLinear -> DequantizeLinear,
# which is a mean. Both grids have the zero point -128. Written as two initializers of that value the
# result is right; as one initializer that both grids name (the same network by the ONNX standard)
# every number is wrong, even far outside of the last grid. Written as ReduceMean both are right.
# Seen: two initializers: 0.0 steps off; one initializer: 8064.0 steps off
#
# Exit status: 0 while the file with one initializer is wrong and that with two is right.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q openvino==2026.4.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
env/bin/python - <<'PY'
import numpy as np
import onnx
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

S_IN, S_OUT, ZERO, SIZE = 0.02, 0.01, -128, 8


def model(shared):
    out_zero = "z" if shared else "z_out"
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s_in", "z"], ["q2"]),
        node("DequantizeLinear", ["q2", "s_in", "z"], ["d2"]),
        node("ReduceSum", ["d2", "axes"], ["sum"], keepdims=0),
        node("Mul", ["sum", "inverse"], ["mean"]),
        node("QuantizeLinear", ["mean", "s_out", out_zero], ["q3"]),
        node("DequantizeLinear", ["q3", "s_out", out_zero], ["y"]),
    ]
    constants = {
        "s_in": np.float32(S_IN),
        "s_out": np.float32(S_OUT),
        "z": np.int8(ZERO),
        "z_out": np.int8(ZERO),
        "axes": np.array([2, 3], np.int64),
        "inverse": np.float32(1 / SIZE**2),
    }
    if shared:
        del constants["z_out"]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


x = np.random.default_rng(0).uniform(0, 2, (1, 4, SIZE, SIZE)).astype(np.float32)


def snap(a, scale):
    return (np.clip(np.rint(a / scale) + ZERO, -128, 127) - ZERO) * scale


want = snap(snap(x.astype(np.float64), S_IN).mean((2, 3)), S_OUT)
errors = {}
for shared in (False, True):
    onnx.save(model(shared), "mean.onnx")
    run = ov.Core().compile_model("mean.onnx", "CPU")
    errors[shared] = np.abs(run(x)[0] - want).max() / S_OUT
    print(f"{'one initializer' if shared else 'two initializers'}: {errors[shared]:.1f} steps off")
raise SystemExit(not (errors[False] <= 1.5 and errors[True] > 10))
PY
