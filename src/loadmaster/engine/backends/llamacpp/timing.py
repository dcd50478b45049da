"""The native library's timers (measure.cpp) for the questions of `loadmaster.engine.timing`."""

import ctypes as c

from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.timing import (
    Question,
    TimeAttention,
    TimeLink,
    TimeProducts,
    TimeRead,
    TimeSmall,
)
from loadmaster.errors import EngineError
from loadmaster.model.quants import BY_NAME

_UNSUPPORTED, _OUT_OF_MEMORY = -4, -2
_SMALL = {"norm": 0, "gate": 1, "rope": 2, "copy": 3}


class _Product(c.Structure):
    """`lm_product`."""

    _fields_ = (
        ("type", c.c_int32),
        ("repacked", c.c_int32),
        ("n_in", c.c_int64),
        ("n_out", c.c_int64),
        ("n_matrices", c.c_int32),
        ("n_expert", c.c_int32),
        ("n_used", c.c_int32),
    )


class _Point(c.Structure):
    """`lm_point`."""

    _fields_ = (("n_tokens", c.c_int32), ("n_matrices", c.c_int32))


class _Attention(c.Structure):
    """`lm_attention`."""

    _fields_ = tuple(
        (name, c.c_int32)
        for name in (
            "type", "head_dim", "n_head", "n_head_kv", "n_cells", "n_tokens", "n_visible",
            "n_layers",
        )
    )  # fmt: skip


class Timers:
    """Asks the native library. None is the answer where the device cannot do it."""

    def __init__(self, library: Library) -> None:
        self._names = {"cpu": b""} | {it.id: it.name.encode() for it in library.devices}
        self._native = library.native
        text, floats = c.c_char_p, c.POINTER(c.c_double)
        self._native.lm_time_products.argtypes = [
            text, c.c_int, c.POINTER(_Product), c.POINTER(_Point), c.c_int, c.c_int, floats,
        ]  # fmt: skip
        self._native.lm_time_attention.argtypes = [
            text, c.c_int, c.POINTER(_Attention), c.c_int, floats,
        ]  # fmt: skip
        self._native.lm_time_small.argtypes = [
            text, c.c_int, c.c_int, c.c_int64, c.c_int, c.c_int, c.c_int, floats,
        ]  # fmt: skip
        self._native.lm_time_link.argtypes = [text, c.c_size_t, c.c_int, c.c_int, floats]
        self._native.lm_time_read.argtypes = [c.c_int, c.c_size_t, c.c_int, floats]

    def time(self, question: Question) -> tuple[float, ...] | None:
        """Seconds of every run; of products, of every run of every point.

        Raises:
            EngineError: the question makes no sense to the engine.
        """
        match question:
            case TimeProducts():
                return self._products(question)
            case TimeAttention():
                return self._attention(question)
            case TimeSmall():
                q, seconds = question, _floats(question.runs)
                status = self._native.lm_time_small(
                    self._name(q.device), q.n_threads, _SMALL[q.operation], q.width, q.n_tokens,
                    q.n_ops, q.runs, seconds,
                )  # fmt: skip
                return _answer(status, seconds)
            case TimeLink():
                seconds = _floats(question.runs)
                status = self._native.lm_time_link(
                    self._name(question.device), question.size_bytes, int(question.pinned),
                    question.runs, seconds,
                )  # fmt: skip
                return _answer(status, seconds)
            case TimeRead():
                seconds = _floats(question.runs)
                status = self._native.lm_time_read(
                    question.n_threads, question.size_bytes, question.runs, seconds
                )
                return _answer(status, seconds)
        raise EngineError(f"the native library cannot time `{type(question).__name__}`")

    def _name(self, device: str) -> bytes:
        try:
            return self._names[device]
        except KeyError:
            raise EngineError(f"the engine sees no device `{device}`") from None

    def _products(self, question: TimeProducts) -> tuple[float, ...] | None:
        spec = _Product(
            BY_NAME[question.type].ggml_id, int(question.repacked), question.n_in, question.n_out,
            question.n_matrices, question.n_expert, question.n_used,
        )  # fmt: skip
        points = (_Point * len(question.points))(*(_Point(*point) for point in question.points))
        seconds = _floats(question.runs * len(points))
        status = self._native.lm_time_products(
            self._name(question.device), question.n_threads, c.byref(spec), points, len(points),
            question.runs, seconds,
        )  # fmt: skip
        return _answer(status, seconds)

    def _attention(self, question: TimeAttention) -> tuple[float, ...] | None:
        spec = _Attention(
            BY_NAME[question.type].ggml_id, question.head_dim, question.n_head,
            question.n_head_kv, question.n_cells, question.n_tokens, question.n_visible,
            question.n_layers,
        )  # fmt: skip
        seconds = _floats(question.runs)
        status = self._native.lm_time_attention(
            self._name(question.device), question.n_threads, c.byref(spec), question.runs, seconds
        )
        return _answer(status, seconds)


def _floats(count: int) -> "c.Array[c.c_double]":
    return (c.c_double * count)()


def _answer(status: int, seconds: "c.Array[c.c_double]") -> tuple[float, ...] | None:
    if status in (_UNSUPPORTED, _OUT_OF_MEMORY):
        return None
    if status != 0:
        raise EngineError(f"the engine refused to time this ({status})")
    return tuple(seconds)
