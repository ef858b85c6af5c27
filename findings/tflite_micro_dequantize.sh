#!/usr/bin/env bash
# TFLite-Micro's DEQUANTIZE multiplies all channels of a constant by the first channel's scale.
#
# tflite-micro 0.dev20261023182759, ai-edge-litert 2.3.0, flatbuffers 25.12.19, numpy 2.4.6; x86-64.
# A file of two operators: DEQUANTIZE of an int8 constant [2, 3] with a scale for each row (0.5 and
# 8), ADD of the float32 input. Weights that are quantized per channel and used in floats look like
# this. LiteRT uses both scales. TFLite-Micro loads the file without a word and uses 0.5 for both.
# Seen: LiteRT 0.0 off, TFLite-Micro 22.5 off; with 0.5 for both rows TFLite-Micro is 0.0 off
#
# Exit status: 0 while TFLite-Micro uses the first scale for all and LiteRT each row's own.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tflite-micro==0.dev20261023182759 ai-edge-litert==2.3.0 \
  flatbuffers==25.12.19 numpy==2.4.6
cd "$folder"
env/bin/python - 2>"$folder/log" <<'PY' || { status=$?; tail -5 "$folder/log"; exit "$status"; }
import flatbuffers
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from tflite_micro.python.tflite_micro import runtime
from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema

CODES = np.array([[1, 2, 3], [1, 2, 3]], np.int8)
SCALES = np.array([0.5, 8.0], np.float32)
FLOAT, INT8 = schema.TensorType.FLOAT32, schema.TensorType.INT8
ADD, DEQUANTIZE = schema.BuiltinOperator.ADD, schema.BuiltinOperator.DEQUANTIZE


def tensor(name, kind, buffer=0):
    made = schema.TensorT()
    made.name, made.type, made.shape, made.buffer = name, kind, [2, 3], buffer
    return made


def operator(index, inputs, outputs):
    made = schema.OperatorT()
    made.opcodeIndex, made.inputs, made.outputs = index, inputs, outputs
    return made


def code(builtin):
    made = schema.OperatorCodeT()
    made.builtinCode, made.deprecatedBuiltinCode, made.version = builtin, builtin, 2
    return made


weights = tensor("weights", INT8, 1)
weights.quantization = schema.QuantizationParametersT()
weights.quantization.scale = SCALES
weights.quantization.zeroPoint = np.zeros(2, np.int64)
weights.quantization.quantizedDimension = 0
add = operator(1, [0, 2], [3])
add.builtinOptionsType = schema.BuiltinOptions.AddOptions
add.builtinOptions = schema.AddOptionsT()
graph = schema.SubGraphT()
graph.tensors = [tensor("x", FLOAT), weights, tensor("floats", FLOAT), tensor("y", FLOAT)]
graph.inputs, graph.outputs = [0], [3]
graph.operators = [operator(0, [1], [2]), add]
empty, constant = schema.BufferT(), schema.BufferT()
constant.data = CODES.view(np.uint8).reshape(-1)
model = schema.ModelT()
model.version, model.subgraphs, model.buffers = 3, [graph], [empty, constant]
model.operatorCodes = [code(DEQUANTIZE), code(ADD)]
builder = flatbuffers.Builder(1024)
builder.Finish(model.Pack(builder), b"TFL3")
content = bytes(builder.Output())

x = np.zeros((2, 3), np.float32)
lite = Interpreter(model_content=content)
lite.allocate_tensors()
lite.set_tensor(lite.get_input_details()[0]["index"], x)
lite.invoke()
micro = runtime.Interpreter.from_bytes(content, arena_size=2**16)
micro.set_input(x, 0)
micro.invoke()
lite, micro = lite.get_tensor(lite.get_output_details()[0]["index"]), micro.get_output(0)
right, first = CODES * SCALES[:, None], CODES * SCALES[0]
off = [float(np.abs(y - want).max()) for y, want in ((lite, right), (micro, right), (micro, first))]
print(f"LiteRT {off[0]} off, TFLite-Micro {off[1]} off; ", end="")
print(f"with 0.5 for both rows TFLite-Micro is {off[2]} off")
raise SystemExit(not (off[0] == 0 and off[1] > 20 and off[2] == 0))
PY
