"""Pages of the site that lie elsewhere in the tree, where people look for them, and the links that lead to them.

Read by mkdocs (`mkdocs.yml`, hooks). Not published itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

#: File in the tree -> page of the site.
PAGES = {
    "deploy/README.md": "operating/deploy-files.md",
    "deploy/acl/README.md": "operating/server-users.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
}

#: Files of which the site has another page.
STAND_INS = {"README.md": "index.md"}

#: A link's target that leads to a file, without its anchor.
_TARGET = re.compile(r"(?<=\]\()([^)#\s:]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to the files lead to their pages, and links within them to where their targets are on the site."""
    source = Path(page.file.abs_src_path)

    def on_site(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / found[1]))
        try:
            name = target.relative_to(ROOT).as_posix()
        except ValueError:
            return found[1]
        there = (PAGES | STAND_INS).get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        return os.path.relpath(there, Path(page.file.src_uri).parent) if there else found[1]

    return _TARGET.sub(on_site, markdown)
