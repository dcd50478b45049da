"""What the C library does with freed blocks, in an environment like a worker's."""

import subprocess
import sys

import pytest

from loadmaster.engine.python_build import find_python_build
from loadmaster.engine.spawn import worker_environment

# Blocks that are mapped of their own, while one of 2 MiB is held.
_COUNT = """
import ctypes
from loadmaster.engine.backends.transformers import environment
libc = ctypes.CDLL(None)
class Found(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]
libc.mallinfo2.restype = Found
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
environment.keep_scratch({tokens})
before = libc.mallinfo2().hblks
block = libc.malloc(2 << 20)
print(libc.mallinfo2().hblks - before)
libc.free(block)
"""


@pytest.mark.parametrize(
    ("tokens", "n_mapped"), [("", 1), ("8", 0), ("512", 1)], ids=["loading", "answers", "prompt"]
)
def test_a_large_block_is_reused_only_where_few_tokens_are_fed(tokens: str, n_mapped: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COUNT.format(tokens=tokens)],
        env=worker_environment(find_python_build(), None),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == n_mapped
