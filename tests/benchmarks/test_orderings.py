"""Orderings: what a verdict says, and the adapters that are trained for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from small_families import BRIEF, SMALL

from benchmarks import adapters
from benchmarks.adapters import ALPHA, POOL, RANK, make_pool
from benchmarks.orderings import STUDIES, Claim, fw_merging, overall, show
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import make_plan
from evomerge.evidence.compare import Difference
from evomerge.families.family import FamilySummary, make
from evomerge.materialize.resident import merged_tensors
from evomerge.operators.linear import TaskArithmetic
from evomerge.scorer.scorer import Scorer


def test_errors_of_items_and_of_seeds_add_in_squares() -> None:
    """Three seeds 0.1 apart have a spread of 0.1; the items' errors are taken as one and the same."""
    assert overall([Difference(0.2, 0.05)]) == Difference(0.2, 0.05)
    three = overall([Difference(0.2, 0.04), Difference(0.3, 0.05), Difference(0.4, 0.06)])
    assert three == pytest.approx((0.3, np.hypot(0.05, 0.1 / 3**0.5)))


@pytest.mark.parametrize(
    ("gain", "by", "verdict"),
    [
        (0.03, 0.0, "agrees"),
        (0.01, 0.0, "undecided"),
        (-0.01, 0.0, "undecided"),
        (-0.03, 0.0, "disagrees"),
        (-0.01, -0.04, "agrees"),
        (0.03, 0.02, "undecided"),
    ],
)
def test_a_verdict_needs_two_standard_errors(gain: float, by: float, verdict: str) -> None:
    assert Claim("one", "other", "", by=by).verdict(Difference(gain, 0.01)) == verdict


def test_a_study_ends_in_verdicts_about_the_models_that_it_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(SMALL["digits"], tasks=("rot90", "invert", "parity", "mod5"), num_held_out=150)
    family = make("digits", tmp_path / "digits", recipe=recipe)
    tested = fw_merging(family, 0, tmp_path)
    study = STUDIES["fw_merging"]
    show(study, {0: tested}, 1.0)
    printed = capsys.readouterr().out.splitlines()
    for claim in study.claims:
        ours, theirs = tested.score(claim.better), tested.score(claim.worse)
        assert tested.difference(claim).value == pytest.approx(ours - theirs)
        (line,) = (line for line in printed if f" {claim.better} " in line and f" {claim.worse} " in line)
        assert line.split()[-1] in ("agrees", "disagrees", "undecided")
    assert len({tested.score(model) for model in tested.models}) > 1


def test_adapters_are_read_as_they_were_trained(
    small_digits: FamilySummary,
    make_campaign: Callable[..., Campaign],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters, "SCHEDULE", BRIEF)
    monkeypatch.setattr(adapters, "POOL", {"noisy": POOL["noisy"]})
    pool = make_pool(small_digits, tmp_path / "adapters")
    plan = make_plan(make_campaign(experts={name: str(folder) for name, folder in pool.items()}))
    scorer = Scorer(plan)
    scorer.materializer.build(TaskArithmetic(), plan.task_arithmetic([0.0]))
    base = {name: tensor.clone() for name, tensor in merged_tensors(scorer.materializer.module).items()}
    scorer.materializer.build(TaskArithmetic(), plan.task_arithmetic([1.0]))
    factors = load_file(pool["noisy"] / "adapter_model.safetensors")
    changed = set()
    for name, tensor in merged_tensors(scorer.materializer.module).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            update = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
            np.testing.assert_allclose(tensor, base[name] + ALPHA / RANK * update, atol=1e-6)
            changed |= {name} if update.abs().max() > 1e-4 else set()
        else:
            np.testing.assert_array_equal(tensor, base[name])
    assert len(changed) == 2 * 6, "the six matrices of both layers"
