"""Checkpoints that come quantized: loaded as they are, by their own bytes, with the tokens that the
numbers in them make."""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.errors import DamagedFileError, EngineRefusedError
from tests.hf_parts import load_request
from tests.quantized_parts import KINDS, add_to_config, numbers, packed, plain_model, quantized

prepare()

from loadmaster.engine.backends.transformers.backend import Transformers  # noqa: E402
from tests.contract.test_transformers import PROMPTS, generate, opened  # noqa: E402

BF16 = {"compute_type": "bf16", "type_k": "bf16", "type_v": "bf16"}
# One rounding of a logit near 16 in BF16, and one of the other.
CLOSE = 0.25
N_OUT = 24


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str], Path] = {}

    def folder(kind: str, family: str = "llama") -> Path:
        if (kind, family) not in made:
            made[kind, family] = quantized(tmp_path_factory.mktemp(kind), kind, family)
        return made[kind, family]

    return folder


def reference(folder: Path, kind: str) -> Any:
    """transformers' own loading; where it has none on a CPU, that of the numbers."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if kind == "fp8-rows":
        folder = numbers(folder, folder.parent / "numbers")
    given: dict[str, Any] = {}
    if kind.startswith("ct-"):  # otherwise it quantizes activations as well
        given["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map="cpu", **given
        )


def gaps(model: Any, prompts: Sequence[list[int]], outputs: Sequence[list[int]]) -> list[float]:
    """The best logit less the chosen one, fed the same tokens alone."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0].float()
        for index, token in enumerate(output):
            row = logits[len(prompt) + index - 1]
            found.append(float(row.max() - row[token]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_as_it_is(checkpoints: Any, kind: str) -> None:
    folder = checkpoints(kind)
    backend = Transformers()
    request = load_request(folder, **BF16)
    sizing = backend.size(folder, request.settings)
    backend.load(request, lambda _: True)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    tokens = generate(backend, PROMPTS[:2], N_OUT)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    backend.close()
    found = gaps(reference(folder, kind), PROMPTS[:2], tokens)
    assert max(found) <= CLOSE


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_in_fp8(checkpoints: Any, family: str) -> None:
    folder = checkpoints("fp8-tiles", family)
    backend = opened(folder, **BF16)
    sizing = backend.size(folder, load_request(folder, **BF16).settings)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    tokens = generate(backend, PROMPTS[:2], N_OUT)
    backend.close()
    assert max(gaps(reference(folder, "fp8-tiles"), PROMPTS[:2], tokens)) <= CLOSE


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe", "mixtral"])
def test_fp8_made_while_loading(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = plain_model(tmp_path / family, family)
    backend = opened(folder, quantize="fp8", **BF16)
    sizing = backend.size(folder, load_request(folder, quantize="fp8", **BF16).settings)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    tokens = generate(backend, PROMPTS[:2], N_OUT)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    made = dict(written_out(backend._model._model))
    assert len(made) >= 2 * model.config.num_hidden_layers
    for name, values in made.items():
        model.get_parameter(name).data.copy_(values)
    backend.close()
    assert max(gaps(model, PROMPTS[:2], tokens)) <= CLOSE


def written_out(model: Any) -> Iterator[tuple[str, Any]]:
    """Every FP8 parameter of a model as the numbers it stands for, one scale at a time."""
    parameters = dict(model.named_parameters())
    for name, codes in parameters.items():
        if codes.dtype is torch.float8_e4m3fn:
            scales = parameters[name + "_scale"]
            stacked, grids = (one if one.ndim == 3 else one[None] for one in (codes, scales))
            halves = 2 if name.endswith("gate_up_proj") else 1
            parts = [
                torch.cat([
                    half.float() * grid.repeat_interleave(128, 0).repeat_interleave(128, 1)[
                        : half.shape[0], : half.shape[1]
                    ]
                    for half, grid in zip(matrix.chunk(halves), table.chunk(halves), strict=True)
                ])
                for matrix, table in zip(stacked, grids, strict=True)
            ]  # fmt: skip
            yield name, torch.stack(parts).view(codes.shape)


# ---- refused

STEM = "model.layers.1.mlp.up_proj.weight"


def changed(folder: Path, target: Path, name: str, change: Any) -> Path:
    """A copy with another tensor, or without it."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    found = change(tensors.pop(name))
    if found is not None:
        tensors[name] = found.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def halved(values: Any) -> Any:
    return values[: len(values) // 2]


@pytest.mark.parametrize(
    ("kind", "name", "change", "words"),
    [
        ("nf4", STEM + ".absmax", halved, "scales of `model.layers.1.mlp.up_proj` are not"),
        ("nf4", STEM + ".quant_map", halved, "scales of `model.layers.1.mlp.up_proj` are not"),
        ("nf4", STEM + ".quant_map", lambda _: None, "KeyError: 'quant_map'"),
        ("nf4-nested", STEM + ".nested_absmax", lambda _: None, "scales of .* are not those"),
        ("nf4-nested", STEM + ".nested_absmax", lambda one: one[:0], "scales of .* are not those"),
        ("nf4-nested", STEM + ".nested_quant_map", halved, "scales of .* are not those"),
        ("fp8-tiles", STEM + "_scale_inv", halved, "a matrix of 128×64 has 2×2 scales"),
        (
            "fp8-tiles",
            STEM + "_scale_inv",
            lambda one: one[:0],
            "a matrix of 128×64 has 0×2 scales",
        ),
        ("ct-int4", STEM + "_packed", lambda one: one[0, 0], "is a scalar, its config makes it"),
        ("int8", STEM.replace("weight", "SCB"), halved, "scales of .* are not those|must match"),
        ("nf4", "model.norm.weight", halved, "another shape of 1 .*`model.norm.weight`"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    checkpoints: Any, kind: str, name: str, change: Any, words: str, tmp_path: Path
) -> None:
    folder = changed(checkpoints(kind), tmp_path / "m", name, change)
    with pytest.raises(EngineRefusedError, match=words):
        opened(folder, **BF16)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("fp8-tiles", STEM + "_scale_inv"), ("int8", STEM.replace("weight", "SCB"))],
)
def test_a_matrix_in_few_bits_without_its_scales_is_refused(
    checkpoints: Any, kind: str, name: str, tmp_path: Path
) -> None:
    folder = changed(checkpoints(kind), tmp_path / "m", name, lambda _: None)
    with pytest.raises(DamagedFileError, match=r"no scales of `model\.layers\.1\.mlp\."):
        opened(folder, **BF16)


def test_what_has_no_products_is_refused(tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "m")
    for method, words in (("gptq", "GPTQ 3-bit"), ("awq", "AWQ 3-bit")):
        add_to_config(folder, {"quant_method": method, "bits": 3})
        packed(folder)
        with pytest.raises(EngineRefusedError, match=words) as refusal:
            opened(folder)
        assert "--quantize nf4" in (refusal.value.hint or "")


def test_a_quantized_checkpoint_is_not_quantized_again(checkpoints: Any) -> None:
    with pytest.raises(EngineRefusedError, match="quantized already") as refusal:
        opened(checkpoints("nf4"), quantize="nf4")
    assert "--quantize" in (refusal.value.hint or "")
