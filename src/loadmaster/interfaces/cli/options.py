"""The options that `run`, `chat` and `plan` share, and the values they stand for.

Names follow llama.cpp, so that a command line can be carried over; ours come first in the help.
"""

import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from loadmaster.engine.types import SamplingParams
from loadmaster.errors import UsageError
from loadmaster.plan.choices import MAX_SEQUENCES
from loadmaster.plan.types import (
    CPU,
    DRAFT_STEP_TOKENS,
    KV_TYPES,
    Knobs,
    LoadMode,
    Override,
    Workload,
)
from loadmaster.tasks.planning import PlanOptions

Command = TypeVar("Command", bound=Callable[..., object])

_SEEDS = 1 << 32
ALL_LAYERS = 1 << 20  # `-ngl all`; planning reduces it to what the model has
LOOKUP = "lookup"
_NO_DRAFTS = (None, "off")
_POSITIVE = click.IntRange(min=1)
_COUNT = click.IntRange(min=0)
_ON_OFF = click.Choice(["on", "off", "auto"])
_KV_TYPE = click.Choice(KV_TYPES)


def _layer_count(text: str) -> int | None:
    """`all` becomes ALL_LAYERS, `auto` None; llama.cpp's negative numbers are refused."""
    if text in ("all", "auto"):
        return ALL_LAYERS if text == "all" else None
    if not text.isdigit():
        raise click.BadParameter(f"`{text}` is not a number of layers: 0 or more, `all`, `auto`")
    return int(text)


def _option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    return click.option(*names, **settings)


_BUDGET = (
    _option("--vram", metavar="SIZE", help="Hard cap on GPU memory: 11.5GiB, 0=8GiB,1=6GiB, 90%."),
    _option("--ram", metavar="SIZE", help="Hard cap on host memory: 48GiB, 80%."),
)
_WORKLOAD = (
    _option(
        "-c", "--ctx", "--ctx-size", "--n-ctx", "n_ctx", type=_POSITIVE, metavar="N",
        help="Tokens of prompt and answer together; default: the model's own, as far as it fits.",
    ),
)  # fmt: skip
_PLACEMENT = (
    _option(
        "-ngl", "--gpu-layers", "--n-gpu-layers", "n_gpu_layers", type=_layer_count, metavar="N",
        help="Layers on the GPU, `all` or `auto`; the rest is solved around it.",
    ),
    _option(
        "-ts", "--tensor-split", "tensor_split", metavar="N,N", help="Layers for each GPU."
    ),
    _option(
        "-ot", "--override-tensor", "override_tensor", multiple=True, metavar="REGEX=DEVICE",
        help="Keep matching tensors on cpu or gpu:0; may be given again.",
    ),
    _option(
        "-ncmoe", "--n-cpu-moe", "n_cpu_moe", type=_COUNT, metavar="N",
        help="Keep the experts of the first N layers on the CPU.",
    ),
    _option("-cmoe", "--cpu-moe", "cpu_moe", is_flag=True, help="Keep all experts on the CPU."),
    _option(
        "-ncffn", "--n-cpu-ffn", "n_cpu_ffn", type=_COUNT, metavar="N",
        help="Keep the dense feed-forwards of the first N layers on the CPU.",
    ),
    _option(
        "--lora", "lora", multiple=True, metavar="FILE[:SCALE]", help="Add a LoRA adapter (GGUF)."
    ),
)  # fmt: skip
_CACHE = (
    _option("--kv", "kv", type=_KV_TYPE, help="Type of the KV cache, keys and values."),
    _option("-ctk", "--cache-type-k", "type_k", type=_KV_TYPE, help="Type of the keys."),
    _option("-ctv", "--cache-type-v", "type_v", type=_KV_TYPE, help="Type of the values."),
    _option(
        "-nkvo", "--no-kv-offload", "no_kv_offload", is_flag=True, help="Keep the KV cache in RAM."
    ),
    _option(
        "--swa-full", "swa_full", is_flag=True, help="Full-size cache for sliding-window layers."
    ),
)
_ENGINE = (
    _option("-t", "--threads", "n_threads", type=_POSITIVE, metavar="N", help="CPU threads."),
    _option(
        "-b", "--batch-size", "n_batch", type=_POSITIVE, metavar="N", help="Logical n_batch."
    ),
    _option(
        "-ub", "--ubatch-size", "n_ubatch", type=_POSITIVE, metavar="N", help="Physical n_ubatch."
    ),
    _option(
        "-nopo", "--no-op-offload", "no_op_offload", is_flag=True,
        help="Never stream CPU-resident weights to a GPU.",
    ),
    _option(
        "--op-offload-min-batch", "op_offload_min_batch", type=_POSITIVE, metavar="N",
        help="Stream them from this many tokens on.",
    ),
    _option("-fa", "--flash-attn", "flash_attn", type=_ON_OFF, help="Flash attention."),
    _option(
        "--draft", "draft", metavar="MODEL|lookup",
        help="Guess tokens ahead and check several in a step where that pays. A smaller model with "
        "the same vocabulary guesses, or `lookup`: what followed the last tokens before. "
        "Default: off.",
    ),
    _option(
        "-lm", "--load-mode", "load_mode", type=click.Choice(["none", "mmap", "mlock"]),
        help="How weights come into RAM: read, mapped, or mapped and locked.",
    ),
    _option(
        "--quantize", "quantize", type=click.Choice(["nf4", "int8", "fp8", "fp4", "none"]),
        help="Of a safetensors model: what its weights are made while they load; default: none.",
    ),
    _option(
        "--no-double-quant", "no_double_quant", is_flag=True,
        help="With --quantize nf4 or fp4: scales in full, 4.5 bits a weight instead of 4.13.",
    ),
    _option(
        "-mm", "--mmproj", "mmproj", metavar="FILE", hidden=True, help="Refused: text only.",
    ),
    _option(
        "--backend", type=click.Choice(["llamacpp", "fake"]), default="llamacpp", hidden=True,
        help="`fake` computes nothing; it is for tests.",
    ),
)  # fmt: skip
_MACHINE = _option(
    "--machine", metavar="NAME|FILE",
    help="Plan for another machine: a shipped profile, or one that `doctor` wrote.",
)  # fmt: skip
_PLAN = (*_BUDGET, *_WORKLOAD, *_PLACEMENT, *_CACHE, *_ENGINE)

_SAMPLING = (
    _option(
        "-n", "--max-tokens", "--predict", "--n-predict", "max_tokens", type=_POSITIVE,
        metavar="N", help="Tokens to generate at most; default: until the model ends.",
    ),
    _option("--temp", "temperature", type=click.FloatRange(min=0), default=0.8, show_default=True,
            help="0 takes the likeliest token."),
    _option("--top-k", type=_COUNT, default=40, show_default=True, help="0: all."),
    _option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True,
            help="Keep the likeliest tokens up to this sum."),
    _option("--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True,
            help="Drop tokens below this part of the likeliest."),
    _option("--typical-p", type=click.FloatRange(0, 1, min_open=True), default=1.0,
            show_default=True, help="Keep tokens of about average surprise up to this sum."),
    _option("--repeat-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0,
            show_default=True, help="Divide the logits of recent tokens by this."),
    _option("--frequency-penalty", type=float, default=0.0, show_default=True,
            help="Taken off a logit for each time the token is among the recent ones."),
    _option("--presence-penalty", type=float, default=0.0, show_default=True,
            help="Taken off a logit once, if the token is among the recent ones."),
    _option("--repeat-last-n", type=click.IntRange(min=-1), default=64, show_default=True,
            metavar="N", help="How many tokens are recent; -1: all."),
    _option("--seed", type=_COUNT, help="Seed of the sampler; default: another each time."),
    _option("--stop", multiple=True, metavar="TEXT", help="End the answer at this text."),
    _option("-s", "--system", "system", metavar="TEXT", help="System prompt."),
)  # fmt: skip
_COMMON = (
    _option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    _option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
    _option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def plan_options(command: Command) -> Command:
    """Everything that decides placement; collected by `read_plan_options`."""
    return _apply(_PLAN, command)


def machine_option(command: Command) -> Command:
    """`--machine`, of commands that plan for machines which are not here."""
    return _apply((_MACHINE,), command)


def sequence_options(*, sequences: str, cells: str) -> Callable[[Command], Command]:
    """`--sequences` and `--cells`, with the help that tells what a command does without them."""
    options = (
        _option(
            "-np", "--sequences", "--parallel", "--max-num-seqs", "n_sequences",
            type=click.IntRange(1, MAX_SEQUENCES), metavar="N", help=sequences,
        ),
        _option("--cells", "n_cells", type=_POSITIVE, metavar="N", help=cells),
    )  # fmt: skip
    return lambda command: _apply(options, command)


def sampling_options(command: Command) -> Command:
    """How tokens are chosen; collected by `read_sampling`."""
    return _apply(_SAMPLING, command)


def common_options(command: Command) -> Command:
    """`--json`, `-q` and `--debug`, on every command."""
    return _apply(_COMMON, command)


def _apply(options: Iterable[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(tuple(options)):
        command = option(command)
    return command


def read_plan_options(given: dict[str, Any]) -> PlanOptions:
    """Collect the values of `plan_options`.

    Raises:
        UsageError: two options contradict each other, or one cannot be read.
    """
    if given["mmproj"] is not None:
        raise UsageError(
            f"images are not supported yet: the vision projector `{given['mmproj']}` would take "
            "memory that no plan counts",
            hint="leave `--mmproj` out; the model answers text without it",
        )
    return PlanOptions(
        vram=given["vram"],
        ram=given["ram"],
        machine=given.get("machine"),
        backend=given["backend"],
        workload=Workload(n_ctx=given["n_ctx"]),
        knobs=_read_knobs(given),
        adapters=tuple(map(parse_adapter, given["lora"])),
        draft=None if given.get("draft") in (*_NO_DRAFTS, LOOKUP) else given["draft"],
    )


def _read_knobs(given: dict[str, Any]) -> Knobs:
    split = _parse_split(given["tensor_split"])
    flash = given["flash_attn"]
    load_mode: LoadMode | None = given["load_mode"]
    return Knobs(
        n_gpu_layers=given["n_gpu_layers"],
        layers_per_device=split,
        overrides=tuple(o for text in given["override_tensor"] for o in parse_overrides(text)),
        n_cpu_moe=ALL_LAYERS if given["cpu_moe"] else given["n_cpu_moe"],
        n_cpu_ffn=given["n_cpu_ffn"],
        type_k=_one_of(given, "type_k", "kv"),
        type_v=_one_of(given, "type_v", "kv"),
        n_batch=given["n_batch"],
        n_ubatch=given["n_ubatch"],
        flash_attn=None if flash in (None, "auto") else flash == "on",
        offload_kqv=False if given["no_kv_offload"] else None,
        op_offload=False if given["no_op_offload"] else None,
        op_offload_min_batch=given["op_offload_min_batch"],
        swa_full=True if given["swa_full"] else None,
        load_mode=load_mode,
        n_threads=given["n_threads"],
        quantize=given.get("quantize"),
        double_quant=False if given.get("no_double_quant") else None,
        n_draft=None if given.get("draft") in _NO_DRAFTS else DRAFT_STEP_TOKENS - 1,
    )


def _one_of(given: dict[str, Any], specific: str, general: str) -> str | None:
    value: str | None = given[specific] or given[general]
    return value


def read_sampling(given: dict[str, Any]) -> SamplingParams:
    """Collect the values of `sampling_options`."""
    return SamplingParams(
        temperature=given["temperature"],
        top_k=given["top_k"],
        top_p=given["top_p"],
        min_p=given["min_p"],
        typical_p=given["typical_p"],
        repeat_penalty=given["repeat_penalty"],
        frequency_penalty=given["frequency_penalty"],
        presence_penalty=given["presence_penalty"],
        repeat_last_n=given["repeat_last_n"],
        seed=secrets.randbelow(_SEEDS) if given["seed"] is None else given["seed"],
    )


def parse_overrides(text: str) -> tuple[Override, ...]:
    """`regex=device`, or several joined with commas as llama.cpp takes them."""
    pieces = text.split(",")
    if not all("=" in piece for piece in pieces):
        pieces = [text]  # a comma inside the regex
    return tuple(map(_parse_override, pieces))


def _parse_override(text: str) -> Override:
    pattern, separator, device = text.rpartition("=")
    if not separator or not pattern:
        raise UsageError(f"`{text}` is not an override", hint="write `-ot 'blk\\.3\\.ffn_.*=cpu'`")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"`{pattern}` is not a regular expression: {error}") from error
    return Override(pattern=pattern, device=parse_device(device))


def parse_device(text: str) -> str:
    """Our device id for `cpu`, `gpu:0` and llama.cpp's `CPU`, `CUDA0`, `Vulkan1`."""
    if text.lower() == CPU:
        return CPU
    match = re.fullmatch(r"(?:gpu:?|cuda|rocm|vulkan|sycl|mtl|metal)(\d+)", text.lower())
    if match is None:
        raise UsageError(
            f"`{text}` is not a device", hint="devices are `cpu` and `gpu:0`, `gpu:1` …"
        )
    return f"gpu:{match[1]}"


def parse_adapter(text: str) -> tuple[str, float]:
    """`FILE` or `FILE:SCALE`; a file whose name ends in `:1` wins over a scale."""
    path, separator, scale = text.rpartition(":")
    if not separator or Path(text).exists():
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:
        return text, 1.0


def _parse_split(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isdigit() for part in parts):
        raise UsageError(
            f"`{text}` is not a list of layer counts", hint="write `-ts 20,12`: layers for each GPU"
        )
    return tuple(map(int, parts))
