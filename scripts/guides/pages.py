"""The pages by file: each asks the tool, shows the arithmetic, and says where advice is wrong."""

from collections.abc import Callable, Mapping

from scripts.guides.checkpoints import llama_8b_nf4, llama_405b_transformers
from scripts.guides.llama_70b import llama_70b_on_24gb, quantizations_on_24gb, two_24gb_cards
from scripts.guides.others import (
    big_file_on_12gb,
    gpt_oss_on_24gb,
    jetson_latency,
    llama_8b_f16,
    llama_405b,
)

PAGES: Mapping[str, Callable[[], str]] = {
    "llama-3-70b-on-24gb.md": llama_70b_on_24gb,
    "llama-3-70b-quantizations.md": quantizations_on_24gb,
    "64gb-model-on-12gb.md": big_file_on_12gb,
    "llama-3-8b-fp16.md": llama_8b_f16,
    "two-24gb-cards.md": two_24gb_cards,
    "gpt-oss-120b-on-24gb.md": gpt_oss_on_24gb,
    "jetson-orin-latency.md": jetson_latency,
    "llama-3.1-405b.md": llama_405b,
    "llama-3-8b-nf4.md": llama_8b_nf4,
    "llama-3.1-405b-transformers.md": llama_405b_transformers,
}
