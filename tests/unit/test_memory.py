"""Header arithmetic against figures that the engine gave for the same files and settings.

The figures are of llama.cpp 0c1e57098 sizing header-only files on virtual devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.grid import BASE, CUDA, PLAIN
from benchmarks.gguf_writer import write_sparse
from benchmarks.shapes import ARCHITECTURES, TINY
from loadmaster.machine.types import SizingRules
from loadmaster.model.quants import BY_NAME
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan import bounds, layout, memory
from loadmaster.plan.types import CPU, EngineSettings, Override

EXPERTS_ON_CPU = (Override(pattern=r"\.ffn_(up|down|gate)_exps\.", device=CPU),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """One case: model, context and compute bytes by the engine, GPUs in order, the host last."""

    name: str
    rules: tuple[SizingRules, ...]
    settings: dict[str, Any]
    rows: tuple[tuple[int, int, int], ...]

    @property
    def engine(self) -> Mapping[str, tuple[int, int, int]]:
        return dict(zip([*_by_id(self.rules), CPU], self.rows, strict=True))


def _by_id(rules: tuple[SizingRules, ...]) -> dict[str, SizingRules]:
    return {f"gpu:{index}": rule for index, rule in enumerate(rules)}


TWO = (CUDA, CUDA)
SIZED = (
    Sized(  # rope_freqs on each device, token_embd again as the output
        name="llama-3b", rules=TWO, settings={"layers_per_device": (5, 10)},
        rows=((297836800, 83886080, 88672512), (775262464, 150994944, 292040704),
              (1058488576, 234881024, 16791552))),
    Sized(
        name="qwen3moe-30b-a3b", rules=TWO,
        settings={"layers_per_device": (20, 29), "type_k": "q8_0", "type_v": "q8_0",
                  "overrides": EXPERTS_ON_CPU},
        rows=((236359680, 89128960, 282853248), (586164224, 124780544, 315359232),
              (17728192512, 0, 12679168))),
    Sized(  # sliding windows, one cache for four sequences, a GPU without layers
        name="gemma3-12b", rules=TWO,
        settings={"layers_per_device": (30, 0), "n_ctx": 32768, "n_seq_max": 4, "n_ubatch": 1024},
        rows=((4465709568, 2348810240, 1089732608), (0, 0, 0),
              (3135337472, 1476395008, 110145536))),
    Sized(  # V padded to the widest layer, a cache for each sequence, token_embd twice on the host
        name="gemma4-31b", rules=(PLAIN,),
        settings={"layers_per_device": (20,), "n_ctx": 16384, "flash_attn": False,
                  "kv_unified": False, "n_seq_max": 2},
        rows=((6567993344, 3279945728, 713043968), (12824222720, 5863636992, 724056064))),
    Sized(  # MLA: K alone
        name="deepseek2-lite", rules=TWO, settings={"layers_per_device": (4, 8)},
        rows=((1479781504, 18874368, 260770304), (2986577792, 33030144, 247738368),
              (5879767040, 75497472, 12593152))),
    Sized(  # recurrent states beside a cache for each sequence
        name="qwen3next-80b-a3b", rules=TWO,
        settings={"layers_per_device": (10, 10), "n_seq_max": 2, "kv_unified": False},
        rows=((9856813056, 51904512, 533725184), (9592799744, 51511296, 325857408),
              (28949101056, 155320320, 23278624))),
    Sized(
        name="lfm2-1.2b", rules=TWO,
        settings={"layers_per_device": (8, 9), "offload_kqv": False},
        rows=((312493056, 0, 58738688), (381413376, 0, 138412032),
              (75497472, 50495488, 18888736))),
    Sized(  # the MTP layer takes a place on the GPU and is not loaded
        name="glm4moe-air", rules=TWO, settings={"layers_per_device": (1, 2)},
        rows=((1689871232, 16777216, 929089792), (509231104, 0, 318767104),
              (68194334720, 754974720, 20985856))),
    Sized(
        name="phi3-mini", rules=TWO, settings={"layers_per_device": (16, 17), "type_k": "q4_0"},
        rows=((1071514112, 515899392, 67119104), (1152327680, 515899392, 88748032),
              (55406592, 0, 16791552))),
    Sized(  # rows of 2880 are no multiple of 512, and this device does not pad them
        name="gpt-oss-20b", rules=(PLAIN,), settings={"layers_per_device": (10,), "swa_full": True},
        rows=((4589963136, 75497472, 423624704), (7021787520, 125829120, 105273344))),
)  # fmt: skip


def _settings(**changes: Any) -> EngineSettings:
    layers = sum(changes.get("layers_per_device", ()))
    return replace(BASE, n_gpu_layers=layers, **changes)


def _model(folder: Path, name: str) -> ModelSpec:
    return read_model(write_sparse(folder / f"{name}.gguf", *ARCHITECTURES[name]("q4_K_M")))


def _tiny(folder: Path, name: str, quant: str = "q4_K_M") -> ModelSpec:
    return read_model(write_sparse(folder / f"{name}-tiny.gguf", *TINY[name](quant)))


@pytest.mark.parametrize("case", SIZED, ids=lambda case: case.name)
def test_bytes_are_the_engines(case: Sized, tmp_path: Path) -> None:
    model, settings, rules = (
        _model(tmp_path, case.name), _settings(**case.settings), _by_id(case.rules),
    )  # fmt: skip
    engine = case.engine
    assert memory.model_bytes(model, settings, rules) == {d: r[0] for d, r in engine.items()}
    assert memory.context_bytes(model, settings, rules) == {d: r[1] for d, r in engine.items()}


@pytest.mark.parametrize("case", SIZED, ids=lambda case: case.name)
def test_the_bound_is_above_the_engine(case: Sized, tmp_path: Path) -> None:
    model = _model(tmp_path, case.name)
    bound = bounds.bound_compute_bytes(model, _settings(**case.settings), _by_id(case.rules))
    for device, (_, _, compute) in case.engine.items():
        assert bound[device] >= compute


def test_quantized_rows_are_padded_once_for_a_tensor() -> None:
    q8, plain = BY_NAME["q8_0"], replace(CUDA, row_padding=0)
    # 10 rows of 3060 bytes; 2880 = 5 · 512 + 320, so 192 elements (204 bytes) are added, once.
    assert memory.alloc_bytes(q8, (2880, 10), plain) == 30720
    assert memory.alloc_bytes(q8, (2880, 10), CUDA) == 30848
    assert memory.alloc_bytes(BY_NAME["f16"], (2880, 10), CUDA) == 57600


@pytest.mark.parametrize(
    ("n_ctx", "n_seq_max", "kv_unified", "rounded"),
    [
        (1, 1, True, 256),
        (4096, 1, True, 4096),
        (4097, 1, True, 4352),
        (1000, 4, True, 1024),
        (1000, 4, False, 1024),
        (4096, 3, False, 4608),  # 1365 cells each, padded to 1536
        (256, 4, False, 1024),
    ],
)
def test_n_ctx_is_rounded_as_the_engine_does(
    n_ctx: int, n_seq_max: int, kv_unified: bool, rounded: int
) -> None:
    assert memory.round_n_ctx(n_ctx, n_seq_max=n_seq_max, kv_unified=kv_unified) == rounded


def test_window_cells_hold_every_sequence_and_one_ubatch(tmp_path: Path) -> None:
    model = _model(tmp_path, "gpt-oss-20b")  # a window of 128 tokens
    settings = _settings(layers_per_device=(0,), n_ctx=8192)
    assert memory.swa_cells(model, settings) == 768
    assert memory.swa_cells(model, replace(settings, n_ubatch=2048)) == 2304
    assert memory.swa_cells(model, replace(settings, n_seq_max=4)) == 1024
    assert memory.swa_cells(model, replace(settings, n_seq_max=4, kv_unified=False)) == 768
    assert memory.swa_cells(model, replace(settings, swa_full=True)) == 8192


def test_the_first_override_that_matches_wins(tmp_path: Path) -> None:
    model = _tiny(tmp_path, "llama-8b")
    settings = _settings(
        layers_per_device=(5,),
        overrides=(
            Override(pattern=r"^blk\.1\.ffn_up\.weight$", device="gpu:0"),
            Override(pattern=r"ffn_(up|gate)", device=CPU),
        ),
    )
    where = layout.device_of_tensor(model, settings)
    assert where["blk.1.ffn_up.weight"] == "gpu:0"
    assert where["blk.1.ffn_gate.weight"] == CPU
    assert where["blk.0.ffn_up.weight"] == CPU
    assert where["blk.0.ffn_down.weight"] == "gpu:0"
    assert where["token_embd.weight"] == CPU


def test_layers_fill_the_gpus_from_the_last_one_back(tmp_path: Path) -> None:
    model = _tiny(tmp_path, "llama-8b")
    devices = layout.layer_devices(model, _settings(layers_per_device=(2, 1)))
    assert devices == (CPU, CPU, "gpu:0", "gpu:0", "gpu:1")


def test_a_repacked_tied_output_is_a_second_host_copy(tmp_path: Path) -> None:
    model = _tiny(tmp_path, "llama-3b", "q4_0")
    alone = _settings()
    tied = next(t for t in model.tensors if t.name == "token_embd.weight").size_bytes

    def host(settings: EngineSettings, *rules: SizingRules) -> int:
        repacked = memory.repacked_types(("avx2",))
        return memory.model_bytes(model, settings, _by_id(rules), repacked=repacked)[CPU]

    plain = memory.model_bytes(model, alone, {})[CPU]
    assert host(alone) == plain + tied
    assert host(replace(alone, use_extra_bufts=False)) == plain
    # Page-locked buffers come before repacked ones, as soon as a GPU is opened.
    assert host(_settings(layers_per_device=(0,)), CUDA) == plain
    assert host(_settings(layers_per_device=(0,), op_offload=False), CUDA) == plain + tied


def test_repacked_weights_are_matrices_of_a_repacked_type(tmp_path: Path) -> None:
    model = _model(tmp_path, "llama-8b")
    q4_k = memory.repacked_types(("avx2",))
    # CPU_REPACK of the engine for this header; the rest is q6_K, norms and token_embd.
    assert memory.repacked_bytes(model, _settings(), {}, q4_k) == 3359637504
    assert memory.repacked_bytes(model, _settings(use_extra_bufts=False), {}, q4_k) == 0
    pinned = _settings(layers_per_device=(0,))
    assert memory.repacked_bytes(model, pinned, _by_id((CUDA,)), q4_k) == 0


def test_repacked_types_follow_the_processor() -> None:
    assert memory.repacked_types(()) == frozenset()
    assert "q2_K" not in memory.repacked_types(("avx2",))
    assert {"q4_K", "q2_K"} <= memory.repacked_types(("avx2", "avx512"))
    assert "q8_0" in memory.repacked_types(("neon", "dotprod"))


def test_output_rows_grow_to_n_outputs_max(tmp_path: Path) -> None:
    model = _tiny(tmp_path, "llama-8b")
    row = 4 * model.n_vocab
    assert memory.output_bytes(model, _settings(n_outputs_max=4, n_seq_max=2)) == 4 * row
    assert memory.output_bytes(model, _settings(n_outputs_max=1, n_seq_max=8)) == 8 * row
    assert memory.output_bytes(model, _settings(n_outputs_max=0, n_batch=64)) == 64 * row


def test_every_tensor_is_placed_once_but_duplicates(tmp_path: Path) -> None:
    for name in TINY:
        model = _tiny(tmp_path, name)
        settings = _settings(layers_per_device=(2, 2))
        placed = layout.placed_tensors(model, settings)
        loaded = [t.name for t in model.tensors if layout.is_loaded(model, t)]
        assert [one.tensor.name for one in placed if not one.duplicate] == loaded
        assert {one.device for one in placed} <= {CPU, "gpu:0", "gpu:1"}
