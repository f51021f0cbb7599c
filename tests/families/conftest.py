import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_families import SMALL

from evomerge.families.family import FamilySummary, make


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FamilySummary]:
    """The small families, built once in this process."""
    root = tmp_path_factory.mktemp("families")
    return {name: make(name, root / name, recipe=recipe) for name, recipe in SMALL.items()}


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where another process built the same families, and died of SIGKILL while it built one more."""
    root = tmp_path_factory.mktemp("elsewhere")
    script = Path(__file__).with_name("small_families.py")
    done = subprocess.run([sys.executable, script, root], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return root
