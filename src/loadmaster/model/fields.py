"""A header's values by name, and the wording of what is wrong with one."""

from collections.abc import Mapping

from loadmaster.errors import DamagedFileError
from loadmaster.model.damage import damaged
from loadmaster.model.gguf import Entry, Header
from loadmaster.model.types import MetadataValue

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_HEADS = 4096
MAX_WIDTH = 1 << 24


class Fields:
    """A header's values by name, with what it takes to say where one is wrong."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.metadata: Mapping[str, MetadataValue] = header.metadata
        value = header.metadata.get("general.architecture")
        self.architecture = value if isinstance(value, str) else ""

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def entry(self, key: str) -> Entry | None:
        return self.header.entries.get(key)

    def wrong(
        self, key: str, found: object, allowed: str, *, code: str = "gguf_field_out_of_range"
    ) -> DamagedFileError:
        entry = self.entry(key)
        offset = entry.offset if entry else None
        return damaged(code, self.header.label, key, found, allowed, offset=offset)

    def missing(self, key: str) -> DamagedFileError:
        return self.wrong(key, "missing", "present", code="missing_key")

    def integer(self, key: str, low: int, high: int) -> int | None:
        """The scalar integer under `key`, None when there is none; outside low–high is damage."""
        value = self.metadata.get(key)
        if key not in self.header.entries:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            entry = self.header.entries[key]
            raise self.wrong(key, f"{article(entry.type_name)}", "an integer", code="bad_type")
        if not low <= value <= high:
            raise self.wrong(key, value, f"{low}–{high}")
        return value

    def required(self, key: str, low: int, high: int) -> int:
        value = self.integer(key, low, high)
        if value is None:
            raise self.missing(key)
        return value

    def per_layer(self, key: str, n_layer: int, low: int, high: int) -> tuple[int, ...] | None:
        """One integer for each layer, from a scalar or an array of at least that length."""
        value = self.metadata.get(key)
        if not isinstance(value, tuple):
            number = self.integer(key, low, high)
            return None if number is None else (number,) * n_layer
        if len(value) < n_layer:
            raise self.wrong(key, f"{len(value)} numbers", f"one for each of {n_layer} layers")
        numbers = tuple(int(one) for one in value[:n_layer] if isinstance(one, int))
        if len(numbers) < n_layer or not all(low <= one <= high for one in numbers):
            worst = next((one for one in value if not _within(one, low, high)), value[0])
            raise self.wrong(key, worst, f"{low}–{high} in each layer")
        return numbers


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _within(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and low <= value <= high
