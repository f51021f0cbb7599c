"""What every evaluator promises; a test class of an evaluator inherits ``EvaluatorContract``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.evaluators.evaluator import LOSS, Evaluator, ItemScores, Metric, Predictor, divergence

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order, where batches are put together otherwise


def assert_same_scores(one: ItemScores, other: ItemScores) -> None:
    assert one.keys() == other.keys()
    for metric, scores in one.items():
        np.testing.assert_allclose(scores.tolist(), other[metric].tolist(), **TOLERANCE)  # objects: pairs of numbers


@contextmanager
def widest_batch(model: Any) -> Iterator[list[int]]:
    """Gather how many rows each forward of the model takes, whether its head is asked or not."""
    rows: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(max(len(given) for given in (*args, *kwargs.values()) if isinstance(given, torch.Tensor)))

    hooks = [
        module.register_forward_pre_hook(count, with_kwargs=True)
        for module in {model, getattr(model, "base_model", model)}
    ]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


class EvaluatorContract:
    """tasks names tasks of at least ten items; evaluator and model make what is tested, the same every time.

    mean_loss_tasks are those whose ``ce`` loss is the mean of the items' ``loss``.
    """

    tasks: Sequence[str]
    mean_loss_tasks: Sequence[str]

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        raise NotImplementedError

    @pytest.fixture
    def one_at_a_time(self) -> Evaluator:
        """The same with a batch size of one."""
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> Any:
        raise NotImplementedError

    def everything(self, evaluator: Evaluator, task: str) -> np.ndarray:
        return np.arange(len(evaluator.sources[task]))

    def test_each_item_has_a_source(self, evaluator: Evaluator) -> None:
        assert evaluator.sources.keys() == set(self.tasks)
        for task in self.tasks:
            assert len(evaluator.sources[task]) >= 10
            assert all(isinstance(source, int | str) for source in evaluator.sources[task])

    def test_it_reports_the_metrics_that_it_declares(self, evaluator: Evaluator, model: Any) -> None:
        for task in self.tasks:
            items = self.everything(evaluator, task)
            scores, metrics = evaluator.score(model, task, items), evaluator.metrics(task)
            companions = {LOSS, *(f"{LOSS}:{name}" for name in metrics)}
            assert metrics.keys() <= scores.keys() <= metrics.keys() | companions
            for name, of_items in scores.items():
                assert of_items.shape == items.shape
                metric = metrics.get(name, Metric("min"))
                assert metric.direction in ("max", "min", None)
                if metric.aggregate is None:
                    assert of_items.dtype == np.float32
                    assert np.isfinite(of_items).all()
                else:
                    assert isinstance(metric.aggregate(of_items, items), float)

    def test_scores_follow_the_order_of_the_items(self, evaluator: Evaluator, model: Any) -> None:
        for task in self.tasks:
            items = self.everything(evaluator, task)
            order = np.random.default_rng(0).permutation(items)
            full, shuffled = evaluator.score(model, task, items), evaluator.score(model, task, order)
            assert len(np.unique(full["loss"])) > 3, "items that all score the same would prove nothing"
            assert_same_scores({metric: of_items[order] for metric, of_items in full.items()}, shuffled)

    def test_a_part_of_the_items_scores_as_in_the_whole(self, evaluator: Evaluator, model: Any) -> None:
        for task in self.tasks:
            full = evaluator.score(model, task, self.everything(evaluator, task))
            for items in (np.array([7]), np.array([8, 2, 5]), np.array([3, 3, 0])):
                part = evaluator.score(model, task, items)
                assert_same_scores({metric: of_items[items] for metric, of_items in full.items()}, part)

    def test_the_batch_size_does_not_matter(self, evaluator: Evaluator, one_at_a_time: Evaluator, model: Any) -> None:
        for task in self.tasks:
            items = self.everything(evaluator, task)
            assert_same_scores(evaluator.score(model, task, items), one_at_a_time.score(model, task, items))
            for name in sorted(evaluator.losses - {"kl"}):
                with torch.no_grad():
                    one, other = (float(e.loss(model, task, items, name)) for e in (evaluator, one_at_a_time))
                assert one == pytest.approx(other, rel=1e-5)

    def test_halved_often_enough_it_takes_one_at_a_time(self, evaluator: Evaluator, model: Any) -> None:
        halved = evaluator
        for _ in range(9):
            halved = halved.halved()
        for task in self.tasks:
            items = self.everything(evaluator, task)
            with widest_batch(model) as before:
                whole = evaluator.score(model, task, items)
            with widest_batch(model) as after:
                assert_same_scores(halved.score(model, task, items), whole)
            assert max(after) == 1 < max(before)

    def test_the_cross_entropy_is_the_mean_of_the_items_losses(self, evaluator: Evaluator, model: Any) -> None:
        for task in self.mean_loss_tasks:
            items = self.everything(evaluator, task)[2:9]
            mean = evaluator.score(model, task, items)["loss"].mean()
            assert float(evaluator.loss(model, task, items, "ce").detach()) == pytest.approx(float(mean), rel=1e-5)

    def test_losses_are_differentiable_in_the_weights(self, evaluator: Evaluator, model: Any) -> None:
        """And right: a small step down the gradient lowers the loss by what the gradient says."""
        assert "ce" in evaluator.losses
        for task in self.tasks:
            items = self.everything(evaluator, task)[:6]
            for name in sorted(evaluator.losses - {"kl"}):
                model.requires_grad_(True)
                before = evaluator.loss(model, task, items, name)
                assert before.ndim == 0
                before.backward()
                norm = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None)
                assert norm > 0
                step = 0.01 * float(before.detach().abs()) / norm
                moved = [p for p in model.parameters() if p.grad is not None]
                with torch.no_grad():
                    for tensor in moved:
                        tensor.sub_(step * tensor.grad)
                    after = float(evaluator.loss(model, task, items, name))
                    for tensor in moved:
                        tensor.add_(step * tensor.grad)
                fallen = float(before.detach()) - after
                assert fallen == pytest.approx(step * norm, rel=0.2)
                model.zero_grad()

    def test_scoring_leaves_the_model_as_it_was(self, evaluator: Evaluator, model: Any) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        for task in self.tasks:
            evaluator.score(model, task, self.everything(evaluator, task))
        after = model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert pointers == {name: tensor.data_ptr() for name, tensor in after.items()}
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_model_in_bfloat16_is_scored_in_float32(self, evaluator: Evaluator, model: Any) -> None:
        for task in self.tasks:
            items = self.everything(evaluator, task)
            exact = evaluator.score(model, task, items)["loss"]
            rounded = evaluator.score(model.bfloat16(), task, items)["loss"]
            model.float()
            assert rounded.dtype == np.float32
            np.testing.assert_allclose(rounded, exact, rtol=0.1, atol=0.1)
            assert len(np.unique(rounded)) > len(items) // 2, "log-probabilities rounded to bfloat16 would coincide"

    def test_a_broken_model_scores_nan_and_raises_nothing(self, evaluator: Evaluator, model: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        for task in self.tasks:
            scores = evaluator.score(model, task, self.everything(evaluator, task)[:4])
            assert np.isnan(scores["loss"]).all()

    def test_the_entropy_is_that_of_what_predictions_are_made_from(self, evaluator: Evaluator, model: Any) -> None:
        if "kl" not in evaluator.losses:
            pytest.skip("predictions of this kind are not compared")
        assert isinstance(evaluator, Predictor)
        for task in self.tasks:
            items = self.everything(evaluator, task)[::-1].copy()
            logits = evaluator.logits(model, task, items)
            entropies = [-(row.softmax(-1) * row.log_softmax(-1)).sum(-1).mean() for row in logits]
            torch.testing.assert_close(torch.stack(entropies).mean(), evaluator.loss(model, task, items, "entropy"))
            one_by_one = [evaluator.logits(model, task, items[place : place + 1])[0] for place in range(3)]
            assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(one_by_one, logits, strict=False))
            with torch.no_grad():
                assert float(divergence(logits, logits, 2.0)) == pytest.approx(0, abs=1e-6)
