"""GPTQ and AWQ checkpoints: the numbers that they stand for, by their own bytes, without the
libraries that wrote them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.errors import DamagedFileError, EngineRefusedError
from loadmaster.model.hf_stored import stored_of
from tests.hf_parts import load_request
from tests.packed_parts import KINDS, numbers_of, pack, pack_checkpoint
from tests.quantized_parts import plain_model

prepare()

from loadmaster.engine.backends.transformers import packed, scaled  # noqa: E402
from loadmaster.engine.backends.transformers.backend import Transformers  # noqa: E402
from tests.contract.test_quantized_checkpoints import BF16, CLOSE, gaps  # noqa: E402
from tests.contract.test_transformers import PROMPTS, generate, opened  # noqa: E402

N_OUT = 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("packed")

    def folder(kind: str, family: str = "llama") -> Path:
        plain, made = root / family, root / f"{family}-{kind}"
        if not plain.exists():
            plain_model(plain, family)
        return made if made.exists() else pack_checkpoint(plain, made, KINDS[kind])

    return folder


def reference(folder: Path) -> Any:
    """transformers' own model of the numbers that a checkpoint stands for."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(numbers_of(folder), dtype=torch.bfloat16)


def matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """What the packed modules of a model multiply with: the rows of a unit matrix, transposed."""
    for name, module in model.named_modules():
        if isinstance(module, packed.PackedLinear):
            unit = torch.eye(module.in_features, dtype=torch.bfloat16)
            yield name, module(unit).T


@pytest.mark.parametrize(
    ("kind", "part"),
    [*((kind, 1 << 20) for kind in KINDS), *((kind, 2000) for kind in ("gptq-2", "gptq-8", "awq"))],
)
def test_it_is_loaded_as_it_is(
    checkpoints: Any, kind: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled, "PART_ON_CPU", part)  # one part of a matrix, or many
    folder = checkpoints(kind)
    backend = Transformers()
    request = load_request(folder, **BF16)
    sizing = backend.size(folder, request.settings)
    backend.load(request, lambda _: True)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    dense = reference(folder)
    found = dict(matrices(backend._model._model))
    assert len(found) == 7 * dense.config.num_hidden_layers
    for name, values in found.items():
        assert torch.equal(values, dense.get_submodule(name).weight), name
    tokens = generate(backend, PROMPTS[:2], N_OUT)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    backend.close()
    assert max(gaps(dense, PROMPTS[:2], tokens)) <= CLOSE


@pytest.mark.parametrize("kind", ["gptq", "gptq-v2", "gptq-order"])
@pytest.mark.parametrize("part", [1 << 20, 512])
def test_rows_that_fill_no_word(kind: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "PART_ON_CPU", part)
    packing, weight = KINDS[kind], torch.randn(20, 64, generator=torch.manual_seed(3))
    tensors, dense = pack(weight.numpy(), packing)
    stored = stored_of({"quantization_config": packing.config}, "config.json")
    assert stored is not None
    found = {name: torch.from_numpy(values) for name, values in tensors.items()}
    sized = {name: (values.dtype, tuple(values.shape)) for name, values in found.items()}
    linear = torch.nn.Linear(64, 20, bias=False)
    module = packed.PackedLinear(
        linear, sized, stored, in_order=not packing.act_order, has_bias=False
    )
    for name, values in found.items():
        getattr(module, name).data = values
    assert torch.equal(module(torch.eye(64)).T, torch.from_numpy(dense))


def test_an_expert_without_its_words_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("awq", "qwen3_moe"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.0.up_proj.qweight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match=r"no `model.*experts\.0\.up_proj\.qweight`"):
        opened(folder, **BF16)


def test_experts_of_which_some_are_packed_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("awq", "qwen3_moe"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    plain = load_file(numbers_of(checkpoints("awq", "qwen3_moe")) / "model.safetensors")
    for name in [one for one in tensors if ".experts." in one and "down_proj" in one]:
        del tensors[name]
    tensors |= {name: plain[name] for name in plain if ".experts." in name and "down_proj" in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineRefusedError, match="some are packed and others are not"):
        opened(folder, **BF16)


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("kind", ["gptq-order", "awq"])
def test_families_that_fuse_and_stack(checkpoints: Any, kind: str, family: str) -> None:
    folder = checkpoints(kind, family)
    backend = opened(folder, **BF16)
    sizing = backend.size(folder, load_request(folder, **BF16).settings)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    tokens = generate(backend, PROMPTS[:2], N_OUT)
    backend.close()
    assert max(gaps(reference(folder), PROMPTS[:2], tokens)) <= CLOSE


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gptq", {"checkpoint_format": "gptq_v2"}),
        ("gptq-v2", {"checkpoint_format": "gptq"}),
    ],
)
def test_the_zeros_of_another_version_are_other_numbers(
    checkpoints: Any, kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder = changed(checkpoints(kind), tmp_path / "m", {}, **change)
    backend = opened(folder, **BF16)
    dense = reference(checkpoints(kind))
    wrong = [
        name
        for name, values in matrices(backend._model._model)
        if not torch.equal(values, dense.get_submodule(name).weight)
    ]
    backend.close()
    assert len(wrong) == 7 * dense.config.num_hidden_layers


# ---- refused

STEM = "model.layers.1.mlp.up_proj."


def changed(folder: Path, target: Path, tensors: dict[str, Any], **quantization: Any) -> Path:
    """A copy with other tensors (None: without), or another config."""
    import json

    target.mkdir()
    found = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        found.pop(STEM + name, None)
        if values is not None:
            found[STEM + name] = values
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize(
    ("kind", "tensors", "quantization", "words"),
    [
        ("gptq", {"scales": None}, {}, "no `model.layers.1.mlp.up_proj.scales`"),
        ("awq", {"qzeros": None}, {}, "no `model.layers.1.mlp.up_proj.qzeros`"),
        ("gptq-order", {"g_idx": None}, {}, "no `model.layers.1.mlp.up_proj.g_idx`"),
        ("gptq", {}, {"group_size": 64}, "in groups of 64"),
        ("awq", {}, {"group_size": 16}, "in groups of 16"),
        ("gptq", {}, {"bits": 8}, "8-bit in groups of 32"),
        ("awq", {"scales": torch.zeros((2, 128), dtype=torch.int32)}, {}, "2×128 of I32"),
        ("awq", {"qweight": torch.zeros(16, dtype=torch.int32)}, {}, "rows and columns"),
        ("awq", {"qweight": torch.zeros((64, 8), dtype=torch.int32)}, {}, "headers say"),
        ("awq", {}, {"group_size": 0}, "group_size is"),
        ("awq", {}, {"group_size": "64"}, "group_size is"),
    ],
)
def test_what_contradicts_its_config_is_refused(
    checkpoints: Any,
    kind: str,
    tensors: dict[str, Any],
    quantization: dict[str, Any],
    words: str,
    tmp_path: Path,
) -> None:
    from loadmaster.model.hf_source import read_checkpoint

    folder = changed(checkpoints(kind), tmp_path / "m", tensors, **quantization)
    with pytest.raises(DamagedFileError, match=words) as refusal:
        read_checkpoint(folder)
    assert "download" in (refusal.value.hint or "")


@pytest.mark.parametrize("value", [-1, 2])
def test_a_group_that_is_not_there_is_refused(checkpoints: Any, value: int, tmp_path: Path) -> None:
    groups = torch.arange(64, dtype=torch.int32) // 32
    groups[5] = value
    folder = changed(checkpoints("gptq"), tmp_path / "m", {"g_idx": groups})
    with pytest.raises(EngineRefusedError, match="there are 0–1") as refusal:
        opened(folder)
    assert "download" in (refusal.value.hint or "")


def test_a_matrix_of_another_model_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    """Consistent in itself, and twice as wide as the config has it."""
    found = load_file(checkpoints("awq") / "model.safetensors")
    wide = {
        name: torch.cat([found[STEM + name]] * 2, dim=1) for name in ("qweight", "qzeros", "scales")
    }
    folder = changed(checkpoints("awq"), tmp_path / "m", wide)
    with pytest.raises(EngineRefusedError, match="256×64, its config makes it 128×64"):
        opened(folder)


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        ("gptq", {"bits": 3}),
        ("gptq", {"checkpoint_format": "marlin"}),
        ("gptq", {"dynamic": {"+:.*down_proj": {"bits": 8}}}),
        ("awq", {"version": "gemv"}),
        ("awq", {"zero_point": False}),
    ],
)
def test_packed_in_other_ways(
    checkpoints: Any, kind: str, quantization: dict[str, Any], tmp_path: Path
) -> None:
    folder = changed(checkpoints(kind), tmp_path / "m", {}, **quantization)
    with pytest.raises(EngineRefusedError, match=r"(GPTQ|AWQ) \d-bit, which needs") as refusal:
        opened(folder)
    assert "--quantize nf4" in (refusal.value.hint or "")
