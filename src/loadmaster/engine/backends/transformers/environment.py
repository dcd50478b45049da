"""How torch and transformers are imported: offline, without downloaded kernels, one file at a time.

The modules beside this one import torch when they are imported; `prepare` comes first.
"""

import ctypes
import logging
import os
from importlib import import_module

from loadmaster.errors import EngineMissingError
from loadmaster.units import MIB

_ENVIRONMENT = {
    "USE_HUB_KERNELS": "NO",  # a config may name kernels that are downloaded and run
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # threads would read tensors faster than they are placed
    "TRANSFORMERS_VERBOSITY": "error",
    # torch wants a folder for what it compiles, though nothing is; a worker has no temporary one.
    "TORCHINDUCTOR_CACHE_DIR": "/",
    "TOKENIZERS_PARALLELISM": "false",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_FEW_TOKENS = 64
_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "tokenizers")
INSTALL = '`pip install "loadmaster[hf]"` installs what it needs'


def prepare() -> None:
    """Set what these libraries read when they are imported, and import them.

    Raises:
        EngineMissingError: one of them is not installed, or cannot be imported.
    """
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product
    for package in _PACKAGES:
        try:
            import_module(package)
        except ImportError as error:
            raise EngineMissingError(
                f"the transformers engine cannot import `{package}`: {error}", hint=INSTALL
            ) from None


def keep_scratch(n_tokens: int | None = None) -> None:
    """Which freed blocks the C library keeps, before a step of so many tokens; None: before a load.

    As the worker is started every large one goes back at once (`engine.spawn`), and no step leaves
    holes that the next one's peak comes on top of. The scratch of few tokens has the same sizes in
    every step: mapped anew in each product, it takes 15 % of decode.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        few = n_tokens is not None and n_tokens <= _FEW_TOKENS
        block, top = (4 * MIB, 8 * MIB) if few else (MIB, MIB)
        set_option(_M_MMAP_THRESHOLD, block)
        set_option(_M_TRIM_THRESHOLD, top)


def trim() -> None:
    """Give freed memory back to the kernel, where the C library can be asked to."""
    given_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if given_back is not None:
        given_back(0)
