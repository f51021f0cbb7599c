"""The page in a real browser: it picks as the command does, keeps up with a campaign, and lets nothing in or out."""

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browsing import chromium, evomerge, served, visit
from playwright.sync_api import expect
from typer.testing import CliRunner

from benchmarks.page import EXPERTS, write_run
from evomerge.campaign.plan import make_plan
from evomerge.campaign.recipe_file import read_recipe
from evomerge.cli import app
from evomerge.evidence.compare import paired_difference
from evomerge.evidence.intervals import difference_intervals, student
from evomerge.evidence.scores import source_codes
from evomerge.families.family import FamilySummary
from evomerge.front.pick import knee, prefer
from evomerge.ledger.location import locate
from evomerge.records import Measurement, Objective, Score
from evomerge.report.html import write_report
from evomerge.report.page.arrays import pack, pack_bits, pack_columns
from evomerge.report.page.document import one_document
from evomerge.report.page.parts import PARTS, part_json
from evomerge.run.comparison import compare_models
from evomerge.run.run import Run, open_run

pytestmark = pytest.mark.browser
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
VIEWS = ("front", "model", "surrogate", "run")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(made_up: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(made_up, path)
    return path.as_uri()


def drag(page: Any, objective: str, weight: float) -> None:
    """Move an objective's slider."""
    page.get_by_label(f"weight of {objective}", exact=True).fill(str(weight))


def picked(page: Any) -> int:
    """The trial that the page says is picked, once it has drawn what was asked for last."""
    page.evaluate("() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    return int(re.findall(r"Picked trial (\d+)", page.locator("#picked").text_content())[0])


def expect_picked(page: Any, number: int) -> None:
    expect(page.locator("#picked")).to_contain_text(re.compile(rf"Picked trial {number}\b"))


def expect_view(page: Any, name: str) -> None:
    expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")


def test_the_rules_of_picking_are_the_same(browser: Any, report: str) -> None:
    rng = np.random.default_rng(0)
    fronts = [rng.normal(size=(rng.integers(1, 30), rng.integers(1, 7))) for _ in range(200)]
    fronts[0][:, 0] = 0.5  # an objective in which all are equal
    weights = [rng.random(front.shape[1]) * rng.integers(0, 2, front.shape[1]) + 1e-3 for front in fronts]
    asked = [[front.tolist(), weight.tolist()] for front, weight in zip(fronts, weights, strict=True)]
    with visit(browser, report) as page:
        found = page.evaluate("(asked) => asked.map(([v, w]) => [Pick.knee(v), Pick.prefer(v, w)])", asked)
    expected = [[knee(front), prefer(front, weight)] for front, weight in zip(fronts, weights, strict=True)]
    assert found == expected


@pytest.mark.parametrize("is_binary", [True, False])
def test_paired_differences_are_the_same(browser: Any, report: str, is_binary: bool) -> None:
    rng = np.random.default_rng(1)
    items_2N = rng.integers(0, 2, (2, 60)) if is_binary else rng.normal(size=(2, 60))
    items_2N = items_2N.astype(np.float32)
    sources = rng.integers(0, 25, 60).tolist()
    codes_N = source_codes(sources)
    objective = Objective(name="a", direction="max")
    ours, theirs = (
        Measurement(split="test", scores={"a": Score(value=0, stderr=0, items=items)}, cost=1, seconds={})
        for items in items_2N
    )
    expected = paired_difference(ours, theirs, [objective], {"a": sources})
    ((low, high),) = difference_intervals(np.diff(items_2N[::-1].astype(np.float64), axis=0), sources)
    frame = {"codes": codes_N.tolist(), "factor": student(int(codes_N.max()) + 1, 0.95)}
    with visit(browser, report) as page:
        found = page.evaluate("([a, b, frame]) => Compare.paired(a, b, frame)", [*items_2N.tolist(), frame])
    assert found == pytest.approx({"value": expected.value, "error": expected.stderr, "low": low, "high": high})


def test_arrays_are_read_as_they_were_written(browser: Any, report: str) -> None:
    flags = np.arange(11) % 3 == 0
    written = [pack([3, 700, -70_000]), pack(np.array([0.25, 1e-300])), pack_bits(flags)]
    numbers_ND = np.random.default_rng(2).normal(size=(4, 3))
    by_column = "(packed) => [0, 1, 2, 3].map((n) => [0, 1, 2].map((d) => Data.unpackColumns(packed, 4)(n, d)))"
    with visit(browser, report) as page:
        read = page.evaluate("(written) => written.map((packed) => Array.from(Data.unpack(packed)))", written)
        columns_ND = page.evaluate(by_column, pack_columns(numbers_ND))
    assert read == [[3, 700, -70_000], [0.25, 1e-300], flags.astype(int).tolist()]
    np.testing.assert_allclose(columns_ND, numbers_ND, atol=1e-4)


def test_sliders_and_bounds_pick_what_the_command_would(browser: Any, report: str, made_up: Run) -> None:
    with visit(browser, report) as page:
        expect_picked(page, made_up.pick(at_knee=True).number)
        drag(page, "code", 4)
        drag(page, "chat", 0.5)
        preference = {"code": 4.0, "chat": 0.5}
        expect_picked(page, made_up.pick(preference=preference).number)
        values = {t.number: t.measurement.scores["maths"].value for t in made_up.front if t.measurement}
        floor = sorted(values.values())[-3]
        page.get_by_label("maths at least", exact=True).fill(str(floor))
        expect_picked(page, made_up.pick(preference=preference, minimum={"maths": floor}).number)
        page.get_by_label("maths at least", exact=True).fill("2")
        expect(page.locator("#picked")).to_contain_text("No model of the front keeps these bounds")
        page.get_by_role("button", name="Reset weights and bounds").click()
        expect_picked(page, made_up.pick(at_knee=True).number)


def test_the_copied_command_exports_the_picked_model(
    browser: Any, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run(small_run)
    with served(small_run) as address, visit(browser, address) as page:
        drag(page, run.steering[0].name, 5)
        number = picked(page)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy").click()
        page.get_by_role("button", name="Copied").wait_for()
        program, *words = shlex.split(page.evaluate("() => navigator.clipboard.readText()"))
    assert program == "evomerge"
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    recipe = read_recipe(tmp_path / "merged" / "recipe.yaml").recipe
    assert recipe.values == make_plan(run.campaign).recipe(run.trials[number].point).values


def test_it_keeps_up_with_a_campaign_and_keeps_what_was_chosen(
    browser: Any, small_digits: FamilySummary, tmp_path: Path
) -> None:
    sections = yaml.safe_load(small_digits.campaign.read_text())
    sections |= {"search": [{"proposer": "sobol"}], "budget": {"evaluations": 5000}}
    file = small_digits.campaign.with_name("live.yaml")
    file.write_text(yaml.safe_dump(sections))
    (tmp_path / "runs").mkdir()
    with served(tmp_path / "runs") as address, evomerge("search", file, "--run", tmp_path / "runs" / "live") as driver:
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("link", name="live").wait_for(timeout=60_000)  # the list shows the run once it has begun
        page.close()
        with visit(browser, f"{address}run/live/") as page:
            trials = page.locator("#facts div", has_text="trials").locator("dd")
            page.wait_for_selector("#state.is-running")
            name = sections["objectives"][0]["name"]
            drag(page, name, 3.5)
            page.get_by_role("tab", name="Run").click()
            seen = trials.text_content()
            trials.filter(has_not_text=re.compile(f"^{seen}$")).wait_for()
            expect(page.get_by_label(f"weight of {name}", exact=True)).to_have_value("3.5")
            expect_view(page, "Run")
            driver.terminate()
            driver.wait()
            page.wait_for_selector("#state.is-stopped")


def test_elsewhere_it_asks_for_the_token(browser: Any, small_run: Path) -> None:
    with served(small_run, "--host", "0.0.0.0") as address:
        token = address.partition("?token=")[2]
        here = re.sub(r"//[^:/]+:", "//127.0.0.1:", address.partition("?")[0])
        stranger = browser.new_context()
        for refused in (here, f"{here}?token=wrong", f"{here}run/digits/overview", f"{here}static/page.js"):
            assert stranger.new_page().goto(refused).status == 403
        stranger.close()
        with visit(browser, f"{here}?token={token}") as page:
            assert "token" not in page.url
            expect(page.locator("h1")).to_have_text(open_run(small_run).campaign.name)


def test_what_a_run_says_is_never_markup(browser: Any, made_up: Run, tmp_path: Path) -> None:
    parts = {name: part_json(made_up, name, item_bytes=10**6) for name in PARTS}
    overview = json.loads(parts["overview"])
    overview |= {"name": EVIL, "experts": [EVIL], "operators": [EVIL], "stages": [EVIL], "command": EVIL}
    overview["objectives"][0]["name"] = EVIL
    overview["numbers"]["names"][0] = [EVIL, EVIL, EVIL]
    overview["trials"]["failure"]["texts"] = [text and EVIL for text in overview["trials"]["failure"]["texts"]]
    overview["trials"]["worker"]["texts"] = [EVIL for _ in overview["trials"]["worker"]["texts"]]
    surrogate = json.loads(parts["surrogate"]) | {"names": [[EVIL, EVIL, EVIL]] * 32}
    path = tmp_path / "evil.html"
    path.write_text(one_document({**parts, "overview": json.dumps(overview), "surrogate": json.dumps(surrogate)}))
    with visit(browser, path.as_uri()) as page:
        for view in VIEWS:
            page.locator(f"#tab-{view}").click()
            page.wait_for_selector(f"#view-{view} .card")
            page.locator(f"#view-{view} tbody, #view-{view} .main-svg").first.wait_for(state="attached")
        expect(page.locator("h1")).to_have_text(EVIL)
        assert page.locator("body img").count() == 0


def overlapping(page: Any, view: str) -> list[str]:
    """Texts below an axis, or in the cells of a row, that cover the next one; slanted ones may."""
    found: list[str] = page.evaluate(
        """(view) => [...document.querySelectorAll(`#view-${view} .xaxislayer-above, #view-${view} .hm`)]
            .flatMap((layer) => {
                const texts = [...layer.querySelectorAll("text")];
                const level = texts.filter((text) => !text.getAttribute("transform")?.includes("rotate(-"));
                const boxes = level.map((text) => [text.textContent, text.getBoundingClientRect()]);
                boxes.sort(([, a], [, b]) => Math.round(a.top - b.top) || a.left - b.left);
                return boxes.filter(([, box], i) => i + 1 < boxes.length && Math.abs(boxes[i + 1][1].top - box.top) < 3
                    && box.right > boxes[i + 1][1].left + 1).map(([text]) => text);
            })""",
        view,
    )
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [800, 1440])
def test_every_view_fits_and_draws(browser: Any, report: str, theme: str, width: int) -> None:
    with visit(browser, report, color_scheme=theme, viewport={"width": width, "height": 900}) as page:
        for view in VIEWS:
            page.locator(f"#tab-{view}").click()
            page.locator(f"#view-{view} .card").first.wait_for()
            if view != "run":
                page.locator(f"#view-{view} .main-svg").first.wait_for(state="attached")
            if view == "surrogate":  # its pictures are drawn one after the other
                expect(page.locator("#view-surrogate .hm image")).to_have_count(4)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert overlapping(page, view) == []
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        page.locator("#theme").click()
        expect(page.locator("html")).not_to_have_attribute("data-theme", theme)


def test_the_keyboard_reaches_everything(browser: Any, report: str, made_up: Run) -> None:
    with visit(browser, report) as page:
        page.locator("#tab-front").focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        expect(page.locator("#tab-run")).to_be_focused()
        page.locator(".trials").focus()
        page.locator(".trials").evaluate(  # three at once: faster than any of them is drawn
            """(rows) => { for (let i = 0; i < 3; i++)
                rows.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true })); }"""
        )
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowUp")
        expect_picked(page, made_up.pick(at_knee=True).number + 3)
        page.get_by_role("button", name="maths", exact=True).focus()
        page.keyboard.press("Enter")
        best = max((t for t in made_up.trials if t.measurement), key=lambda t: t.measurement.scores["maths"].value)  # type: ignore[union-attr]
        first = "(trial) => document.querySelector('tr.row').dataset.trial === trial"
        page.wait_for_function(first, arg=str(best.number), timeout=5000)
        assert page.locator("tr.row").count() < len(made_up.trials)


def test_an_address_shows_what_was_chosen(browser: Any, report: str) -> None:
    with visit(browser, report) as page:
        drag(page, "law", 5)
        number = picked(page)
        page.get_by_role("tab", name="Model").click()
        page.get_by_label("Compare with").select_option("expert:law")
        page.wait_for_url(re.compile("versus=expert"))
        address = page.url
    with visit(browser, address) as page:
        expect_picked(page, number)
        expect_view(page, "Model")
        expect(page.get_by_label("Compare with")).to_have_value("expert:law")
        page.get_by_text("Wrong to right").wait_for()


def dominated(run: Run) -> list[int]:
    return [trial.number for trial in run.trials if trial.state == "scored" and trial not in run.front]


def gains(page: Any, over: str) -> list[str]:
    """What the picked model gains over another one, as the page shows it."""
    row = page.locator("#view-model .gains tr", has=page.get_by_role("button", name=f"over {over}", exact=True))
    return [cell.split(" ±")[0].lstrip("▲▼ ") for cell in row.locator("td > span:first-child").all_text_contents()]


@pytest.mark.parametrize("is_live", [False, True])
def test_any_scored_trial_is_compared_as_the_command_does(
    browser: Any, report: str, made_up: Run, is_live: bool
) -> None:
    ours, theirs = dominated(made_up)[3:5]
    with contextlib.ExitStack() as stack:
        folder = made_up.location.file(".")
        address = stack.enter_context(served(folder)) if is_live else report
        page = stack.enter_context(visit(browser, f"{address}#view=run"))
        page.locator(f"tr.row[data-trial='{ours}']").click()
        page.get_by_role("tab", name="Model").click()
        field = page.get_by_label("or any trial, by number")
        for wrong, why in (("49", "There is no scored trial 49."), (str(ours), "This one is picked already.")):
            field.fill(wrong)
            field.blur()
            expect(field).to_have_js_property("validationMessage", why)
        field.fill(str(theirs))
        field.press("Enter")
        page.get_by_text("Wrong to right").wait_for()
        for label, subject in ((f"trial {theirs}", f"trial:{theirs}"), ("uniform", "uniform")):
            pairs = compare_models(made_up, f"trial:{ours}", subject).pairs
            expected = [f"{pair.objective.sign * pair.gain.value:+z.3f}".replace("-", "−") for pair in pairs]  # noqa: RUF001
            assert [gain.removeprefix("+") for gain in gains(page, label)] == [e.removeprefix("+") for e in expected]
        assert "Search items are those that models are picked by" in page.locator("#view-model").text_content()
        page.get_by_role("button", name=f"less those of trial {theirs}").click()
        page.get_by_role("button", name="Compare others with it").click()  # now the dominated one is what others face
        page.get_by_role("button", name="Balance").click()
        page.locator(".gains tr.is-versus", has_text=f"over trial {ours}").wait_for()


def test_what_a_report_has_no_room_for_names_its_command(browser: Any, made_up: Run, tmp_path: Path) -> None:
    path = tmp_path / "small.html"
    path.write_text(one_document({name: part_json(made_up, name) for name in PARTS}))
    number = dominated(made_up)[3]
    with visit(browser, f"{path.as_uri()}#view=model&rule=trial&trial={number}&versus=uniform") as page:
        command = page.locator("#view-model code").first
        command.wait_for()
        program, *words = shlex.split(command.text_content())
    assert program == "evomerge"
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert (done.exit_code, f"trial {number} less" in done.output) == (0, True)


def test_what_cannot_be_compared_says_why(browser: Any, report: str) -> None:
    for trial, why in ((49, "Trial 49 has no scores."), (39, "Trial 39 was stopped early")):
        with visit(browser, f"{report}#view=model&rule=trial&trial={trial}&versus=uniform") as page:
            page.locator("#view-model .card", has_text="Gains and losses").get_by_text(why).wait_for()


def traces(page: Any) -> list[dict[str, Any]]:
    """What the picture of the front shows, once it is drawn."""
    picked(page)
    page.wait_for_function("() => document.querySelector('#front-plot').data")
    found: list[dict[str, Any]] = page.evaluate(
        """() => document.querySelector('#front-plot')._fullData.map(({ name, visible, xaxis, x, y, customdata, marker }) =>
            ({ name, visible, xaxis, x: [...x], y: [...y], subjects: customdata, colours: marker?.color }))"""
    )
    return found


def reports(tmp_path: Path, objectives: int) -> tuple[Run, str]:
    write_run(locate(tmp_path / "run"), 60, objectives=EXPERTS[:objectives])
    run, path = open_run(tmp_path / "run"), tmp_path / "report.html"
    path.write_text(one_document({name: part_json(run, name, item_bytes=10**6) for name in PARTS}))
    return run, path.as_uri()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_of_three_objectives_colour_says_the_third(browser: Any, tmp_path: Path, theme: str) -> None:
    run, address = reports(tmp_path, 3)
    with visit(browser, address, color_scheme=theme) as page:
        fronts = [trace for trace in traces(page) if trace["name"] == "front"]
        titles = page.locator("#front-plot .annotation-text").all_text_contents()
    thirds = (2, 1, 0)  # of the panels: objectives 0 and 1, 0 and 2, 1 and 2
    assert titles[::3] == [f"colour: {run.steering[m].name}" for m in thirds]
    for trace, m in zip(fronts, thirds, strict=True):
        values_N = [run.tested[subject].scores[run.steering[m].name].value for subject in trace["subjects"]]
        rgb_N3 = np.array([[int(part) for part in re.findall(r"\d+", colour)] for colour in trace["colours"]])
        lightness_N = rgb_N3 @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(lightness_N[np.argsort(values_N, kind="stable")]) >= 0).all()
        assert np.ptp(lightness_N) > 100


def pixels(page: Any) -> dict[str, list[float]]:
    """Where in the window each subject of the front's first panel or axis is, alone or in a crowd."""
    found: dict[str, list[float]] = page.evaluate(
        """() => { const plot = document.querySelector("#front-plot"), at = plot.getBoundingClientRect();
            const { xaxis, yaxis } = plot._fullLayout, found = {};
            for (const trace of plot._fullData.filter((trace) => trace.xaxis === "x" && trace.hoverinfo !== "skip"))
                trace.customdata?.forEach((subject, i) => { if (subject) found[subject] ??= [
                    at.left + xaxis._offset + xaxis.d2p(trace.x[i]), at.top + yaxis._offset + yaxis.d2p(trace.y[i])]; });
            return found; }"""
    )
    return found


@pytest.mark.parametrize(("drawn_as", "group"), [("pairs", "dominated"), ("pairs", "front"), ("parallel", "front")])
def test_each_of_a_crowd_can_be_pointed_at(browser: Any, report: str, made_up: Run, drawn_as: str, group: str) -> None:
    """Of a kind with more points than are drawn one by one: thousands in truth, a few here."""
    number_of = {"dominated": dominated(made_up), "front": [trial.number for trial in made_up.front]}
    with visit(browser, f"{report}#view=run&as={drawn_as}") as page:
        page.evaluate("Plots.MAX_DRAWN = 5")
        page.get_by_role("tab", name="Front").click()
        plot = page.locator("#front-plot")
        expect(plot.locator(".imagelayer image, .shapelayer path")).to_have_count(6 if drawn_as == "pairs" else 2)
        assert plot.locator("path.point").count() < 100  # they are one image a panel, or one shape
        places = pixels(page)
        pixels_N2 = np.array([*places.values()])
        gaps = {n: np.sort(np.hypot(*(pixels_N2 - places[f"trial:{n}"]).T))[1] for n in number_of[group]}
        number = max(gaps, key=lambda n: gaps[n])
        x, y = places[f"trial:{number}"]
        page.mouse.move(x + 2, y - 2)
        expect(plot.locator(".hovertext")).to_contain_text(f"trial {number}")
        page.mouse.click(x + 2, y - 2)
        expect_picked(page, number)
        grid_G2 = np.random.default_rng(0).uniform(pixels_N2.min(axis=0), pixels_N2.max(axis=0) + 1, (1000, 2))
        distances_G = np.hypot(*(grid_G2[:, None] - pixels_N2).transpose(2, 0, 1)).min(axis=1)
        assert distances_G.max() > 15
        page.mouse.move(*grid_G2[distances_G.argmax()])
        expect(plot.locator(".hovertext")).to_have_count(0)


def test_of_other_numbers_of_objectives_the_front_has_one_colour(browser: Any, tmp_path: Path) -> None:
    _, address = reports(tmp_path, 2)
    with visit(browser, address) as page:
        (front,) = (trace for trace in traces(page) if trace["name"] == "front")
        assert isinstance(front["colours"], str)


def test_parallel_axes_hold_all_that_is_drawn(browser: Any, report: str) -> None:
    def heights() -> list[float]:
        drawn = [trace for trace in traces(page) if trace["visible"] is True]
        return [height for trace in drawn for height in trace["y"] if height is not None]

    with visit(browser, f"{report}#as=parallel&versus=expert:chat") as page:
        assert 0 <= min(heights()) <= max(heights()) <= 1
        page.locator("#front-plot .traces", has_text="expert law").locator(".legendtoggle").click()
        page.wait_for_function(
            """() => document.querySelector('#front-plot')._fullData.some(({ name, visible, y }) =>
                name === 'expert law' && visible === true && Math.max(...y) <= 1)"""
        )
        assert 0 <= min(heights()) <= max(heights()) <= 1


def test_every_axis_of_a_narrow_window_has_its_name(browser: Any, made_up: Run, tmp_path: Path) -> None:
    parts = {name: part_json(made_up, name) for name in PARTS}
    overview = json.loads(parts["overview"])
    overview["objectives"] = [{**o, "name": f"{o['name']}_of_school", "sign": -1} for o in overview["objectives"]]
    path = tmp_path / "lower.html"
    path.write_text(one_document({**parts, "overview": json.dumps(overview)}))
    with visit(browser, f"{path.as_uri()}#as=parallel", viewport={"width": 800, "height": 900}) as page:
        names = page.locator("#front-plot .xtick text")
        expect(names).to_have_count(4)
        for name in names.all():
            expect(name).to_be_visible()
            expect(name).to_contain_text("_of_school(lower is better)")


def test_what_the_legend_hides_stays_hidden_and_nothing_else(browser: Any, report: str) -> None:
    with visit(browser, f"{report}#as=pairs") as page:
        hidden = lambda: {trace["name"] for trace in traces(page) if trace["visible"] is not True}  # noqa: E731
        assert hidden() == set()
        page.locator("#front-plot .traces", has_text="uniform").locator(".legendtoggle").click()
        page.wait_for_function(
            "() => document.querySelector('#front-plot')._fullData.some((trace) => trace.visible !== true)"
        )
        page.locator("[data-subject='expert:chat'] button").click()
        page.locator("#front-plot .legendtext", has_text="compared: expert chat").wait_for()
        assert hidden() == {"uniform"}
        page.get_by_role("button", name="parallel coordinates").click()
        page.locator("#front-plot .legendtext", has_text="expert law").wait_for()
        page.get_by_role("button", name="pairs").click()
        page.locator("#front-plot .legendtext", has_text="experts").wait_for()


def test_a_trial_without_test_scores_has_its_ring_where_its_point_is(browser: Any, report: str, made_up: Run) -> None:
    number = dominated(made_up)[3]
    names = [objective.name for objective in made_up.steering[:2]]
    with visit(browser, f"{report}#as=pairs&split=test&rule=trial&trial={number}") as page:
        ring = next(trace for trace in traces(page) if trace["name"] == "picked")
    assert [ring["x"][0], ring["y"][0]] == [made_up.searched[f"trial:{number}"].scores[name].value for name in names]


def test_what_is_picked_and_compared_stands_above_the_table_of_models(browser: Any, report: str, made_up: Run) -> None:
    ours, theirs = dominated(made_up)[3:5]  # the table has no other rows of these
    with visit(browser, f"{report}#rule=trial&trial={ours}&versus=trial:{theirs}") as page:
        rows = page.locator(".models tbody tr")
        for place, subject in enumerate((f"trial:{ours}", f"trial:{theirs}", "base")):
            expect(rows.nth(place)).to_have_attribute("data-subject", subject)


def test_no_picture_can_be_sent_to_a_host(browser: Any, report: str) -> None:
    """Plotly brings a button that uploads a picture's data."""
    with visit(browser, report) as page:
        traces(page)
        buttons = page.locator("#front-plot .modebar-btn").evaluate_all("(all) => all.map((b) => b.dataset.title)")
        assert "Download plot as a PNG" in buttons
        assert not any(re.search("share|cloud|send|edit", button, re.IGNORECASE) for button in buttons)
        assert page.evaluate("document.querySelector('#front-plot')._context.plotlyServerURL") == ""


def test_a_slider_that_is_dragged_writes_few_addresses(browser: Any, report: str, made_up: Run) -> None:
    """Browsers refuse to write hundreds in a row; the last is kept in any case."""
    with visit(browser, report) as page:
        page.evaluate(
            """() => { const plain = history.replaceState.bind(history); window.numWritten = 0;
                history.replaceState = (...words) => { window.numWritten += 1; plain(...words); }; }"""
        )
        page.get_by_label("weight of law", exact=True).evaluate(
            """(slider) => { for (let i = 0; i < 300; i++) {
                slider.value = i / 60; slider.dispatchEvent(new Event("input", { bubbles: true })); } }"""
        )
        expect_picked(page, made_up.pick(preference={"law": 5.0}).number)
        page.wait_for_url(re.compile("weights=1%2C1%2C1%2C5"))
        assert page.evaluate("window.numWritten") < 10


def test_history_goes_back_through_the_views(browser: Any, report: str, made_up: Run) -> None:
    with visit(browser, report) as page:
        drag(page, "law", 5)
        number = picked(page)
        page.get_by_role("tab", name="Model").click()
        page.get_by_role("tab", name="Run").click()
        for there in ("Model", "Front"):
            page.go_back()
            expect_view(page, there)
            expect_picked(page, number)
        page.go_forward()
        expect_view(page, "Model")
        expect_picked(page, number)
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#main")).to_be_focused()
        expect_view(page, "Model")
        expect_picked(page, number)
        page.evaluate("location.hash = 'view=run&rule=knee&weights=1,1,1,2'")  # as if typed
        expect_view(page, "Run")
        expect_picked(page, made_up.pick(at_knee=True).number)
        expect(page.get_by_label("weight of law", exact=True)).to_have_value("2")
