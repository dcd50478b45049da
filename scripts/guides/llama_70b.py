"""Pages about Llama 3 70B on one and two cards of 24 GB."""

from typing import Any

from loadmaster.machine.profiles import load_profile
from loadmaster.model.shapes.library import load_shape, shape_header
from loadmaster.plan.types import CPU
from loadmaster.units import GIB
from scripts.guides.asking import END, GB, Answer, ask, compare, printed, ram_gb_s


def llama_70b_on_24gb() -> str:
    """Llama 3 70B Q4_K_M on 24 GB and 64 GB, at two lengths."""
    short = ask("loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx4090-24g -c 4096")
    long = ask("loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx4090-24g -c 8192")
    exact = ask("loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx4090-24g -c 8192 --kv f16")
    size = shape_header(load_shape("llama-3-70b"), "Q4_K_M")[1]
    layer = _layer_bytes("llama-3-70b", "Q4_K_M")
    rate = ram_gb_s("rtx4090-24g")
    kept = [f"{answer.gib('gpu:0', 'model') * GIB / layer:.0f}" for answer in (exact, long, short)]
    read = long.ram_gib * GIB / GB
    return f"""# Llama 3 70B Q4_K_M on 24 GB of VRAM and 64 GB of RAM

It fits, and it is slow: **{short.decode_tok_s:.1f} tok/s** at n_ctx 4096 and **{long.decode_tok_s:.1f} tok/s** at
8192, on an RTX 4090 beside two channels of DDR5-5600.

## n_ctx 4096

{short.text}

## n_ctx 8192

{long.text}

## The arithmetic

| | |
|---|---|
| the file | {size / GIB:.2f} GiB = {size / GB:.1f} GB |
| one of its 80 layers | {layer / (1 << 20):.0f} MiB on average |
| KV cache of one token | 80 layers × 8 heads × 128 × 2 (K and V) × 2 bytes = 320 KiB; 170 KiB as q8_0 |
| cache at 8192 | {exact.gib("gpu:0", "kv"):.2f} GiB as f16, {long.gib("gpu:0", "kv"):.2f} GiB as q8_0 |
| weights on the card | {long.gib("gpu:0", "model"):.2f} GiB |
| weights in RAM | {long.ram_gib:.2f} GiB = {read:.1f} GB, read again for every token |
| at {rate:.1f} GB/s, the memory's nominal rate | {rate / read:.1f} tok/s and no more |
| at 80 % of it, which llama.cpp reaches | {0.8 * rate / read:.1f} tok/s from the RAM's share alone |

## Where the folklore is wrong

- **"35 to 45 of the 80 layers"** is right as a count: the card holds as many bytes as {kept[0]} layers (f16 cache), {kept[1]}
  (q8_0) or {kept[2]} (n_ctx 4096). This tool keeps the attention and the cache of *all* layers on the card and moves only
  feed-forward matrices to RAM: the same bytes, and a long context does not slow down.
- **"6 to 10 tok/s"** is not possible with two channels: it would take {6 * read:.0f} to {10 * read:.0f} GB/s from the RAM. Eight
  channels of DDR5, or fewer bits, have that; a desktop has {rate:.0f}.
- **"Q4 is 35 GB"** takes 4 bits for 70 billion weights. Q4_K_M has 4.8: it is {size / GB:.1f} GB.
- **"The GPU's bandwidth decides"**: {_vram_ms(long):.0f} ms of each token are the card's,
  {1000 / long.decode_tok_s - _vram_ms(long):.0f} ms the RAM's. A faster card changes little; a second one, everything (see
  [two 24 GB cards](two-24gb-cards.md)).
{END}"""


def _layer_bytes(shape: str, quantization: str) -> float:
    """A layer's mean size: the file less embedding and output, by the number of layers."""
    plan = ask(f"loadmaster plan shape:{shape}@{quantization} --machine a100-80g").made
    dims = load_shape(shape).dims
    ends = dims.n_embd * dims.n_vocab * (4.5 + 6.5625) / 8  # token_embd in q4_K, output in q6_K
    return (plan.file_bytes - ends) / dims.n_layer


def _vram_ms(answer: Answer) -> float:
    """The card's share of a token at three quarters of its bandwidth."""
    machine = load_profile(answer.made.machine_name)
    rate = machine.gpus[0].bandwidth_bytes_s
    assert rate is not None
    return 1000 * answer.gib("gpu:0", "model") * GIB / (0.75 * rate)


LADDER = ("F16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XS")


def quantizations_on_24gb() -> str:
    """The 70B in eight quantizations on 24 GB."""
    models = " ".join(f"shape:llama-3-70b@{label}" for label in LADDER)
    command = f"loadmaster plan --compare {models} --machine rtx4090-24g -c 8192"
    fast = f"{command} --goal speed"
    content = compare(command)
    rows = {
        (one["quantization"], one["type_k"]): one for one in content["candidates"]
    }  # f16 and q8_0 of each
    q4, small = rows["Q4_K_M", "q8_0"], rows["IQ3_XXS", "q8_0"]
    whole = rows["IQ2_XS", "f16"]
    return f"""# Llama 3 70B from F16 to IQ2_XS on 24 GB of VRAM and 64 GB of RAM

{printed(command)}

The same for speed, as long as the KL divergence stays at or under 0.2: `--goal speed` takes
**{_picked(compare(fast))}**.

## How to read it

- F16 does not fit RAM and VRAM together: what is beyond them is read from disk for every token
  ({rows["F16", "f16"]["decode_tok_s"]:.3f} tok/s). Q8_0 fits, at {rows["Q8_0", "f16"]["decode_tok_s"]:.1f}.
- Speed follows what stays in RAM: Q4_K_M keeps {_ram(q4):.1f} GiB there and makes
  {q4["decode_tok_s"]:.1f} tok/s, IQ3_XXS {_ram(small):.1f} GiB and {small["decode_tok_s"]:.1f}.
- IQ2_XS fits the card but for {_ram(whole):.1f} GiB (the embedding, of which a token reads one row) and makes
  {whole["decode_tok_s"]:.0f} tok/s, at 6 points less of MMLU than Q5_K_M, and still 9 more than Llama 3 8B unquantized.
- Q2_K is a poor bargain: IQ3_XXS is {_gib(small) - _gib(rows["Q2_K", "f16"]):.1f} GiB larger and has half the divergence.

## Where the folklore is wrong

- **"Below 4 bits a model is broken."** Measured MMLU of the 70B: Q5_K_M 80.8, IQ3_XXS 79.1, IQ2_XS 74.9. The 8B has
  65.2 at 16 bits.
- **"KL divergence of 0.18 means 18 % worse."** It is a distance between distributions in nats, measured on Llama 3 8B;
  the 70B loses less at the same type. It ranks quantizations of one model and nothing else.
{END}"""


def _ram(candidate: dict[str, Any]) -> float:
    return float(candidate["weights_bytes"][CPU]) / GIB


def _gib(candidate: dict[str, Any]) -> float:
    return float(candidate["file_bytes"]) / GIB


def _picked(content: dict[str, Any]) -> str:
    one = next(it for it in content["candidates"] if it["picked"])
    return f"{one['quantization']} at {one['decode_tok_s']:.1f} tok/s"


def two_24gb_cards() -> str:
    """Llama 3 70B on two cards of 24 GB."""
    old = ask("loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx3090-x2")
    new = ask("loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx4090-x2")
    one = ask("loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx4090-24g")
    five = ask("loadmaster plan shape:llama-3-70b@Q5_K_M --machine rtx3090-x2")
    return f"""# Llama 3 70B on two cards of 24 GB

**{old.decode_tok_s:.1f} tok/s** on two RTX 3090, **{new.decode_tok_s:.1f}** on two RTX 4090, against
{one.decode_tok_s:.1f} on one: nothing waits for RAM any more. Published: 16.6 and 19.2
(XiongjieDai/GPU-Benchmarks-on-LLM-Inference, tg512).

{old.text}

## The arithmetic

The layers are split between the cards, and a token passes through one after the other: the bytes are read at the rate
of *one* card. {(old.gib("gpu:0", "model") + old.gib("gpu:1", "model")) * GIB / GB:.1f} GB at 75 % of 936 GB/s are
{1000 / old.decode_tok_s:.0f} ms. Between the cards one row of activations crosses (32 KiB), so 8 lanes are enough.

## One size up

{five.text}

Q5_K_M is {five.made.file_bytes / GIB:.1f} GiB: {five.ram_gib:.1f} GiB go to RAM, and the speed falls to
{five.decode_tok_s:.1f} tok/s.

## Where the folklore is wrong

- **"Two cards are twice as fast."** They hold twice as much. Split by layers, one sequence gets the rate of one card.
- **"You need NVLink."** Not for this split.
- **"48 GB take anything up to 48 GB."** {old.made.file_bytes / GIB:.1f} GiB leave
  {(old.made.device("gpu:0").left_bytes + old.made.device("gpu:1").left_bytes) / GIB:.1f} GiB on both cards together, after
  cache, buffers and two CUDA contexts.
{END}"""
