"""Which of torch's attention kernels a model gets: torch is asked, with shapes as in its steps."""

from typing import Any

import torch

from loadmaster.model.checkpoint import CheckpointSpec

_NAMES = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cudnn"}
_N_TOKENS, _N_CELLS = 16, 64


def attention_text(spec: CheckpointSpec, device: Any, dtype: Any, *, plain: bool) -> str:
    """`sdpa: flash`, or which kernels prompts, single answers and answers side by side get."""
    if plain or spec.softcap:
        return "eager"
    layer = spec.layers[0]
    n_kv = max(1, layer.n_head_kv)
    group, width = max(1, layer.n_head // n_kv), layer.k_width // n_kv

    def rows(*shape: int) -> Any:
        return torch.empty((*shape, width), dtype=dtype, device=device)

    prompt = rows(n_kv, 1, _N_TOKENS).expand(n_kv, group, _N_TOKENS, width)
    mask = torch.ones((2, 1, 1, _N_CELLS), dtype=torch.bool, device=device)
    cells, several = rows(1, n_kv, _N_CELLS), rows(2, n_kv, _N_CELLS)
    found = {
        "prompts": _kernel(rows(n_kv, group, _N_TOKENS), prompt, None, is_causal=True),
        "answers": _kernel(rows(1, n_kv, group), cells, None),
        "answers side by side": _kernel(rows(2, n_kv, group), several, mask),
    }
    names = set(found.values())
    if len(names) == 1:
        return f"sdpa: {names.pop()}"
    return "sdpa: " + ", ".join(f"{name} for {what}" for what, name in found.items())


def _kernel(queries: Any, keys: Any, mask: Any, *, is_causal: bool = False) -> str:
    with torch.inference_mode():
        number = torch._fused_sdp_choice(queries, keys, keys, attn_mask=mask, is_causal=is_causal)
    return _NAMES.get(int(number), f"kernel {int(number)}")
