"""Walking through a header's bytes, a window at a time, with every length checked first."""

import struct
from collections.abc import Callable, Iterator
from itertools import repeat

from loadmaster.model.damage import damaged, truncated
from loadmaster.units import KIB, MIB

ReadAt = Callable[[int, int], bytes]  # offset, length → bytes; fewer only at the end of the file

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = {
    U8: struct.Struct("<B"), I8: struct.Struct("<b"), U16: struct.Struct("<H"),
    I16: struct.Struct("<h"), U32: struct.Struct("<I"), I32: struct.Struct("<i"),
    F32: struct.Struct("<f"), BOOL: struct.Struct("<B"), U64: struct.Struct("<Q"),
    I64: struct.Struct("<q"), F64: struct.Struct("<d"),
}  # fmt: skip

# The largest headers in use have about 25 MiB.
MAX_HEADER_BYTES = 256 * MIB
MAX_LISTED_STRING_BYTES = 1 * MIB  # of one string in an array
FIRST_READ_BYTES = 64 * KIB
NEXT_READ_BYTES = 1 * MIB


class Cursor:
    """Walks a header front to back through a window; never past the end of the file."""

    def __init__(self, read_at: ReadAt, size: int, label: str) -> None:
        self._read_at = read_at
        self._window = b""
        self._base = 0
        self._pos = 0
        self.size = size
        self.label = label
        self.bytes_read = 0

    @property
    def offset(self) -> int:
        return self._base + self._pos

    @property
    def left(self) -> int:
        return self.size - self.offset

    def take(self, length: int, what: str) -> bytes:
        """The next `length` bytes."""
        if len(self._window) - self._pos < length:
            self._refill(length, what)
        start = self._pos
        self._pos = start + length
        return self._window[start : self._pos]

    def skip(self, length: int, what: str) -> None:
        """Step over bytes without reading those beyond the window."""
        if length > self.left:
            raise truncated(self.label, self.size, self.offset + length, what)
        self._pos += length
        if self._pos > len(self._window):
            self._base, self._pos, self._window = self.offset, 0, b""

    def number(self, kind: int, what: str) -> int | float:
        layout = NUMBERS[kind]
        value: int | float = layout.unpack(self.take(layout.size, what))[0]
        return value

    def u32(self, what: str) -> int:
        return int(self.number(U32, what))

    def u64(self, what: str) -> int:
        return int(self.number(U64, what))

    def text(self, limit: int, what: str) -> bytes:
        """A string: its length, checked against `limit` and the file, then its bytes."""
        return self.take(self.length(limit, what), what)

    def length(self, limit: int, what: str) -> int:
        """The length of a string or an array, where each element takes a byte at least."""
        at = self.offset
        value = self.u64(f"the length of {what}")
        if value > limit:
            raise damaged(
                "length_out_of_bounds", self.label, f"the length of {what}", value,
                f"up to {limit}", offset=at,
            )  # fmt: skip
        if value > self.left:
            raise truncated(self.label, self.size, self.offset + value, what)
        return value

    def strings(self, count: int, what: str) -> Iterator[list[bytes]]:
        """An array's strings, a window at a time."""
        unpack = NUMBERS[U64].unpack_from
        while count:
            batch: list[bytes] = []
            window, pos, end = self._window, self._pos, len(self._window)
            room = end - 8
            for _ in repeat(None, count):
                if pos > room:
                    break
                stop = pos + 8 + unpack(window, pos)[0]
                if stop > end:
                    break
                batch.append(window[pos + 8 : stop])
                pos = stop
            self._pos = pos
            if not batch:  # the window's end cuts the next one
                batch = [self.text(MAX_LISTED_STRING_BYTES, what)]
            count -= len(batch)
            yield batch

    def _refill(self, length: int, what: str) -> None:
        if length > self.left:
            raise truncated(self.label, self.size, self.offset + length, what)
        rest = self._window[self._pos :]
        wanted = max(length - len(rest), NEXT_READ_BYTES if self.bytes_read else FIRST_READ_BYTES)
        at = self.offset + len(rest)
        wanted = min(wanted, self.size - at)
        fresh = self._read_at(at, wanted)
        if len(fresh) < wanted:  # the file shrank while it was read
            raise truncated(self.label, at + len(fresh), self.offset + length, what)
        self.bytes_read += len(fresh)
        self._base, self._pos, self._window = self.offset, 0, rest + fresh
        if self.offset > MAX_HEADER_BYTES:
            raise damaged(
                "length_out_of_bounds", self.label, "the header", f"over {self.offset} bytes",
                f"up to {MAX_HEADER_BYTES}", offset=self.offset,
            )  # fmt: skip
