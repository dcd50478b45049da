"""Whatever happens to a file's bytes, the reader answers with a model or a refusal, soon."""

import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import gguf_writer as gw
from loadmaster.errors import DamagedFileError, LoadmasterError
from loadmaster.model.gguf import parse_header
from loadmaster.model.source import read_model

_METADATA, _TENSORS = gw.tiny_llama()
_HEADER = gw.header(_METADATA, _TENSORS)
_SIZE = len(_HEADER) + sum(-(-one.size_bytes // 32) * 32 for one in _TENSORS)

_EDGES = [0, 1, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1]
_place = st.integers(4, len(_HEADER) - 8)
_patch = st.one_of(
    st.binary(min_size=1, max_size=8), st.sampled_from([v.to_bytes(8, "little") for v in _EDGES])
)


def _judge(raw: bytes, folder: Path) -> str | None:
    path = folder / "m.gguf"
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(_SIZE)
    error = refusal(path)
    if error is None:
        return None
    assert error.message.isprintable()
    assert error.hint
    return error.code


def refusal(path: Path) -> LoadmasterError | None:
    try:
        read_model(path)
    except LoadmasterError as error:
        return error
    return None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(patches=st.lists(st.tuples(_place, _patch), min_size=1, max_size=16))
def test_damaged_bytes_give_a_model_or_a_refusal(
    tmp_path: Path, patches: list[tuple[int, bytes]]
) -> None:
    raw = bytearray(_HEADER)
    for at, patch in patches:
        raw[at : at + len(patch)] = patch
    started = time.process_time()
    _judge(bytes(raw), tmp_path)
    assert time.process_time() - started < 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=4096))
def test_noise_behind_the_magic_is_refused(tmp_path: Path, tail: bytes) -> None:
    assert _judge(b"GGUF\x03\0\0\0" + tail, tmp_path) is not None


def test_every_cut_of_the_header_is_refused() -> None:
    # A header's own end is a cut as well: the tensors are missing then.
    for length in range(4, len(_HEADER) + 1):
        cut = _HEADER[:length]
        with pytest.raises(DamagedFileError) as caught:
            parse_header(lambda at, n, cut=cut: cut[at : at + n], length, "m.gguf")  # type: ignore[misc]
        assert caught.value.code == "truncated", length


def test_a_hostile_header_costs_little_memory(tmp_path: Path) -> None:
    path = gw.write_sparse(tmp_path / "m.gguf", *gw.tiny_llama("bpe", n_vocab=60_000))
    raw = path.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.tokens")
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(DamagedFileError) as caught:
        read_model(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.code == "duplicate_key"
    assert peak_bytes < 64 << 20
