"""The transformers engine gives memory back: after an unload, and after a large job. Totals are
measured in a process of their own."""

import json
import queue
import subprocess
import sys
from pathlib import Path

import pytest

from loadmaster.engine import worker
from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.engine.wire import Frame
from tests.hf_parts import load_request, write_llama, write_model

prepare()

from loadmaster.engine.backends.transformers.backend import FLUSH_TOKENS, Transformers  # noqa: E402

# In a process of its own: what it had before a model was open, with it, and after.
_UNLOAD = """
import json, sys
from pathlib import Path
from loadmaster.engine.backends.transformers.environment import prepare
prepare()
from loadmaster.engine.backends.transformers.backend import Transformers
from loadmaster.engine.meter import process_memory
from loadmaster.engine.types import SequenceWork
from tests.hf_parts import load_request

def turn(folder, n_ctx):
    backend = Transformers()
    backend.load(load_request(folder, n_ctx=n_ctx, n_seq_max=1), lambda _: True)
    for at in range(0, 256, 64):
        backend.step([SequenceWork(seq_id=0, tokens=(1,) * 64, position=at, sample=False)])
    held = process_memory().own_bytes
    backend.close()
    return held

small, large = map(Path, sys.argv[1:])
turn(small, 512)  # what torch itself sets up once
before = process_memory().own_bytes
held = [turn(large, 4096) for _ in range(2)]
print(json.dumps([before, held, process_memory().own_bytes]))
"""


def test_an_unloaded_model_leaves_nothing(tmp_path: Path) -> None:
    small, large = write_llama(tmp_path / "small"), write_large(tmp_path / "large")
    size = (large / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", _UNLOAD, str(small), str(large)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    before, held, after = json.loads(done.stdout.splitlines()[-1])
    assert min(held) > before + size  # it was there
    assert after < before + size // 4


def write_large(folder: Path) -> Path:
    """A model that is large beside what a process grows by otherwise: 64 MiB of embedding."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    write_llama(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_freed_tensors_go_back_after_a_large_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loadmaster.engine.backends.transformers import backend as module
    from loadmaster.engine.types import SequenceWork

    trimmed: list[int] = []
    backend = Transformers()
    backend.load(load_request(write_model(tmp_path / "m", "llama"), n_ctx=512), lambda _: True)
    monkeypatch.setattr(module, "trim", lambda: trimmed.append(1))
    chunk = [SequenceWork(seq_id=0, tokens=(1,) * 256, position=0, sample=False)]
    for _ in range(FLUSH_TOKENS // 256 - 1):
        backend.step(chunk)
    backend.flush()
    assert trimmed == []
    backend.step(chunk)
    backend.flush()
    backend.flush()
    assert trimmed == [1]
    monkeypatch.undo()
    backend.close()


def test_a_worker_flushes_once_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    frame = Frame(body={"kind": "call"})

    class Flushing:
        n = 0

        def flush(self) -> None:
            self.n += 1
            inbox.put(frame)  # somebody asks at last

    backend = Flushing()
    monkeypatch.setattr(worker, "_FLUSH_S", 0.0)
    idle = object.__new__(worker.Worker)
    for name, value in (("_inbox", inbox), ("_backend", backend), ("_driver", object())):
        setattr(idle, name, value)
    assert idle._next_frame() is frame
    inbox.put(frame)
    assert idle._next_frame() is frame  # it was there already: nothing is given back
    assert backend.n == 1
