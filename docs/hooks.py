"""MkDocs: a file of the repository that a page links to as ../PATH becomes a part of the site.

So one relative link works on a code host and in the site. Images keep their names; all else is
shown as text.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")


def site_path(path: str) -> str:
    """Where the site has the repository's file."""
    return f"repository/{path}" if path.endswith(".png") else f"repository/{path}.txt"


def on_files(files: Any, config: Any) -> Any:
    """Add the linked files that exist."""
    pages = [page.content_string for page in files.documentation_pages()]
    for path in sorted({path for page in pages for path in LINK.findall(page)}):
        if (ROOT / path).is_file():
            source = str(ROOT / path)
            files.append(File.generated(config, site_path(path), abs_src_path=source))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point the links there; MkDocs reports those that lead nowhere."""
    return LINK.sub(lambda link: site_path(link[1]), markdown)
