"""How programs are told of a server: text for their own configuration files. Pure.

The forms are those of Continue's `config.yaml`, opencode's `opencode.json` and Open WebUI's
environment, as their documentation has them in November 2026.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadmaster.errors import NotFoundError

CLIENTS = ("continue", "openwebui", "opencode")
_NO_KEY = "loadmaster"  # a key has to be named; without `--api-key-file` the server reads none
_DEMO = "demo"
# Continue takes ids that begin so for chat models, and sends no completions to them.
_CHAT_ONLY = ("gpt", "o")
_FIM_FAMILIES = (
    "qwen…coder", "codestral", "starcoder", "codegemma", "deepseek", "granite", "codellama",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a client is told of a model."""

    n_ctx: int | None = None
    takes_tools: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models of a server by id, in its order; none where it could not be asked."""

    known: Mapping[str, Model] = field(default_factory=dict)

    @classmethod
    def read(cls, rows: Sequence[Mapping[str, Any]]) -> "Models":
        """From the list of `/v1/models`."""
        known = {
            str(row.get("id")): Model(
                n_ctx=row.get("max_model_len"),
                takes_tools="tools" in (row.get("capabilities") or ()),
            )
            for row in rows
        }
        return cls(known=known)

    def first(self) -> str:
        """The one to chat with, where none is named."""
        return next(iter(self.known), _DEMO)

    def find(self, name: str) -> Model:
        """What is known of a model.

        Raises:
            NotFoundError: the server has none of this name.
        """
        if self.known and name not in self.known:
            near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.4) or self.known
            listed = ", ".join(f"`{one}`" for one in near)
            raise NotFoundError(f"the server has no model `{name}`", hint=f"it has {listed}")
        return self.known.get(name, Model())


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
    models: Models | None = None,
    model: str | None = None,
    autocomplete: str | None = None,
    embed: str | None = None,
    rerank: str | None = None,
    key_file: str | None = None,
) -> Configuration:
    """The configuration of one of `CLIENTS`.

    Raises:
        NotFoundError: the server has no model of a name.
    """
    models = models or Models()
    chat = model or models.first()
    given = {"autocomplete": autocomplete, "embed": embed, "rerank": rerank}
    roles = {role: name for role, name in given.items() if name}
    for name in (chat, *roles.values()):
        models.find(name)
    if client == "continue":
        return _continue(url, models, chat, roles, has_key=key_file is not None)
    if client == "opencode":
        return _opencode(url, models, chat, key_file)
    return _openwebui(url, roles, key_file)


# -- Continue


def _continue(
    url: str, models: Models, chat: str, roles: Mapping[str, str], *, has_key: bool
) -> Configuration:
    key = "${{ secrets.LOADMASTER_API_KEY }}" if has_key else _NO_KEY
    entries = [_continue_entry(url, key, chat, ("chat", "edit", "apply"), models.find(chat))]
    entries += [
        _continue_entry(url, key, name, (role,), models.find(name)) for role, name in roles.items()
    ]
    notes = list(_autocomplete_notes(roles.get("autocomplete")))
    if has_key:
        notes.append("write `LOADMASTER_API_KEY=` and the key into `~/.continue/.env`")
    head = "name: loadmaster\nversion: 1.0.0\nschema: v1\nmodels:\n"
    return Configuration(
        place="~/.continue/config.yaml", text=head + "\n".join(entries), notes=tuple(notes)
    )


def _continue_entry(url: str, key: str, name: str, roles: tuple[str, ...], model: Model) -> str:
    lines = [
        f"  - name: {json.dumps(name)}",
        "    provider: openai",
        f"    model: {json.dumps(name)}",
        f"    apiBase: {url}/v1/",
        f"    apiKey: {key}",
        f"    roles: [{', '.join(roles)}]",
    ]
    if model.takes_tools and "chat" in roles:
        lines.append("    capabilities: [tool_use]")  # Continue knows only ids of its own list
    if model.n_ctx and not {"embed", "rerank"} & set(roles):
        lines += ["    defaultCompletionOptions:", f"      contextLength: {model.n_ctx}"]
    if model.n_ctx and "chat" in roles:
        lines.append(f"      maxTokens: {max(1, model.n_ctx // 4)}")
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
    if not any(all(part in name for part in family.split("…")) for family in _FIM_FAMILIES):
        families = ", ".join(f"`{family}`" for family in _FIM_FAMILIES)
        return [
            f"Continue knows the form of a completion by the id: name `{model}` with the family it "
            f"is of ({families}), `loadmaster serve ID=MODEL`"
        ]
    return []


# -- opencode and Open WebUI


def _opencode(url: str, models: Models, chat: str, key_file: str | None) -> Configuration:
    key = _NO_KEY if key_file is None else f"{{file:{key_file}}}"
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "loadmaster",
        "options": {"baseURL": f"{url}/v1", "apiKey": key},
        "models": {chat: _opencode_model(chat, models.find(chat))},
    }
    value = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {"loadmaster": provider},
        "model": f"loadmaster/{chat}",
    }
    notes: tuple[str, ...] = ()
    if models.known and not models.find(chat).takes_tools:
        notes = (f"the chat template of `{chat}` has no place for tools, which opencode needs",)
    return Configuration(
        place="opencode.json or ~/.config/opencode/opencode.json",
        text=json.dumps(value, indent=2),
        notes=notes,
    )


def _opencode_model(name: str, model: Model) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": name}
    if model.n_ctx:
        shown["limit"] = {"context": model.n_ctx, "output": max(1, model.n_ctx // 4)}
    return shown


def _openwebui(url: str, roles: Mapping[str, str], key_file: str | None) -> Configuration:
    key = _NO_KEY if key_file is None else f'"$(cat {key_file})"'
    lines = [
        f"OPENAI_API_BASE_URL={url}/v1",
        f"OPENAI_API_KEY={key}",
        "ENABLE_OLLAMA_API=false",
    ]
    if "embed" in roles:
        lines += [
            "RAG_EMBEDDING_ENGINE=openai",
            f"RAG_OPENAI_API_BASE_URL={url}/v1",
            f"RAG_OPENAI_API_KEY={key}",
            f"RAG_EMBEDDING_MODEL={roles['embed']}",
        ]
    if "rerank" in roles:
        lines += [
            "ENABLE_RAG_HYBRID_SEARCH=true",
            "RAG_RERANKING_ENGINE=external",
            f"RAG_EXTERNAL_RERANKER_URL={url}/v1/rerank",
            f"RAG_EXTERNAL_RERANKER_API_KEY={key}",
            f"RAG_RERANKING_MODEL={roles['rerank']}",
        ]
    notes = (
        "Open WebUI reads these at its first start; later ones are made in its settings",
        "in a container, 127.0.0.1 is the container: run it with `--network=host`, or serve with "
        "`--host 0.0.0.0 --api-key-file FILE`",
    )
    return Configuration(
        place="the environment of `open-webui serve`", text="\n".join(lines), notes=notes
    )
