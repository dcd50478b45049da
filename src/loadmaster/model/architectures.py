"""The architectures of the pinned engine, and the GGUF files that are not language models.

LLM_ARCH_NAMES in llama-arch.cpp of the llama.cpp that llama-cpp-python 0.3.36 vendors.
"""

KNOWN = frozenset((
    "afmoe", "apertus", "arcee", "arctic", "arwkv7", "baichuan", "bailingmoe", "bailingmoe2",
    "bailingmoe3", "bert", "bitnet", "bloom", "chameleon", "chatglm", "codeshell", "cogvlm",
    "cohere2", "cohere2moe", "command-r", "dbrx", "deci", "deepseek", "deepseek2",
    "deepseek2-ocr", "deepseek32", "deepseek4", "dots1", "dots3note", "dream", "ernie4_5",
    "ernie4_5-moe", "eurobert", "exaone", "exaone-moe", "exaone4", "falcon", "falcon-h1",
    "gemma", "gemma-embedding", "gemma2", "gemma3", "gemma3n", "gemma4", "glm-dsa", "glm4",
    "glm4moe", "glm5-next", "gpt-oss", "gpt2", "gptj", "gptneox", "granite", "granite_swa",
    "granitehybrid", "granitemoe", "graniteswitch", "grok", "grovemoe", "hrm_text",
    "hunyuan-dense", "hunyuan-moe", "hunyuan_vl", "hy_v3", "hy_v4", "internlm2", "jais", "jais2",
    "jamba", "jina-bert-v2", "jina-bert-v3", "kimi-k3", "kimi-linear", "laguna", "lfm2",
    "lfm2moe", "llada", "llada-moe", "llama", "llama-embed", "llama4", "maincoder", "mamba",
    "mamba2", "maple", "mellum", "mimo2", "minicpm", "minicpm3", "minimax-01", "minimax-m2",
    "minimax-m3", "mistral3", "mistral4", "modern-bert", "mpt", "muse-glimmer", "nanbeige",
    "nemotron", "nemotron_h", "nemotron_h_moe", "neo-bert", "nomic-bert", "nomic-bert-moe",
    "olmo", "olmo2", "olmoe", "openelm", "orion", "paddleocr", "pangu-embedded", "phi2", "phi3",
    "phimoe", "plamo", "plamo2", "plamo3", "plm", "qwen", "qwen2", "qwen2moe", "qwen2vl",
    "qwen3", "qwen35", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe", "qwen4exp",
    "refact", "rnd1", "rwkv6", "rwkv6qwen2", "rwkv7", "seed_oss", "smallthinker", "smollm3",
    "spark2_5", "stablelm", "starcoder", "starcoder2", "step35", "t5", "t5encoder", "talkie",
    "xverse",
))  # fmt: skip

# Known to the engine, and of no use alone.
NOT_A_MODEL = {
    "clip": "a vision projector, not a model: it belongs beside one (`mmproj`)",
    "eagle3": "a draft head, not a model: it belongs beside the model it drafts for",
    "dflash": "a draft head, not a model: it belongs beside the model it drafts for",
    "gemma4-assistant": "a draft head, not a model: it belongs beside a gemma4 model",
    "wavtokenizer-dec": "an audio decoder, not a language model",
    "qwen3tts": "a speech model; text is not what it writes",
    "pockettts": "a speech model; text is not what it writes",
}

# `general.type` of GGUF files that are no model (gguf-py's GGUFType).
NOT_A_MODEL_TYPE = {
    "adapter": "a LoRA adapter, not a model: give it with `--lora` beside its model",
    "mmproj": "a vision projector, not a model: it belongs beside one",
    "imatrix": "an importance matrix for quantizing, not a model",
    "vocab": "a vocabulary without weights, not a model",
}

# Architectures whose token_embd is one row for each token of the tokenizer.
EMBEDS_VOCABULARY = frozenset((
    "llama", "llama4", "mistral3", "mistral4", "deci", "falcon", "gpt2", "gptneox", "baichuan",
    "starcoder", "starcoder2", "stablelm", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3",
    "qwen3moe", "qwen3next", "qwen35", "qwen35moe", "phi2", "phi3", "phimoe", "internlm2",
    "minicpm", "minicpm3", "gemma", "gemma2", "gemma3", "gemma3n", "mamba", "mamba2", "jamba",
    "falcon-h1", "command-r", "cohere2", "dbrx", "olmo", "olmo2", "olmoe", "deepseek",
    "deepseek2", "chatglm", "glm4", "glm4moe", "granite", "granitemoe", "granitehybrid",
    "exaone", "exaone4", "nemotron", "nemotron_h", "smollm3", "gpt-oss", "lfm2", "lfm2moe",
    "seed_oss", "ernie4_5", "ernie4_5-moe", "minimax-m2",
))  # fmt: skip

# Graphs that assert `n_embd_head == hparams.n_embd_head_k()`: keys as wide as values. (gpt-oss
# has no such line and aborts in its output product.)
EQUAL_HEADS = frozenset((
    "afmoe", "apertus", "arcee", "arctic", "baichuan", "bailingmoe2", "bert", "bitnet", "bloom",
    "chameleon", "chatglm", "codeshell", "cogvlm", "cohere2", "cohere2moe", "command-r", "dbrx",
    "deci", "deepseek", "dots1", "dream", "ernie4_5", "ernie4_5-moe", "eurobert", "exaone",
    "exaone-moe", "exaone4", "falcon", "glm4", "glm4moe", "gpt-oss", "gpt2", "gptneox",
    "granite", "granite_swa", "granitehybrid", "graniteswitch", "grok", "grovemoe", "hunyuan-moe",
    "hunyuan_vl", "hy_v3", "internlm2", "jais", "jais2", "laguna", "llada", "llada-moe", "llama",
    "llama4", "maincoder", "maple", "mellum", "minimax-01", "minimax-m2", "minimax-m3", "mistral3",
    "modern-bert", "mpt", "muse-glimmer", "nanbeige", "nemotron", "nemotron_h", "nemotron_h_moe",
    "neo-bert", "olmo", "olmo2", "olmoe", "openelm", "orion", "paddleocr", "pangu-embedded",
    "phi2", "phi3", "plamo", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen35",
    "qwen35moe", "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe", "qwen4exp", "refact", "rnd1",
    "seed_oss", "smallthinker", "smollm3", "spark2_5", "stablelm", "starcoder", "starcoder2",
    "t5", "talkie", "xverse",
))  # fmt: skip

# Graphs that assert `n_embd_head == n_rot` as well: RoPE turns the whole head.
WHOLE_HEAD_ROPE = frozenset((
    "apertus", "arcee", "arctic", "baichuan", "chameleon", "codeshell", "cogvlm", "cohere2moe",
    "dbrx", "deci", "deepseek", "dots1", "dream", "ernie4_5", "ernie4_5-moe", "exaone",
    "exaone-moe", "exaone4", "falcon", "granite", "granite_swa", "graniteswitch", "grok",
    "grovemoe", "hunyuan-moe", "hunyuan_vl", "hy_v3", "internlm2", "jais2", "llada", "llada-moe",
    "llama", "llama4", "maincoder", "mellum", "mistral3", "olmo", "olmo2", "olmoe", "orion",
    "paddleocr", "pangu-embedded", "plamo", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe",
    "qwen3vl", "qwen3vlmoe", "rnd1", "seed_oss", "smallthinker", "smollm3", "starcoder2",
    "talkie", "xverse",
))  # fmt: skip

# With a RoPE width of 0 their graphs loop or read nothing.
NEEDS_ROPE = WHOLE_HEAD_ROPE | {
    "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "phi2", "phi3", "phimoe", "stablelm",
    "command-r", "cohere2", "glm4", "glm4moe", "chatglm", "deepseek2", "gpt-oss", "gptneox",
    "qwen3next", "minimax-m2", "mistral4",
}  # fmt: skip

# Graphs that read how many experts each layer uses; the others take the first layer's number.
UNEVEN_EXPERTS = frozenset({"nemotron_h", "nemotron_h_moe", "granite_swa"})

DELTA_NET = frozenset({"qwen3next", "qwen35", "qwen35moe"})

# Graphs that assert `2 * n_embd == d_inner`.
DOUBLE_INNER = frozenset({"granitehybrid", "jamba"})
