"""Models: making a checkpoint run, and exporting it to ONNX."""
