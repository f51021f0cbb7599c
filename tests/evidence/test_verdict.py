"""Whether a front is better than a reference beyond noise."""

import numpy as np
import pytest

from evomerge.evidence.compare import Difference, paired_difference
from evomerge.evidence.scores import score_of
from evomerge.evidence.verdict import LEVEL, Verdict, luck_text, verdict
from evomerge.records import Measurement, Objective

A = Objective(name="rot90", task="a", metric="accuracy", direction="max")
B = Objective(name="parity", task="b", metric="loss", direction="min")
SOURCES = {"rot90": list(range(200)), "parity": list(range(100, 300))}


def measured(a: np.ndarray, b: np.ndarray) -> Measurement:
    scores = {
        name: score_of(x.astype(np.float32), np.arange(len(x)), SOURCES[name][: len(x)])
        for name, x in (("rot90", a), ("parity", b))
    }
    return Measurement(split="test", scores=scores, cost=1.0, seconds={})


def alike(rng: np.random.Generator, num_models: int, lead: float = 0.0) -> tuple[Measurement, dict[str, Measurement]]:
    """A reference, and models that differ from it by noise, but for the first one's lead in rot90's hits."""
    hard, loss = rng.random(200), rng.gamma(2.0, 0.5, 200)
    members = {}
    for k in range(num_models):
        rate = 0.7 + (lead if k == 0 else 0.0)
        members[f"trial {k}"] = measured(hard + 0.2 * rng.normal(size=200) < rate, loss + 0.3 * rng.normal(size=200))
    return measured(hard + 0.2 * rng.normal(size=200) < 0.7, loss + 0.3 * rng.normal(size=200)), members


def judge(reference: Measurement, members: dict[str, Measurement], *objectives: Objective) -> Verdict:
    return verdict(members, reference, "the uniform average", objectives or (A, B), SOURCES)


def test_a_front_of_equals_rarely_has_a_winner() -> None:
    """12 models in 2 objectives, none better: a winner in 1 of 20 runs, where single comparisons find one in most."""
    rng = np.random.default_rng(0)
    found = [judge(*alike(rng, 12)) for _ in range(150)]
    assert sum(bool(v.winners) for v in found) <= 14  # binomial: more than that in 2 of 100 cases at LEVEL
    single = [max(gain.difference.value / gain.difference.stderr for gain in v.gains) > 1.645 for v in found]
    assert np.mean(single) > 0.4


def test_a_real_lead_is_found() -> None:
    found = judge(*alike(np.random.default_rng(10), 12, lead=0.2))
    assert {(gain.model, gain.objective) for gain in found.winners} == {("trial 0", "rot90")}
    assert found.gains[0].chance < 0.005
    assert found.text == (
        "1 of 12 models on the front is better than the uniform average beyond noise: trial 0 "
        f"{found.gains[0].difference.value:+.3f} ±{found.gains[0].difference.stderr:.3f} in rot90"
    )


def test_without_a_winner_the_largest_gain_is_named() -> None:
    reference, members = alike(np.random.default_rng(2), 3)
    found = judge(reference, members)
    assert not found.winners
    gain = found.gains[0]
    assert gain.chance > LEVEL
    assert gain.difference == paired_difference(
        members[gain.model], reference, [A if gain.objective == "rot90" else B], SOURCES
    )
    assert found.text == (
        "no model on the front is better than the uniform average beyond noise in any objective "
        f"(largest gain {gain.difference.value:+.3f} ±{gain.difference.stderr:.3f} in {gain.objective})"
    )
    assert "objective" not in judge(reference, members, A).text


def test_every_gain_is_listed_largest_first_and_a_smaller_loss_is_one() -> None:
    hits, loss = np.arange(200) % 3 > 0, 1 + (np.arange(200) % 7) / 7
    better = measured(hits, loss - 0.2 - 0.01 * (np.arange(200) % 5))
    found = judge(measured(hits, loss), {"same": measured(hits, loss), "better": better})
    assert [(gain.model, gain.objective) for gain in found.gains[:1]] == [("better", "parity")]
    assert len(found.gains) == 4
    assert found.gains[0].difference.value == pytest.approx(0.22, abs=1e-6)
    assert {gain.chance for gain in found.gains[1:]} == {1.0}
    assert found.text.startswith(
        "1 of 2 models on the front is better than the uniform average beyond noise: better +0.2"
    )


def test_a_gain_on_every_item_needs_no_scatter_to_be_seen() -> None:
    """From all wrong to all right, and a loss that is lower by the same everywhere: no standard error, no doubt."""
    found = judge(measured(np.zeros(200), np.ones(200)), {"trial 3": measured(np.ones(200), np.full(200, 0.5))})
    assert [gain.objective for gain in found.winners] == ["parity", "rot90"]
    assert found.text.endswith("trial 3 +0.500 ±0.000 in parity, trial 3 +1.000 ±0.000 in rot90")


def test_models_that_are_alike_cost_little_certainty() -> None:
    """The same model 40 times over is one comparison, not 40: Bonferroni's correction would multiply by 40."""
    rng = np.random.default_rng(3)
    reference, members = alike(rng, 1, lead=0.09)
    one = judge(reference, members, A).gains[0].chance
    many = judge(reference, {f"copy {k}": members["trial 0"] for k in range(40)}, A).gains[0].chance
    assert 0.001 < one < 0.05
    assert many == pytest.approx(one, rel=0.2)


def test_long_verdicts_name_some_objectives_and_count_the_rest() -> None:
    names = ["one", "two", "three", "four", "five"]
    objectives = [Objective(name=name, task=name, metric="accuracy", direction="max") for name in names]
    sources = {name: range(50) for name in names}

    def scored(rate: int) -> Measurement:
        x = (np.arange(50) % 10 < rate).astype(np.float32)
        return Measurement(
            split="test", scores={name: score_of(x, np.arange(50), range(50)) for name in names}, cost=1.0, seconds={}
        )

    text = verdict({"trial 1": scored(9)}, scored(2), "the best scalar", objectives, sources).text
    assert text.count("±") == 3
    assert text.endswith(" in three, and gains in 2 more objectives")


def test_luck_in_words() -> None:
    assert luck_text("mean", 240, 0.0213, Difference(0.018, 0.012)) == (
        "the best mean of 240 candidates flatters by about 0.021; on test items it lost 0.018 ±0.012"
    )
    assert luck_text("chat", 8, 0.01, Difference(-0.004, 0.012)).endswith("on test items it gained 0.004 ±0.012")


@pytest.mark.parametrize("zero", [0.0, -0.0, 0.0004, -0.0004])
def test_luck_that_rounds_to_zero_is_said_in_words(zero: float) -> None:
    assert luck_text("chat", 8, zero, Difference(zero, 0.012)) == (
        "the best chat of 8 candidates flatters by less than 0.001; on test items it scored the same, ±0.012"
    )
    assert "flatters by less than 0.001" in luck_text("chat", 8, -0.002, Difference(0.018, 0.012))
