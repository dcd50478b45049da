"""What is particular to llama.cpp: placement, adapters, caches of other kinds, dry runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gguf_writer import bpe_tokenizer, write_random, write_sparse, write_split
from benchmarks.shapes import build, build_tiny
from loadmaster.engine.cap import MemoryCgroup
from loadmaster.engine.process import Engine
from loadmaster.engine.sizing import Sizer
from loadmaster.engine.skeleton import write_skeleton
from loadmaster.engine.types import DoneEvent, EngineBuild, TextEvent, VirtualDevice
from loadmaster.errors import EngineRefusedError
from loadmaster.model.source import read_model
from loadmaster.plan.types import Adapter, Override, Sizing, SizingFailure
from loadmaster.units import MIB, Bytes
from tests.engine_parts import WRONG_LOGITS, gaps, load_request, request, settings

pytestmark = pytest.mark.engine

Gpu = Callable[..., VirtualDevice]


def generate(engine: Engine, name: str, prompt: list[int]) -> tuple[list[int], DoneEvent]:
    """The tokens that a text came of, and the end."""
    events = list(engine.generate(request(name, prompt, 12, top_logprobs=0)))
    end = events[-1]
    assert isinstance(end, DoneEvent)
    parts = [event.logprobs for event in events if isinstance(event, TextEvent)]
    return [one.token for logprobs in parts for one in logprobs], end


@pytest.mark.parametrize(
    ("shape", "cached"),
    [("llama-8b", (0, 90, 99)), ("gemma3-12b", (0, 90, 90)), ("mamba-2.8b", (0, 0, 0))],
)
def test_kept_cells_give_the_text_of_fresh_ones(
    engine_build: EngineBuild, tmp_path: Path, shape: str, cached: tuple[int, ...]
) -> None:
    path = tmp_path / "m.gguf"
    write_random(path, *build_tiny(shape, "f16"))
    base = [(7 * i * i + 3 * i) % 250 for i in range(150)]
    prompts = [base[:100], base[:90] + base[120:140], base[:100]]
    with Engine.start(engine_build) as engine:
        engine.load(load_request(path, settings(n_ctx=256)))
        engine.commit_peak(0.2)
        kept = [generate(engine, f"{i}", prompt) for i, prompt in enumerate(prompts)]
    assert tuple(end.n_cached for _, end in kept) == cached
    outputs = [tokens for tokens, _ in kept]
    assert max(gaps(engine_build, path, prompts, outputs)) <= WRONG_LOGITS
    others = [outputs[1], outputs[2], outputs[1]]
    assert max(gaps(engine_build, path, prompts, others)) > WRONG_LOGITS  # it tells texts apart


def test_an_override_moves_its_tensors(
    engine_build: EngineBuild, demo_model: Path, stand_in_gpu: Gpu
) -> None:
    whole = settings(n_gpu_layers=2, layers_per_device=(1, 1))
    moved = replace(whole, overrides=(Override(pattern=r"ffn_(up|down)", device="cpu"),))
    devices = [stand_in_gpu(), stand_in_gpu(index=1)]
    with Engine.start(engine_build, devices=devices) as engine:
        before, after = engine.size(demo_model, whole), engine.size(demo_model, moved)
        assert isinstance(before, Sizing)
        assert isinstance(after, Sizing)
        assert after.on("gpu:0").model_bytes < before.on("gpu:0").model_bytes
        assert after.on("cpu").model_bytes > before.on("cpu").model_bytes
        assert engine.load(load_request(demo_model, moved)).n_ctx == 256
        assert engine.memory().buffers == after.buffers


def test_an_override_to_a_missing_device_is_refused(
    engine_build: EngineBuild, demo_model: Path
) -> None:
    lost = settings(overrides=(Override(pattern="ffn", device="gpu:3"),))
    with Engine.start(engine_build) as engine:
        sized = engine.size(demo_model, lost)
        assert isinstance(sized, SizingFailure)
        assert "gpu:3" in sized.reason


def _lora(path: Path) -> Adapter:
    metadata = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 400.0,
    }
    tensors = [
        (f"blk.{layer}.{name}.weight.lora_{part}", "f32", shape)
        for layer in range(4)
        for name, n_out in (("attn_q", 256), ("attn_output", 256))
        for part, shape in (("a", (256, 4)), ("b", (4, n_out)))
    ]
    write_random(path, metadata, tensors)
    return Adapter(path=str(path), scale=1.0, size_bytes=Bytes(path.stat().st_size))


def test_an_adapter_changes_the_text(engine_build: EngineBuild, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    write_random(model, *build_tiny("llama-8b", "f16"))
    texts = []
    for adapters in ((), (_lora(tmp_path / "lora.gguf"),)):
        with Engine.start(engine_build) as engine:
            engine.load(load_request(model, settings(adapters=adapters)))
            texts.append(generate(engine, "a", list(range(40)))[0])
    assert texts[0] != texts[1]


def test_an_adapter_of_another_model_is_refused(
    engine_build: EngineBuild, demo_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "m.gguf"
    write_random(model, *build_tiny("llama-8b", "f16", n_embd=512))
    wrong = settings(adapters=(_lora(tmp_path / "lora.gguf"),))
    with Engine.start(engine_build) as engine, pytest.raises(EngineRefusedError, match="adapter"):
        engine.load(load_request(model, wrong))


def test_without_a_cgroup_the_allocation_fails(
    engine_build: EngineBuild, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryCgroup, "create", lambda *_: None)
    large = settings(n_ctx=1 << 19, type_k="f32", type_v="f32")
    with Engine.start(engine_build) as engine:
        with pytest.raises(EngineRefusedError, match="allocate"):
            engine.load(load_request(demo_model, large, Bytes(256 * MIB)))
        assert engine.failure is None


# -- dry runs


@pytest.mark.parametrize("shape", ["llama-3b", "gemma3-12b", "granitehybrid-3b"])
def test_a_skeleton_is_sized_as_the_whole_file(
    engine_build: EngineBuild, tmp_path: Path, stand_in_gpu: Gpu, shape: str
) -> None:
    path = tmp_path / "m.gguf"
    description = build(shape, "q4_K_M")
    metadata = {k: v for k, v in description.metadata.items() if "tokenizer" not in k}
    n_vocab = next(t.shape[1] for t in description.tensors if t.name == "token_embd.weight")
    write_sparse(path, metadata | bpe_tokenizer(n_vocab), description.tensors)
    wanted = settings(n_gpu_layers=9, layers_per_device=(9,), n_ctx=4096, n_ubatch=256)
    device = stand_in_gpu(80 << 30)
    with Sizer(engine_build, [device]) as sizer:
        sized = sizer.sizes(read_model(path), [wanted])[wanted]
    with Engine.start(engine_build, devices=[device]) as engine:
        assert engine.size(path, wanted) == sized


def test_shards_are_sized_as_one_file(engine_build: EngineBuild, tmp_path: Path) -> None:
    metadata, tensors = build_tiny("llama-8b", "q8_0")
    whole = tmp_path / "m.gguf"
    write_random(whole, metadata, tensors)
    write_split(tmp_path, "split", metadata, tensors, 3)
    first = next(iter(sorted(tmp_path.glob("split*-00001-of-*.gguf"))))
    wanted = settings()
    with Sizer(engine_build, []) as sizer:
        sizes = [sizer.sizes(read_model(path), [wanted])[wanted] for path in (whole, first)]
    assert isinstance(sizes[0], Sizing)
    assert sizes[0] == sizes[1]


def test_a_skeleton_has_the_size_and_not_the_blocks(tmp_path: Path) -> None:
    path, skeleton = tmp_path / "m.gguf", tmp_path / "skeleton.gguf"
    write_sparse(path, *build("llama-70b", "q4_K_M"))
    model = read_model(path)
    write_skeleton(model, skeleton)
    assert skeleton.stat().st_size > model.weight_bytes
    assert skeleton.stat().st_blocks * 512 < MIB
    assert read_model(skeleton).tensors == model.tensors


def test_much_recurrent_state_is_not_sized(engine_build: EngineBuild, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_sparse(path, *build("mamba-2.8b", "q8_0"))
    many = settings(n_seq_max=256, n_outputs_max=256)
    with Sizer(engine_build, []) as sizer:
        refused = sizer.sizes(read_model(path), [many])[many]
    assert isinstance(refused, SizingFailure)
    assert "recurrent state" in refused.reason
