"""What `python -m mambair_ds.convert` turns into what: option files, weights, ONNX."""
