"""Loads model files with the engine and decodes eight tokens of each; one process per file.

    python -m benchmarks.decode_probe < paths        one JSON line for each path

The library is loaded once and the process forks for each file (about 200 files a second): a file
that kills its process is told by the signal, and the next one is not touched by it. Outcomes:
`decoded`, `refused` (the engine said no), `aborted` (a signal, or over the time limit).
"""

import ctypes
import json
import os
import resource
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NoReturn

N_TOKENS = 8
N_CTX = 256
CPU_LIMIT_S = 20
MEMORY_LIMIT_BYTES = 6 << 30
REFUSED = 3


def engine() -> Any:
    """The ctypes layer alone; the package around it imports far more than a fork should carry."""
    lib_dir, python_dir = _places()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(lib_dir)
    os.environ["GGML_NO_BACKTRACE"] = "1"
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(python_dir / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as layer

    return layer


def _places() -> tuple[Path, Path]:
    """Library and ctypes layer: from the environment, else of the chosen engine build."""
    lib, python = os.environ.get("LLAMA_CPP_LIB_PATH"), os.environ.get("LLAMA_CPP_PYTHON_PATH")
    if lib and python:
        return Path(lib), Path(python)
    from loadmaster.engine.builds import find_build

    build = find_build()
    return build.lib_dir, build.python_dir


def main() -> None:
    layer = engine()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        path = line.rstrip("\n")
        print(json.dumps({"path": path, **probe(layer, path)}), flush=True)


def probe(layer: Any, path: str) -> dict[str, Any]:
    """Try one file in a child of this process."""
    with tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            _child(layer, path, log.fileno())
        _, status = os.waitpid(pid, 0)
        log.seek(0)
        words = log.read()[-8192:].decode("utf-8", "replace").strip().splitlines()
    if os.WIFSIGNALED(status):
        return {"outcome": "aborted", "signal": os.WTERMSIG(status), "why": _last_words(words)}
    code = os.waitstatus_to_exitcode(status)
    outcome = {0: "decoded", REFUSED: "refused"}.get(code, "aborted")
    why = "" if outcome == "decoded" else _last_words(words)
    return {"outcome": outcome, "signal": 0, "why": why}


def _last_words(words: list[str]) -> str:
    marks = ("GGML_ASSERT", "GGML_ABORT", "what():", "error loading", "failed", "unsupported")
    told = [line for line in words if any(mark in line for mark in marks)]
    return (told or words or [""])[-1][:300]


def _child(layer: Any, path: str, log: int) -> NoReturn:
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    code = 1
    try:
        code = 0 if decode(layer, path) else REFUSED
    finally:
        os._exit(code)


def decode(layer: Any, path: str) -> bool:
    """Load, tokenize a line with a rare character, decode eight tokens; False when refused."""
    layer.llama_backend_init()
    params = layer.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    model = layer.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        return False
    settings = layer.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = N_CTX, 64, 64
    settings.n_threads = settings.n_threads_batch = 1
    context = layer.llama_init_from_model(model, settings)
    if not context:
        return False
    vocab = layer.llama_model_get_vocab(model)
    tokens = (ctypes.c_int32 * 64)()
    text = "hello 🦙 wörld".encode()
    n_tokens = layer.llama_tokenize(vocab, text, len(text), tokens, 64, True, True)
    if n_tokens <= 0:
        tokens[0], n_tokens = 0, 1
    return _generate(layer, context, vocab, tokens, n_tokens)


def _generate(layer: Any, context: Any, vocab: Any, tokens: Any, n_tokens: int) -> bool:
    n_vocab = layer.llama_vocab_n_tokens(vocab)
    piece = ctypes.create_string_buffer(256)
    for _ in range(N_TOKENS):
        batch = layer.llama_batch_get_one(tokens, n_tokens)
        if layer.llama_decode(context, batch) != 0:
            return False
        logits = layer.llama_get_logits_ith(context, -1)
        best = max(range(n_vocab), key=logits.__getitem__) if n_vocab else 0
        layer.llama_token_to_piece(vocab, best, piece, 256, 0, True)
        tokens = (ctypes.c_int32 * 1)(best)
        n_tokens = 1
    return True


if __name__ == "__main__":
    main()
