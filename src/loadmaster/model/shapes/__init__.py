"""Models by their dimensions alone: `shape:llama-3-70b@Q4_K_M` needs no file."""
