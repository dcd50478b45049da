"""What a MODEL argument names: a path, a file of the Hub, a URL, or a model in Ollama's store.

Pure. Everything that later becomes part of a path or a URL passes an allow-list here, and so do the
paths that a server lists (`safe_file_path`): no other code joins a foreign string to a folder.
"""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from loadmaster.errors import UsageError

DEFAULT_REVISION = "main"
MAX_REFERENCE_CHARACTERS = 2048

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_QUANTIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_FILE_PART = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9 ._+,=()\[\]-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_PAGE = re.compile(
    r"/(?P<owner>[^/]+)/(?P<repo>[^/]+)/(?:resolve|blob|raw)/(?P<revision>[^/]+)/(?P<file>.+)"
)
_HUB_HOSTS = frozenset({"huggingface.co", "hf.co"})
_FORMS = "MODEL is a file, `hf:owner/repo:Q4_K_M`, an `https://` URL, `ollama:name:tag` or `demo`"


@dataclass(frozen=True, slots=True, kw_only=True)
class PathReference:
    """A file of this machine, or the bare name of one in a store."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HubReference:
    """A GGUF file of a Hub repository, by its path or by its quantization."""

    owner: str
    repo: str
    file: str | None = None
    quantization: str | None = None
    revision: str = DEFAULT_REVISION

    @property
    def repo_id(self) -> str:
        return f"{self.owner}/{self.repo}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision names one commit for good."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        quantization = f":{self.quantization}" if self.quantization else ""
        revision = f"@{self.revision}" if self.revision != DEFAULT_REVISION else ""
        return f"hf:{self.repo_id}{file}{quantization}{revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlReference:
    """A file anywhere; its query may hold a secret and is never shown."""

    url: str

    @property
    def file_name(self) -> str:
        """The last part of the path where it can be a file's name."""
        last = PurePosixPath(unquote(urlsplit(self.url).path)).name
        return last if _FILE_PART.fullmatch(last) else "model.gguf"

    def __str__(self) -> str:
        return shown_url(self.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaReference:
    """A model that Ollama has pulled."""

    namespace: str
    name: str
    tag: str

    def __str__(self) -> str:
        namespace = "" if self.namespace == "library" else f"{self.namespace}/"
        return f"ollama:{namespace}{self.name}:{self.tag}"


Reference = PathReference | HubReference | UrlReference | OllamaReference


def parse_reference(text: str) -> Reference:
    """Read a MODEL argument.

    Raises:
        UsageError: it has a scheme, and is not written as that scheme wants it.
    """
    if len(text) > MAX_REFERENCE_CHARACTERS or "\0" in text:
        raise UsageError(f"`{_cut(text)}` is not a model", hint=_FORMS)
    scheme, separator, rest = text.partition(":")
    if separator and scheme.lower() == "hf":
        return _hub(text, rest)
    if separator and scheme.lower() == "ollama":
        return _ollama(text, rest)
    if separator and scheme.lower() in ("http", "https") and rest.startswith("//"):
        return _url(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UsageError(f"`{_cut(text)}`: `{scheme}` URLs are not read", hint=_FORMS)
    return PathReference(path=text)


def _cut(text: str) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text[:80])
    return printable + ("…" if len(text) > 80 else "")


def _hub(text: str, rest: str) -> HubReference:
    body, _, revision = rest.partition("@")
    names, _, quantization = body.partition(":")
    owner, _, tail = names.partition("/")
    repo, _, file = tail.partition("/")
    problem = (
        _wrong_repo(owner, repo)
        or ("revision" if "@" in rest and not _is_revision(revision) else None)
        or ("quantization" if ":" in body and not _QUANTIZATION.fullmatch(quantization) else None)
        or ("file" if "/" in tail and not is_safe_file_path(file) else None)
        or ("quantization beside a file" if file and quantization else None)
    )
    if problem:
        raise UsageError(
            f"`{_cut(text)}` is not a Hub reference: wrong {problem}",
            hint="write `hf:owner/repo`, `hf:owner/repo:Q4_K_M`, `hf:owner/repo/file.gguf`, each "
            "with `@revision` if need be",
        )
    return HubReference(
        owner=owner,
        repo=repo,
        file=file or None,
        quantization=quantization or None,
        revision=revision or DEFAULT_REVISION,
    )


def _wrong_repo(owner: str, repo: str) -> str | None:
    for what, name in (("owner", owner), ("repository", repo)):
        # The Hub allows neither; `--` separates owner and repository in its cache.
        if not _NAME.fullmatch(name) or ".." in name or "--" in name:
            return what
    return None


def _is_revision(text: str) -> bool:
    return len(text) <= 128 and ".." not in text and _REVISION.fullmatch(text) is not None


def is_safe_file_path(text: str) -> bool:
    """Whether a repository's path is plain enough to become one of ours, below a folder."""
    parts = text.split("/")
    return len(text) <= 512 and all(_FILE_PART.fullmatch(p) and ".." not in p for p in parts)


def _ollama(text: str, rest: str) -> OllamaReference:
    names, _, tag = rest.partition(":")
    namespace, _, name = names.rpartition("/")
    reference = OllamaReference(namespace=namespace or "library", name=name, tag=tag or "latest")
    parts = (reference.namespace, reference.name, reference.tag)
    if not all(_NAME.fullmatch(part) and ".." not in part for part in parts):
        raise UsageError(
            f"`{_cut(text)}` is not an Ollama model",
            hint="write `ollama:llama3:8b`, as `ollama ls`",
        )
    return reference


def _url(text: str) -> UrlReference | HubReference:
    shown = _cut(text.partition("?")[0])
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"`{shown}` is not a URL", hint="percent-encode spaces and letters")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"`{shown}` is not a URL: {error}", hint=_FORMS) from None
    if not host or parts.path in ("", "/"):
        raise UsageError(f"`{shown}` names no file", hint="give the URL of a .gguf file")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"a URL of {host} has a name or a password in it", hint="put Hub tokens into `HF_TOKEN`"
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise UsageError(f"`{shown}` is not encrypted", hint="write `https://`")
    page = _HUB_PAGE.fullmatch(unquote(parts.path)) if host in _HUB_HOSTS else None
    if page:
        return _hub(shown, f"{page['owner']}/{page['repo']}/{page['file']}@{page['revision']}")
    return UrlReference(url=text.partition("#")[0])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, reached without a network."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def shown_url(url: str) -> str:
    """A URL as messages may show it: without its query, which can be a signature."""
    return url.partition("?")[0].partition("#")[0]
