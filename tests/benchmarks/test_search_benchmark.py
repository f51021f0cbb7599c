"""The comparison of searchers: fronts that are known, costs that are cut, numbers that agree with closed forms."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search.__main__ import main, make_tasks, read_problems
from benchmarks.search.analytic import ANALYTIC, Analytic
from benchmarks.search.comparison import Comparison, compare
from benchmarks.search.picture import _apart
from benchmarks.search.problem import Scores
from benchmarks.search.searchers import PEERS, read_searchers
from benchmarks.search.trace import Step, Trace, run
from evomerge.campaign.plan import StageSpace
from evomerge.campaign.sections import StageSection
from evomerge.errors import CampaignError
from evomerge.families.family import FamilySummary
from evomerge.front.pareto import hypervolume, non_dominated
from evomerge.records import Candidate, Measurement, Split

STAGES = "[{proposer: sobol, evaluations: 4}, {proposer: cma_es, population: 5}]"


@pytest.fixture(params=ANALYTIC.values(), ids=ANALYTIC)
def analytic(request: pytest.FixtureRequest) -> Analytic:
    return request.param


def test_no_point_dominates_the_true_front(analytic: Analytic) -> None:
    """Points all over the box, and points near the Pareto set, where a wrong front would show."""
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.ones(analytic.num_objectives), 500)
    pareto = analytic.pareto_points(weights)
    assert ((pareto >= 0) & (pareto <= 1)).all()
    near = np.clip(pareto + 0.03 * rng.standard_normal(pareto.shape), 0, 1)
    values = analytic.values(np.concatenate([near, rng.uniform(size=pareto.shape)]))
    better = (values[:, None] >= analytic.front).all(axis=2) & (values[:, None] > analytic.front + 1e-9).any(axis=2)
    assert not better.any()
    assert non_dominated(analytic.front).all()


def test_each_objective_is_best_at_its_centre_and_the_front_reaches_it(analytic: Analytic) -> None:
    np.testing.assert_allclose(np.diag(analytic.values(analytic.centers)), 1.0, atol=1e-9)
    np.testing.assert_allclose(analytic.front.max(axis=0), 1.0, atol=1e-9)


def test_fronts_have_the_shapes_they_are_named_after() -> None:
    """Closed forms for one Hessian and two objectives: at share t of the way, q is t^2 and (1 - t)^2."""
    np.testing.assert_allclose(ANALYTIC["linear"].front.sum(axis=1), 1.0, atol=1e-9)
    assert hypervolume(ANALYTIC["linear"].front, np.zeros(2)) == pytest.approx(0.5, abs=0.005)
    t = np.linspace(0, 1, 1001)
    bell = np.exp(-5 * np.stack([t**2, (1 - t) ** 2], axis=1))
    concave = ANALYTIC["concave"]
    along = concave.centers[0] + t[:, None] * (concave.centers[1] - concave.centers[0])
    np.testing.assert_allclose(concave.values(along), bell, atol=1e-9)
    for weight in np.linspace(0.05, 0.95, 19):  # weighted sums find the ends alone
        found = t[(bell @ [weight, 1 - weight]).argmax()]
        assert min(found, 1 - found) < 0.12
    for weight in np.linspace(0.05, 0.95, 19):  # and all of a front that bulges
        found = t[(-np.stack([t**2, (1 - t) ** 2], axis=1) @ [weight, 1 - weight]).argmax()]
        assert found == pytest.approx(1 - weight, abs=1e-3)


def test_noise_is_of_the_stated_size_and_a_points_own() -> None:
    problem = ANALYTIC["noisy"]
    scorer, other = problem.open(0).scorer, problem.open(1).scorer
    candidates = [Candidate(point=tuple(point)) for point in np.random.default_rng(0).uniform(size=(400, 4)).tolist()]
    noise = []
    for candidate in candidates:
        scores = scorer.score(candidate, "search").scores
        assert {score.stderr for score in scores.values()} == {problem.noise}
        truth = problem.values(np.array(candidate.point))
        noise.append([score.value for score in scores.values()] - truth)
        assert [score.value for score in scorer.score(candidate, "test").scores.values()] == truth.tolist()
    assert np.std(noise) == pytest.approx(problem.noise, rel=0.1)
    assert abs(np.corrcoef(np.array(noise).T)[0, 1]) < 0.2
    again = scorer.score(candidates[0], "search").scores["expert0"].value
    assert again == scorer.score(candidates[0], "search").scores["expert0"].value
    assert again != other.score(candidates[0], "search").scores["expert0"].value


def test_a_run_is_cut_by_cost_repeats_itself_and_has_test_values_wherever_they_are_needed() -> None:
    problem = ANALYTIC["noisy"]
    (task,) = make_tasks(problem, read_searchers(f"two={STAGES}"), [3], 30)
    told: list[float] = []
    first = run(problem.open(3), task.stages, 3, 30, told.append)
    second = run(problem.open(3), task.stages, 3, 30, lambda _: None)
    assert [step.search for step in first.steps] == [step.search for step in second.steps]
    assert first.costs[-1] == 30 == told[-1]
    assert [step.stage for step in first.steps] == [0] * 4 + [1] * 26
    assert any(step.test is None for step in first.steps)
    for cost in range(1, 31):
        assert np.isfinite(first.tested(first.front(cost))).all()


@dataclass(frozen=True)
class Costly:
    """Candidates that cost more than a forward, as after a descent."""

    inner: Scores
    cost: float

    def configure(self, stage_space: StageSpace) -> None:
        self.inner.configure(stage_space)

    def score(self, subject: Candidate, split: Split) -> Measurement:
        return replace(self.inner.score(subject, split), cost=self.cost)


def test_the_budget_is_of_cost_and_not_of_candidates() -> None:
    opened = ANALYTIC["noisy"].open(0)
    (task,) = make_tasks(ANALYTIC["noisy"], read_searchers("sobol"), [0], 10)
    costly = replace(opened, scorer=Costly(opened.scorer, 2.5))
    assert run(costly, task.stages, 0, 10, lambda _: None).costs.tolist() == [2.5, 5, 7.5, 10]


def trace(searched: Sequence[float], cost: float = 1.0) -> Trace:
    """One objective against its opposite, so that every candidate is on the front; test values are the search's."""
    steps = [Step(stage=0, cost=cost, search=(x, 1 - x), test=(x, 1 - x), propose_s=0.1, score_s=0.3) for x in searched]
    return Trace(steps, {"base": (0.0, 0.0), "expert:a": (-0.5, 0.1)})


def test_what_was_not_paid_for_is_not_on_the_front() -> None:
    one = trace([0.1, 0.2, 0.3], cost=4.5)
    assert [one.front(cost) for cost in (4, 4.5, 9, 13.4, 13.5)] == [[], [0], [0, 1], [0, 1], [0, 1, 2]]


def of(**runs: list[Trace]) -> Comparison:
    return compare("made up", 2, runs, "zero", 3, None)


def test_curves_wins_and_intervals_agree_with_numbers_made_by_hand() -> None:
    """Hypervolume of (x, 1 - x) alone is x - x^2; Student's t at 95 % with two degrees of freedom is 2.91999."""
    good, bad = [0.5, 0.4, 0.3], [0.1, 0.1, 0.2]
    found = of(bad=[trace([x] * 3) for x in bad], good=[trace([0.05, x, x]) for x in good])
    assert found.costs_G.tolist() == [1, 2, 3]
    np.testing.assert_allclose(found.volumes["bad"][:, -1], [0.09, 0.09, 0.16])
    expected = [0.25 + 0.05 * 0.45, 0.24 + 0.05 * 0.35, 0.21 + 0.05 * 0.25]  # and what (0.05, 0.95) adds
    np.testing.assert_allclose(found.volumes["good"][:, -1], expected)
    np.testing.assert_allclose(found.means["good"], 0.5)
    assert (found.wins("good", "bad"), found.wins("bad", "good")) == (1, 0)
    assert found.costs_to_reach("good").tolist() == [2, 2, 2]
    assert found.costs_to_reach("bad").tolist() == [np.inf] * 3
    assert found.focus == "bad"
    gain = np.array([0.09, 0.09, 0.16]) - expected
    difference = found.difference("bad", 3)
    assert difference.other == "good"
    assert difference.gain == pytest.approx(gain.mean() / np.mean(expected))
    assert difference.half_width == pytest.approx(2.91999 * gain.std(ddof=1) / 3**0.5 / np.mean(expected), rel=1e-5)
    assert found.propose_share["bad"] == pytest.approx(0.25)


def test_hindsight_takes_the_best_of_all_searchers_trials_and_no_more_than_the_focus_has() -> None:
    steps = [
        Step(stage=0, cost=cost, search=search, test=test, propose_s=0, score_s=1)
        for cost, search, test in ((2, None, None), (1, (0.1, 0.1), (0.2, 0.1)), (1, (0.45, 0.9), (0.3, 0.5)))
    ]
    focus, other = Trace(steps, {"base": (0.0, 0.0)}), trace([0.5, 0.2, 0.1, 0.3], cost=1)
    found = compare("x", 2, {"auto": [focus], "other": [other]}, "zero", 4, None)
    assert found.costs_G.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(found.hindsight, [[0, 0, 0.15, 0.25]])  # first what is best on search values


def test_who_ends_alike_wins_half_and_is_there_when_it_gets_there() -> None:
    found = of(one=[trace([0.5] * 3)], other=[trace([0.5] * 3)])
    assert (found.wins("one", "other"), found.wins("other", "one")) == (0.5, 0.5)
    assert found.costs_to_reach("one").tolist() == [1]


def test_the_best_mean_is_chosen_on_search_values_and_reported_on_test_values() -> None:
    values = [((0.9, 0.3), (0.2, 0.2)), ((0.3, 0.8), (0.7, 0.7)), ((0.7, 0.6), (0.4, 0.3))]
    steps = [Step(stage=0, cost=1, search=s, test=t, propose_s=0, score_s=1) for s, t in values]
    found = of(one=[Trace(steps, {"base": (0.0, 0.0)})])
    np.testing.assert_allclose(found.means["one"], [[0.2, 0.2, 0.35]])


def test_the_reference_point_is_zero_the_base_or_the_worst_model() -> None:
    runs = {"one": [trace([0.5])]}
    volumes = {name: compare("x", 2, runs, name, 1, None).volumes["one"][0, 0] for name in ("zero", "base", "worst")}
    assert volumes == pytest.approx({"zero": 0.25, "base": 0.25, "worst": 0.5})


def test_distance_to_the_true_front() -> None:
    front = np.array([[0.5, 0.5], [0.5, 0.9]])
    runs = {"one": [trace([0.5, 0.2])], "late": [trace([0.5], cost=2)]}
    found = compare("x", 2, runs, "zero", 2, front)
    np.testing.assert_allclose(found.distances["one"], [[(0 + 0.4) / 2, (0 + np.hypot(0.3, 0.1)) / 2]])
    np.testing.assert_allclose(found.distances["late"], [[np.nan, 0.2]])


def test_searchers_are_read_from_names_files_and_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("search:\n- {proposer: nsga2, population: 8}\n")
    found = read_searchers(f"auto, tpe,two={STAGES},mine={tmp_path / 'mine.yaml'},{','.join(PEERS)}")
    assert list(found) == ["auto", "tpe", "two", "mine", *PEERS]
    assert found["two"] == [
        StageSection(proposer="sobol", evaluations=4),
        StageSection(proposer="cma_es", options={"population": 5}),
    ]
    del found["pymoo_nsga2"]  # its environment would be made
    make_tasks(ANALYTIC["convex"], found, [0], 20)  # options that a proposer does not know are refused here


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nsga", "unknown searcher 'nsga'.*nsga"),
        ("tpe,tpe", "tpe is given twice"),
        ("x={proposer: tpe}", "expected a list of stages"),
        ("x=[{proposer: none}]", r"x\[0\].proposer: unknown proposer 'none'"),
        ("x=[{evaluations: 3}]", r"x\[0\].proposer: missing"),
        ("x=nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_a_searcher_that_is_none_is_named(text: str, message: str) -> None:
    with pytest.raises(CampaignError, match=message):
        read_searchers(text)


def test_options_beside_their_stage_are_not_left_out_silently() -> None:
    found = read_searchers("mine=[{proposer: cma_es, options: {population: 5}}]")
    with pytest.raises(CampaignError, match="options"):
        make_tasks(ANALYTIC["convex"], found, [0], 20)


def test_a_finished_run_is_not_run_again_and_every_searcher_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", "noisy,linear", "--searchers", f"sobol,two={STAGES}", "--out", str(tmp_path), "--budget"]
    monkeypatch.setattr(sys, "argv", [*command, "14", "--seeds", "1"])
    main()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(before) == 4
    monkeypatch.setattr(sys, "argv", [*command, "14", "--seeds", "2"])
    main()
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(after) == 8
    assert before.items() <= after.items()
    monkeypatch.setattr(sys, "argv", [*command, "12", "--seeds", "1"])
    main()
    assert len(list(tmp_path.glob("*.json"))) == 12
    shown = capsys.readouterr().out
    for text in (
        "noisy: 2 objectives, 4 dimensions",
        "hypervolume of test values above zero",
        "IGD",
        "sobol",
        "two",
        "at 14",
    ):
        assert text in shown
    page = (tmp_path / "noisy+linear.html").read_text()
    assert "Plotly.newPlot" in page
    for text in ("sobol", "two", "true front"):
        assert text in page.rsplit("Plotly.newPlot", 1)[1]


@pytest.mark.parametrize("wrong", [["noisy", "--seeds", "0"], ["noisy", "--searchers", ","], [","]])
def test_nothing_to_compare_is_refused(wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["search", *wrong])
    with pytest.raises(SystemExit, match="2"):
        main()


def test_variants_of_a_family(digits4: FamilySummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two objectives, one coefficient an expert; scored by the real models."""
    (problem,) = read_problems("digits4:2:model")
    plan = problem.plan(0)
    assert [objective.name for objective in plan.objectives] == list(digits4.scores["base"])[:2]
    assert len(plan.space) == len(digits4.experts)
    assert problem.plan(1).splits["rot90"]["test"].tolist() != plan.splits["rot90"]["test"].tolist()
    (task,) = make_tasks(problem, read_searchers("sobol"), [0], 2)
    found = run(problem.open(0), task.stages, 0, 2, lambda _: None)
    assert found.costs.tolist() == [1, 2]
    assert 0 <= found.tested(found.front(2)).min() <= found.tested(found.front(2)).max() <= 1
    task.save(tmp_path, found)
    loaded = task.load(tmp_path)
    assert loaded is not None
    assert loaded.steps[1].search == found.steps[1].search
    with pytest.raises(CampaignError, match="digits4:sideways: expected a number of objectives up to 4"):
        read_problems("digits4:sideways")


def test_stages_with_spaces_of_their_own_are_other_searchers(digits4: FamilySummary, tmp_path: Path) -> None:
    """One coefficient an expert, then one an expert and layer: the second stage begins near the best of the first."""
    (problem,) = read_problems("digits4:2")
    ladder = "[{proposer: sobol, evaluations: 3, space: {groups: model}}, {proposer: cma_es, sigma: 0.000001}]"
    plain, laddered = make_tasks(
        problem, read_searchers(f"plain={ladder.replace('model', 'layer')},x={ladder}"), [0], 4
    )
    assert plain.path(tmp_path) != laddered.path(tmp_path)
    assert [stage.num_dimensions for stage in laddered.stages] == [4, 32]
    steps = run(problem.open(0), laddered.stages, 0, 4, lambda _: None).steps
    best = max((step.search for step in steps[:3] if step.search), key=sum)
    assert steps[3].search == pytest.approx(best, abs=0.01)


def test_labels_are_pushed_apart_and_keep_their_order() -> None:
    assert _apart([0.5, 0.0, 0.51], 0.1) == pytest.approx([0.455, 0.0, 0.555])
    assert _apart([0.0, 0.0, 0.0], 1.0) == pytest.approx([-1, 0, 1])
