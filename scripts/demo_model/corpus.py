"""The training text: the sources, the docstrings and the help topics of the running Python.

Everything is derived from the interpreter that runs this file, in a fixed order and with a fixed
seed: the same Python version gives the same corpus, byte for byte.
"""

import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as topic_texts
from typing import Literal

from scripts.demo_model.chats import conversations
from scripts.demo_model.library import C_MODULES, Module, module_from_import, module_from_source

Kind = Literal["source", "test", "docs", "chat"]

HELD_OUT_PER_MILLE = 30
TEST_PER_MILLE = 450  # the test suite is larger than the library: less than half of it is used

# Character maps, generated tables, files with the paths of the machine that built Python.
SKIPPED_PARTS = frozenset({"encodings", "site-packages", "__pycache__", "lib-dynload", "data"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "badsyntax", "bad_coding", "topics.py")

# What a first question is likely to be about: `CONTINUED` in train.py repeats these.
_COMMON_NAMES = """
    greetings builtins math time itertools functools operator random heapq bisect csv json io sys
    os posix posixpath pathlib textwrap collections re string struct glob shutil statistics
    datetime copy pprint contextlib dataclasses enum tempfile argparse hashlib base64 decimal
    fractions calendar timeit queue
"""
COMMON = frozenset(_COMMON_NAMES.split())
COMMON_MAX_CHARS = 700


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of the corpus; `unit` is the file or module that it was made from."""

    unit: str
    kind: Kind
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.unit)


def is_held_out(unit: str) -> bool:
    """Whether a file is kept for the evaluation; the same answer on every machine."""
    return _per_mille("held-out:" + unit) < HELD_OUT_PER_MILLE


def is_common(document: Document) -> bool:
    """A short text about one of the modules that people ask about first."""
    module = document.unit.removeprefix("builtin:").split("/")[0].removesuffix(".py").lstrip("_")
    return module in COMMON and len(document.text) <= COMMON_MAX_CHARS


def build_corpus() -> list[Document]:
    """All documents, the held-out ones included."""
    sources = list(_source_documents())
    modules = [module_from_source(d.unit, d.text) for d in sources if d.kind == "source"]
    modules += [module_from_import(name) for name in C_MODULES]
    known = [module for module in modules if module is not None]
    topics = [(f"topic:{name}", name, text) for name, text in sorted(topic_texts.items())]
    return [
        *sources,
        *(Document(unit=unit, kind="docs", text=text.strip() + "\n") for unit, _, text in topics),
        *(Document(unit=module.unit, kind="docs", text=_reference(module)) for module in known),
        *(Document(unit=u, kind="chat", text=t) for u, t in conversations(known, topics)),
    ]


def _source_documents() -> Iterator[Document]:
    lib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(lib.rglob("*.py")):
        unit = path.relative_to(lib).as_posix()
        if SKIPPED_PARTS & set(path.parts[len(lib.parts) :]):
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in unit.split("/")):
            continue
        is_test = unit.startswith("test/") or "/test" in unit
        if is_test and _per_mille("test:" + unit) >= TEST_PER_MILLE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # test files for the tokenizer's error paths
            continue
        if text.strip():
            yield Document(unit=unit, kind="test" if is_test else "source", text=text)


def _reference(module: Module) -> str:
    parts = [f"{module.name}\n{'=' * len(module.name)}\n\n{module.doc}".rstrip()]
    parts += [
        f"{entry.full_name}{entry.signature}\n\n{textwrap.indent(entry.doc, '    ')}"
        for entry in module.entries
    ]
    return "\n\n".join(parts) + "\n"


def _per_mille(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 1000
