"""The properties of the shipped demo model that other parts of the project rely on."""

import json
import random
from pathlib import Path
from typing import Any

import gguf
import jinja2
import pytest
import tokenizers

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "src" / "loadmaster" / "data" / "demo.gguf"
FOLDER = ROOT / "tests" / "data" / "demo"
F16 = FOLDER / "demo-f16.gguf"
MIB = 2**20
K_QUANT_BLOCK = 256


@pytest.fixture(scope="module", params=[SHIPPED, F16], ids=lambda path: path.stem)
def reader(request: pytest.FixtureRequest) -> Any:
    return gguf.GGUFReader(request.param)


def value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def test_sizes() -> None:
    assert SHIPPED.stat().st_size <= 8 * MIB
    assert F16.stat().st_size + (FOLDER / "model.safetensors").stat().st_size <= 24 * MIB


def test_metadata(reader: Any) -> None:
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "general.name") == "loadmaster demo"
    assert value(reader, "general.license") == "PSF-2.0"
    assert value(reader, "llama.context_length") == 2048
    assert value(reader, "llama.vocab_size") == 4096
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert value(reader, "tokenizer.ggml.add_bos_token") is False


def test_tensors(reader: Any) -> None:
    n_layer = value(reader, "llama.block_count")
    assert len(reader.tensors) == 9 * n_layer + 2  # the output matrix is the token embedding
    assert sum(int(t.n_elements) for t in reader.tensors) <= 5_900_000
    for tensor in reader.tensors:
        is_norm = len(tensor.shape) == 1
        assert (tensor.tensor_type == gguf.GGMLQuantizationType.F32) == is_norm
        assert int(tensor.shape[0]) % K_QUANT_BLOCK == 0, tensor.name


def test_vocabulary(reader: Any) -> None:
    tokens = value(reader, "tokenizer.ggml.tokens")
    types = value(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(set(tokens)) == len(types) == 4096
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    assert control == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokens[value(reader, "tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert sum(len(token) == 1 for token in tokens) == 256  # every byte: any text is encodable


def test_chat_template(reader: Any) -> None:
    template = value(reader, "tokenizer.chat_template")
    assert template == json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    text = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_both_formats_hold_the_same_shape(reader: Any) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["hidden_size"] == value(reader, "llama.embedding_length")
    assert config["intermediate_size"] == value(reader, "llama.feed_forward_length")
    assert config["num_hidden_layers"] == value(reader, "llama.block_count")
    assert config["num_attention_heads"] == value(reader, "llama.attention.head_count")
    assert config["num_key_value_heads"] == value(reader, "llama.attention.head_count_kv")
    assert config["max_position_embeddings"] == value(reader, "llama.context_length")


def test_tokenizer_round_trip() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(300):
        points = [rng.choice((rng.randrange(128), rng.randrange(0xE000, 0x110000)))] * 2
        points += [rng.randrange(0xD800) for _ in range(rng.randrange(20))]
        rng.shuffle(points)
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
