"""Whatever happens to the bytes of a header or a config, there is a model or a refusal."""

import json
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadmaster.errors import LoadmasterError
from loadmaster.model.hf_config import parse_config
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.model.safetensors import parse_header
from tests.checkpoint_parts import LOADED, header_bytes, write_checkpoint

_ROW = LOADED["qwen3"]
_RAW, _DATA = header_bytes(
    {name: (dtype, shape) for name, (dtype, shape) in _ROW["tensors"].items()}
)
_CONFIG = json.dumps(_ROW["config"]).encode()
_patch = st.binary(min_size=1, max_size=8)
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def _patched(raw: bytes, patches: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(raw)
    for at, patch in patches:
        at %= len(raw)
        changed[at : at + len(patch)] = patch
    return bytes(changed)


def _judge(read: Callable[[], object]) -> None:
    error = _refusal(read)
    if error is not None:
        assert error.message.isprintable()
        assert error.hint


def _refusal(read: Callable[[], object]) -> LoadmasterError | None:
    try:
        read()
    except LoadmasterError as error:
        return error
    return None


@given(patches=st.lists(st.tuples(st.integers(0, 1 << 20), _patch), min_size=1, max_size=12))
def test_damaged_headers(patches: list[tuple[int, bytes]]) -> None:
    raw = _patched(_RAW, patches)
    _judge(lambda: parse_header(lambda at, n: raw[at : at + n], len(raw) + _DATA, "m"))


@given(st.binary(max_size=64))
def test_any_bytes(raw: bytes) -> None:
    _judge(lambda: parse_header(lambda at, n: raw[at : at + n], len(raw), "m"))


@given(patches=st.lists(st.tuples(st.integers(0, 1 << 20), _patch), min_size=1, max_size=6))
def test_damaged_configs(patches: list[tuple[int, bytes]]) -> None:
    _judge(lambda: parse_config(_patched(_CONFIG, patches), "config.json"))


@given(key=st.sampled_from([*_ROW["config"], "quantization_config"]), value=_values)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_config(tmp_path: Path, key: str, value: object) -> None:
    folder = write_checkpoint(tmp_path / "m", "qwen3")
    (folder / "config.json").write_text(json.dumps(_ROW["config"] | {key: value}))
    _judge(lambda: read_checkpoint(folder))
