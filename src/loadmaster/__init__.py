"""Run language models that are bigger than your GPU, inside exactly the memory you allow."""

__version__ = "0.1.0"
