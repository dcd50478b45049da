"""What `GET /` says: one screen for whoever opens the address in a browser, a line for programs."""

import html
import json
from collections.abc import Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response

from loadmaster import __version__

_MOST_MODELS = 12
_LINKS = {
    "/v1/models": "the models, as OpenAI's clients read them",
    "/loadmaster/v1/models": "what is loaded and what it is doing",
    "/loadmaster/v1/memory": "memory, planned and measured",
    "/metrics": "figures for Prometheus",
    "/openapi.json": "every route",
}
# No script, no style, nothing from elsewhere: the browser's own colours, light or dark.
_HEADERS = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def front_page(request: Request, models: Mapping[str, str]) -> Response:
    """HTML where it is asked for; `models` are ids and states, in the order of the offer."""
    running = f"loadmaster {__version__} is running"
    if "text/html" not in request.headers.get("accept", ""):
        return Response(f"{running}\n", media_type="text/plain")
    url = f"http://{request.headers.get('host', '127.0.0.1')}"
    return Response(_page(running, url, models), media_type="text/html", headers=_HEADERS)


def _page(running: str, url: str, models: Mapping[str, str]) -> str:
    first = next(iter(models), "demo")
    body = {"model": first, "messages": [{"role": "user", "content": "What is a list?"}]}
    parts = [
        f"<h1>{running}</h1>",
        "<p>This is a server for programs: there is nothing to type here.</p>",
        "<h2>Models</h2>",
        _list([f"<code>{html.escape(name)}</code>: {state}" for name, state in _shown(models)]),
        "<h2>Where clients point</h2>",
        _list(
            [
                f"OpenAI: <code>{html.escape(url)}/v1</code>",
                f"Anthropic and Ollama: <code>{html.escape(url)}</code>",
            ]
        ),
        f"<pre>{html.escape(f'curl {url}/v1/chat/completions -d {_quoted(body)}')}</pre>",
        "<p><code>loadmaster launch continue</code> (or <code>opencode</code>, "
        "<code>openwebui</code>) prints a client's configuration, <code>loadmaster ps</code> shows "
        "what is loaded.</p>",
        "<h2>To read</h2>",
        _list([f'<a href="{path}">{path}</a>: {text}' for path, text in _LINKS.items()]),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>loadmaster</title>'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width"></head><body><main>'
    )
    return head + "\n".join(parts) + "</main></body></html>\n"


def _shown(models: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    shown = list(models.items())[:_MOST_MODELS]
    return [*shown, ("…", f"{len(models)} in all")] if len(models) > _MOST_MODELS else shown


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _quoted(body: object) -> str:
    """JSON as one word of a shell."""
    return "'" + json.dumps(body, ensure_ascii=False).replace("'", "'\\''") + "'"
