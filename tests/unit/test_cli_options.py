"""llama.cpp's spellings mean what they mean there; what cannot be read is refused in one line."""

from dataclasses import replace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from loadmaster.engine.types import SamplingParams
from loadmaster.errors import UsageError
from loadmaster.interfaces.cli import options
from loadmaster.plan.types import CPU, Override
from loadmaster.tasks.planning import PlanOptions


def read(*words: str) -> tuple[PlanOptions, SamplingParams, dict[str, Any]]:
    """What a command with all shared options gets from these words."""
    caught: list[tuple[PlanOptions, SamplingParams, dict[str, Any]]] = []

    @click.command()
    @options.sampling_options
    @options.plan_options
    @options.common_options
    def command(**given: Any) -> None:
        caught.append((options.read_plan_options(given), options.read_sampling(given), given))

    command.main(list(words), standalone_mode=False)
    return caught[0]


def test_nothing_given_leaves_everything_to_the_planner() -> None:
    plan, sampling, _ = read()
    assert plan == PlanOptions()
    assert replace(sampling, seed=0) == SamplingParams()


def test_a_seed_is_drawn_unless_given() -> None:
    drawn = {read()[1].seed for _ in range(4)}
    assert len(drawn) > 1
    assert read("--seed", "7")[1].seed == 7


def test_a_vision_projector_is_refused_with_its_reason() -> None:
    with pytest.raises(UsageError, match="images are not supported"):
        read("--mmproj", "clip.gguf")


@pytest.mark.parametrize("spelling", ["-c", "--ctx", "--ctx-size", "--n-ctx"])
def test_n_ctx(spelling: str) -> None:
    assert read(spelling, "4096")[0].workload.n_ctx == 4096


@pytest.mark.parametrize(
    "words",
    [["-ngl", "20"], ["-ngl=20"], ["--gpu-layers", "20"], ["--n-gpu-layers=20"]],
)
def test_gpu_layers(words: list[str]) -> None:
    assert read(*words)[0].knobs.n_gpu_layers == 20


def test_gpu_layers_in_words() -> None:
    assert read("-ngl", "all")[0].knobs.n_gpu_layers == options.ALL_LAYERS
    assert read("-ngl", "auto")[0].knobs.n_gpu_layers is None
    assert read("-ngl", "0")[0].knobs.n_gpu_layers == 0


def test_cache_types() -> None:
    assert read("--kv", "q8_0")[0].knobs.type_k == "q8_0"
    knobs = read("--kv", "q8_0", "-ctv", "q4_0")[0].knobs
    assert (knobs.type_k, knobs.type_v) == ("q8_0", "q4_0")
    assert read("--cache-type-k", "bf16")[0].knobs.type_v is None


@pytest.mark.parametrize("spelling", ["-n", "--max-tokens", "--predict", "--n-predict"])
def test_max_tokens(spelling: str) -> None:
    assert read(spelling, "64")[2]["max_tokens"] == 64


def test_engine_settings() -> None:
    knobs = read(
        "-t", "8", "-b", "1024", "-ub", "256", "-fa", "off", "-ncmoe", "7", "-ncffn", "3",
        "--load-mode", "mmap", "-nkvo", "--swa-full", "-ts", "3,2",
    )[0].knobs  # fmt: skip
    assert (knobs.n_threads, knobs.n_batch, knobs.n_ubatch) == (8, 1024, 256)
    assert (knobs.flash_attn, knobs.n_cpu_moe, knobs.n_cpu_ffn) == (False, 7, 3)
    assert (knobs.load_mode, knobs.offload_kqv, knobs.swa_full) == ("mmap", False, True)
    assert knobs.layers_per_device == (3, 2)
    assert read("-fa", "auto")[0].knobs.flash_attn is None
    assert read("-cmoe")[0].knobs.n_cpu_moe == options.ALL_LAYERS


def test_sampling() -> None:
    sampling = read(
        "--temp", "0", "--top-k", "1", "--top-p", "0.5", "--min-p", "0.1", "--seed", "9"
    )[1]
    assert sampling == SamplingParams(temperature=0, top_k=1, top_p=0.5, min_p=0.1, seed=9)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("ffn=CPU", [("ffn", CPU)]),
        (r"blk\.\d+\.ffn_.*=cpu", [(r"blk\.\d+\.ffn_.*", CPU)]),
        ("a=CUDA0,b=gpu:1", [("a", "gpu:0"), ("b", "gpu:1")]),
        ("x{1,2}=CPU", [("x{1,2}", CPU)]),
        ("a=b=Vulkan3", [("a=b", "gpu:3")]),
    ],
)
def test_overrides(text: str, overrides: list[tuple[str, str]]) -> None:
    wanted = tuple(Override(pattern=pattern, device=device) for pattern, device in overrides)
    assert options.parse_overrides(text) == wanted
    assert read("-ot", text)[0].knobs.overrides == wanted


@pytest.mark.parametrize("text", ["ffn", "=CPU", "ffn=", "ffn=disk", "ffn[=CPU", "ffn=gpu:x"])
def test_overrides_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError):
        options.parse_overrides(text)


def test_adapters() -> None:
    assert options.parse_adapter("a.gguf") == ("a.gguf", 1.0)
    assert options.parse_adapter("a.gguf:0.5") == ("a.gguf", 0.5)
    assert options.parse_adapter("c:a.gguf") == ("c:a.gguf", 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-ngl", "-1"], "-1"),
        (["-ngl", "1.5"], "not a number of layers"),
        (["-c", "0"], "0 is not in the range"),
        (["-c", "8k"], "8k"),
        (["--kv", "q9"], "q9"),
        (["--temp", "-1"], "-1"),
        (["--vrma", "8GiB"], "--vrma"),
    ],
)
def test_words_that_mean_nothing(words: list[str], message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        read(*words)
    assert message in caught.value.format_message()


def test_a_split_that_is_no_list() -> None:
    with pytest.raises(UsageError, match="not a list of layer counts"):
        read("-ts", "3,x")


def test_every_option_has_a_help_text() -> None:
    @click.command()
    @options.sampling_options
    @options.plan_options
    @options.common_options
    def command(**given: Any) -> None:
        """All of them."""

    for parameter in command.params:
        assert isinstance(parameter, click.Option)
        assert parameter.help, parameter.name
    assert CliRunner().invoke(command, ["--help"]).exit_code == 0
