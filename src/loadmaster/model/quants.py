"""ggml's tensor types: how many bytes a block of elements takes.

Read off the block structs of ggml-common.h (each with a static_assert on its size) and the
`type_traits` table of ggml.c, in the llama.cpp that llama-cpp-python 0.3.36 vendors.
"""

from loadmaster.model.types import QuantType

QK_K = 256  # elements of a super-block (ggml-common.h)


def _row(name: str, ggml_id: int, block_size: int, block_bytes: int) -> QuantType:
    return QuantType(name=name, ggml_id=ggml_id, block_size=block_size, block_bytes=block_bytes)


_TABLE = (
    _row("f32", 0, 1, 4),
    _row("f16", 1, 1, 2),
    _row("q4_0", 2, 32, 2 + 16),
    _row("q4_1", 3, 32, 4 + 16),
    _row("q5_0", 6, 32, 2 + 4 + 16),
    _row("q5_1", 7, 32, 4 + 4 + 16),
    _row("q8_0", 8, 32, 2 + 32),
    _row("q8_1", 9, 32, 4 + 32),
    _row("q2_K", 10, QK_K, 16 + 64 + 4),
    _row("q3_K", 11, QK_K, 32 + 64 + 12 + 2),
    _row("q4_K", 12, QK_K, 4 + 12 + 128),
    _row("q5_K", 13, QK_K, 4 + 12 + 32 + 128),
    _row("q6_K", 14, QK_K, 128 + 64 + 16 + 2),
    _row("q8_K", 15, QK_K, 4 + 256 + 32),
    _row("iq2_xxs", 16, QK_K, 2 + 64),
    _row("iq2_xs", 17, QK_K, 2 + 64 + 8),
    _row("iq3_xxs", 18, QK_K, 2 + 96),
    _row("iq1_s", 19, QK_K, 2 + 32 + 16),
    _row("iq4_nl", 20, 32, 2 + 16),
    _row("iq3_s", 21, QK_K, 2 + 64 + 8 + 32 + 4),
    _row("iq2_s", 22, QK_K, 2 + 64 + 8 + 8),
    _row("iq4_xs", 23, QK_K, 2 + 2 + 4 + 128),
    _row("i8", 24, 1, 1),
    _row("i16", 25, 1, 2),
    _row("i32", 26, 1, 4),
    _row("i64", 27, 1, 8),
    _row("f64", 28, 1, 8),
    _row("iq1_m", 29, QK_K, 32 + 16 + 8),
    _row("bf16", 30, 1, 2),
    _row("tq1_0", 34, QK_K, 48 + 4 + 2),
    _row("tq2_0", 35, QK_K, 64 + 2),
    _row("mxfp4", 39, 32, 1 + 16),
    _row("nvfp4", 40, 64, 4 + 32),
    _row("q1_0", 41, 128, 2 + 16),
    _row("q2_0", 42, 64, 2 + 16),
)

BY_ID = {quant.ggml_id: quant for quant in _TABLE}
BY_NAME = {quant.name: quant for quant in _TABLE}

F32 = BY_NAME["f32"]

# Types that older files have and ggml no longer reads, with what to use instead.
REMOVED = {
    4: "q4_2, removed in 2023",
    5: "q4_3, removed in 2023",
    31: "q4_0_4_4, removed: use q4_0",
    32: "q4_0_4_8, removed: use q4_0",
    33: "q4_0_8_8, removed: use q4_0",
    36: "iq4_nl_4_4, removed: use iq4_nl",
    37: "iq4_nl_4_8, removed: use iq4_nl",
    38: "iq4_nl_8_8, removed: use iq4_nl",
}
