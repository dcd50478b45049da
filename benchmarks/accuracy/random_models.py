"""Random-weight models that load in a fraction of a second."""

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
    chat_template: str | None = None

    def write(self, folder: Path) -> Path:
        """The file in `folder`, written if it is not there."""
        path = folder / f"{self.name}.gguf"
        if not path.exists():
            metadata, tensors = build_tiny(self.shape, self.quant, **self.changes)
            if self.chat_template is not None:
                metadata["tokenizer.chat_template"] = self.chat_template
            write_random(path, metadata, tensors)
        return path


def _model(
    name: str, shape: str, quant: str, *, template: str | None = None, **changes: Any
) -> RandomModel:
    return RandomModel(name=name, shape=shape, quant=quant, changes=changes, chat_template=template)


_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


# Dense and with experts, 4 to 16 layers, 19 to 51 MB.
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

# Of all kinds of widths, vocabularies and types, 35 to 395 MB; every other has a chat template.
MIXED = (
    _model("llama-12", "llama-8b", "q4_K_M", n_layer=12, n_embd=1024, n_head=16, n_head_kv=4,
           n_ff=2816, n_vocab=32000),
    _model("llama-16t", "llama-8b", "q8_0", n_layer=16, n_embd=512, n_head=8, n_ff=1536,
           n_vocab=8192, template=_TEMPLATE),
    _model("qwen3-16", "qwen3-8b", "q6_K", n_layer=16, n_embd=1024, n_head=16, n_ff=3072,
           n_vocab=151936),
    _model("qwen3moe-8t", "qwen3moe-30b-a3b", "q4_K_M", n_layer=8, n_embd=1024, n_head=16,
           n_head_kv=4, n_ff_exp=512, n_expert=16, n_expert_used=4, n_vocab=32000,
           template=_TEMPLATE),
    _model("gemma2-10", "gemma2-9b", "q4_0", n_layer=10, n_embd=1024, n_head=8, n_ff=4096,
           n_vocab=64000),
    _model("phi3-8t", "phi3-mini", "f16", n_layer=8, n_embd=768, n_head=12, n_head_kv=12,
           n_ff=2048, n_vocab=16000, template=_TEMPLATE),
    _model("granite-12", "granitehybrid-3b", "q8_0", n_layer=12, n_embd=512, n_head=8,
           attention=(3, 7, 11), n_vocab=16384),
    _model("llama-96t", "llama-405b", "q5_K_M", n_layer=96, n_embd=256, n_ff=768,
           template=_TEMPLATE),
)  # fmt: skip
