"""The adapter for llama.cpp, on llama-cpp-python's ctypes layer and our native library."""
