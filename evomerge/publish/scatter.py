"""Scatter plots as a PNG, for where no script runs: a model card. Drawn by Pillow, twice as large, and scaled down."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

WIDTH, HEIGHT = 520, 400  # of a panel, in units; all lengths below are in units
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 14, 58
PIXELS = 2  # a unit, in the file
OVERSAMPLING = 2
INK, SOFT, GRID, PAPER = "#1b2733", "#51606f", "#e5e8ec", "#ffffff"
TEXT_SIZE, LEGEND_ROW = 13, 24
BAR_MIX = 0.55  # of a colour in its error bars; the rest is paper


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points that look alike: (x, y), and by how much each may be off, (x, y); shape: see SHAPES."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[tuple[float, float]] = ()
    color: str
    shape: str = "circle"
    size: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot; levels are named horizontal lines."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Mapping[str, float] = field(default_factory=dict)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write panels, at most two in a row, and below them a legend of the series' names."""
    from PIL import Image, ImageDraw, ImageFont

    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    width = num_columns * WIDTH
    legend = list({series.name: series for panel in panels for series in panel.series if series.points}.values())
    scale = PIXELS * OVERSAMPLING
    font: Any = ImageFont.load_default(TEXT_SIZE * scale)
    places = _legend_places([34 + font.getlength(series.name) / scale for series in legend], width)
    height = round(num_rows * HEIGHT + (places[-1][1] + LEGEND_ROW if places else 0) + 8)
    image = Image.new("RGB", (width * scale, height * scale), PAPER)
    canvas = Canvas(ImageDraw.Draw(image), image, font, scale)
    for number, panel in enumerate(panels):
        row, column = divmod(number, num_columns)
        _Axes(canvas, panel, column * WIDTH, row * HEIGHT).draw()
    for series, (x, y) in zip(legend, places, strict=True):
        canvas.marker(x + 8, num_rows * HEIGHT + y + 10, series)
        canvas.text(x + 20, num_rows * HEIGHT + y + 10, series.name, "lm")
    image.resize((width * PIXELS, height * PIXELS), Image.Resampling.LANCZOS).save(path, optimize=True)


def ticks(low: float, high: float) -> list[float]:
    """Return four to nine round numbers (1, 2 or 5 times a power of ten apart) within low and high."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (step * part) <= 8)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


class Canvas:
    """What can be drawn, in units."""

    def __init__(self, drawing: "ImageDraw", image: Any, font: Any, scale: int) -> None:
        self._drawing, self._image, self._font, self._scale = drawing, image, font, scale

    def line(self, ends: Sequence[tuple[float, float]], color: str, width: float) -> None:
        """Draw a line through points."""
        self._drawing.line([self._at(*end) for end in ends], fill=color, width=max(1, round(width * self._scale)))

    def text(self, x: float, y: float, text: str, anchor: str, color: str = INK) -> None:
        """Write a line of text; anchor: Pillow's two letters."""
        self._drawing.text(self._at(x, y), text, fill=color, font=self._font, anchor=anchor)

    def upright_text(self, x: float, y: float, text: str) -> None:
        """Write from below to above, the middle at a point."""
        from PIL import Image, ImageDraw

        length = round(self._font.getlength(text)) + 2 * self._scale
        strip = Image.new("RGB", (length, round(TEXT_SIZE * 1.6) * self._scale), PAPER)
        ImageDraw.Draw(strip).text((length / 2, strip.height / 2), text, fill=INK, font=self._font, anchor="mm")
        turned = strip.transpose(Image.Transpose.ROTATE_90)
        left, top = self._at(x, y)
        self._image.paste(turned, (round(left - turned.width / 2), round(top - turned.height / 2)))

    def marker(self, x: float, y: float, series: Series) -> None:
        """Draw a series' marker."""
        r = series.size
        if series.shape in ("circle", "ring"):
            box = [*self._at(x - r, y - r), *self._at(x + r, y + r)]
            if series.shape == "circle":
                self._drawing.ellipse(box, fill=series.color)
            else:
                self._drawing.ellipse(box, outline=series.color, width=round(2.2 * self._scale))
            return
        for stroke in SHAPES[series.shape]:
            corners = [(x + r * dx, y + r * dy) for dx, dy in stroke]
            if len(corners) == 2:
                self.line(corners, series.color, 2)
            else:
                self._drawing.polygon([self._at(*corner) for corner in corners], fill=series.color)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return x * self._scale, y * self._scale


SHAPES: dict[str, list[list[tuple[float, float]]]] = {  # beside circle and ring: polygons, or strokes of two points
    "diamond": [[(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)]],
    "square": [[(-1, -1), (1, -1), (1, 1), (-1, 1)]],
    "triangle": [[(0, -1.2), (1.15, 0.9), (-1.15, 0.9)]],
    "cross": [[(-1, -1), (1, 1)], [(-1, 1), (1, -1)]],
}


class _Axes:
    """A panel's frame, and where its numbers lie."""

    def __init__(self, canvas: Canvas, panel: Panel, left: float, top: float) -> None:
        self._canvas, self._panel = canvas, panel
        self._x0, self._x1 = left + LEFT, left + WIDTH - RIGHT
        self._y0, self._y1 = top + TOP, top + HEIGHT - BOTTOM
        points = [point for series in panel.series for point in series.points]
        self._x_range = _padded([x for x, _ in points])
        self._y_range = _padded([*(y for _, y in points), *panel.levels.values()])

    def draw(self) -> None:
        """Draw grid, labels, levels, error bars, and the markers over them."""
        self._grid()
        free = self._y1
        for name, level in sorted(self._panel.levels.items(), key=lambda pair: pair[1]):
            y = self._y(level)
            free = min(y - 3, free - TEXT_SIZE - 2)  # no name over another
            steps = [self._x0 + 6 * n for n in range(int((self._x1 - self._x0) / 6))]
            for start in steps[::2]:
                self._canvas.line([(start, y), (start + 4, y)], SOFT, 1)
            self._canvas.text(self._x1 - 4, free, name, "rb", SOFT)
        for series in self._panel.series:
            self._bars(series)
        for series in self._panel.series:
            for x, y in series.points:
                self._canvas.marker(self._x(x), self._y(y), series)

    def _grid(self) -> None:
        canvas, panel = self._canvas, self._panel
        x_ticks, y_ticks = ticks(*self._x_range), ticks(*self._y_range)
        for tick, label in zip(x_ticks, _labels(x_ticks), strict=True):
            canvas.line([(self._x(tick), self._y0), (self._x(tick), self._y1)], GRID, 1)
            canvas.text(self._x(tick), self._y1 + 8, label, "mt", SOFT)
        for tick, label in zip(y_ticks, _labels(y_ticks), strict=True):
            canvas.line([(self._x0, self._y(tick)), (self._x1, self._y(tick))], GRID, 1)
            canvas.text(self._x0 - 8, self._y(tick), label, "rm", SOFT)
        canvas.line([(self._x0, self._y0), (self._x0, self._y1), (self._x1, self._y1)], SOFT, 1)
        canvas.text((self._x0 + self._x1) / 2, self._y1 + 32, panel.x_label, "mt")
        canvas.upright_text(self._x0 - 58, (self._y0 + self._y1) / 2, panel.y_label)

    def _bars(self, series: Series) -> None:
        color = _mixed(series.color)
        for (x, y), (dx, dy) in zip(series.points, series.errors, strict=bool(series.errors)):
            left, right = (min(max(self._x(x + by), self._x0), self._x1) for by in (-dx, dx))
            low, high = (min(max(self._y(y + by), self._y0), self._y1) for by in (-dy, dy))
            self._canvas.line([(left, self._y(y)), (right, self._y(y))], color, 1.2)
            self._canvas.line([(self._x(x), low), (self._x(x), high)], color, 1.2)

    def _x(self, value: float) -> float:
        low, high = self._x_range
        return self._x0 + (value - low) / (high - low) * (self._x1 - self._x0)

    def _y(self, value: float) -> float:
        low, high = self._y_range
        return self._y1 - (value - low) / (high - low) * (self._y1 - self._y0)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Return a range with some room around the values; around values that are all but one, as much as it is large."""
    low, high = min(values), max(values)
    is_one = high - low <= 1e-6 * max(abs(low), abs(high))
    room = (0.5 * abs(high) or 1.0) if is_one else 0.06 * (high - low)
    return low - room, high + room


def _labels(numbers: Sequence[float]) -> list[str]:
    """Write the numbers with as many decimals as their distance needs."""
    step = min((after - before for before, after in pairwise(numbers)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{number + 0.0:.{decimals}f}" for number in numbers]


def _mixed(color: str) -> str:
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(BAR_MIX * part + (1 - BAR_MIX) * 255):02x}" for part in parts)


def _legend_places(lengths: Sequence[float], width: float) -> list[tuple[float, float]]:
    """Return where each entry of a legend begins, row by row."""
    places: list[tuple[float, float]] = []
    x, y = float(LEFT), 0.0
    for length in lengths:
        if x + length > width and x > LEFT:
            x, y = float(LEFT), y + LEGEND_ROW
        places.append((x, y))
        x += length
    return places
