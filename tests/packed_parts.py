"""Checkpoints packed as GPTQ and AWQ pack them, written with numpy from the formats' description,
and the numbers that they stand for."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Array = npt.NDArray[Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight values is in a word's first four bits, …
_BESIDE = ("tokenizer.json", "tokenizer_config.json")
_ENDINGS = ("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a checkpoint is packed."""

    method: str = "gptq"
    bits: int = 4
    group: int = 32  # -1: one for a whole row
    act_order: bool = False
    version: str = "gptq"  # of GPTQ: `gptq`, whose zeros are stored less one, or `gptq_v2`
    g_idx: bool = True  # whether it is stored
    biases: bool = False  # of zeros, where the model has none, as older tools wrote them

    @property
    def config(self) -> dict[str, Any]:
        found = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            return found | {"version": "gemm", "zero_point": True}
        return found | {"checkpoint_format": self.version, "desc_act": self.act_order, "sym": False}


KINDS: Mapping[str, Packing] = {
    "gptq": Packing(),
    "gptq-v2": Packing(version="gptq_v2"),
    "gptq-order": Packing(act_order=True),
    "gptq-odd": Packing(group=48),
    "gptq-row": Packing(group=-1, g_idx=False),
    "gptq-2": Packing(bits=2, biases=True),
    "gptq-8": Packing(bits=8, version="gptq_v2", act_order=True),
    "awq": Packing(method="awq"),
    "awq-row": Packing(method="awq", group=-1),
}


def pack_checkpoint(plain: Path, made: Path, packing: Packing) -> Path:
    """A checkpoint of a plain one; `numbers` beside it is the plain one of what it stands for."""
    tensors = load_file(plain / "model.safetensors")
    numbers = dict(tensors)
    for seed, name in enumerate(sorted(one for one in tensors if one.endswith(_ENDINGS))):
        packed, dense = pack(tensors.pop(name).float().numpy(), packing, seed)
        stem = name.removesuffix("weight")
        tensors |= {stem + part: torch.from_numpy(values) for part, values in packed.items()}
        numbers[name] = torch.from_numpy(dense).to(torch.bfloat16)
        if packing.biases and stem + "bias" not in tensors:
            tensors[stem + "bias"] = torch.zeros(len(dense), dtype=torch.float16)
    config = json.loads((plain / "config.json").read_text())
    _write(made, tensors, config | {"quantization_config": packing.config})
    _write(made.with_name(made.name + "-numbers"), numbers, config)
    for name in _BESIDE:
        shutil.copy(plain / name, made / name)
    return made


def numbers_of(made: Path) -> Path:
    """The plain checkpoint beside a packed one."""
    return made.with_name(made.name + "-numbers")


def _write(folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def pack(weight: Array, packing: Packing, seed: int = 0) -> tuple[dict[str, Array], Array]:
    """The tensors of a matrix, and what it is in F32 once they are multiplied."""
    rows, columns = weight.shape
    size = columns if packing.group == -1 else packing.group
    group_of = np.arange(columns, dtype=np.int32) // size
    if packing.act_order:
        group_of = np.random.default_rng(seed).permutation(group_of)
    codes = np.zeros((rows, columns), np.int64)
    dense = np.zeros((rows, columns), np.float32)
    scales = np.zeros((group_of.max() + 1, rows), np.float16)
    zeros = np.zeros((group_of.max() + 1, rows), np.int64)
    for group in range(len(scales)):
        own = group_of == group
        part = _quantize(weight[:, own], packing.bits)
        codes[:, own], zeros[group], scales[group] = part
        steps = (codes[:, own] - zeros[group][:, None]).astype(np.float32)
        dense[:, own] = steps * scales[group].astype(np.float32)[:, None]
    return dict(_tensors(codes, zeros, scales, group_of, packing)), dense


def _quantize(part: Array, bits: int) -> tuple[Array, Array, Array]:
    """Codes, zeros and scales of the columns of a group; one row's zero is 0."""
    most = (1 << bits) - 1
    low, high = part.min(1).clip(max=0), part.max(1).clip(min=0)
    low[0] = 0
    scales = ((high - low) / most).clip(min=1e-4).astype(np.float16)
    steps = scales.astype(np.float32)
    zeros = np.rint(-low / steps).clip(0, most)
    codes = (np.rint(part / steps[:, None]) + zeros[:, None]).clip(0, most)
    return codes.astype(np.int64), zeros.astype(np.int64), scales


def _tensors(
    codes: Array, zeros: Array, scales: Array, group_of: Array, packing: Packing
) -> Iterator[tuple[str, Array]]:
    bits, order = packing.bits, AWQ_ORDER if packing.method == "awq" else None
    stored = _words(zeros, bits, order)
    if packing.method == "gptq":
        yield "qweight", np.ascontiguousarray(_words(codes, bits, order).T.view(np.int32))
        if packing.version == "gptq":
            stored = stored - np.uint32(sum(1 << place for place in range(0, 32, bits)))
        if packing.g_idx:
            yield "g_idx", group_of.astype(np.int32)
    else:
        yield "qweight", _words(codes.T, bits, order).view(np.int32)
    yield "qzeros", stored.view(np.int32)
    yield "scales", scales


def _words(values: Array, bits: int, order: tuple[int, ...] | None) -> Array:
    """Values of each row packed into words of 32 bits; the last may have room left."""
    per = 32 // bits
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per)))
    found = np.zeros((values.shape[0], values.shape[1] // per), np.uint32)
    for place in range(per):
        own = values[:, (order[place] if order else place) :: per]
        found |= (own << (bits * place)).astype(np.uint32)
    return found
