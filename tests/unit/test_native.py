"""The native library's virtual devices, through ggml's own C API."""

import ctypes as c
import sys
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from loadmaster.engine import builds, selftest

pytestmark = pytest.mark.engine

MIB = 1 << 20
ALIGNMENT = 8192
BAD_ARGUMENT, NAME_TAKEN = -1, -3
numbers = count()

Device = tuple[int, int]  # our index, ggml's device


@pytest.fixture(scope="module")
def native() -> c.CDLL:
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    library = c.CDLL(str(builds.find_build().lib_dir / f"libloadmaster_native{suffix}"))
    library.lm_add_device.argtypes = [
        c.c_char_p,
        c.c_size_t,
        c.c_size_t,
        c.c_size_t,
        c.c_int,
        c.c_int,
    ]
    library.lm_device_set_total.argtypes = [c.c_int, c.c_size_t]
    for name in ("dev_by_name", "dev_buffer_type", "dev_host_buffer_type", "dev_backend_reg"):
        getattr(library, f"ggml_backend_{name}").restype = c.c_void_p
    for name in ("buft_alloc_buffer", "buffer_get_base", "reg_get_proc_address"):
        getattr(library, f"ggml_backend_{name}").restype = c.c_void_p
    for name in ("dev_buffer_type", "dev_host_buffer_type", "dev_backend_reg", "buffer_get_base"):
        getattr(library, f"ggml_backend_{name}").argtypes = [c.c_void_p]
    library.ggml_backend_buffer_free.argtypes = [c.c_void_p]
    library.ggml_backend_buft_alloc_buffer.argtypes = [c.c_void_p, c.c_size_t]
    library.ggml_backend_dev_memory.argtypes = [c.c_void_p, *[c.POINTER(c.c_size_t)] * 2]
    library.ggml_backend_reg_get_proc_address.argtypes = [c.c_void_p, c.c_char_p]
    return library


@pytest.fixture
def add(native: c.CDLL) -> Callable[..., Device]:
    def make(total: int, *, pinned_host: bool = False) -> Device:
        name = f"Test{next(numbers)}".encode()
        index = native.lm_add_device(name, total, ALIGNMENT, 0, 0, pinned_host)
        assert index >= 0
        assert native.lm_register() > index
        return index, native.ggml_backend_dev_by_name(name)

    return make


@pytest.fixture
def allocate(native: c.CDLL) -> Iterator[Callable[[Device, int], int | None]]:
    made: list[int] = []

    def make(device: Device, size: int) -> int | None:
        buffer_type = native.ggml_backend_dev_buffer_type(device[1])
        buffer: int | None = native.ggml_backend_buft_alloc_buffer(buffer_type, size)
        made.extend([buffer] if buffer else [])
        return buffer

    yield make
    for buffer in made:
        native.ggml_backend_buffer_free(buffer)


def usage(native: c.CDLL, device: Device) -> tuple[int, int, int]:
    counts = [c.c_size_t() for _ in range(3)]
    assert native.lm_device_usage(device[0], *map(c.byref, counts)) == 0
    return counts[0].value, counts[1].value, counts[2].value


def test_version(native: c.CDLL) -> None:
    assert native.lm_version() == selftest.NATIVE_VERSION


def test_the_limit_is_exact(
    native: c.CDLL, add: Callable[..., Device], allocate: Callable[[Device, int], int | None]
) -> None:
    device = add(MIB)
    assert allocate(device, MIB - 1)
    assert allocate(device, 2) is None
    assert allocate(device, 1)
    assert allocate(device, 1) is None
    assert allocate(device, 2**64 - 1) is None
    assert usage(native, device) == (MIB, MIB, 3)


def test_an_empty_buffer_costs_nothing(
    native: c.CDLL, add: Callable[..., Device], allocate: Callable[[Device, int], int | None]
) -> None:
    device = add(0)
    assert allocate(device, 0)
    assert usage(native, device) == (0, 0, 0)


def test_memory_is_aligned_as_declared(
    native: c.CDLL, add: Callable[..., Device], allocate: Callable[[Device, int], int | None]
) -> None:
    device = add(MIB)
    for size in (1, 100, ALIGNMENT + 1):
        buffer = allocate(device, size)
        assert native.ggml_backend_buffer_get_base(buffer) % ALIGNMENT == 0


def test_freeing_gives_back_and_the_peak_stays_until_reset(
    native: c.CDLL, add: Callable[..., Device]
) -> None:
    device = add(MIB)
    kind = native.ggml_backend_dev_buffer_type(device[1])
    native.ggml_backend_buffer_free(native.ggml_backend_buft_alloc_buffer(kind, 1000))
    assert usage(native, device) == (0, 1000, 0)
    assert native.lm_device_reset_peak(device[0]) == 0
    assert usage(native, device) == (0, 0, 0)


def test_the_limit_can_change_and_free_is_never_negative(
    native: c.CDLL, add: Callable[..., Device], allocate: Callable[[Device, int], int | None]
) -> None:
    device = add(MIB)
    assert allocate(device, 1000)
    assert native.lm_device_set_total(device[0], 500) == 0
    assert allocate(device, 1) is None
    free, total = c.c_size_t(), c.c_size_t()
    native.ggml_backend_dev_memory(device[1], c.byref(free), c.byref(total))
    assert (free.value, total.value) == (0, 500)
    assert native.lm_device_set_total(device[0], 1001) == 0
    assert allocate(device, 1)


def test_the_nth_allocation_is_refused_once(
    native: c.CDLL, add: Callable[..., Device], allocate: Callable[[Device, int], int | None]
) -> None:
    device = add(MIB)
    assert native.lm_device_deny_after(device[0], 2) == 0
    assert [allocate(device, 1) is not None for _ in range(4)] == [True, False, True, True]
    assert usage(native, device)[2] == 1
    native.lm_device_deny_after(device[0], 1)
    native.lm_device_deny_after(device[0], 0)
    assert allocate(device, 1)


def test_pinned_host_memory_is_not_the_devices(native: c.CDLL, add: Callable[..., Device]) -> None:
    assert native.ggml_backend_dev_host_buffer_type(add(MIB)[1]) is None
    device = add(0, pinned_host=True)
    kind = native.ggml_backend_dev_host_buffer_type(device[1])
    buffer = native.ggml_backend_buft_alloc_buffer(kind, MIB)
    assert buffer
    assert usage(native, device) == (0, 0, 0)
    native.ggml_backend_buffer_free(buffer)


def test_the_engine_can_set_its_threads(native: c.CDLL, add: Callable[..., Device]) -> None:
    registry = native.ggml_backend_dev_backend_reg(add(MIB)[1])
    for name in (b"ggml_backend_set_n_threads", b"ggml_backend_set_abort_callback"):
        assert native.ggml_backend_reg_get_proc_address(registry, name)
    assert native.ggml_backend_reg_get_proc_address(registry, b"something else") is None


class GgmlInit(c.Structure):
    _fields_ = (("size", c.c_size_t), ("memory", c.c_void_p), ("no_alloc", c.c_bool))


F32, F16, Q8_0 = 0, 1, 8


@pytest.fixture
def tensor(native: c.CDLL) -> Iterator[Callable[..., int]]:
    """Make a ggml tensor, from nothing or by flash attention over three others."""
    native.ggml_init.restype = c.c_void_p
    native.ggml_init.argtypes = [GgmlInit]
    native.ggml_new_tensor_4d.restype = native.ggml_flash_attn_ext.restype = c.c_void_p
    native.ggml_new_tensor_4d.argtypes = [c.c_void_p, c.c_int, *[c.c_int64] * 4]
    native.ggml_flash_attn_ext.argtypes = [*[c.c_void_p] * 5, *[c.c_float] * 3]
    native.ggml_free.argtypes = [c.c_void_p]
    context = native.ggml_init(GgmlInit(MIB, None, True))

    def make(kind: int, *shape: int, attend: tuple[int, int, int] | None = None) -> int:
        if attend is not None:
            return int(native.ggml_flash_attn_ext(context, *attend, None, 1.0, 0.0, 0.0))
        return int(native.ggml_new_tensor_4d(context, kind, *shape, *[1] * (4 - len(shape))))

    yield make
    native.ggml_free(context)


def alloc_size(native: c.CDLL, device: int, tensor: int) -> int:
    native.ggml_backend_buft_get_alloc_size.restype = c.c_size_t
    native.ggml_backend_buft_get_alloc_size.argtypes = [c.c_void_p, c.c_void_p]
    kind = native.ggml_backend_dev_buffer_type(device)
    size: int = native.ggml_backend_buft_get_alloc_size(kind, tensor)
    return size


def test_quantized_rows_are_padded(native: c.CDLL, tensor: Callable[..., int]) -> None:
    name = f"Test{next(numbers)}".encode()
    native.lm_add_device(name, MIB, 128, 512, 32, 0)
    native.lm_register()
    device = native.ggml_backend_dev_by_name(name)
    assert alloc_size(native, device, tensor(Q8_0, 64, 3)) == 3 * 68 + 476  # 448 more elements
    assert alloc_size(native, device, tensor(Q8_0, 512, 3)) == 3 * 544
    assert alloc_size(native, device, tensor(F16, 64, 3)) == 3 * 128


def test_attention_over_a_quantized_cache_has_room_for_f16_copies(
    native: c.CDLL, add: Callable[..., Device], tensor: Callable[..., int]
) -> None:
    index, device = add(MIB)
    query = tensor(F32, 64, 16, 4)
    quantized = [tensor(Q8_0, 64, 256, 2) for _ in range(2)]
    plain = [tensor(F16, 64, 256, 2) for _ in range(2)]
    over_quantized, over_plain = (
        tensor(F32, attend=(query, *cache)) for cache in (quantized, plain)
    )
    output_bytes = 64 * 16 * 4 * 4
    assert alloc_size(native, device, over_quantized) == output_bytes
    assert native.lm_device_set_f16_attention(index, 1) == 0
    copies_bytes = 2 * 64 * 256 * 2 * 2
    assert alloc_size(native, device, over_quantized) == output_bytes + copies_bytes
    assert alloc_size(native, device, over_plain) == output_bytes


def test_wrong_arguments_are_answers_not_crashes(
    native: c.CDLL, add: Callable[..., Device]
) -> None:
    index, _ = add(MIB)
    assert native.lm_add_device(b"", MIB, 128, 0, 0, 0) == BAD_ARGUMENT
    assert native.lm_add_device(None, MIB, 128, 0, 0, 0) == BAD_ARGUMENT
    assert native.lm_add_device(b"Odd", MIB, 96, 0, 0, 0) == BAD_ARGUMENT
    assert native.lm_add_device(b"CPU", MIB, 128, 0, 0, 0) == NAME_TAKEN
    assert native.lm_device_set_total(index + 1, 1) == BAD_ARGUMENT
    assert native.lm_device_deny_after(-1, 1) == BAD_ARGUMENT
    assert native.lm_device_usage(index, None, None, None) == BAD_ARGUMENT
    assert native.lm_memory_breakdown(None, None, 0) == BAD_ARGUMENT


def test_the_installed_engine_passes_its_selftest() -> None:
    outcome = builds.test_build(builds.find_build())
    assert outcome.passed, outcome.failure
    assert len(outcome.checks) >= 6
