"""The engine that is a Python environment: found without being imported, refused with a command."""

import subprocess
import sys
from importlib import metadata

import pytest

from loadmaster.engine.python_build import find_python_build
from loadmaster.errors import EngineMissingError


def versions(monkeypatch: pytest.MonkeyPatch, **known: str | None) -> None:
    real = metadata.version

    def version(package: str) -> str:
        found = known.get(package, real(package))
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)


def test_it_names_its_versions() -> None:
    build = find_python_build()
    assert build.id.startswith("transformers-5.")
    assert "bitsandbytes" in build.version
    assert build.target in ("cpu", "cuda", "rocm")


def test_without_the_extra_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, torch=None)
    with pytest.raises(EngineMissingError, match="`torch`, which is not installed") as refusal:
        find_python_build()
    assert 'pip install "loadmaster[hf]"' in str(refusal.value.hint)


def test_versions_with_known_holes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, transformers="4.57.1")
    with pytest.raises(EngineMissingError, match=r"4\.57\.1, 5\.23 or newer"):
        find_python_build()


def test_a_local_build_counts_as_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, torch="2.13.0+cpu", accelerate="1.15.0rc1")
    assert "torch 2.13.0+cpu" in find_python_build().version


def test_looking_for_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from loadmaster.engine.python_build import find_python_build as f; f();"
        "import loadmaster.interfaces.cli.main;"
        "print([m for m in ('torch', 'transformers', 'bitsandbytes', 'tokenizers', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
