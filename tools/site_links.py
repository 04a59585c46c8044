"""An mkdocs hook (mkdocs.yml): links from a page to a file outside docs/ become links to the repository.

In a checkout and on GitHub they are relative; the site contains only the pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes ``](../path)`` an absolute link if the file exists; mkdocs warns of the others."""

    def absolute(link: re.Match[str]) -> str:
        return f"]({config['repo_url']}/blob/main/{link[1]})" if (ROOT / link[1]).exists() else link[0]

    return re.sub(r"\]\(\.\./([\w./-]+)\)", absolute, markdown)
