"""Pages about other models and machines."""

from typing import Any

from loadmaster.model.shapes.library import load_shape, shape_header
from loadmaster.plan.types import CPU
from loadmaster.units import GIB
from scripts.guides.asking import END, GB, Answer, ask, compare, ram_gb_s


def big_file_on_12gb() -> str:
    """A 64 GB file on 12 GB, beside 64 and 96 GB of RAM."""
    dense = "loadmaster plan shape:qwen2.5-72b@Q6_K --machine rtx3060-12g-ram{}g{}"
    small, large = ask(dense.format(64, "")), ask(dense.format(96, ""))
    exact = ask(dense.format(64, " --vram 11.5GiB"))
    capped = ask(dense.format(64, " --load-mode none --ram 40GiB"))
    experts = ask("loadmaster plan shape:gpt-oss-120b --machine rtx3060-12g-ram64g")
    size = small.made.file_bytes
    rates = [ram_gb_s(f"rtx3060-12g-ram{ram}g") for ram in (64, 96)]
    return f"""# A 64 GB model on 12 GB of VRAM

Qwen2.5 72B in Q6_K is {size / GB:.1f} GB ({size / GIB:.2f} GiB) and reads all of it for every token. gpt-oss-120b is
about as large and reads a twentieth of it.

## 12 GB + 64 GB of RAM

{small.text}

It fits, with {small.made.device(CPU).left_bytes / GIB:.1f} GiB to spare: the file's {size / GIB:.1f} GiB less
{small.gib("gpu:0", "model"):.1f} GiB on the card. The cost is time: {small.ram_gib:.1f} GiB from RAM at
{rates[0]:.1f} GB/s is one token in {1 / small.decode_tok_s:.1f} s.

## "Use exactly 11.5 GiB"

{exact.text}

The cap holds for the process on the card as the driver counts it, CUDA's own context included. The plan ends
{exact.made.device("gpu:0").left_bytes / (1 << 20):.0f} MiB under it, because matrices are indivisible.

## 12 GB + 96 GB of RAM

{large.text}

More RAM makes nothing faster by itself: this machine is faster because its memory is DDR5 ({rates[1]:.1f} against
{rates[0]:.1f} GB/s).

## Refused where it must be

{capped.text}

## The same size with experts

{experts.text}

gpt-oss-120b uses 4 of 128 experts for a token. The experts that stay in RAM are {experts.ram_gib:.1f} GiB, of which a
token reads about a thirty-second: {experts.decode_tok_s:.0f} tok/s instead of {small.decode_tok_s:.1f}.

## Where the folklore is wrong

- **"A 64 GB model needs 64 GB of VRAM."** It needs its bytes in VRAM and RAM together; the speed depends on where.
- **"More RAM is faster."** Channels and clock are; capacity only decides whether the disk is read.
- **"Model size tells the speed."** The bytes that a token reads do.
{END}"""


def llama_8b_f16() -> str:
    """Llama 3 8B in FP16 on 12 and 24 GB."""
    big = ask("loadmaster plan shape:llama-3-8b@F16 --machine rtx4090-24g")
    small = ask("loadmaster plan shape:llama-3-8b@F16 --machine rtx3060-12g")
    q8 = ask("loadmaster plan shape:llama-3-8b@Q8_0 --machine rtx3060-12g")
    size = big.made.file_bytes
    return f"""# Llama 3 8B in FP16 on 12 and 24 GB

## 24 GB

{big.text}

8.03 billion weights × 2 bytes are {size / GB:.2f} GB ({size / GIB:.2f} GiB). With the cache
({big.gib("gpu:0", "kv"):.2f} GiB at n_ctx 8192), buffers and CUDA's context the card has
{big.made.device("gpu:0").left_bytes / GIB:.1f} GiB left.

## 12 GB

{small.text}

{small.ram_gib:.1f} GiB stay in RAM and set the speed: {small.decode_tok_s:.1f} tok/s. Q8_0 halves the file and fits:
**{q8.decode_tok_s:.0f} tok/s**, at a KL divergence of 0.0014 and the same published MMLU (65.2).

{q8.text}

## Where the folklore is wrong

- **"13B Llama 3.1"** does not exist: Llama 3 and 3.1 have 8, 70 and 405 billion weights. 13B was Llama 2.
- **"FP16 for quality."** On Llama 3 8B, Q8_0 has the MMLU of FP16 (65.23 and 65.20) in half the memory.
- **"8B in FP16 is 16 GB, so a 16 GB card holds it."** Weights alone are {size / GIB:.1f} GiB; with cache and context it
  takes {big.made.device("gpu:0").planned_bytes / GIB:.1f} GiB.

The same model in NF4, with transformers: [Llama 3 8B in NF4](llama-3-8b-nf4.md).
{END}"""


def gpt_oss_on_24gb() -> str:
    """gpt-oss-120b on 24 GB and 64 GB."""
    answer = ask("loadmaster plan shape:gpt-oss-120b --machine rtx4090-24g")
    dims = load_shape("gpt-oss-120b").dims
    expert = 3 * dims.n_embd * dims.n_ff_exp * 4.25 / 8
    active = dims.n_layer * dims.n_expert_used * expert / GB
    return f"""# gpt-oss-120b on 24 GB of VRAM and 64 GB of RAM

{answer.text}

## The arithmetic

| | |
|---|---|
| the file | {answer.made.file_bytes / GIB:.2f} GiB, experts in MXFP4 (4.25 bits), the rest in Q8_0 |
| one expert of one layer | 3 × 2880 × 2880 weights = {expert / (1 << 20):.1f} MiB |
| experts that a token uses | 36 layers × 4 of 128 = {active:.2f} GB |
| of the expert bytes in RAM ({answer.ram_gib:.1f} GiB) a token reads | 4/128 |

Attention, caches and routers stay on the card for all layers; experts fill the rest of it, whole matrices at a time.
The cache is kept in f16: with attention sinks even q8_0 costs accuracy, and sliding windows make it small
({answer.gib("gpu:0", "kv"):.2f} GiB at n_ctx {answer.made.engine.n_ctx}).

## Where the folklore is wrong

- **"120B needs 80 GB of VRAM."** It needs {answer.gib("gpu:0", "model"):.0f} GiB there and {answer.ram_gib:.0f} GiB in RAM.
- **The figure above is an upper one.** Published runs with experts in RAM reach about half of what the bandwidth
  allows: small matrices are gathered from all over the memory, and the CPU has to keep up. See `docs/published.md`;
  `loadmaster doctor --measure` replaces the table by this machine's own rates.
{END}"""


def jetson_latency() -> str:
    """An 8B under 50 ms to the first token on a Jetson Orin."""
    asked = {
        "llama-3.1-8b@Q4_K_M": "8B, 4.9 bits",
        "llama-3.1-8b@IQ2_XS": "8B, 2.6 bits",
        "qwen3-4b@Q4_K_M": "4B, 4.9 bits",
        "llama-3.2-3b@Q4_K_M": "3B, 4.9 bits",
        "llama-3.2-1b@Q8_0": "1B, 8.5 bits",
    }
    command = "loadmaster plan shape:{} --machine jetson-orin-64g -c 2048 --prompt-tokens 24"
    answers = {shape: ask(command.format(shape)) for shape in asked}
    rows = "\n".join(
        f"| {shape} ({what}) | {answers[shape].made.file_bytes / GIB:.2f} GiB "
        f"| {_ttft_ms(answers[shape]):.0f} ms | {answers[shape].decode_tok_s:.0f} tok/s "
        f"| {'yes' if _ttft_ms(answers[shape]) <= 50 else 'no'} |"
        for shape, what in asked.items()
    )
    first = answers["llama-3.1-8b@Q4_K_M"]
    read = first.gib("gpu:0", "model") * GIB / GB
    return f"""# A Jetson AGX Orin with a latency target

Wanted: an 8B model that begins to answer a short spoken command (24 tokens) within 50 ms.

| model | file | first token | then | within 50 ms |
|---|---|---|---|---|
{rows}

An 8B in Q4_K_M does not make it: its {read:.1f} GB at three quarters of the 204.8 GB/s that CPU and GPU share are
{1000 * read / (0.75 * 204.8):.0f} ms for one pass, and the prompt and the first token are two. Fewer bits shorten both passes, at a cost: Llama 3 8B
falls from 64.6 to 50.0 in MMLU between Q4_K_M and IQ2_XS, below what a 3B or 4B model has to offer.

These are predictions from the nominal bandwidth. The published rate of an 8B Q4_K_M on this board is about 25 tok/s, where
the table says {first.decode_tok_s:.0f}: take a third more time for each row, and only models up to 3B or 4B keep the target.

{first.text}

## What does

- A smaller model, as in the table.
- Keeping the system prompt's cache, so that only the new words are read. It saves prefill of what is already there, not
  the two passes, so it does not bring the 8B under 50 ms.
- 64 GB of memory do not help: the plan takes
  {first.made.device("gpu:0").planned_bytes / GIB:.1f} GiB of {first.made.device("gpu:0").budget_bytes / GIB:.0f}.

## Where the folklore is wrong

- **"275 TOPS."** One sequence never gets to use them: it waits for memory. Published decode of an 8B Q4_K_M on this
  board is about 25 tok/s, {25 * read:.0f} GB/s.
- **"Unified memory saves the copy, so it is faster."** There is no copy to save once the weights are resident.
{END}"""


def _ttft_ms(answer: Answer) -> float:
    ttft = answer.made.predicted.ttft_s
    assert ttft is not None
    return 1000 * ttft


def llama_405b() -> str:
    """Llama 3.1 405B on four and eight cards."""
    models = " ".join(f"shape:llama-3.1-405b@{label}" for label in _405B_LABELS)
    command = f"loadmaster plan --compare {models} --machine {{}} -c 4096 --kv f16"
    machines = ("rtx4090-x8", "a100-80g-x4")
    rows = "\n".join(
        _405b_row(machine, one)
        for machine in machines
        for one in compare(command.format(machine))["candidates"]
    )
    return f"""# Llama 3.1 405B on four and eight cards

| machine | quantization | file | on GPUs | in RAM | decode |
|---|---|---|---|---|---|
{rows}

`rtx4090-x8` has 8 × 24 GB beside 512 GB of RAM, `a100-80g-x4` 4 × 80 GB beside 1 TB. The command:

```
$ {command.format(machines[0])}
```

## The arithmetic

405.9 billion weights are {_405b_gib("BF16"):.0f} GiB in BF16 and {_405b_gib("Q4_K_M"):.0f} GiB in Q4_K_M; the cache takes
504 KiB a token (126 layers × 8 heads × 128 × 2 × 2 bytes). What does not fit the cards is read from RAM for every token,
and what does not fit RAM from the disk.

In BF16, FP8 and NF4 with transformers, on 8 × 80, 4 × 80, 8 × 24 and 4 × 24 GB:
[405B with transformers](llama-3.1-405b-transformers.md).
{END}"""


_405B_LABELS = ("BF16", "Q8_0", "Q4_K_M", "IQ2_XS")


def _405b_gib(quantization: str) -> float:
    return shape_header(load_shape("llama-3.1-405b"), quantization)[1] / GIB


def _405b_row(machine: str, one: dict[str, Any]) -> str:
    weights = one["weights_bytes"]
    disk = " (from disk)" if one["bound_by"] == "disk" else ""
    cells = [machine, one["quantization"], f"{one['file_bytes'] / GIB:.0f} GiB"]
    cells += [f"{weights['gpu'] / GIB:.0f} GiB", f"{weights[CPU] / GIB:.0f} GiB"]
    return f"| {' | '.join(cells)} | {one['decode_tok_s']:.2g} tok/s{disk} |"
