"""Models of other programs: found by name, used in place, never by a path of their own choosing."""

import json
from pathlib import Path

import pytest

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.model import store
from loadmaster.model.reference import HubReference, OllamaReference
from loadmaster.tasks.locating import locate
from tests import remote_parts as parts

COMMIT = "a" * 40
DIGEST = "b" * 64


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    parts.isolate(monkeypatch, tmp_path)
    return tmp_path


def cached(home: Path, *names: str) -> Path:
    folder = home / "hf" / "hub" / "models--o--r"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "blobs").mkdir(parents=True)
    for name in names:
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / "blobs" / path.name).write_bytes(b"GGUF")
        path.symlink_to(folder / "blobs" / path.name)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def hub(**fields: str) -> HubReference:
    return HubReference(owner="o", repo="r", **fields)


def test_hub_cache_by_revision_quantization_and_file(home: Path) -> None:
    snapshot = cached(home, "m-Q4_K_M.gguf", "sub/m-Q8_0.gguf")
    assert store.find_hub(hub()) == snapshot / "m-Q4_K_M.gguf"
    assert store.find_hub(hub(quantization="q8_0")) == snapshot / "sub/m-Q8_0.gguf"
    assert store.find_hub(hub(file="sub/m-Q8_0.gguf")) == snapshot / "sub/m-Q8_0.gguf"
    assert store.find_hub(hub(revision=COMMIT)) == snapshot / "m-Q4_K_M.gguf"
    assert store.find_hub(hub(quantization="Q2_K")) is None
    assert store.find_hub(hub(revision="v2")) is None


def test_a_link_without_its_blob_and_an_incomplete_split_are_not_there(home: Path) -> None:
    snapshot = cached(home, "m-Q4_0.gguf", "s-Q8_0-00001-of-00002.gguf")
    (home / "hf/hub/models--o--r/blobs/m-Q4_0.gguf").unlink()
    assert snapshot.is_dir()
    assert store.find_hub(hub()) is None


def test_a_reference_file_cannot_lead_elsewhere(home: Path) -> None:
    cached(home, "m-Q4_0.gguf")
    (home / "hf/hub/models--o--r/refs/main").write_text("../../../../etc")
    assert store.find_hub(hub()) is None


def test_lm_studio(home: Path) -> None:
    folder = home / "user/.lmstudio/models/o/r"
    folder.mkdir(parents=True)
    (folder / "m-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert locate("hf:o/r:Q4_K_M") == folder / "m-Q4_K_M.gguf"
    assert locate("m-Q4_K_M.gguf") == folder / "m-Q4_K_M.gguf"


def ollama(home: Path, digest: str) -> None:
    manifest = home / "ollama/manifests/registry.ollama.ai/library/llama3/8b"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "c" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest},
    ]
    manifest.write_text(json.dumps({"layers": layers}))


def test_ollama(home: Path) -> None:
    ollama(home, f"sha256:{DIGEST}")
    blob = home / "ollama/blobs" / f"sha256-{DIGEST}"
    reference = OllamaReference(namespace="library", name="llama3", tag="8b")
    assert store.find_ollama(reference) is None
    blob.parent.mkdir()
    blob.write_bytes(b"GGUF")
    assert store.find_ollama(reference) == blob
    with pytest.raises(NotFoundError) as caught:
        locate("ollama:llama3")
    assert "`ollama:llama3:8b`" in (caught.value.hint or "")


@pytest.mark.parametrize("digest", ["sha256:../../x", "sha256:" + "b" * 63, "md5:" + "b" * 64, "7"])
def test_an_ollama_digest_is_a_digest(home: Path, digest: str) -> None:
    ollama(home, digest)
    (home / "x").write_bytes(b"GGUF")
    assert store.find_ollama(OllamaReference(namespace="library", name="llama3", tag="8b")) is None


def test_a_name_that_two_files_have_asks_for_a_path(home: Path) -> None:
    cached(home, "m-Q4_0.gguf")
    folder = home / "user/.lmstudio/models/o/r"
    folder.mkdir(parents=True)
    (folder / "m-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="2 files"):
        locate("m-Q4_0.gguf")


def test_what_is_not_here_gets_the_command_that_fetches_it() -> None:
    with pytest.raises(NotFoundError) as caught:
        locate("hf:o/r:Q4_K_M")
    assert caught.value.hint == "`loadmaster pull hf:o/r:Q4_K_M`"
    with pytest.raises(NotFoundError) as caught:
        locate("o/r:Q4_K_M")
    assert "`hf:o/r:Q4_K_M`" in (caught.value.hint or "")
