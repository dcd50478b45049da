"""Trains the demo model: a small Llama on the Python standard library (docs/demo-model.md)."""
