"""The page as one HTML document with everything in it: served live it asks for its figures, as a report it has them.

Nothing is loaded from anywhere else, and the document's own policy says so to the browser.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

PAGE = "page"


def document(content: Mapping[str, Any] | None = None) -> str:
    """`content`: what there is to show (`pictured`); None: the page asks its server for that."""
    told = "" if content is None else as_json(content)
    return _parts()[0].replace("<!-- content -->", f'<script type="application/json" id="content">{told}</script>')


def as_json(content: Mapping[str, Any]) -> str:
    """On one line, and such that it cannot end the element that it stands in."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def policy() -> str:
    """The Content-Security-Policy of the document: its own script and style, its own server, nothing else."""
    return _parts()[1]


@functools.cache
def _parts() -> tuple[str, str]:
    html, style, *scripts = (
        resources.files(__package__).joinpath(PAGE, name).read_text(encoding="utf-8")
        for name in ("index.html", "page.css", "chart.js", "page.js")
    )
    script = "\n".join(scripts)
    allowed = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    html = html.replace("<!-- policy -->", f'<meta http-equiv="Content-Security-Policy" content="{allowed}">')
    html = html.replace("<!-- style -->", f"<style>{style}</style>").replace(
        "<!-- script -->", f"<script>{script}</script>"
    )
    return html, allowed


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
