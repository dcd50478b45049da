"""From a MODEL argument to a file: here, in a store, or elsewhere and known by its header."""

import difflib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadmaster.errors import DamagedFileError, LoadmasterError, NotFoundError, UsageError
from loadmaster.model import store
from loadmaster.model.http import Http
from loadmaster.model.hub import Hub, check_online
from loadmaster.model.reference import (
    HubReference,
    OllamaReference,
    PathReference,
    Reference,
    UrlReference,
    parse_reference,
)
from loadmaster.model.remote import RemoteShard, is_skeleton, read_remote, url_shards
from loadmaster.model.shapes.library import (
    ShapeReference,
    is_shape,
    load_shape,
    parse_shape,
    shape_model,
)
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.model.variants import Variant, choose
from loadmaster.tasks.planning import DEMO, model_path
from loadmaster.units import format_size

_LIKE_A_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
SHAPE_NOTE = "a shape: dimensions of the published checkpoint, typed as llama-quantize does"


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A model's header, and what a person should know about where it is from."""

    model: ModelSpec
    notes: tuple[str, ...] = ()


def locate(name: str) -> Path:
    """The file with the weights of a MODEL argument; no network.

    Raises:
        NotFoundError: it is not on this machine; the hint has the command that fetches it.
        UsageError: it is no reference, or several files would do.
    """
    if name == DEMO:
        return model_path(name)
    if is_shape(name):
        raise _no_weights(parse_shape(name))
    reference = parse_reference(name)
    path = _find(reference)
    if path is None:
        raise _not_here(reference)
    return path


def locate_header(name: str) -> Located:
    """The header of a MODEL argument, over the network where the file is not here.

    Raises:
        LoadmasterError: it cannot be found or read.
    """
    if name == DEMO:
        return Located(model=read_model(model_path(name)))
    if is_shape(name):
        return Located(model=shape_model(parse_shape(name)), notes=(SHAPE_NOTE,))
    reference = parse_reference(name)
    path = _find(reference)
    if path is not None:
        return Located(model=read_model(path))
    if isinstance(reference, HubReference | UrlReference):
        return _remote(reference)
    raise _not_here(reference)


def _no_weights(reference: ShapeReference) -> UsageError:
    published = load_shape(reference.name).published
    return UsageError(
        f"`{reference}` is a shape: dimensions without weights",
        hint=f"`loadmaster plan {reference}` plans it; a GGUF file of {published} runs",
    )


def check_has_weights(path: Path) -> None:
    """Refuse to load the header of a model that was planned before its download.

    Raises:
        NotFoundError: it is one.
    """
    if is_skeleton(path):
        raise NotFoundError(
            f"`{path.name}` was planned from its header alone: its weights are not on this machine",
            hint="`loadmaster pull` the model, then plan it again",
        )


def _find(reference: Reference) -> Path | None:
    match reference:
        case PathReference(path=name):
            return _find_path(name)
        case HubReference():
            return store.find_hub(reference)
        case OllamaReference():
            return store.find_ollama(reference)
        case UrlReference():
            path = store.url_file(reference)
            return path if path.is_file() else None


def _find_path(name: str) -> Path | None:
    with suppress(OSError):
        if Path(name).expanduser().exists():
            return model_path(name)
    if "/" in name or not name.endswith(".gguf"):
        return None
    found = store.find_named(name)
    if len(found) > 1:
        raise UsageError(
            f"{len(found)} files are named `{name}`",
            hint="give a path: " + ", ".join(f"`{path}`" for path in found[:3]),
        )
    return found[0] if found else None


def _not_here(reference: Reference) -> NotFoundError:
    match reference:
        case PathReference(path=name):
            hint = "give a GGUF file, or `demo` for the packaged model"
            if _LIKE_A_REPO.fullmatch(name):
                hint = f"a file of this name is not here; on the Hub it would be `hf:{name}`"
            return NotFoundError(f"`{name}` is not there", hint=hint)
        case OllamaReference():
            names = store.ollama_names()
            near = difflib.get_close_matches(str(reference), names, n=3, cutoff=0.4) or names[:3]
            shown = ", ".join(f"`{one}`" for one in near)
            return NotFoundError(
                f"Ollama has no `{str(reference).removeprefix('ollama:')}` on this machine",
                hint=f"it has {shown}" if near else "`OLLAMA_MODELS` names its folder",
            )
    return NotFoundError(
        f"`{reference}` is not on this machine", hint=f"`loadmaster pull {reference}`"
    )


def _remote(reference: HubReference | UrlReference) -> Located:
    try:
        model = (
            _read_hub(reference) if isinstance(reference, HubReference) else _read_url(reference)
        )
    except DamagedFileError as error:
        if error.code == "header_too_large":
            error.hint = f"`loadmaster pull {reference}`, then plan it from the disk"
        raise
    note = (
        f"not downloaded: planned from {format_size(model.header_bytes)} read of "
        f"{format_size(model.file_bytes)}; `loadmaster pull {reference}` fetches it"
    )
    return Located(model=model, notes=(note,))


def _read_url(reference: UrlReference) -> ModelSpec:
    check_online()
    with Http() as http:
        return read_remote(http, url_shards(reference.url, reference.file_name))


def _read_hub(reference: HubReference) -> ModelSpec:
    with Hub() as hub:
        commit = hub.commit(reference)
        variant = choose(reference, hub.files(reference, commit))
        try:
            return read_remote(hub.http, hub_shards(hub, reference, commit, variant))
        except LoadmasterError as error:
            raise hub.refusal(reference, error) from None


def hub_shards(
    hub: Hub, reference: HubReference, commit: str, variant: Variant
) -> tuple[RemoteShard, ...]:
    """Where the files of a variant are."""
    return tuple(
        RemoteShard(
            url=hub.file_url(reference, commit, file.path), name=file.path.rpartition("/")[2]
        )
        for file in variant.files
    )
