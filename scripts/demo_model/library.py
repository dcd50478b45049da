"""The documented names of the standard library, read from its sources or from the interpreter."""

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal

# Modules that people ask about first: their conversations are made with more phrasings.
_POPULAR_NAMES = """
    argparse ast asyncio base64 bisect builtins calendar collections contextlib copy csv
    dataclasses datetime decimal difflib enum fnmatch fractions functools glob gzip hashlib heapq
    html http inspect io itertools json logging math operator os pathlib pickle posixpath pprint
    queue random re sched shelve shlex shutil socket sqlite3 statistics string struct subprocess
    sys tarfile tempfile textwrap threading time timeit tokenize traceback types typing unittest
    urllib uuid warnings weakref xml zipfile zlib
"""
POPULAR = frozenset(_POPULAR_NAMES.split())
_C_NAMES = """
    builtins math cmath itertools time _collections _functools _operator _random _struct _heapq
    _bisect _csv _json _io _thread _socket _datetime _decimal _pickle posix sys gc errno signal
    select zlib binascii array atexit marshal unicodedata _weakref _string _sre _asyncio mmap
"""
C_MODULES = tuple(_C_NAMES.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One documented name of a module, the raw material of the conversations."""

    module: str
    name: str
    kind: Literal["function", "class", "method"]
    signature: str
    arguments: tuple[str, ...]
    doc: str
    source: str  # without the docstring; empty where unknown or too long

    @property
    def full_name(self) -> str:
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """The documented names of one module."""

    unit: str
    name: str
    doc: str
    entries: tuple[Entry, ...]

    def named(self, kind: str) -> list[str]:
        return [entry.name for entry in self.entries if entry.kind == kind]


def module_from_source(unit: str, text: str) -> Module | None:
    name = unit.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    entries = [
        replace(entry, module=_public_module(name, entry.name))
        for node in tree.body
        for entry in _entries(node, name, "")
    ]
    doc = _clean(ast.get_docstring(tree))
    if not entries and not doc:
        return None
    return Module(unit=unit, name=name, doc=doc, entries=tuple(entries))


def _public_module(module: str, name: str) -> str:
    """`unittest` for `TestCase` of `unittest.case`: the name that programs import."""
    package = module.split(".")[0]
    if package == module or package not in POPULAR:
        return module
    value = getattr(importlib.import_module(package), name.split(".")[0], None)
    return package if getattr(value, "__module__", None) == module else module


def _entries(node: ast.stmt, module: str, prefix: str) -> Iterator[Entry]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            doc = _clean(ast.get_docstring(node))
            if node.name.startswith("_") or not doc:
                return
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield Entry(
                module=module,
                name=prefix + node.name,
                kind="method" if prefix else "function",
                signature=f"({ast.unparse(node.args)})",
                arguments=tuple(a.arg for a in arguments if a.arg not in {"self", "cls"}),
                doc=doc,
                source=_short_source(node),
            )
        case ast.ClassDef() if not node.name.startswith("_"):
            doc = _clean(ast.get_docstring(node))
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            if doc:
                yield Entry(
                    module=module,
                    name=prefix + node.name,
                    kind="class",
                    signature=f"({bases})" if bases else "",
                    arguments=(),
                    doc=doc,
                    source="",
                )
            for child in node.body:
                yield from _entries(child, module, f"{prefix}{node.name}.")


def _short_source(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    body = node.body[1:]
    length_lines = (node.end_lineno or 0) - node.lineno
    if not body or length_lines > 60:
        return ""
    bare = type(node)(**{**dict(ast.iter_fields(node)), "body": body, "decorator_list": []})
    return ast.unparse(ast.copy_location(bare, node))


def module_from_import(name: str) -> Module | None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    public = {"posix": "os"}.get(name, name.lstrip("_"))
    entries = []
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or isinstance(value, ModuleType):
            continue
        if inspect.isbuiltin(value):
            entries.append(_builtin_entry(public, attribute, value, "function"))
        elif inspect.isclass(value) and value.__module__ in {name, "builtins", public}:
            entries.append(_builtin_entry(public, attribute, value, "class"))
            if issubclass(value, BaseException) and value is not BaseException:
                continue
            for method, descriptor in sorted(vars(value).items()):
                if not method.startswith("_") and inspect.isroutine(descriptor):
                    entries.append(
                        _builtin_entry(public, f"{attribute}.{method}", descriptor, "method")
                    )
    found = tuple(entry for entry in entries if entry is not None)
    # `_socket` describes itself, not `socket`, which has a source of its own.
    doc = _clean(inspect.getdoc(module)) if name == public else ""
    return Module(unit=f"builtin:{name}", name=public, doc=doc, entries=found)


def _builtin_entry(
    module: str, name: str, value: object, kind: Literal["function", "class", "method"]
) -> Entry | None:
    doc = _clean(inspect.getdoc(value))
    if not doc or value is getattr(builtins, "copyright", None):
        return None
    try:
        # The text signature is not used as such: it holds markers such as `$self`.
        parameters = inspect.signature(value).parameters  # type: ignore[arg-type]
        arguments = tuple(p for p in parameters if p not in {"self", "cls", "type"})
        signature = "(" + ", ".join(str(parameters[p]) for p in arguments) + ")"
    except (TypeError, ValueError):
        arguments, signature = (), ""
    if "0x" in signature:  # the address of a default value differs from run to run
        return None
    return Entry(
        module=module,
        name=name,
        kind=kind,
        signature=signature,
        arguments=arguments,
        doc=doc,
        source="",
    )


def _clean(doc: str | None) -> str:
    lines = inspect.cleandoc(doc or "").expandtabs().splitlines()
    return "\n".join(line.rstrip() for line in lines)
