"""How programs are told of a server: text for their own configuration files. Pure.

The forms are those of Continue's `config.yaml`, opencode's `opencode.json` and Open WebUI's
environment, as their documentation has them in November 2026.
"""

import json
from dataclasses import dataclass

CLIENTS = ("continue", "openwebui", "opencode")
_KEY = "loadmaster"  # a key has to be named; without `--api-key-file` the server reads none
# Continue takes ids that begin so for chat models, and sends no completions to them.
_CHAT_ONLY = ("gpt", "o")
_FIM_FAMILIES = (
    "codestral", "qwen", "starcoder", "codegemma", "deepseek", "granite", "codellama",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A piece of a configuration, where it goes, and what to know of it."""

    place: str
    text: str
    notes: tuple[str, ...] = ()


def configuration(
    client: str,
    *,
    url: str,
    model: str,
    autocomplete: str | None = None,
    embed: str | None = None,
    rerank: str | None = None,
) -> Configuration:
    """The configuration of one of `CLIENTS`."""
    if client == "continue":
        roles = {"autocomplete": autocomplete, "embed": embed, "rerank": rerank}
        return _continue(url, model, {role: name for role, name in roles.items() if name})
    if client == "opencode":
        return _opencode(url, model)
    return _openwebui(url)


def _continue(url: str, model: str, roles: dict[str, str]) -> Configuration:
    entries = [_continue_model(url, model, ("chat", "edit", "apply"))]
    entries += [_continue_model(url, name, (role,)) for role, name in roles.items()]
    head = "name: loadmaster\nversion: 1.0.0\nschema: v1\nmodels:\n"
    return Configuration(
        place="~/.continue/config.yaml",
        text=head + "\n".join(entries),
        notes=tuple(_autocomplete_notes(roles.get("autocomplete"))),
    )


def _continue_model(url: str, model: str, roles: tuple[str, ...]) -> str:
    lines = [
        f"  - name: {json.dumps(model)}",
        "    provider: openai",
        f"    model: {json.dumps(model)}",
        f"    apiBase: {url}/v1/",
        f"    apiKey: {_KEY}",
        f"    roles: [{', '.join(roles)}]",
    ]
    return "\n".join(lines)


def _autocomplete_notes(model: str | None) -> list[str]:
    """Continue chooses the form of a completion by the model's name."""
    if model is None:
        return []
    name = model.lower()
    if name.startswith(_CHAT_ONLY):
        return [
            f"Continue takes `{model}` for a chat model, as its id begins with `gpt` or `o`: serve "
            "it under another, `loadmaster serve ID=MODEL`"
        ]
    if not any(family in name for family in _FIM_FAMILIES):
        families = ", ".join(f"`{family}`" for family in _FIM_FAMILIES)
        return [
            f"Continue knows the form of a completion by the id: name `{model}` with the family it "
            f"is of ({families}), `loadmaster serve ID=MODEL`"
        ]
    return []


def _opencode(url: str, model: str) -> Configuration:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "loadmaster",
        "options": {"baseURL": f"{url}/v1", "apiKey": _KEY},
        "models": {model: {"name": model}},
    }
    value = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {"loadmaster": provider},
        "model": f"loadmaster/{model}",
    }
    return Configuration(place="opencode.json", text=json.dumps(value, indent=2))


def _openwebui(url: str) -> Configuration:
    lines = [
        f"OPENAI_API_BASE_URL={url}/v1",
        f"OPENAI_API_KEY={_KEY}",
        "ENABLE_OLLAMA_API=false",
    ]
    note = (
        "in a container, 127.0.0.1 is the container: run it with `--network=host`, or serve with "
        "`--host 0.0.0.0 --api-key-file FILE`"
    )
    return Configuration(
        place="the environment of `open-webui serve`", text="\n".join(lines), notes=(note,)
    )
