"""What a command leaves behind that was typed into the tests' own process (see the fixture ``typed``)."""

from typing import NamedTuple


class Typed(NamedTuple):
    """Its exit status, and what it printed where."""

    returncode: int
    stdout: str
    stderr: str
