"""The person's browser, where there is one to open."""

import os
import sys
import webbrowser


def open_browser(address: str) -> None:
    """Open an address, unless this machine has no screen: then the browser would be one in the terminal."""
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)
