"""Write `docs/guides`, `docs/machines.md`, `docs/published.md`; `--check` says if they are current."""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from scripts.guides.machines import machines_page
from scripts.guides.pages import PAGES
from scripts.guides.published import published_page

DOCS = Path(__file__).parents[2] / "docs"


def pages() -> Mapping[Path, str]:
    """Every written page with its text, made without an engine and without the user's caches."""
    with tempfile.TemporaryDirectory() as home:
        before = os.environ.get("LOADMASTER_HOME")
        os.environ["LOADMASTER_HOME"] = home
        try:
            made = {DOCS / "guides" / name: page() for name, page in PAGES.items()}
            made[DOCS / "published.md"] = published_page()
        finally:
            if before is None:
                del os.environ["LOADMASTER_HOME"]
            else:
                os.environ["LOADMASTER_HOME"] = before
    return {**made, DOCS / "machines.md": machines_page()}


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    checking = parser.parse_args().check
    stale = []
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not checking:
            path.write_text(text, encoding="utf-8")
    if not stale:
        return 0
    print(f"{'not current' if checking else 'written'}: {', '.join(stale)}", file=sys.stderr)
    return int(checking)


if __name__ == "__main__":
    sys.exit(main())
