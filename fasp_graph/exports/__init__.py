"""Files that run without this project: ONNX, .pt2 and AOTInductor packages."""
