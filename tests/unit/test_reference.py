"""MODEL arguments: what they name, and what is refused before it becomes a path or a URL."""

import pytest

from loadmaster.errors import UsageError
from loadmaster.model.reference import (
    HubReference,
    OllamaReference,
    PathReference,
    UrlReference,
    is_safe_file_path,
    parse_reference,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m.gguf", PathReference(path="m.gguf")),
        ("/a b/m.gguf", PathReference(path="/a b/m.gguf")),
        ("hf:o/r", HubReference(owner="o", repo="r")),
        ("hf:o/r:Q4_K_M", HubReference(owner="o", repo="r", quantization="Q4_K_M")),
        ("hf:o/r@v1.0", HubReference(owner="o", repo="r", revision="v1.0")),
        (
            "hf:o/r:q8_0@refs/pr/1",
            HubReference(owner="o", repo="r", quantization="q8_0", revision="refs/pr/1"),
        ),
        ("hf:o/r/sub/m.gguf", HubReference(owner="o", repo="r", file="sub/m.gguf")),
        (
            "https://huggingface.co/o/r/resolve/main/sub/m%20x.gguf?download=true",
            HubReference(owner="o", repo="r", file="sub/m x.gguf"),
        ),
        (
            "https://hf.co/o/r/blob/v2/m.gguf",
            HubReference(owner="o", repo="r", file="m.gguf", revision="v2"),
        ),
        ("https://x.org/a/m.gguf?sig=1", UrlReference(url="https://x.org/a/m.gguf?sig=1")),
        ("http://127.0.0.1:8000/m.gguf", UrlReference(url="http://127.0.0.1:8000/m.gguf")),
        ("http://[::1]/m.gguf#part", UrlReference(url="http://[::1]/m.gguf")),
        ("ollama:llama3:8b", OllamaReference(namespace="library", name="llama3", tag="8b")),
        ("ollama:me/x", OllamaReference(namespace="me", name="x", tag="latest")),
    ],
)
def test_reads(text: str, expected: object) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf:", "hf:o", "hf:o/", "hf:../r", "hf:o/..", "hf:o/r--x", "hf:o/r:", "hf:o/r@",
        "hf:o/r@../x", "hf:o/r@a//b", "hf:o/r:Q4/../..", "hf:o/r/../m.gguf", "hf:o/r/m.gguf:Q4_0",
        "hf:o/r/%2e%2e/m.gguf", "hf:o/r/a\\b.gguf", "hf:o/r/.hidden", "hf:ö/r", "hf:o/r\n",
        "ollama:", "ollama:../x", "ollama:a/b/c", "ollama:x:../../y",
        "http://example.org/m.gguf", "https://", "https://x.org", "https://u:p@x.org/m.gguf",
        "https://x.org/m .gguf", "https://x.org:port/m.gguf", "https://[x/m.gguf",
        "ftp://x.org/m.gguf", "file:///etc/passwd", "a\0b", "x" * 3000,
        "https://huggingface.co/o/r/resolve/main/../../x.gguf",
    ],
)  # fmt: skip
def test_refuses_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert caught.value.hint
    assert "u:p" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["hf:o/r", "hf:o/r:Q4_K_M", "hf:o/r/a/m.gguf@v1", "ollama:llama3:8b", "ollama:me/x:1"]
)
def test_prints_what_it_read(text: str) -> None:
    assert str(parse_reference(text)) == text


def test_a_secret_in_a_query_is_not_printed() -> None:
    reference = parse_reference("https://x.org/m.gguf?X-Signature=secret")
    assert str(reference) == "https://x.org/m.gguf"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://x.org/a/m.gguf?x", "m.gguf"),
        ("https://x.org/a/%2e%2e", "model.gguf"),
        ("https://x.org/a%2f..%2fetc", "etc"),
        ("https://x.org/a/", "a"),
        ("https://x.org/a/%00", "model.gguf"),
    ],
)
def test_file_name_of_a_url(url: str, name: str) -> None:
    assert UrlReference(url=url).file_name == name


@pytest.mark.parametrize(
    "path", ["../a", "a/../b", "/a", "a//b", "a/", "", ".a", "a\0", "a\\b", "~a"]
)
def test_unsafe_file_paths(path: str) -> None:
    assert not is_safe_file_path(path)
