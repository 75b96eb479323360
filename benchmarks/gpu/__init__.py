"""Time and memory on a GPU; `python -m benchmarks.gpu`."""
