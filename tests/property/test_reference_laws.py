"""Whatever a MODEL argument is: an answer or a refusal, and never a path out of its folder."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.errors import LoadmasterError
from loadmaster.model.reference import (
    HubReference,
    OllamaReference,
    UrlReference,
    is_safe_file_path,
    parse_reference,
)

_PIECES = st.sampled_from(
    ["hf:", "ollama:", "https://", "http://localhost", "/", "..", ".", ":", "@", "%2e", "\\", "\0",
     "~", "a", "Q4_K_M", "main", "x.org", "m.gguf", "--", " ", "ü", "#", "?", "//"]
)  # fmt: skip
_TEXTS = st.one_of(st.text(max_size=60), st.lists(_PIECES, max_size=12).map("".join))
_ROOT = Path("/cache")


def inside(*parts: str) -> bool:
    path = Path(*map(str, (_ROOT, *parts)))
    return ".." not in path.parts and _ROOT in path.parents and "\0" not in str(path)


@given(_TEXTS)
def test_a_reference_stays_in_its_folder(text: str) -> None:
    try:
        reference = parse_reference(text)
    except LoadmasterError:
        return
    match reference:
        case HubReference():
            assert inside(
                f"models--{reference.owner}--{reference.repo}", "refs", reference.revision
            )
            assert reference.file is None or inside("snapshots", reference.file)
            assert parse_reference(str(reference)) == reference
        case OllamaReference():
            assert inside(reference.namespace, reference.name, reference.tag)
        case UrlReference():
            assert inside("downloads", reference.file_name)
            assert "/" not in reference.file_name


@given(_TEXTS)
def test_a_safe_file_path_stays_below_its_folder(text: str) -> None:
    if is_safe_file_path(text):
        assert inside(text)
        assert not text.startswith("/")
