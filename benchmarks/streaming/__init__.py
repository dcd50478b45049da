"""Streamed answers over HTTP and without it, timed as they arrive: the parts of `serve`."""
