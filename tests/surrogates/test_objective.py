"""The surrogate of an objective: the companion's smoothness, the metric's last word, and fits that can be taken up."""

import numpy as np

from evomerge.surrogates.objective import Told, model_objective
from evomerge.surrogates.slopes import fit_slopes


def world(seed: int, num: int, num_dimensions: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, a smooth loss, and a metric that falls with it, counted on 100 items."""
    rng = np.random.default_rng(seed)
    points = rng.random((num, num_dimensions))
    losses = ((points - 0.4) ** 2 * np.arange(1, num_dimensions + 1)).mean(axis=1)
    return points, losses, rng.binomial(100, np.exp(-losses)) / 100


def test_a_companion_makes_better_predictions_of_the_metric() -> None:
    def off(seed: int, *, has_companion: bool) -> float:
        points, losses, values = world(seed, 30)
        asked, true_losses, _ = world(seed + 50, 200)
        model = model_objective(Told(points, values, np.full(30, 0.02**2), losses if has_companion else None))
        return float(np.abs(model.mean(asked) - np.exp(-true_losses)).mean())

    with_it, without = (np.mean([off(seed, has_companion=has) for seed in range(4)]) for has in (True, False))
    assert with_it < 0.85 * without


def test_a_metric_that_its_companion_does_not_explain_is_modelled_itself() -> None:
    points, losses, _ = world(2, 60)
    values = np.sin(5 * points[:, 0])
    model = model_objective(Told(points, values, np.zeros(60), losses))
    asked = world(3, 100)[0]
    assert np.corrcoef(model.mean(asked), np.sin(5 * asked[:, 0]))[0, 1] > 0.9


def test_a_higher_loss_is_never_taken_for_better() -> None:
    points, losses, _ = world(4, 20)
    assert model_objective(Told(points, losses, np.zeros(20), losses)).slope == 0


def test_a_model_of_known_lengths_is_the_fitted_one() -> None:
    """What a resumed search reads from the record rebuilds the model bit for bit."""
    points, losses, values = world(5, 25)
    fitted = model_objective(Told(points, values, np.full(25, 1e-4), losses))
    rebuilt = model_objective(Told(points, values, np.full(25, 1e-4), losses), fitted.logs, refit=False)
    asked = world(6, 50)[0]
    assert (fitted.mean(asked) == rebuilt.mean(asked)).all()
    for ours, theirs in zip(fitted.predict(asked), rebuilt.predict(asked), strict=True):
        assert (ours == theirs).all()


def test_uncertainty_shrinks_where_much_was_told() -> None:
    points, losses, values = world(7, 40)
    model = model_objective(Told(points, values, np.full(40, 1e-4), losses))
    told, far = model.predict(points)[1].mean(), model.predict(points + 3.0)[1].mean()
    assert told < 0.5 * far


def test_slopes_of_a_descent_tell_what_few_candidates_cannot() -> None:
    """Gradients at eight points, with errors and of another offset, beside five candidates in 24 dimensions."""
    points, losses, values = world(8, 5, 24)
    way = np.random.default_rng(9).random((8, 24))
    gradients = 2 * (way - 0.4) * np.arange(1, 25) / 24
    gradients += 0.1 * np.random.default_rng(10).standard_normal(gradients.shape)
    way_losses = 0.3 + ((way - 0.4) ** 2 * np.arange(1, 25)).mean(axis=1, keepdims=True)
    (slopes,) = fit_slopes(way, way_losses, gradients[:, None])
    asked, true_losses, _ = world(11, 200, 24)
    errors = np.full(5, 0.02**2)
    correlation = {
        what: np.corrcoef(model_objective(Told(points, values, errors, losses, of)).mean(asked), -true_losses)[0, 1]
        for what, of in {"with": slopes, "without": None}.items()
    }
    assert correlation["with"] > 0.7
    assert correlation["without"] < 0.4
