"""From a MODEL argument to a file: here, in a store, or elsewhere and known by its header."""

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadmaster.errors import DamagedFileError, LoadmasterError, NotFoundError, UsageError
from loadmaster.model import store
from loadmaster.model.checkpoint import AnyModel, CheckpointSpec
from loadmaster.model.hf_config import CONFIG
from loadmaster.model.hf_pooling import POOLING
from loadmaster.model.hf_remote import RemoteCheckpoint, has_checkpoint, read_remote_checkpoint
from loadmaster.model.hf_source import is_checkpoint, read_checkpoint
from loadmaster.model.hf_vocabulary import TOKENIZER
from loadmaster.model.http import Http
from loadmaster.model.hub import Hub, check_online
from loadmaster.model.reference import (
    HubReference,
    OllamaReference,
    PathReference,
    Reference,
    UrlReference,
    is_safe_file_path,
    parse_reference,
)
from loadmaster.model.remote import RemoteShard, is_skeleton, read_remote, url_shards
from loadmaster.model.shapes.checkpoints import QUANTIZATIONS, shape_checkpoint
from loadmaster.model.shapes.library import (
    ShapeReference,
    is_shape,
    load_shape,
    parse_shape,
    shape_model,
)
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.model.variants import RepoFile, Variant, choose, variants_of
from loadmaster.plan.types import Quantize
from loadmaster.tasks.planning import DEMO, model_path
from loadmaster.units import format_size

_LIKE_A_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
SHAPE_NOTE = "a shape: dimensions of the published checkpoint, typed as llama-quantize does"
CHECKPOINT_NOTE = "a shape: dimensions of the published checkpoint, BF16 before it is quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A model's header, and what a person should know about where it is from."""

    model: AnyModel
    notes: tuple[str, ...] = ()
    quantize: Quantize | None = None  # of a shape that names it

    @property
    def gguf(self) -> ModelSpec:
        """The model, where it cannot be a checkpoint."""
        assert isinstance(self.model, ModelSpec)
        return self.model


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


def locate_model(name: str, quantize: Quantize | None = None) -> Located:
    """The header of a MODEL argument whose files are here; no network.

    With `quantize` a checkpoint is meant wherever there is a GGUF too.

    Raises:
        LoadmasterError: it is not here, or cannot be read.
    """
    if name != DEMO and not is_shape(name):
        reference = parse_reference(name)
        if isinstance(reference, HubReference) and _names_no_gguf(reference):
            folder = store.find_checkpoint(reference)
            if folder is not None and (quantize is not None or _find(reference) is None):
                return _local(folder)
            if quantize is not None and _find(reference) is None:
                raise _not_here(reference, " --safetensors")
    return _local(locate(name))


def locate_header(name: str, quantize: Quantize | None = None) -> Located:
    """The header of a MODEL argument, over the network where the file is not here.

    With `quantize` a checkpoint is meant wherever there is a GGUF too.

    Raises:
        LoadmasterError: it cannot be found or read.
    """
    if name == DEMO:
        return Located(model=read_model(model_path(name)))
    if is_shape(name):
        return _shape(parse_shape(name), quantize)
    reference = parse_reference(name)
    if quantize is not None and isinstance(reference, HubReference) and _names_no_gguf(reference):
        folder = store.find_checkpoint(reference)
        return _local(folder) if folder else _remote(reference, checkpoint=True)
    path = _find(reference)
    if path is None and isinstance(reference, HubReference) and _names_no_gguf(reference):
        path = store.find_checkpoint(reference)
    if path is not None:
        return _local(path)
    if isinstance(reference, HubReference | UrlReference):
        return _remote(reference)
    raise _not_here(reference)


def _names_no_gguf(reference: HubReference) -> bool:
    """Whether safetensors of the repository may be what is meant."""
    file = reference.file or ""
    return reference.quantization is None and not file.lower().endswith(".gguf")


def _local(path: Path) -> Located:
    model = read_local(path)
    if isinstance(model, CheckpointSpec) and not (model.folder / TOKENIZER).is_file():
        return Located(model=model, notes=(f"{TOKENIZER} is missing: it runs when that is there",))
    return Located(model=model)


def read_local(path: Path) -> AnyModel:
    """The header of a model's file or folder."""
    no_gguf = path.is_dir() and not any(path.glob("*.gguf"))
    return read_checkpoint(path) if no_gguf or is_checkpoint(path) else read_model(path)


def _shape(reference: ShapeReference, quantize: Quantize | None) -> Located:
    """As a GGUF, or as a checkpoint where a quantization of those is named."""
    label = (reference.quantization or quantize or "").lower()
    if label.upper() not in QUANTIZATIONS:
        return Located(model=shape_model(reference), notes=(SHAPE_NOTE,))
    if quantize is not None and label != quantize:
        raise UsageError(
            f"`{reference}` and `--quantize {quantize}` are two quantizations",
            hint=f"`{reference}` alone, or `shape:{reference.name} --quantize {quantize}`",
        )
    model = shape_checkpoint(load_shape(reference.name))
    return Located(model=model, notes=(CHECKPOINT_NOTE,), quantize=_QUANTIZE[label])


_QUANTIZE: Mapping[str, Quantize] = {
    "none": "none", "int8": "int8", "fp8": "fp8", "nf4": "nf4", "fp4": "fp4",
}  # fmt: skip


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
        name = path.parent.name if path.name == CONFIG else path.name
        raise NotFoundError(
            f"`{name}` was planned from its header alone: its weights are not on this machine",
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


def _not_here(reference: Reference, which: str = "") -> NotFoundError:
    """`which`: the flag of `pull` for one of several forms."""
    match reference:
        case PathReference(path=name):
            hint = "give a GGUF file or a folder of safetensors, or `demo` for the packaged model"
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
        f"`{reference}` is not on this machine", hint=f"`loadmaster pull {reference}{which}`"
    )


def _remote(reference: HubReference | UrlReference, *, checkpoint: bool = False) -> Located:
    try:
        model: AnyModel
        if isinstance(reference, HubReference):
            model = _read_hub(reference, checkpoint=checkpoint)
        else:
            model = _read_url(reference)
    except DamagedFileError as error:
        if error.code == "header_too_large":
            error.hint = f"`loadmaster pull {reference}`, then plan it from the disk"
        raise
    fetch = f"loadmaster pull {reference}"
    if isinstance(model, CheckpointSpec) and isinstance(reference, HubReference):
        fetch += " --safetensors"
    note = (
        f"not downloaded: planned from {format_size(model.header_bytes)} read of "
        f"{format_size(model.file_bytes)}; `{fetch}` fetches it"
    )
    return Located(model=model, notes=(note,))


def _read_url(reference: UrlReference) -> ModelSpec:
    check_online()
    with Http() as http:
        return read_remote(http, url_shards(reference.url, reference.file_name))


def _read_hub(reference: HubReference, *, checkpoint: bool) -> AnyModel:
    with Hub() as hub:
        commit = hub.commit(reference)
        files = hub.files(reference, commit)
        try:
            if checkpoint or _is_checkpoint_repository(reference, files):
                return read_remote_checkpoint(
                    hub.http, hub_checkpoint(hub, reference, commit, files)
                )
            variant = choose(reference, files)
            return read_remote(hub.http, hub_shards(hub, reference, commit, variant))
        except LoadmasterError as error:
            raise hub.refusal(reference, error) from None


def _is_checkpoint_repository(reference: HubReference, files: Sequence[RepoFile]) -> bool:
    """Safetensors and no GGUF, and none was asked for."""
    named = reference.file is not None or reference.quantization is not None
    return not named and not variants_of(files) and has_checkpoint(files)


def hub_checkpoint(
    hub: Hub, reference: HubReference, commit: str, files: Sequence[RepoFile]
) -> RemoteCheckpoint:
    """Where a checkpoint's files are: those at the top of the repository, and how it pools."""
    return RemoteCheckpoint(
        name=reference.repo,
        commit=commit,
        urls={
            file.path: hub.file_url(reference, commit, file.path)
            for file in files
            if file.path == POOLING or ("/" not in file.path and is_safe_file_path(file.path))
        },
    )


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
