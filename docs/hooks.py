"""Hooks of mkdocs: add the pages of experiments/ to the site, and turn links that leave the site into plain text.

Pages use links relative to the repository, so that they also work on a forge and in an editor.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#|/)([^)\s#]*)(#[^)]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures of experiments/ under their own paths."""
    for pattern in ("*.md", "*.png"):
        for path in sorted((ROOT / "experiments").rglob(pattern)):
            if path.name == "LOG.md":  # the lab diary is not part of the site
                continue
            uri = path.relative_to(ROOT).as_posix()
            content = path.read_bytes() if path.suffix == ".png" else path.read_text(encoding="utf-8")
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Rewrite links between docs/ and the rest of the repository for the site."""
    uri = page.file.src_uri
    if uri == "changelog.md":
        markdown = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    home = "." if uri == "changelog.md" else posixpath.dirname(in_repository(uri))

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups()
        there = posixpath.normpath(posixpath.join(home, target))
        inside = in_site(there)
        if files.get_file_from_path(inside) is None:
            return text if (ROOT / there).exists() else found[0]  # keep a broken link: mkdocs reports it
        return f"{mark}[{text}]({posixpath.relpath(inside, posixpath.dirname(uri) or '.')}{anchor or ''})"

    parts = FENCE.split(markdown)  # odd parts are code blocks
    return "".join(part if at % 2 else LINK.sub(link, part) for at, part in enumerate(parts))


def in_repository(uri: str) -> str:
    """Path in the repository of a page of the site."""
    return uri if uri.startswith("experiments/") else f"docs/{uri}"


def in_site(path: str) -> str:
    """Path in the site of a file of the repository: docs/ is the root, README.md the front page."""
    return "index.md" if path == "README.md" else "changelog.md" if path == "CHANGELOG.md" else path.removeprefix("docs/")
