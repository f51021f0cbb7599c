"""The report is one file that asks nobody for anything, and in which data stay data."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest

from evomerge.report.html import write_report
from evomerge.report.page.document import one_document, static_names, static_text
from evomerge.report.page.parts import PARTS
from evomerge.run.run import Run

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


def test_what_a_run_says_cannot_end_its_script() -> None:
    page = one_document({"overview": json.dumps({"name": EVIL})})
    assert "alert(1)</script>" not in page
    (inside,) = re.findall(r'<script type="application/json" id="part-overview">(.*?)</script>', page, re.DOTALL)
    assert json.loads(inside) == {"name": EVIL}


def test_the_policy_lets_only_the_pages_own_scripts_run_and_asks_no_host() -> None:
    page = one_document({})
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL):
        assert b64encode(sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    markup = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL).replace(policy, "")
    assert not re.search(r"//|/static/", markup)


def test_our_scripts_make_no_markup_of_text() -> None:
    for name in static_names():
        if name.endswith(".js") and name != "plotly.min.js":
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", static_text(name))


def test_no_other_file_is_served() -> None:
    for name in ("../parts.py", "parts.py", "/etc/passwd", ""):
        with pytest.raises(KeyError):
            static_text(name)


def test_a_report_holds_all_parts_but_the_log(made_up: Run, tmp_path: Path) -> None:
    told: list[str] = []
    write_report(made_up, tmp_path / "report.html", told.append)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f'id="part-{name}"' in page for name in PARTS)
    assert told == [name for name in PARTS if name != "log"]
    assert re.search(r'id="part-log"[^>]*>\[\]<', page)
