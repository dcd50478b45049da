"""The Hub's API: which commit a revision is, which files it has, where each is to be fetched."""

import difflib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from loadmaster.errors import AuthError, LoadmasterError, NetworkError, NotFoundError, UsageError
from loadmaster.model.http import Http, Patience, Token, origin_of
from loadmaster.model.reference import HubReference, is_loopback
from loadmaster.model.variants import RepoFile
from loadmaster.settings import (
    HF_ENDPOINT,
    HF_HOME,
    HF_HUB_OFFLINE,
    HF_TOKEN,
    HF_TOKEN_PATH,
    XDG_CACHE_HOME,
)

DEFAULT_ENDPOINT = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[\x21-\x7e]{1,512}")
_NEXT = re.compile(r'<([^>]{1,2048})>;\s*rel="next"')
_MAX_PAGES = 20
_TRUE = frozenset({"1", "on", "yes", "true"})


def endpoint() -> str:
    """The Hub's address, without a slash at its end.

    Raises:
        UsageError: `HF_ENDPOINT` is not an encrypted address.
    """
    text = (HF_ENDPOINT.value or DEFAULT_ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host, parts = "", urlsplit("")
    if not host or (parts.scheme != "https" and not is_loopback(host)) or "@" in parts.netloc:
        raise UsageError(
            "`HF_ENDPOINT` is not an `https://` address",
            hint=f"unset it for {DEFAULT_ENDPOINT}",
        )
    return text


def check_online() -> None:
    """Refuse the network where the user has.

    Raises:
        NetworkError: `HF_HUB_OFFLINE` is set.
    """
    if (HF_HUB_OFFLINE.value or "").lower() in _TRUE:
        raise NetworkError(
            "`HF_HUB_OFFLINE` is set, and the model is not on this machine",
            hint="unset `HF_HUB_OFFLINE`",
        )


def hub_home() -> Path:
    """The folder of the Hub's client: its token and its cache."""
    if HF_HOME.value:
        return Path(HF_HOME.value).expanduser()
    return Path(XDG_CACHE_HOME.value or "~/.cache").expanduser() / "huggingface"


def find_token() -> str | None:
    """The user's token: `HF_TOKEN`, else what `hf auth login` wrote."""
    text = HF_TOKEN.value
    if text is None:
        path = Path(HF_TOKEN_PATH.value).expanduser() if HF_TOKEN_PATH.value else None
        with suppress(OSError, UnicodeDecodeError):
            text = (path or hub_home() / "token").read_text(encoding="utf-8")
    text = (text or "").strip()
    return text if _TOKEN.fullmatch(text) else None


class Hub:
    """One endpoint, with the user's token for it. Close it, or use it as a context manager."""

    def __init__(self, patience: Patience | None = None) -> None:
        check_online()
        self.endpoint = endpoint()
        value = find_token()
        self._has_token = value is not None
        token = Token(origin=origin_of(self.endpoint), value=value) if value else None
        self.http = Http(token, patience=patience)

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def commit(self, reference: HubReference) -> str:
        """The commit that the reference's revision is now.

        Raises:
            NotFoundError: no such repository or revision; the nearest are named.
            AuthError: it is gated, or private.
        """
        revision = quote(reference.revision, safe="")
        url = f"{self.endpoint}/api/models/{reference.repo_id}/revision/{revision}"
        document = self._json(url, reference)
        commit = document.get("sha") if isinstance(document, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise _not_the_hub(self.endpoint)
        return commit

    def files(self, reference: HubReference, commit: str) -> tuple[RepoFile, ...]:
        """All files of a commit."""
        url = f"{self.endpoint}/api/models/{reference.repo_id}/tree/{commit}?recursive=true"
        files: list[RepoFile] = []
        for _ in range(_MAX_PAGES):
            page, headers = self._page(url, reference)
            if not isinstance(page, list):
                raise _not_the_hub(self.endpoint)
            files += [file for file in map(_repo_file, page) if file is not None]
            following = _NEXT.search(headers.get("link", ""))
            if following is None:
                break
            url = urljoin(url, following[1])
            if origin_of(url) != origin_of(self.endpoint):
                raise _not_the_hub(self.endpoint)
        return tuple(files)

    def file_url(self, reference: HubReference, commit: str, path: str) -> str:
        """Where a file's bytes are."""
        return f"{self.endpoint}/{reference.repo_id}/resolve/{commit}/{quote(path)}"

    def _json(self, url: str, reference: HubReference) -> Any:
        return self._page(url, reference)[0]

    def _page(self, url: str, reference: HubReference) -> tuple[Any, Mapping[str, str]]:
        try:
            return self.http.json(url)
        except (AuthError, NotFoundError) as error:
            raise self.refusal(reference, error) from None

    def refusal(self, reference: HubReference, error: LoadmasterError) -> LoadmasterError:
        """Why the Hub refuses a repository, and what to type next; other errors as they are."""
        if not isinstance(error, AuthError | NotFoundError):
            return error
        code = error.numbers.get("reason")
        if code is None and error.numbers.get("status") == 404:
            code = "RepoNotFound"
        page = f"{self.endpoint}/{reference.repo_id}"
        if code == "RevisionNotFound":
            near = self._near_revisions(reference)
            return NotFoundError(
                f"`{reference.repo_id}` has no revision `{reference.revision}`",
                hint=f"it has {', '.join(near)}" if near else "leave `@revision` out for `main`",
            )
        if code == "GatedRepo":
            login = "" if self._has_token else ", then `hf auth login` or set `HF_TOKEN`"
            return AuthError(
                f"`{reference.repo_id}` is gated: its owner must grant access",
                hint=f"accept its terms at {page}{login}",
            )
        if code == "RepoNotFound":
            near = self._near_repositories(reference)
            hint = f"nearest: {', '.join(near)}" if near else f"look at {page}"
            if not self._has_token:
                hint += "; if it is private: `hf auth login`"
            return NotFoundError(f"the Hub has no `{reference.repo_id}`", hint=hint)
        return AuthError(
            f"the Hub refuses access to `{reference.repo_id}`",
            hint="`hf auth login` again: the token is refused or lacks the right to read it"
            if self._has_token
            else "`hf auth login`, or set `HF_TOKEN`",
        )

    def _near_repositories(self, reference: HubReference) -> list[str]:
        url = f"{self.endpoint}/api/models?limit=20&search={quote(reference.repo)}"
        found = self._names(url, "id")
        close = difflib.get_close_matches(reference.repo_id, found, n=3, cutoff=0.3)
        return [f"`hf:{name}`" for name in close or found[:3]]

    def _near_revisions(self, reference: HubReference) -> list[str]:
        url = f"{self.endpoint}/api/models/{reference.repo_id}/refs"
        names = self._names(url, "name")
        close = difflib.get_close_matches(reference.revision, names, n=3, cutoff=0.3)
        return [f"`{name}`" for name in close or names[:5]]

    def _names(self, url: str, key: str) -> list[str]:
        """Names for a hint: whatever goes wrong here, the error it belongs to matters more."""
        try:
            document, _ = self.http.json(url)
        except LoadmasterError:
            return []
        lists = document.values() if isinstance(document, dict) else [document]
        rows = [row for one in lists if isinstance(one, list) for row in one]
        names = [row.get(key) for row in rows if isinstance(row, dict)]
        return [name for name in names if isinstance(name, str) and name.isprintable()][:200]


def _repo_file(row: object) -> RepoFile | None:
    if not isinstance(row, dict) or row.get("type") != "file":
        return None
    path, size = row.get("path"), row.get("size")
    large = row.get("lfs")
    sha256 = large.get("oid") if isinstance(large, dict) else None
    if not isinstance(path, str) or not isinstance(size, int) or size < 0:
        return None
    is_hash = isinstance(sha256, str) and _SHA256.fullmatch(sha256)
    return RepoFile(path=path, size_bytes=size, sha256=str(sha256) if is_hash else None)


def _not_the_hub(address: str) -> NetworkError:
    return NetworkError(f"{address} does not answer as the Hub does", hint="check `HF_ENDPOINT`")
