"""The transformers engine on several GPUs, which are pretended: no operation has tensors of two
devices, tokens are those of the CPU, and weights and cells are where they were planned. What CUDA
itself computes and takes is not proved here."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.engine.types import SamplingParams
from loadmaster.errors import EngineError, EngineRefusedError
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.plan.hf_placement import device_map_of
from loadmaster.units import GIB, Bytes
from tests import packed_parts, quantized_parts
from tests.contract.test_transformers import GREEDY, PROMPTS, generate, opened, work
from tests.hf_parts import load_request
from tests.pretended_gpus import TOTAL_BYTES, MixedError, PretendedGpus, pretended_gpus

prepare()

import bitsandbytes  # noqa: E402
from bitsandbytes.functional import int8_vectorwise_quant  # noqa: E402

from loadmaster.engine.backends.transformers import attention, kept, weights  # noqa: E402
from loadmaster.engine.backends.transformers.backend import Transformers  # noqa: E402

FAMILIES = ("llama", "gemma3_text", "mixtral")
SPLITS = {
    "two": ("gpu:0", "gpu:1", "gpu:1"),
    "backwards": ("gpu:1", "gpu:0", "gpu:0"),
    "CPU beside": ("cpu", "gpu:0", "gpu:1"),
    "CPU beside backwards": ("cpu", "gpu:1", "gpu:0"),
}
SIZES: dict[str, Any] = {"n_seq_max": 4, "n_ctx": 4 * 160}
N_OUT = 8


@pytest.fixture
def gpus() -> Iterator[PretendedGpus]:
    with pretended_gpus() as mode:
        yield mode


def split(folder: Path, name: str) -> dict[str, Any]:
    return {"device_map": device_map_of(read_checkpoint(folder), SPLITS[name])}


def as_sized(backend: Transformers, folder: Path, **changes: Any) -> bool:
    """Whether what is open takes on each device what it was sized for."""
    request = load_request(folder, **changes)
    sizing = backend.size(request.model_path, request.settings)
    return backend.memory().buffers == getattr(sizing, "buffers", None)


def on_the_cpu(folder: Path, **changes: Any) -> list[list[int]]:
    backend = opened(folder, **SIZES | changes)
    try:
        return generate(backend, PROMPTS, N_OUT)
    finally:
        backend.close()


# -- the pretence


def test_what_cuda_refuses_is_refused(gpus: PretendedGpus) -> None:
    first = torch.ones(2, 3, device="cuda:0")
    second = first.to("cuda:1")
    assert (str(first[0].device), str((second + 1).device)) == ("cuda:0", "cuda:1")
    assert str((first * torch.tensor(2.0)).device) == "cuda:0"  # a number may be the CPU's
    assert second.cpu().device.type == "cpu"
    mixtures: list[Callable[[], Any]] = [
        lambda: first + second,
        lambda: torch.cat([first, torch.ones(2, 3)]),
        lambda: torch.nn.functional.linear(first, second),
        lambda: first[torch.tensor([1], device="cuda:1")],
        lambda: first.__setitem__(0, torch.ones(3)),
    ]
    for mixture in mixtures:
        with pytest.raises(MixedError):
            mixture()


# -- placement


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_mixes_devices_and_tokens_are_those_of_the_cpu(
    models: Any, family: str, name: str
) -> None:
    folder = models(family)
    expected = on_the_cpu(folder)
    changes = SIZES | split(folder, name)
    with pretended_gpus():
        backend = opened(folder, **changes)
        assert generate(backend, PROMPTS, N_OUT) == expected
        assert as_sized(backend, folder, **changes)
        backend.close()


@pytest.mark.parametrize("quantize", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("name", ["two", "CPU beside"])
def test_quantized_matrices_are_where_they_were_planned(
    models: Any, quantize: str, name: str
) -> None:
    """Beside a GPU bitsandbytes leaves those of the CPU as they are, so that tokens are others."""
    folder = models("llama")
    changes = SIZES | {"quantize": quantize, "double_quant": quantize == "nf4"}
    expected = on_the_cpu(folder, **changes)
    changes |= split(folder, name)
    with pretended_gpus():
        backend = opened(folder, **changes)
        tokens = generate(backend, PROMPTS, N_OUT)
        assert as_sized(backend, folder, **changes)
        assert tokens == expected or (name == "CPU beside" and quantize != "fp8")
        backend.close()


@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "fp8-tiles", "awq", "gptq-8"])
def test_checkpoints_that_come_quantized(tmp_path: Path, kind: str) -> None:
    if kind in packed_parts.KINDS:
        plain = quantized_parts.plain_model(tmp_path / "plain")
        folder = packed_parts.pack_checkpoint(plain, tmp_path / kind, packed_parts.KINDS[kind])
    else:
        folder = quantized_parts.quantized(tmp_path, kind)
    settings = {"compute_type": "bf16", "type_k": "bf16", "type_v": "bf16"}
    expected = on_the_cpu(folder, **settings)
    changes = SIZES | settings | split(folder, "two")
    with pretended_gpus():
        backend = opened(folder, **changes)
        assert generate(backend, PROMPTS, N_OUT) == expected
        assert as_sized(backend, folder, **changes)
        backend.close()


@pytest.mark.parametrize("changes", [{"type_k": "q8_0", "type_v": "q4_0"}, {"attention": "eager"}])
def test_cells_of_every_kind(models: Any, changes: dict[str, Any]) -> None:
    folder = models("mistral")
    expected = on_the_cpu(folder, **changes)
    changes = SIZES | changes | split(folder, "two")
    with pretended_gpus():
        backend = opened(folder, **changes)
        assert generate(backend, PROMPTS, N_OUT) == expected
        assert as_sized(backend, folder, **changes)
        backend.close()


@pytest.mark.usefixtures("gpus")
def test_states_copies_and_sampled_tokens(models: Any) -> None:
    folder = models("llama")
    backend = opened(folder, **SIZES | split(folder, "two"))
    backend.start_sequence(0, GREEDY)
    (token,) = backend.step([work(0, PROMPTS[3], 0)]).tokens.values()
    state, n = backend.save_state(0), len(PROMPTS[3])
    backend.restore_state(1, state)
    assert backend.share(1, 2, n)
    for seq_id in (0, 1, 2):
        backend.start_sequence(seq_id, SamplingParams(temperature=0.8, seed=5))
    step = backend.step([work(seq_id, [token], n) for seq_id in (0, 1, 2)])
    assert len(set(step.tokens.values())) == 1
    backend.commit_peak(5.0)
    backend.close()


@pytest.mark.usefixtures("gpus")
def test_vectors(models: Any) -> None:
    folder = models("llama")
    settings: dict[str, Any] = {"pooling": "mean", "n_seq_max": 4, "n_ubatch": 128}
    plain = opened(folder, **settings)
    split_up = opened(folder, **settings | split(folder, "two"))
    prompts = PROMPTS[:2]
    assert torch.allclose(torch.tensor(split_up.embed(prompts)), torch.tensor(plain.embed(prompts)))


@pytest.mark.usefixtures("gpus")
def test_inputs_are_moved_where_the_map_changes_and_nowhere_else(models: Any) -> None:
    folder = models("llama")
    backend = opened(folder, **SIZES | split(folder, "two"))
    model: Any = getattr(backend._open, "_model")  # noqa: B009
    hooked = {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    assert hooked == {"", *(name for name, _ in split(folder, "two")["device_map"])}
    backend.close()


# -- caps, and what there is no memory for


def test_every_device_is_capped_before_anything_is_on_it(gpus: PretendedGpus, models: Any) -> None:
    folder = models("llama")
    request = load_request(folder, **SIZES | split(folder, "two"))
    caps = {"gpu:0": Bytes(2 * GIB), "gpu:1": Bytes(16 * GIB)}
    backend = Transformers()
    backend.load(replace(request, device_caps=caps), lambda _: True)
    assert gpus.caps == {"cuda:0": 2 * GIB / TOTAL_BYTES, "cuda:1": 1.0}
    backend.close()


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.usefixtures("gpus")
def test_memory_that_runs_out_while_weights_are_made_is_told_and_given_back(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models("llama")
    made: list[Any] = []

    def after_three(part: Any) -> Any:
        made.append(weakref.ref(part))
        return int8_vectorwise_quant(part) if len(made) <= 3 else out_of_memory()

    monkeypatch.setattr(bitsandbytes.functional, "int8_vectorwise_quant", after_three)
    backend = Transformers()
    request = load_request(folder, quantize="int8", **split(folder, "two"))
    with pytest.raises(EngineRefusedError, match=r"out of memory\. Tried to allocate") as refusal:
        backend.load(request, lambda _: True)
    assert "--vram" in (refusal.value.hint or "")
    assert len(made) == 4  # no matrix was tried after the one that failed
    gc.collect()
    assert not [one for one in made if one() is not None]


@pytest.mark.usefixtures("gpus")
def test_memory_that_runs_out_in_a_step_is_told(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models("llama")
    backend = opened(folder, **SIZES | split(folder, "two"))
    monkeypatch.setattr(attention, "_sdpa", out_of_memory)
    backend.start_sequence(0, GREEDY)
    with pytest.raises(EngineError, match="failed a step: CUDA out of memory") as failure:
        backend.step([work(0, PROMPTS[0], 0)])
    assert "-ub" in (failure.value.hint or "")
    backend.close()


@pytest.mark.usefixtures("gpus")
def test_memory_that_runs_out_for_cells_is_given_back(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_models: list[Any] = []
    folder, load = models("llama"), weights.load_weights

    def noted(*given: Any) -> Any:
        found = load(*given)
        opened_models.append(weakref.ref(found))
        return found

    monkeypatch.setattr(f"{Transformers.__module__}.load_weights", noted)
    monkeypatch.setattr(kept, "_zeros", out_of_memory)
    with pytest.raises(EngineRefusedError, match="cannot open the model: CUDA out of memory"):
        opened(folder, **split(folder, "two"))
    gc.collect()
    assert [one() for one in opened_models] == [None]


# -- cards and builds that do not go together


def refused(folder: Path) -> EngineRefusedError:
    with pytest.raises(EngineRefusedError) as refusal:
        opened(folder, **SIZES | split(folder, "two"))
    return refusal.value


def test_a_torch_without_cuda_says_what_to_type(models: Any) -> None:
    refusal = refused(models("llama"))
    assert "sees 0 GPUs" in refusal.message
    assert "pip install --force-reinstall torch" in (refusal.hint or "")


def test_a_card_that_torch_has_no_kernels_for_is_refused(models: Any) -> None:
    with pretended_gpus(level=(7, 0)):
        refusal = refused(models("llama"))
    assert "gpu:0 has compute capability 7.0" in refusal.message
    assert "is built for 8.0 and newer" in refusal.message


def test_a_driver_that_is_too_old_is_no_crash(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*_: Any) -> Any:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    with pretended_gpus():
        monkeypatch.setattr(torch.cuda, "get_device_capability", too_old)
        refusal = refused(models("llama"))
    assert "cannot use gpu:0: The NVIDIA driver on your system is too old" in refusal.message
    assert "a newer driver" in (refusal.hint or "")


def test_kernels_that_are_built_for_every_length_are_not_taken() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    Transformers()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
