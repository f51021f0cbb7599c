"""Scatter plots as a PNG: what is asked for is drawn, where it belongs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evomerge.publish.scatter import BOTTOM, HEIGHT, LEFT, PIXELS, RIGHT, SHAPES, TOP, WIDTH, Panel, Series, draw, ticks

RED, BLUE = "#ff0000", "#0000ff"


def pixels_of(path: Path, color: tuple[int, int, int]) -> np.ndarray:
    """Return (x, y) of the pixels that are nearly of a colour, in units of the picture."""
    with Image.open(path) as picture:
        image = np.asarray(picture.convert("RGB")).astype(int)
    rows, columns = np.nonzero((np.abs(image - np.array(color)).max(axis=2) < 60)[: HEIGHT * PIXELS])
    return np.stack([columns, rows], axis=1) / PIXELS


def panel(*series: Series, **more: object) -> Panel:
    return Panel(x_label="maths", y_label="chat", series=series, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", ["circle", "ring", *SHAPES])
def test_points_lie_where_their_numbers_say(tmp_path: Path, shape: str) -> None:
    corners = Series(name="corners", points=[(0, 0), (1, 1)], color=BLUE)
    middle = Series(name="middle", points=[(0.5, 0.25)], color=RED, shape=shape, size=6)
    draw([panel(corners, middle)], tmp_path / "picture.png")
    found = pixels_of(tmp_path / "picture.png", (255, 0, 0))
    low, high = -0.06, 1.06
    x = LEFT + (0.5 - low) / (high - low) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - (0.25 - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
    np.testing.assert_allclose((found.min(0) + found.max(0)) / 2, (x, y), atol=1.5)
    assert (np.abs(found - (x, y)) <= 9).all()


def test_bars_reach_as_far_as_the_errors_and_end_at_the_frame(tmp_path: Path) -> None:
    points = [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)]
    errors = [(0.0, 0.0), (0.0, 0.0), (0.25, 9.0)]
    draw([panel(Series(name="front", points=points, errors=errors, color=RED))], tmp_path / "picture.png")
    bars = pixels_of(tmp_path / "picture.png", (255, 115, 115))
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    upright = bars[np.abs(bars[:, 0] - middle) < 1]
    assert upright[:, 1].min() >= TOP - 1
    assert upright[:, 1].max() <= HEIGHT - BOTTOM + 1
    level = bars[np.abs(bars[:, 1] - (TOP + (HEIGHT - TOP - BOTTOM) / 2)) < 1]
    np.testing.assert_allclose(np.ptp(level[:, 0]), 0.5 / 1.12 * (WIDTH - LEFT - RIGHT), atol=2)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (6, 2, 3)])
def test_panels_stand_in_two_columns(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    one = panel(Series(name="front", points=[(1, 2)], color=RED), levels={"base": 1.0, "uniform": 1.01})
    draw([one] * count, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        width, height = picture.size
    assert width == columns * WIDTH * PIXELS
    assert rows * HEIGHT * PIXELS < height < (rows * HEIGHT + 60) * PIXELS


def test_points_that_are_all_alike_are_drawn_too(tmp_path: Path) -> None:
    alike = [(0.3, 0.0), (0.1 + 0.2, 0.0)]
    draw([panel(Series(name="front", points=alike, color=RED))], tmp_path / "picture.png")
    found = pixels_of(tmp_path / "picture.png", (255, 0, 0))
    np.testing.assert_allclose(
        found.mean(0), (LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2), atol=1
    )


@given(st.floats(-1e3, 1e3), st.floats(1e-2, 1e6))
def test_ticks_are_few_and_within(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    assert 3 <= len(found) <= 10
    tolerance = 1e-8 * span
    assert all(low - tolerance <= tick <= high + tolerance for tick in found)
