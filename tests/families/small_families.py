"""Families small enough to build within a second, for the tests; run as a script, it builds them in another process."""

import os
import signal
import sys
from pathlib import Path

from evomerge.families.family import make
from evomerge.families.recipes import DigitsRecipe, OrdersRecipe, Recipe, Schedule, TextRecipe

BRIEF = Schedule(steps=4, learning_rate=1e-3, num_rows=8)

SMALL: dict[str, Recipe] = {
    "digits": DigitsRecipe(
        tasks=("rot90", "parity", "noise"), hidden=16, layers=2, mlp=16, base=BRIEF, expert=BRIEF, num_held_out=950
    ),
    "orders": OrdersRecipe(num_digits=3, hidden=16, layers=2, mlp=16, base=BRIEF, expert=BRIEF, num_held_out=50),
    "text": TextRecipe(
        hidden=16,
        layers=2,
        mlp=16,
        vocabulary=300,
        window=30,
        base=BRIEF,
        expert=BRIEF,
        num_train_characters=20_000,
        num_items=12,
        item_characters=120,
    ),
}


def build_all_then_die(root: Path) -> None:
    """Build every small family under ``root``, then begin one more and die of SIGKILL in the midst of its training."""
    for name, recipe in SMALL.items():
        make(name, root / name, recipe=recipe)

    def die(message: str, fraction: float) -> None:
        if fraction > 0:
            os.kill(os.getpid(), signal.SIGKILL)

    make("orders", root / "killed", recipe=SMALL["orders"], progress=die)


if __name__ == "__main__":
    build_all_then_die(Path(sys.argv[1]))
