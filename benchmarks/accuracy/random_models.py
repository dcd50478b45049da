"""Random-weight models that load in a fraction of a second: dense and with experts, 4 to 16 layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gguf_writer import write_random
from benchmarks.shapes import build_tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """A small model of some architecture; `changes` are dimensions of `benchmarks.shapes`."""

    name: str
    shape: str
    quant: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """The file in `folder`, written if it is not there."""
        path = folder / f"{self.name}.gguf"
        if not path.exists():
            write_random(path, *build_tiny(self.shape, self.quant, **self.changes))
        return path


def _model(name: str, shape: str, quant: str, **changes: Any) -> RandomModel:
    return RandomModel(name=name, shape=shape, quant=quant, changes=changes)


SMALL = (
    _model("llama-16", "llama-8b", "q4_K_M", n_layer=16, n_embd=512, n_head=8, n_ff=1536,
           n_vocab=4096),
    _model("llama-6", "llama-8b", "q8_0", n_layer=6, n_embd=512, n_head=8, n_ff=1536),
    _model("qwen3-10", "qwen3-8b", "q6_K", n_layer=10, n_embd=512, n_head=8, n_ff=1280,
           n_vocab=2048),
    _model("qwen2-12", "qwen2-7b", "q4_K_M", n_layer=12, n_embd=768, n_head=12, n_ff=2048),
    _model("gemma2-8", "gemma2-9b", "q5_K_M", n_layer=8, n_embd=512, n_head=8, n_ff=2048),
    _model("phi3-14", "phi3-mini", "q4_K_M", n_layer=14, n_embd=512, n_head=8, n_head_kv=4,
           n_ff=1536),
    _model("mistral-4", "mistral-7b", "q8_0", n_layer=4, n_embd=768, n_head=12, n_ff=2048),
    _model("mixtral-8", "mixtral-8x7b", "q4_K_M", n_layer=8, n_embd=512, n_head=8, n_ff=768),
    _model("qwen3moe-12", "qwen3moe-30b-a3b", "q4_K_M", n_layer=12, n_embd=512, n_head=8,
           n_ff_exp=256, n_expert=16, n_expert_used=4),
    _model("qwen3moe-6", "qwen3moe-30b-a3b", "q8_0", n_layer=6, n_embd=512, n_head=8, n_ff_exp=512),
    _model("gpt-oss-8", "gpt-oss-20b", "q8_0", n_layer=8, n_embd=512, n_head=8, n_ff_exp=512),
    _model("deepseek2-5", "deepseek2-lite", "q6_K", n_layer=5, n_embd=512, n_ff=1536,
           n_ff_exp=512),
)  # fmt: skip
