"""A real Chromium for the tests of the page, and the command that serves it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
ROOT = Path(__file__).parents[2]


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser; skip where there is none."""
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}: make test-browser installs it, or says how")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, address: str, **context: Any) -> Iterator[Any]:
    """Open an address; nothing may be written to its console as an error, and no other host asked."""
    problems: list[str] = []
    asked: list[str] = []
    opened = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    page = opened.new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("html[data-ready], table.runs", state="attached")
    yield page
    origin = "/".join(address.split("/")[:3])
    assert problems == []
    assert [url for url in asked if not url.startswith((origin, "data:", "blob:"))] == []
    opened.close()


@contextmanager
def evomerge(*words: object) -> Iterator[subprocess.Popen[str]]:
    """Run a command in the background; end it as Ctrl-C does."""
    command = [sys.executable, "-m", "evomerge.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGINT)


@contextmanager
def served(place: object, *options: str) -> Iterator[str]:
    """Serve a place with ``evomerge ui``; give its address."""
    with evomerge("ui", place, "--no-open", *options) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("page "), line
        yield line.split()[1]
    assert process.returncode == 0
