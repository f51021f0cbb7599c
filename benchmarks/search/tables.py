"""The tables of a comparison: every searcher is shown, losers too."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.search.comparison import LEVEL, Comparison
from evomerge.records import Floats

REFERENCES = {"zero": "zero", "base": "the base's scores", "worst": "the worst of base and experts an objective"}


def tables(found: Comparison) -> Group:
    """Return hypervolume, IGD, best mean, what there is at the end, and the difference to the best other searcher."""
    return Group(*_tables(found))


def _tables(found: Comparison) -> Iterator[Group]:
    what = f"{found.problem}: {found.num_objectives} objectives, {found.num_dimensions} dimensions"
    seeds = f"medians of {found.num_seeds} seeds, lowest to highest" if found.num_seeds > 1 else "one seed"
    ceiling = "" if found.ceiling is None else f"; the true front has {_number(found.ceiling, 4)}"
    above = REFERENCES[found.reference]
    seen = f"hindsight: as many models as {found.focus} has by then, chosen from all searchers' trials of the seed"
    curves = {**found.volumes, "hindsight": found.hindsight}
    yield _by_cost(found, curves, f"{what}\nhypervolume of test values above {above}; {seeds}{ceiling}\n{seen}")
    if found.distances:
        distance = "IGD: from the true front to the nearest found point, on average (less is better)"
        yield _by_cost(found, found.distances, f"{distance}; {seeds}")
    yield _by_cost(found, found.means, f"best mean of objectives, on test items; {seeds}")
    yield _at_the_end(found)
    if len(found.searchers) > 1:
        yield _wins(found)
        yield _differences(found)


def _by_cost(found: Comparison, curves: Mapping[str, Floats], title: str) -> Group:
    rows = (
        [name, *(_spread(curve_SG[:, found.place(cost)]) for cost in found.table_costs)]
        for name, curve_SG in curves.items()
    )
    return _titled(title, ["searcher", *_at(found)], rows)


def _at_the_end(found: Comparison) -> Group:
    """Cost to reach where the best other searcher ends, and seconds of proposing."""
    has_others = len(found.searchers) > 1
    columns = [
        "searcher",
        *(["reaches at", "in seeds"] if has_others else []),
        *("s to propose one", "% of time"),
    ]
    rows = []
    for name in found.searchers:
        row = [name]
        if has_others:
            costs_S = found.costs_to_reach(name)
            median = float(np.quantile(costs_S, 0.5, method="higher"))
            row += [f"{median:.0f}" if np.isfinite(median) else "-", f"{np.isfinite(costs_S).sum()}"]
        rows.append([*row, f"{found.propose_s[name]:.3f}", f"{100 * found.propose_share[name]:.0f}"])
    reaching = "the cost at which it is where the best other one ends (median), and in how many seeds; " * has_others
    return _titled(f"{reaching}proposing", columns, rows)


def _wins(found: Comparison) -> Group:
    rows = [
        [name, *("" if other == name else f"{100 * found.wins(name, other):.0f}" for other in found.searchers)]
        for name in found.searchers
    ]
    return _titled("% of seeds in which the row ends above the column", ["", *found.searchers], rows)


def _differences(found: Comparison) -> Group:
    """One column a cost, at which another searcher may be the best other one."""
    title = f"{found.focus} over the best other searcher, paired, in % of that one; {100 * LEVEL:.0f} % interval"
    differences = [found.difference(found.focus, cost) for cost in found.table_costs]
    ends = [(100 * (one.gain - one.half_width), 100 * (one.gain + one.half_width)) for one in differences]
    rows = [
        ["best other", *(one.other for one in differences)],
        ["difference", *("-" if np.isnan(one.gain) else f"{100 * one.gain:+.1f}" for one in differences)],
        ["interval", *("-" if np.isnan(low) else f"{low:+.1f} to {high:+.1f}" for low, high in ends)],
    ]
    return _titled(title, ["", *_at(found)], rows)


def _at(found: Comparison) -> list[str]:
    return [f"at {cost:g}" for cost in found.table_costs]


def _titled(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Group:
    table = Table(box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return Group(Text(title, style="bold"), table)


def _spread(values_S: Floats) -> str:
    """Median, and below it lowest to highest."""
    median = _number(float(np.median(values_S)), 4)
    low, high = (_number(float(end), 3) for end in (values_S.min(), values_S.max()))
    return median if len(values_S) == 1 else f"{median}\n[dim]{low} to {high}[/]"


def _number(value: float, digits: int) -> str:
    """Without the zero before the point; a dash for none."""
    if np.isnan(value):
        return "-"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
