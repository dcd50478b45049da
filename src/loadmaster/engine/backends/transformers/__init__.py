"""transformers and bitsandbytes as an engine; imported inside the worker only."""
