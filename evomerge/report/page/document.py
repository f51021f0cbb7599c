"""The page itself: its files as they are served, and all of them in one document that works offline."""

import re
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.resources import files

STATIC = files("evomerge.report.page") / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PLOTLY = "plotly.min.js"


def static_names() -> list[str]:
    """Return the names of the page's files, Plotly's script among them."""
    return sorted([PLOTLY, *(file.name for file in STATIC.iterdir())])


@cache
def static_text(name: str) -> str:
    """Return a file of the page. Raises: KeyError for any other name."""
    if name not in static_names():
        raise KeyError(name)
    if name == PLOTLY:
        from plotly.offline import get_plotlyjs

        return str(get_plotlyjs())
    return (STATIC / name).read_text(encoding="utf-8")


def one_document(parts: Mapping[str, str]) -> str:
    """Return the page with its files and parts (JSON) inside; it asks nobody for anything.

    Its policy names the scripts by their hashes: whatever the data hold, nothing else runs.
    """
    scripts: list[str] = []

    def inlined(match: re.Match[str]) -> str:
        scripts.append(static_text(match["name"]))
        return f"<script>{scripts[-1]}</script>"

    page = static_text("page.html")
    page = re.sub(r'<script src="/static/(?P<name>[\w.]+)"></script>', inlined, page)
    page = page.replace('<link rel="stylesheet" href="/static/page.css">', f"<style>{static_text('page.css')}</style>")
    data = "".join(
        f'<script type="application/json" id="part-{name}">{_harmless(text)}</script>' for name, text in parts.items()
    )
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">'
    return page.replace("<!-- data -->", data).replace("<!-- policy -->", policy)


def _policy(scripts: list[str]) -> str:
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"


def _harmless(text: str) -> str:
    """Return JSON in which no tag can end or begin."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
