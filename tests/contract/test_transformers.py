"""The transformers engine on tiny random models: its tokens against transformers' own, its cells,
its memory and its refusals. In this process where that is enough, through the worker where not."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.engine.types import SamplingParams, SequenceWork
from loadmaster.errors import EngineError, EngineRefusedError
from tests.hf_parts import FAMILIES, load_request, write_model

prepare()

from loadmaster.engine.backends.transformers.backend import Transformers  # noqa: E402

GREEDY = SamplingParams(temperature=0)
PROMPTS = [[(7 * i * i + 3 * i + 11 * k) % 250 + 1 for i in range(10 + 23 * k)] for k in range(4)]
N_OUT = 40
CLOSE = 0.05


def opened(folder: Path, **changes: Any) -> Transformers:
    backend = Transformers()
    backend.load(load_request(folder, **changes), lambda _: True)
    return backend


def work(seq_id: int, tokens: Sequence[int], position: int, sample: bool = True) -> SequenceWork:
    return SequenceWork(seq_id=seq_id, tokens=tuple(tokens), position=position, sample=sample)


def generate(
    backend: Transformers, prompts: Sequence[Sequence[int]], n_out: int, chunk: int = 17
) -> list[list[int]]:
    """Greedy tokens of all prompts together: whoever has fed its prompt decodes beside the rest."""
    for seq_id in range(len(prompts)):
        backend.start_sequence(seq_id, GREEDY)
        backend.remove(seq_id, 0)
    tokens = [list(prompt) for prompt in prompts]
    fed = [0] * len(prompts)
    while any(len(row) < len(p) + n_out for row, p in zip(tokens, prompts, strict=True)):
        step = []
        for seq_id, row in enumerate(tokens):
            if len(row) < len(prompts[seq_id]) + n_out:
                part = row[fed[seq_id] : fed[seq_id] + chunk]
                sample = fed[seq_id] + len(part) == len(row)
                step.append(work(seq_id, part, fed[seq_id], sample))
                fed[seq_id] += len(part)
        for seq_id, token in backend.step(step).tokens.items():
            tokens[seq_id].append(token)
    return [row[len(p) :] for row, p in zip(tokens, prompts, strict=True)]


def gaps(folder: Path, prompts: Sequence[list[int]], outputs: Sequence[list[int]]) -> list[float]:
    """The best logit less the chosen one, by transformers' own model fed the same tokens alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0]
        for index, token in enumerate(output):
            row = logits[len(prompt) + index - 1]
            found.append(float(row.max() - row[token]))
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_are_those_of_transformers(models: Any, family: str) -> None:
    folder = models(family)
    backend = opened(folder, n_seq_max=4, n_ctx=4 * 160)
    together = generate(backend, PROMPTS, N_OUT)
    assert max(gaps(folder, PROMPTS, together)) <= CLOSE
    alone = [generate(backend, [prompt], N_OUT)[0] for prompt in PROMPTS]
    assert max(gaps(folder, PROMPTS, alone)) <= CLOSE
    backend.close()


def test_greedy_equals_generate(models: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder = models("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    backend = opened(folder)
    for prompt in PROMPTS[:2]:
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=N_OUT, do_sample=False, eos_token_id=-1
        )[0, len(prompt) :].tolist()
        assert generate(backend, [prompt], N_OUT) == [expected]
    backend.close()


@pytest.fixture
def llama(models: Any) -> Iterator[Transformers]:
    backend = opened(models("llama"), n_seq_max=4, n_ctx=4 * 160)
    yield backend
    backend.close()


@pytest.fixture
def windowed(models: Any) -> Iterator[Transformers]:
    backend = opened(models("mistral"), n_seq_max=4, n_ctx=4 * 160)
    yield backend
    backend.close()


# -- cells


def feed(backend: Transformers, seq_id: int, tokens: Sequence[int], position: int = 0) -> int:
    """Feed tokens to a sequence; the likeliest next one."""
    backend.start_sequence(seq_id, GREEDY)
    return backend.step([work(seq_id, tokens, position)]).tokens[seq_id]


LONG = PROMPTS[3]


def test_a_copied_beginning_goes_on_like_its_source(llama: Transformers) -> None:
    expected = feed(llama, 0, LONG)
    assert llama.share(0, 2, 40)
    assert feed(llama, 2, LONG[40:], 40) == expected


def test_a_dropped_tail_is_as_if_it_never_was(llama: Transformers) -> None:
    expected = feed(llama, 0, LONG)
    feed(llama, 1, [*LONG[:50], 9, 9, 9])
    assert llama.remove(1, 50)
    assert feed(llama, 1, LONG[50:], 50) == expected
    assert not llama.remove(1, len(LONG) + 1)  # more than it has: all are dropped
    assert feed(llama, 1, LONG) == expected


def test_a_state_goes_on_in_another_slot(llama: Transformers) -> None:
    expected = feed(llama, 0, LONG)
    feed(llama, 0, LONG)
    llama.remove(0, 60)
    state = llama.save_state(0)
    llama.restore_state(3, state)
    assert feed(llama, 3, LONG[60:], 60) == expected
    tail = llama.take_state(0, 20, 1 << 20)
    assert tail is not None
    assert llama.share(3, 0, 20)
    llama.restore_state(0, tail, 20)
    assert feed(llama, 0, LONG[60:], 60) == expected
    assert llama.take_state(0, 0, 16) is None  # too large, and dropped all the same
    assert not llama.share(0, 1, 1)


@pytest.mark.parametrize("damage", [b"", b"\0" * 40])
def test_a_state_of_another_model_is_refused(llama: Transformers, damage: bytes) -> None:
    with pytest.raises(EngineRefusedError, match="another model"):
        llama.restore_state(0, damage)


def test_a_window_is_all_that_is_kept_of_a_sequence(windowed: Transformers) -> None:
    expected = feed(windowed, 0, LONG)
    assert windowed.capabilities().shared_at_end
    assert not windowed.share(0, 1, 40)  # its window has moved on
    assert windowed.share(0, 1, len(LONG) - 1)
    assert feed(windowed, 1, LONG[-1:], len(LONG) - 1) == expected
    windowed.restore_state(2, windowed.save_state(0))
    assert windowed.remove(2, len(LONG) - 1)
    assert feed(windowed, 2, LONG[-1:], len(LONG) - 1) == expected
    assert not windowed.remove(2, 30)
    assert feed(windowed, 2, LONG) == expected


def test_a_cut_step_leaves_no_trace(llama: Transformers) -> None:
    expected = feed(llama, 0, LONG)
    feed(llama, 1, LONG[:30])
    llama.interrupt()
    assert llama.step([work(1, LONG[30:], 30)]).cut
    llama.resume()
    assert llama.remove(1, 30)
    assert feed(llama, 1, LONG[30:], 30) == expected


def test_a_cut_chunk_behind_a_window_drops_the_sequence(windowed: Transformers) -> None:
    expected = feed(windowed, 0, LONG)
    feed(windowed, 1, LONG[:30])
    windowed.interrupt()
    assert windowed.step([work(1, LONG[30:], 30)]).cut
    windowed.resume()
    assert not windowed.remove(1, 30)
    assert feed(windowed, 1, LONG) == expected


def test_a_step_beyond_the_slots_is_an_error(llama: Transformers) -> None:
    for part in (work(4, [1], 0), work(0, [1], 160), work(0, [], 0)):
        with pytest.raises(EngineError, match="4 slots of 160 cells"):
            llama.step([part])


# -- memory


def test_the_peak_leaves_the_buffers_as_they_are(llama: Transformers) -> None:
    before = llama.memory().buffers
    llama.commit_peak(5.0)
    assert llama.memory().buffers == before
    assert feed(llama, 0, LONG) == feed(llama, 1, LONG)


@pytest.mark.parametrize(
    "changes",
    [
        {"compute_type": "bf16", "type_k": "bf16", "type_v": "f16"},
        {"compute_type": "bf16", "type_k": "q8_0", "type_v": "q8_0"},
        {"type_k": "q8_0", "type_v": "q4_0"},
        {"quantize": "int8", "compute_type": "bf16"},
        {"quantize": "fp8", "compute_type": "bf16"},
        {"quantize": "nf4", "compute_type": "f32"},
        {"quantize": "nf4", "double_quant": True, "compute_type": "f32"},
        {"quantize": "fp4", "compute_type": "f32"},
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_bytes_are_those_that_were_sized(
    models: Any, family: str, changes: dict[str, Any]
) -> None:
    backend = Transformers()
    request = load_request(models(family), **changes)
    sizing = backend.size(request.model_path, request.settings)
    backend.load(request, lambda _: True)
    assert backend.memory().buffers == getattr(sizing, "buffers", None)
    assert len(generate(backend, PROMPTS[:2], 4)[0]) == 4
    backend.close()
    assert backend.memory().buffers == ()


# -- refusals


def refused(folder: Path, words: str, **changes: Any) -> str | None:
    with pytest.raises(EngineRefusedError, match=words) as refusal:
        opened(folder, **changes)
    return refusal.value.hint


def test_what_this_engine_cannot_do_is_refused(models: Any) -> None:
    folder = models("llama")
    assert refused(folder, "flash_attention_2 is not used", attention="flash_attention_2")
    assert refused(folder, "sees 0 GPUs", device_map=(("", "gpu:0"),))
    assert refused(folder, "no KV cache of type q5_1", type_k="q5_1")
    assert refused(folder, "on the disk", device_map=(("", "disk"),)) is None


def test_a_load_can_be_stopped(models: Any) -> None:
    backend = Transformers()
    with pytest.raises(EngineRefusedError, match="was stopped"):
        backend.load(load_request(models("llama")), lambda _: False)
    backend.load(load_request(models("llama")), lambda _: True)
    backend.close()


def test_a_checkpoint_that_misses_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "llama")
    header = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(
        header.replace(b"model.norm.weight", b"model.form.weight")
    )
    with pytest.raises(Exception, match="norm"):
        opened(folder)


def test_a_config_key_that_is_not_known_is_not_passed_on(tmp_path: Path) -> None:
    from loadmaster.engine.backends.transformers.weights import clean_config
    from tests.hf_parts import write_llama

    folder = write_llama(
        tmp_path / "m", attn_implementation="kernels-community/x", surprise=1, _name_or_path="y"
    )
    config = clean_config(folder)
    assert not hasattr(config, "surprise")
    assert "kernels" not in json.dumps(config.to_dict())
    assert config.num_hidden_layers == 3


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "llama")
    (folder / "tokenizer.json").unlink()
    assert refused(folder, "no tokenizer.json") is not None
