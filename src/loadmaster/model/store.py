"""Models that other programs have downloaded, found and used where they are.

The Hub's cache (also ours: `pull` writes it), Ollama's blobs and LM Studio's folder. Nothing is
copied, moved or written here. What a manifest says becomes a path only as a sha256.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from loadmaster.model.hf_source import is_checkpoint
from loadmaster.model.hub import hub_home
from loadmaster.model.reference import HubReference, OllamaReference, UrlReference
from loadmaster.model.variants import RepoFile, Variant, choose, variants_of
from loadmaster.settings import HF_HUB_CACHE, OLLAMA_MODELS, cache_folder

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_ENTRIES = 20_000  # of a store, before the search for a bare name gives up


def hub_cache() -> Path:
    """The Hub's cache, by the same variables as its own client."""
    if HF_HUB_CACHE.value:
        return Path(HF_HUB_CACHE.value).expanduser()
    return hub_home() / "hub"


def repo_folder(reference: HubReference) -> Path:
    """A repository's folder in the cache; it may not exist."""
    return hub_cache() / f"models--{reference.owner}--{reference.repo}"


def find_hub(reference: HubReference) -> Path | None:
    """The first shard of what a reference means, when all of it is in the Hub's cache.

    Raises:
        UsageError: the snapshot has several models, and the reference does not say which.
    """
    for snapshot in _snapshots(reference):
        files = tuple(_files_of(snapshot))
        if any(_means(reference, one) for one in variants_of(files)):
            return snapshot / choose(reference, files).files[0].path
    return _find_lm_studio(reference)


def find_checkpoint(reference: HubReference) -> Path | None:
    """The folder of a repository's safetensors, when the Hub's cache has them."""
    for snapshot in _snapshots(reference):
        if is_checkpoint(snapshot):
            return snapshot
    return None


def _means(reference: HubReference, variant: Variant) -> bool:
    if reference.file is not None:
        return any(file.path == reference.file for file in variant.files)
    if reference.quantization is not None:
        return variant.label.removeprefix("UD-") == reference.quantization.upper().removeprefix(
            "UD-"
        )
    return True


def _snapshots(reference: HubReference) -> Iterator[Path]:
    folder = repo_folder(reference)
    commit = reference.revision if reference.is_commit else _read_ref(folder, reference.revision)
    if commit is not None and (folder / "snapshots" / commit).is_dir():
        yield folder / "snapshots" / commit


def _read_ref(folder: Path, revision: str) -> str | None:
    try:
        commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _files_of(snapshot: Path) -> Iterator[RepoFile]:
    for path in _ggufs_below(snapshot):
        yield RepoFile(
            path=path.relative_to(snapshot).as_posix(), size_bytes=path.stat().st_size, sha256=None
        )


def _ggufs_below(folder: Path) -> Iterator[Path]:
    """GGUF files that are there, in a fixed order; a link to a missing blob is none."""
    seen = 0
    for parent, folders, names in os.walk(folder):
        folders.sort()
        seen += len(names) + len(folders)
        if seen > _MAX_ENTRIES:
            return
        for name in sorted(names):
            path = Path(parent) / name
            if name.endswith(".gguf") and path.is_file():
                yield path


def lm_studio_folders() -> tuple[Path, ...]:
    """Where LM Studio keeps models, now and in its older versions."""
    homes = [Path.home() / ".lmstudio", Path.home() / ".cache" / "lm-studio"]
    pointer = Path.home() / ".lmstudio-home-pointer"
    with suppress(OSError, UnicodeDecodeError):
        homes.insert(0, Path(pointer.read_text(encoding="utf-8").strip()))
    return tuple(dict.fromkeys(home / "models" for home in homes if home.is_absolute()))


def _find_lm_studio(reference: HubReference) -> Path | None:
    """LM Studio names folders like the Hub, and keeps no revision: only the default one is it."""
    if reference.revision != "main":
        return None
    for folder in lm_studio_folders():
        repo = folder / reference.owner / reference.repo
        files = tuple(_files_of(repo)) if repo.is_dir() else ()
        if any(_means(reference, one) for one in variants_of(files)):
            return repo / choose(reference, files).files[0].path
    return None


def ollama_folders() -> tuple[Path, ...]:
    """Where Ollama keeps models: the user's, and those of its system services."""
    if OLLAMA_MODELS.value:
        return (Path(OLLAMA_MODELS.value).expanduser(),)
    return (
        Path.home() / ".ollama" / "models",
        Path("/usr/share/ollama/.ollama/models"),
        Path("/var/lib/ollama/.ollama/models"),
    )


def find_ollama(reference: OllamaReference) -> Path | None:
    """The blob with the weights of a model that Ollama has pulled."""
    for folder in ollama_folders():
        registry = folder / "manifests" / "registry.ollama.ai"
        manifest = registry / reference.namespace / reference.name / reference.tag
        digest = _model_digest(manifest)
        if digest is not None:
            blob = folder / "blobs" / f"sha256-{digest}"
            if blob.is_file():
                return blob
    return None


def _model_digest(manifest: Path) -> str | None:
    try:
        with manifest.open("rb") as file:
            document = json.loads(file.read(_MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    layers = document.get("layers") if isinstance(document, dict) else None
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict) and layer.get("mediaType") == _OLLAMA_MODEL:
            match = _DIGEST.fullmatch(str(layer.get("digest")))
            return match[1] if match else None
    return None


def ollama_names() -> tuple[str, ...]:
    """Every model of Ollama's, as it is to be typed."""
    names = []
    for folder in ollama_folders():
        registry = folder / "manifests" / "registry.ollama.ai"
        for path in sorted(registry.glob("*/*/*")):
            namespace, name, tag = path.parts[-3:]
            names.append(str(OllamaReference(namespace=namespace, name=name, tag=tag)))
    return tuple(dict.fromkeys(names))


def find_named(name: str) -> tuple[Path, ...]:
    """Files of any store that have this very name; several copies of one blob count once."""
    folders = (hub_cache(), *lm_studio_folders(), download_folder())
    found = (path for folder in folders for path in _ggufs_below(folder) if path.name == name)
    return _distinct(found)


def _distinct(paths: Iterable[Path]) -> tuple[Path, ...]:
    by_file: dict[Path, Path] = {}
    for path in paths:
        by_file.setdefault(path.resolve(), path)
    return tuple(by_file.values())


def download_folder() -> Path:
    """Where `pull` puts files of plain URLs."""
    return cache_folder() / "downloads"


def url_file(reference: UrlReference) -> Path:
    """Where `pull` puts the file of a URL. The query counts, and shows nowhere."""
    key = hashlib.sha256(reference.url.encode()).hexdigest()[:16]
    return download_folder() / key / reference.file_name
