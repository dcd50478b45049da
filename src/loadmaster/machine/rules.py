"""How each engine backend lays out buffers, for virtual devices and for cards that are here.

The figures are llama.cpp's at commit 0c1e57098 (the one in llama-cpp-python 0.3.36), under
`ggml/src/`; a version bump checks them again.
"""

from collections.abc import Mapping
from types import MappingProxyType

from loadmaster.machine.types import GpuBackend, SizingRules

# `GGML_OP_OFFLOAD_MIN_BATCH` when nobody sets it: the same default in all four backends
# (ggml-cuda.cu:5825, ggml-vulkan.cpp:16111, ggml-metal-device.m:1285, ggml-sycl.cpp:7272).
DEFAULT_OFFLOAD_MIN_BATCH = 32

# ggml-cuda.cu:898 alignment; common.cuh:186 MATRIX_ROW_PADDING; ggml-cuda.cu:1257 host buffers;
# fattn-common.cuh, ggml_cuda_flash_attn_ext_get_f16_extra_data.
CUDA = SizingRules(
    alignment_bytes=128,
    row_padding=512,
    offload_min_batch=DEFAULT_OFFLOAD_MIN_BATCH,
    pinned_host=True,
    f16_attention=True,
)

# ggml-vulkan.cpp:13036: `minStorageBufferOffsetAlignment` of the driver, a power of two that the
# specification bounds by 256; drivers report 4 to 64 (NVIDIA 16, RADV 4, ANV 4, lavapipe 16). The
# widest of them is taken, so sizes are never below. ggml-vulkan.cpp:13047: no row padding.
VULKAN = SizingRules(
    alignment_bytes=64,
    row_padding=0,
    offload_min_batch=DEFAULT_OFFLOAD_MIN_BATCH,
    pinned_host=True,
)

# ggml-metal.cpp:270 and 346 alignment; ggml-metal.cpp:697 and 822: no host buffer type.
METAL = SizingRules(
    alignment_bytes=32,
    row_padding=0,
    offload_min_batch=DEFAULT_OFFLOAD_MIN_BATCH,
    pinned_host=False,
)

# ggml-sycl/common.hpp:253 alignment; presets.hpp:20 row padding; ggml-sycl.cpp:6368 host buffers.
SYCL = SizingRules(
    alignment_bytes=128,
    row_padding=512,
    offload_min_batch=DEFAULT_OFFLOAD_MIN_BATCH,
    pinned_host=True,
)

# ROCm is the CUDA source compiled by hipcc. A stand-in device imitates CUDA.
RULES: Mapping[GpuBackend, SizingRules] = MappingProxyType(
    {"cuda": CUDA, "rocm": CUDA, "vulkan": VULKAN, "metal": METAL, "sycl": SYCL, "virtual": CUDA}
)
