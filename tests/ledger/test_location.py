"""Where runs live, as people type it; passwords are never shown."""

import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.errors import RunError
from evomerge.ledger.location import FILE_NAME, find_place, locate


@pytest.mark.parametrize(
    ("given", "shown", "name"),
    [
        ("runs/digits", "runs/digits", None),
        ("a folder#1?", "a folder#1?", None),
        ("postgresql://me@host/db", "postgresql://me@host/db", None),
        ("postgresql://me@host:5433/db#digits", "postgresql://me@host:5433/db#digits", "digits"),
        ("postgres://me:secret@host/db#digits", "postgresql://me:***@host/db#digits", "digits"),
        ("postgresql://me:se#cret@host/db#digits", "postgresql://me:***@host/db#digits", "digits"),
        (
            "postgresql://host/db?user=me&password=secret&sslmode=require",
            "postgresql://host/db?password=***&sslmode=require&user=me",
            None,
        ),
        ("postgresql://me@/db?host=%2Ftmp", "postgresql://me@/db?host=/tmp", None),
        ("sqlite:///all.sqlite#digits", "sqlite:///all.sqlite#digits", "digits"),
        ("sqlite:////tmp/all.sqlite", "sqlite:////tmp/all.sqlite", None),
    ],
)
def test_what_is_typed_is_read(given: str, shown: str, name: str | None) -> None:
    location = locate(given)
    assert location.name == name
    assert sorted(str(location).partition("?")[2].split("&")) == sorted(shown.partition("?")[2].split("&"))
    assert str(location).partition("?")[0] == shown.partition("?")[0]
    assert "secret" not in repr(location)
    assert locate(location) is location
    assert locate(str(location)).name == name


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("mysql://me:secret@host/db", "expected a database as postgresql://.*found another URL"),
        ("postgresql://me:secret@host", "postgresql://me:\\*\\*\\*@host: expected the name of a database"),
        ("postgresql://me:sec#ret@host/db", "in a password, write # as %23"),
        ("postgresql://me:secret@host:port/db", "found another URL"),
        ("sqlite://#one", "expected the name of a database"),
    ],
)
def test_what_is_no_place_is_one_line_without_passwords(given: str, told: str) -> None:
    with pytest.raises(RunError, match=told) as caught:
        locate(given)
    assert "sec" not in str(caught.value)
    assert "ret" not in str(caught.value)


def test_a_file_of_a_run_lies_in_its_folder(tmp_path: Path) -> None:
    assert locate(tmp_path).file("report.html") == tmp_path / "report.html"
    with pytest.raises(RunError, match="has no folder for report.html; say where with --out"):
        locate("postgresql://me@host/db#digits").file("report.html")


def test_a_missing_driver_names_the_extra() -> None:
    """In a process in which psycopg cannot be imported."""
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from evomerge.ledger.ledger import Ledger; from evomerge.ledger.location import locate\n"
        "try: Ledger.open(locate('postgresql://me@host/db#one'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told == "RunError a PostgreSQL database needs psycopg: pip install 'evomerge[postgresql]'\n"


def test_a_run_is_found_by_its_name_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a run lies where the name leads, or neither is there."""
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "runs/here", "runs/one"):
        Path(folder).mkdir(parents=True)
        Path(folder, FILE_NAME).touch()
    Path("one").mkdir()  # a folder of something else
    assert find_place("one") == locate("runs/one")
    for given in ("runs/one", "runs", "here", "nowhere", "sqlite:///runs.sqlite#one"):
        assert find_place(given) == locate(given)
