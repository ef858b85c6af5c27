"""Constants of ONNX files that stay codes."""
