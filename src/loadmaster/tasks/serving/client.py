"""Asking a server that runs: what `ps`, `stop` and `launch` need of it, wherever it listens."""

import json
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from loadmaster.errors import LoadmasterError, NetworkError, NotFoundError, UsageError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8765
DEFAULT_URL = f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"
TIMEOUT_S = 60.0  # an unload lets requests end first
LOOK_TIMEOUT_S = 5.0  # a list is there at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a server listens, and the key for it."""

    url: str = DEFAULT_URL
    key: str | None = None

    def models(self) -> list[dict[str, Any]]:
        """What `ps` shows: the rows of models that are more than offers.

        Raises:
            NotFoundError: no server listens there.
        """
        rows = self._ask("GET", "/loadmaster/v1/models").get("models")
        return rows if isinstance(rows, list) else []

    def offers(self) -> list[dict[str, Any]]:
        """The models that may be asked for, as `/v1/models` lists them."""
        rows = self._ask("GET", "/v1/models", timeout_s=LOOK_TIMEOUT_S).get("data")
        return rows if isinstance(rows, list) else []

    def stop(self, model: str) -> bool:
        """Unload a model; False when it was not loaded."""
        answer = self._ask("POST", "/models/unload", {"model": model})
        return bool(answer.get("was_loaded"))

    def _ask(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"`{self.url}` is no address of a server", hint=f"`{DEFAULT_URL}`")
        connection = HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            status, raw = response.status, response.read()
        except ConnectionRefusedError:
            raise NotFoundError(
                f"no server listens at {self.url}",
                hint="`loadmaster serve` starts one; `--url` names another",
            ) from None
        except (OSError, HTTPException) as error:
            raise NetworkError(f"the server at {self.url} does not answer: {error}") from None
        finally:
            connection.close()
        return _answer(self.url, status, raw)


def _answer(url: str, status: int, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise NetworkError(f"what listens at {url} is no loadmaster server")
    if status < 400:
        return value
    error = value.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    refused = LoadmasterError(f"the server refused: {message or status}")
    refused.exit_code = {401: 5, 403: 5, 404: 4, 429: 9}.get(status, 1)
    raise refused
