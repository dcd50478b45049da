"""Pages about safetensors models under the transformers engine."""

from loadmaster.machine.profiles import load_profile
from loadmaster.model.shapes.checkpoints import shape_checkpoint
from loadmaster.model.shapes.library import load_shape, shape_header
from loadmaster.plan.hf_speed import speed_of
from loadmaster.plan.types import CPU, Plan, TransformersSettings
from loadmaster.units import GIB
from scripts.guides.asking import END, GB, Answer, ask, compare, printed

_PLAN_405B = "loadmaster plan shape:llama-3.1-405b@{} --machine {} -c 4096"
_CARDS = {
    "8 × 80 GB": "h100-80g-x8",
    "4 × 80 GB": "a100-80g-x4",
    "8 × 24 GB": "rtx4090-x8",
    "4 × 24 GB": "rtx4090-x8 --vram 0=23GiB,1=23GiB,2=23GiB,3=23GiB",
}
_LABELS = {"NONE": "BF16", "FP8": "FP8", "NF4": "NF4"}


def llama_8b_nf4() -> str:
    """Llama 3 8B in NF4 on 12 and 24 GB, beside FP16 and Q4_K_M."""
    small = ask("loadmaster plan shape:llama-3-8b@nf4 --machine rtx3060-12g")
    large = ask("loadmaster plan shape:llama-3-8b@nf4 --machine rtx4090-24g")
    plain = ask("loadmaster plan shape:llama-3-8b@none --machine rtx4090-24g")
    refused = ask("loadmaster plan shape:llama-3-8b@none --machine rtx3060-12g")
    command = (
        "loadmaster plan --compare shape:llama-3-8b@NONE shape:llama-3-8b@INT8 "
        "shape:llama-3-8b@NF4 shape:llama-3-8b@Q8_0 shape:llama-3-8b@Q4_K_M "
        "--machine rtx4090-24g --kv f16"
    )
    return f"""# Llama 3 8B in NF4 on 12 and 24 GB

transformers with bitsandbytes makes NF4 of the published BF16 weights while it loads them.

## 12 GB

{small.text}

## The arithmetic

| | |
|---|---|
| matrices of 32 layers | 6.979 billion weights |
| in NF4, a scale for each 64, quantized once more | × 4.127 bits = {6.979e9 * 4.127 / 8 / GIB:.2f} GiB |
| embedding and output, not quantized | 2 × 128,256 × 4,096 × 2 bytes = {2 * 128256 * 4096 * 2 / GIB:.2f} GiB |
| together | {small.gib("gpu:0", "model"):.2f} GiB |
| the cache, for each token | 32 layers × 8 heads × 128 × 2 × 2 bytes = 128 KiB |

## 24 GB

{large.text}

The 4090 reads three times as fast as the 3060 and decodes {large.decode_tok_s:.0f} tok/s, as many as that: its Python launches operations no faster. In
BF16 it waits for its memory instead, at {plain.decode_tok_s:.0f} tok/s. bitsandbytes publishes 57.1 tok/s for NF4 with double
quantization and 47.5 for BF16 on this card.

## BF16 on 12 GB: refused

{refused.text}

Nothing slips to the CPU unasked. `-ngl` puts layers there, unquantized, and says what it costs.

## Beside llama.cpp

{printed(command)}

## Where the folklore is wrong

- **"4 bits are a quarter of 16."** Of the whole model it is {small.gib("gpu:0", "model") / plain.gib("gpu:0", "model"):.0%}: embedding and output stay in 16 bits, and scales add an eighth of a bit.
- **"NF4 is the same as Q4_K_M."** About as fast on this card or slower, {small.gib("gpu:0", "model") - _q4_gib():.1f} GiB larger, and a point lower in published MMLU (63.4
  and 64.6): GGUF files are quantized once, slowly, with more bits where it matters.
- **"bitsandbytes spills to RAM when the card is full."** What is on the CPU is not quantized and goes over the link for
  every token.
{END}"""


def _q4_gib() -> float:
    return shape_header(load_shape("llama-3-8b"), "Q4_K_M")[1] / GIB


def llama_405b_transformers() -> str:
    """Llama 3.1 405B in BF16, FP8 and NF4 on four sets of cards."""
    answers = {
        (cards, label): ask(_PLAN_405B.format(label.lower(), machine))
        for cards, machine in _CARDS.items()
        for label in _LABELS
    }
    rows = "\n".join(_row(cards, label, answer) for (cards, label), answer in answers.items())
    nf4 = answers["4 × 80 GB", "NF4"]
    eight = answers["8 × 80 GB", "NF4"]
    on_cpu = ask(_PLAN_405B.format("nf4", "rtx4090-x8") + " -ngl 98")
    refused = answers["8 × 24 GB", "NF4"]
    model = sum(device.of("model") for device in nf4.made.devices)
    llamacpp = compare(
        "loadmaster plan --compare shape:llama-3.1-405b@IQ2_XS --machine rtx4090-x8 -c 4096"
        " --kv f16"
    )["candidates"][0]
    return f"""# Llama 3.1 405B with transformers: BF16, FP8 and NF4

| cards | weights | | GPUs in use | decode |
|---|---|---|---|---|
{rows}

## NF4 on four 80 GB cards

{nf4.text}

## The arithmetic

| | |
|---|---|
| matrices of 126 layers | 401.7 billion weights |
| in NF4 with double quantization | × 4.127 bits = {401.65e9 * 4.127 / 8 / GIB:.0f} GiB |
| embedding and output in BF16 | {2 * 128256 * 16384 * 2 / GIB:.1f} GiB |
| together | {model / GIB:.1f} GiB ({model / GB:.0f} GB) |
| of eight cards with 24 GB, after headroom, contexts and activations | 8 × {_room(on_cpu):.1f} = {8 * _room(on_cpu):.0f} GiB |

## Eight 24 GB cards: refused

{_shortened(refused)}

The folklore's "405B in 4 bits is 203 GB" is right for the matrices in 4.0 bits; scales, embedding, output, contexts and
activations are what eight 24 GB cards do not hold. llama.cpp in IQ2_XS puts {llamacpp["weights_bytes"]["gpu"] / GIB:.0f} GiB on them.

## Eight 24 GB cards with 28 layers on the CPU

{_ended(on_cpu)}

## NF4 on eight 80 GB cards

{_ended(eight)}

As many cards as hold it are used, and the others stay free. H100s decode {eight.decode_tok_s:.1f} tok/s where A100s decode {nf4.decode_tok_s:.1f}:
both wait for Python, which launches the operations of 126 layers.

{_several_cards(nf4)}{END}"""


def _several_cards(nf4: Answer) -> str:
    return f"""## Several cards, one token

| | |
|---|---|
| balance by memory | equal cards are filled evenly, to the same share of their budgets |
| balance by time | of unequal cards the fastest is filled first: a token takes the sum of their times |
| pipeline bubble | with n cards each waits (n − 1) / n of the time, at one sequence and at many: a step passes each card once |
| between cards | a row of 16,384 numbers, 32 KiB a token: {_handover_ms(nf4):.2f} ms of {1000 / nf4.decode_tok_s:.0f} on four A100s |
| link to the CPU | bounds whatever `-ngl` leaves there |

For many users an engine that shards every matrix makes all cards work at the same time. The plan's last note has its
command: `--tensor-parallel-size` is the most cards that share all heads evenly, `--gpu-memory-utilization` the smallest
budget over the card's memory, `--max-model-len` the planned n_ctx. Where the weights do not fit all cards together the
note says that instead.

FP8 keeps its bits in memory and is written out in BF16 for every product, a part at a time: half the memory of BF16, and fewer
tokens a second than NF4. vLLM multiplies in FP8 on Hopper and Ada cards.
"""


def _row(cards: str, label: str, answer: Answer) -> str:
    name = _LABELS[label]
    if answer.plan is None:
        return f"| {cards} | {name} | does not fit | | |"
    plan: Plan = answer.plan
    assert isinstance(plan.engine, TransformersSettings)
    gpus = [device for device in plan.devices if device.id != CPU]
    size = sum(device.of("model") for device in gpus) / GIB
    return f"| {cards} | {name} | {size:.0f} GiB | {len(gpus)} | {answer.decode_tok_s:.1f} tok/s |"


def _ended(answer: Answer) -> str:
    """A plan from its prediction on: the ledgers of eight cards are long."""
    lines = answer.text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("predicted"))
    return "\n".join([*lines[:2], "…", *lines[start:]])


def _handover_ms(answer: Answer) -> float:
    machine = load_profile(answer.made.machine_name)
    speed = speed_of(machine, shape_checkpoint(load_shape("llama-3.1-405b")), _settings(answer))
    return 1000 * speed.handover_s(1)


def _settings(answer: Answer) -> TransformersSettings:
    assert isinstance(answer.made.engine, TransformersSettings)
    return answer.made.engine


def _room(answer: Answer) -> float:
    """GiB of weights and cache that one of these cards holds."""
    card = answer.made.device("gpu:0")
    fixed = [item for item in card.items if item.why in ("cuda context", "cuBLAS workspaces")]
    taken = card.of("compute") + sum(item.bytes for item in fixed)
    return (card.budget_bytes - taken) / GIB


def _shortened(answer: Answer) -> str:
    """A refusal without its ledger, which is long for eight cards."""
    lines = answer.refusal.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("  short by"))
    return f"```\n$ {answer.command}\n" + "\n".join(lines[start:]).rstrip() + "\n```"
