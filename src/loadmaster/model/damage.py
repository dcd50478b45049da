"""How a refusal of a model file is worded: field, what was found, what is allowed, where."""

from loadmaster.errors import DamagedFileError, Number

DOWNLOAD_AGAIN = "download the file again and compare its sha256 with the publisher's"

_QUOTE_BYTES = 64  # no more of a hostile file than this is ever shown


def quoted(text: str | bytes) -> str:
    """At most 64 bytes of a file's content, control characters escaped, for a message."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    shown = raw[:_QUOTE_BYTES].decode("utf-8", "replace")
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    # Escaping lengthens: cut once more so that the promise is about what is printed.
    safe = safe.encode()[:_QUOTE_BYTES].decode("utf-8", "ignore")
    return f"`{safe}…`" if len(raw) > _QUOTE_BYTES else f"`{safe}`"


def damaged(
    code: str,
    label: str,
    field: str,
    found: object,
    allowed: str,
    *,
    offset: int | None = None,
    hint: str = DOWNLOAD_AGAIN,
) -> DamagedFileError:
    """One field of `label` is wrong: `field` is `found`, only `allowed` would do."""
    number: Number = found if isinstance(found, int | float) else str(found)
    place = label if offset is None else f"byte {offset:#06x} of {label}"
    return DamagedFileError(
        f"model file is damaged: {field} is {found}, allowed {allowed} ({place})",
        code=code,
        hint=hint,
        numbers={
            "file": label, "field": field, "offset": offset, "found": number, "allowed": allowed,
        },
    )  # fmt: skip


def refused(code: str, message: str, *, hint: str, **numbers: Number) -> DamagedFileError:
    """A refusal that is not about one field: not a GGUF, a missing shard, an architecture."""
    return DamagedFileError(message, code=code, hint=hint, numbers=numbers)


def truncated(label: str, have: int, need: int, what: str) -> DamagedFileError:
    """The file ends before `what` does; `need` is a lower bound when the header itself is cut."""
    return DamagedFileError(
        f"model file is truncated: {label} has {have} bytes and needs "
        f"{'at least ' if what != 'the tensors' else ''}{need} for {what}",
        code="truncated",
        hint="the download stopped early: resume or repeat it",
        numbers={"file": label, "have": have, "need": need},
    )
