"""The plots and the outputs in `docs/quantization.md`, from the command that it is about.

    python -m scripts.docs_quantization [--check]

Prose is written by hand, around outputs between markers that name their command. `--check` ends
with 1 when a plot or an output is out of date.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from loadmaster.interfaces.cli.quantization_plots import plots
from scripts.guides.asking import printed

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "quantization.md"
ROWS, COLUMNS = 4096, 4096  # the command's defaults
_OUTPUT = re.compile(r"(<!-- output: (?P<command>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def files() -> Mapping[Path, str]:
    """Everything that the command writes, by the path where it belongs."""
    drawn = {DOCS / name: content for name, content in plots(ROWS, COLUMNS).items()}
    return {**drawn, PAGE: page(PAGE.read_text(encoding="utf-8"))}


def page(text: str) -> str:
    """The page with every output as the command prints it now."""
    return _OUTPUT.sub(lambda match: f"{match[1]}{printed(match['command'])}\n{match[3]}", text)


def main() -> int:
    """Write what is out of date, or name it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether all is current")
    checking = parser.parse_args().check
    stale = [
        path
        for path, text in files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if checking and stale:
        names = ", ".join(path.name for path in stale)
        print(f"not current: {names}: `make docs` writes them", file=sys.stderr)
    elif stale:
        current = files()
        for path in stale:
            path.write_text(current[path], encoding="utf-8")
    return int(checking and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
