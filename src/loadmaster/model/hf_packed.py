"""Matrices of GPTQ and AWQ checkpoints: several small integers in a word, and what belongs to them.

    qweight   the integers: GPTQ packs along the columns (what goes in), AWQ along the rows
    qzeros    for each group of columns and each row what stands for zero, packed along the rows
    scales    for each group and each row
    g_idx     the group of each column; only of GPTQ, where their order may be another

Both are transposed: the first dimension goes along the columns. Pure.
"""

from collections.abc import Iterator, Mapping, Sequence

from loadmaster.errors import DamagedFileError
from loadmaster.model.checkpoint import CheckpointTensor, Stored
from loadmaster.model.damage import refused
from loadmaster.model.safetensors import FLOATS

WORD = 32  # bits
METHODS = ("gptq", "awq")
_VALUES, _BESIDE = ("qweight", "weight"), ("qzeros", "scales", "g_idx")
_WORDS, _SCALES = ("I32",), tuple(sorted(FLOATS))


def packed_shape(shape: Sequence[int], stored: Stored) -> tuple[int, int]:
    """Rows and columns of a matrix by the shape of its `qweight`."""
    per_word = WORD // stored.bits
    if stored.method == "gptq":
        return shape[1], shape[0] * per_word
    return shape[1] * per_word, shape[0]


def n_groups(columns: int, stored: Stored) -> int:
    """How many groups of columns have a scale; the last one may be smaller."""
    return -(-columns // stored.block[1]) if stored.block else 1


def check_packed(tensors: Sequence[CheckpointTensor], stored: Stored, label: str) -> None:
    """Every matrix that is packed has all that belongs to it, in the sizes that the config tells.

    Raises:
        DamagedFileError: one has not.
    """
    if stored.method not in METHODS or not stored.runs:
        return
    by_name = {tensor.name: tensor for tensor in tensors}
    for tensor in tensors:
        part = tensor.name.rpartition(".")[2]
        if part == "qweight":
            _check_matrix(tensor, by_name, stored, label)
        elif part in _BESIDE and not {f"{tensor.module}.{one}" for one in _VALUES} & by_name.keys():
            raise _missing(f"{tensor.module}.qweight", stored)


def _check_matrix(
    tensor: CheckpointTensor, by_name: Mapping[str, CheckpointTensor], stored: Stored, label: str
) -> None:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise _other(tensor, "rows and columns", stored, label)
    for part, (dtypes, shape) in _expected(tensor, stored):
        found = by_name.get(f"{tensor.module}.{part}")
        if found is None:
            if part == "g_idx" and not stored.act_order:
                continue
            raise _missing(f"{tensor.module}.{part}", stored)
        if found.shape != shape or found.dtype not in dtypes:
            raise _other(found, "×".join(map(str, shape)), stored, label)


def _expected(
    tensor: CheckpointTensor, stored: Stored
) -> Iterator[tuple[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """The tensors of a matrix: the types each may have, and its shape."""
    rows, columns = packed_shape(tensor.shape, stored)
    groups = n_groups(columns, stored)
    yield "qweight", (_WORDS, tensor.shape)
    yield "qzeros", (_WORDS, (groups, -(-rows * stored.bits // WORD)))
    yield "scales", (_SCALES, (groups, rows))
    if stored.method == "gptq":
        yield "g_idx", (_WORDS, (columns,))


def _missing(name: str, stored: Stored) -> DamagedFileError:
    return refused(
        "missing_tensor",
        f"the shards have no `{name}`, which a matrix in {stored.label} has",
        hint="a shard is missing or of another model: download the checkpoint again",
    )


def _other(tensor: CheckpointTensor, expected: str, stored: Stored, label: str) -> DamagedFileError:
    shown = "×".join(map(str, tensor.shape)) or "a scalar"
    size = stored.block[1] if stored.block else -1
    return refused(
        "config_mismatch",
        f"{label} says {stored.label} in groups of {size}, which makes `{tensor.name}` {expected}, "
        f"and the headers say {shown} of {tensor.dtype}",
        hint="config.json is of another model: download the checkpoint again",
    )
