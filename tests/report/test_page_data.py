"""What the page is told is what the ledger holds."""

import json
import shutil
from base64 import b64decode
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.page import write_run
from evomerge.errors import RunError
from evomerge.evidence.intervals import score_intervals
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import locate
from evomerge.records import Candidate, Floats
from evomerge.report.front import front
from evomerge.report.page.evidence import evidence, item_texts, items
from evomerge.report.page.overview import STATES, overview, reference_models
from evomerge.report.page.parts import PARTS, part_json, trial_items_json
from evomerge.report.page.surrogate import surrogate
from evomerge.run.run import Run, open_run
from evomerge.run.volume import front_volume
from evomerge.splits import split_items


def unpacked(packed: dict[str, Any]) -> Floats:
    numbers: Floats = np.frombuffer(b64decode(packed["data"]), dtype=f"<{packed['kind']}").astype(np.float64)
    return numbers


@pytest.fixture(scope="module")
def shown(made_up: Run) -> dict[str, Any]:
    return overview(made_up)


def test_every_trial_has_its_scores_and_its_state(made_up: Run, shown: dict[str, Any]) -> None:
    columns = shown["trials"]
    states = [STATES[int(code)] for code in unpacked(columns["state"])]
    assert [number for number, state in enumerate(states) if state == "front"] == sorted(shown["front"])
    assert {states[49], states[99], states[39], states[-1]} == {"failed", "stopped", "waiting"}
    for m, objective in enumerate(made_up.objectives):
        expected = [t.measurement.scores[objective.name].value if t.measurement else np.nan for t in made_up.trials]
        np.testing.assert_array_equal(unpacked(columns["values"][m]), expected)
    failure = columns["failure"]
    assert failure["texts"][int(unpacked(failure["codes"])[99])] == made_up.trials[99].failure


def test_numbers_are_those_of_each_trial(made_up: Run, shown: dict[str, Any]) -> None:
    (layout,) = shown["numbers"]["of"]
    steps_DN = np.frombuffer(b64decode(layout["numbers"]["data"]), dtype="<u2").reshape(-1, len(made_up.trials))
    read_ND = np.array(layout["numbers"]["low"]) + steps_DN.T / 65535 * np.array(layout["numbers"]["span"])
    expected_ND = [[number for _, number in made_up.numbers_of(trial)] for trial in made_up.trials]
    np.testing.assert_allclose(read_ND, expected_ND, atol=1.4 / 65535)
    assert shown["numbers"]["names"][1] == ("coefficient", "maths", "layer0")


def test_the_curve_ends_at_the_hypervolume_of_the_front(made_up: Run, shown: dict[str, Any]) -> None:
    volumes = unpacked(shown["hypervolume"]["volume"])
    assert volumes[-1] == pytest.approx(made_up.hypervolume())
    assert (np.diff(volumes) >= 0).all()
    assert unpacked(shown["hypervolume"]["cost"])[-1] == pytest.approx(made_up.cost)


def test_references_are_shown_before_the_test_items_are_touched(made_up: Run) -> None:
    assert reference_models(made_up) == [*made_up.references[:-1], made_up.best_scalar]


def test_intervals_are_those_of_the_items(made_up: Run) -> None:
    for split, measured in (("search", made_up.searched), ("test", made_up.tested)):
        found = evidence(made_up)["intervals"][split]
        assert set(found["subjects"]) == {*reference_models(made_up), *(f"trial:{t.number}" for t in made_up.front)}
        name = made_up.objectives[1].name
        items_KN = np.stack([measured[subject].scores[name].items for subject in found["subjects"]])
        expected = score_intervals(items_KN.astype(np.float64), made_up.sources(split)[name])  # type: ignore[arg-type]
        np.testing.assert_allclose(unpacked(found["ends"][1]).reshape(-1, 2), expected, rtol=1e-6)


def test_the_hypervolume_has_its_error_and_its_interval(made_up: Run) -> None:
    found = front_volume(made_up)
    assert unpacked(evidence(made_up)["hypervolume"]).tolist() == [found.value, found.stderr, *found.interval]


def test_items_of_references_and_of_as_many_trials_as_have_room(made_up: Run) -> None:
    """First the front on the test items, then the best of all on the search items."""
    every, some, none = (items(made_up, most_bytes)["held"] for most_bytes in (10**6, 50_000, 0))
    front = [f"trial:{trial.number}" for trial in made_up.front]
    scored = [trial for trial in made_up.trials if trial.state == "scored"]
    assert set(none["search"]) == set(none["test"]) == set(made_up.references)
    assert set(every["test"]) == {*made_up.references, *front}
    assert set(every["search"]) == {*made_up.references, *(f"trial:{trial.number}" for trial in scored)}
    assert set(some["test"]) == set(every["test"])
    assert list(some["search"]) == list(every["search"])[: len(some["search"])]
    assert len(made_up.references) < len(some["search"]) < len(every["search"])
    best, *_, worst = (made_up.searched[s] for s in every["search"] if s.startswith("trial:"))
    mean = {id(m): np.mean([score.value for score in m.scores.values()]) for m in (best, worst)}
    assert mean[id(best)] > mean[id(worst)]


def test_items_are_those_of_the_ledger(made_up: Run) -> None:
    held = items(made_up, 10**6)["held"]
    name = made_up.objectives[2].name
    for split, measured in (("search", made_up.searched), ("test", made_up.tested)):
        for subject in ("uniform", f"trial:{made_up.front[0].number}"):
            data = np.frombuffer(b64decode(held[split][subject][2]["data"]), dtype=np.uint8)
            np.testing.assert_array_equal(np.unpackbits(data)[:300], measured[subject].scores[name].items)


def test_the_items_of_one_trial_are_those_of_all(made_up: Run) -> None:
    held = items(made_up, 10**6)["held"]
    states = {trial.state: trial.number for trial in made_up.trials if trial not in made_up.front}
    member = made_up.front[0].number
    for number, splits in ((member, {"search", "test"}), (states["scored"], {"search"}), (states["stopped"], set())):
        found = json.loads(trial_items_json(made_up, number))["held"]
        assert set(found) == splits
        assert all(found[split] == {f"trial:{number}": held[split][f"trial:{number}"]} for split in splits)
    for number in (states["failed"], states["pending"], len(made_up.trials)):
        with pytest.raises(RunError, match=f"trial {number}"):
            trial_items_json(made_up, number)


def test_the_use_of_the_test_items_is_said(tmp_path: Path) -> None:
    write_run(locate(tmp_path), 3)
    assert overview(open_run(tmp_path))["use_of_test_items"] == (
        "the test items were used once, for the front that is shown"
    )
    with closing(Ledger.drive(locate(tmp_path), "made-up")) as ledger:
        ledger.touch_test_items()
        ledger.issue(0, 3, Candidate(point=(0.5,) * 32))
        ledger.record(ledger.trials()[-1], "it failed", None)
        ledger.touch_test_items()
    run = open_run(tmp_path)
    sentence = overview(run)["use_of_test_items"]
    assert sentence == "the test items were used 2 times: later fronts were chosen knowing more than the search items"
    assert sentence in front(run).people  # the terminal says the same


def test_texts_are_those_of_the_split(made_up: Run, tmp_path: Path) -> None:
    """The items' texts are read again from the task files, and left out once these have changed."""
    sources = {"maths": list(range(40)), "chat": [f"c{number // 2}" for number in range(40)]}
    lines = {
        "maths": [{"source": n, "prompt": f"{n}+1=", "answer": f"{n + 1}"} for n in sources["maths"]],
        "chat": [
            {"source": source, "prompt": "Say", "choices": ["a", source], "gold": 1} for source in sources["chat"]
        ],
    }
    for task, of_task in lines.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of_task))
    evaluation = {"kind": "language", "data": str(tmp_path), "split": {"adapt": 0.0, "search": 0.5, "test": 0.5}}
    campaign = made_up.campaign.model_copy(update={"evaluation": evaluation})
    splits = split_items(sources, campaign.split.shares(), campaign.seed)
    held = {task: [sources[task][item] for item in splits[task]["test"]] for task in sources}
    run = Run(made_up.location, campaign, made_up.objectives[:2], {"sources": {"test": held}}, made_up.ledger)
    assert item_texts(run, "test") == {
        "maths": [f"{source}+1= → {int(source) + 1}" for source in held["maths"]],
        "chat": [f"Say → {source}" for source in held["chat"]],
    }
    (tmp_path / "maths.jsonl").write_text('{"source": 0, "prompt": "another", "answer": "1"}\n' * 40)
    assert item_texts(run, "test") == {}


def test_the_surrogate_names_what_waits_and_what_matters(made_up: Run) -> None:
    found = surrogate(made_up)
    assert found["waiting"] == ["trial 120"]
    for m, objective in enumerate(made_up.steering):
        described = found["objectives"][m]
        assert np.corrcoef(unpacked(described["measured"]), unpacked(described["predicted"]))[0, 1] > 0.5
        slopes = unpacked(described["slopes"]).reshape(4, 8).mean(axis=1)
        assert found["names"][8 * int(slopes.argmax())][1] == objective.name  # its own expert moves it most


def test_what_a_surrogate_has_planned_is_named(made_up: Run, tmp_path: Path) -> None:
    """Its batch is in the memo of the candidate that it was planned with; what was asked since is no plan any more."""
    shutil.copytree(made_up.location.file("."), tmp_path / "run")
    with closing(Ledger.drive(locate(tmp_path / "run"), "made-up")) as ledger:
        ledger.update_campaign({**ledger.campaign(), "budget": {"evaluations": 200}})
        batch = [(x,) * 32 for x in (0.2, 0.4, 0.6, 0.8)]
        ledger.issue(0, 121, Candidate(point=batch[0], memo={"then": batch[1:]}))
        ledger.issue(0, 122, Candidate(point=batch[1]))
    found = surrogate(open_run(tmp_path / "run"))
    assert found["waiting"] == ["trial 120", "trial 121", "trial 122", "planned 1", "planned 2"]
    assert len(unpacked(found["objectives"][0]["expected"])) == 5


def test_times_and_log_are_those_of_the_run(small_run: Path) -> None:
    run = open_run(small_run)
    times = json.loads(part_json(run, "overview"))["times"]
    assert sum(worker["num_results"] for worker in times["workers"]) == len(run.trials)
    events = json.loads(part_json(run, "log"))
    assert (events[0]["event"], events[-1]) == ("begin", {**events[-1], "event": "end", "how": "finished"})


@pytest.mark.parametrize("num_trials", [1, 3])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path, num_trials: int) -> None:
    write_run(locate(tmp_path), num_trials)
    run = open_run(tmp_path)
    parts = {name: json.loads(part_json(run, name)) for name in PARTS}
    assert parts["overview"]["trials"]["count"] == num_trials
    assert f"needs 8 scored trials for a surrogate; there are {num_trials - 1}" in parts["surrogate"]["absent"]
