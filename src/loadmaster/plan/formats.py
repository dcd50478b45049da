"""The formats that `--quantize` makes of weights: what they take and how exact they are. Pure.

Bytes are those of a plan's ledger (`hf_weights`), errors those of Gaussian weights (`rounding`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loadmaster.model.codes import FP4, INT4, INT8, NF4, Code
from loadmaster.plan.hf_weights import (
    BLOCK,
    NESTED_BLOCK,
    four_bit_allocations,
    int8_allocations,
)
from loadmaster.plan.rounding import relative_error

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has (`quantize_4bit`)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to keep a matrix."""

    name: str
    code: Code
    by_row: bool = False  # a scale for each row; otherwise for each block
    double_quant: bool = False
    is_run: bool = True  # False: nothing makes it, it is there to compare with

    def block(self, columns: int, block: int) -> int:
        """Weights that share a scale."""
        return columns if self.by_row else block

    def bits(self, rows: int, columns: int, block: int = BLOCK) -> float:
        """Bits a weight, scales and tables with it."""
        if self.by_row:
            size = sum(int8_allocations(rows, columns))
        else:
            size = sum(four_bit_allocations(rows * columns, self.double_quant, block))
        return 8 * size / (rows * columns)

    def error(self, columns: int, block: int = BLOCK) -> float:
        """Root mean square error over the weights' own, if those are Gaussian."""
        nested = NESTED_BLOCK if self.double_quant else None
        return relative_error(self.code, self.block(columns, block), nested)


FORMATS: Sequence[Format] = (
    Format(name="int8", code=INT8, by_row=True),
    Format(name="nf4", code=NF4),
    Format(name="nf4, double", code=NF4, double_quant=True),
    Format(name="fp4", code=FP4),
    Format(name="fp4, double", code=FP4, double_quant=True),
    Format(name="int4", code=INT4, is_run=False),
)
