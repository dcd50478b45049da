"""The guides of `docs/guides`, written by the tool they are about: `python -m scripts.guides`."""
