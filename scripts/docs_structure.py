"""The module table of `docs/structure.md`, written from the modules' own first sentences.

    python -m scripts.docs_structure [--check]

The prose above the marker is written by hand. `--check` ends with 1 when the page is out of date.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structure.md"
PACKAGE = ROOT / "src" / "loadmaster"
MARKER = "<!-- below: written by `make docs` from the modules' first sentences -->"
# The order of the data's way, not of the alphabet.
PACKAGES = (
    ".", "machine", "model", "plan", "engine", "engine/backends", "scheduler", "jobs", "tasks",
    "interfaces/cli", "interfaces/http",
)  # fmt: skip


def page() -> str:
    """The page with its table brought up to date."""
    prose = PAGE.read_text(encoding="utf-8").split(MARKER)[0]
    return f"{prose}{MARKER}\n\n{_tables()}"


def _tables() -> str:
    blocks = []
    for package in PACKAGES:
        rows = [_row(path) for path in _modules(package)]
        if rows:
            title = "base" if package == "." else package
            blocks.append("\n".join([f"**{title}**", "", *rows]))
    return "\n\n".join(blocks) + "\n"


def _modules(package: str) -> list[Path]:
    folder = PACKAGE / package
    found = sorted(folder.rglob("*.py") if package == "engine/backends" else folder.glob("*.py"))
    return [path for path in found if path.name not in ("__init__.py", "__main__.py")]


def _row(path: Path) -> str:
    sentence = " ".join(
        (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split()
    )
    if not sentence:
        raise SystemExit(f"{path.relative_to(ROOT)} has no docstring")
    return f"- `{path.stem}`: {sentence}"


def main() -> int:
    wanted = page()
    if "--check" in sys.argv:
        if PAGE.read_text(encoding="utf-8") != wanted:
            print("docs/structure.md is out of date: run `make docs`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
