"""Item response theory on a run's own models."""

import numpy as np
import pytest

from evomerge.fidelity.irt import ability_of, fit_item_response, held_out_values, irt_value


def simulated(num_models: int, num_items: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    abilities, slopes, offsets = (
        rng.normal(0, 1.5, num_models),
        rng.uniform(0.5, 2.5, num_items),
        rng.normal(0, 1.5, num_items),
    )
    probabilities = 1 / (1 + np.exp(offsets - abilities[:, None] * slopes))
    return abilities, (rng.random((num_models, num_items)) < probabilities).astype(float)


def test_abilities_are_recovered() -> None:
    abilities, responses = simulated(40, 300, 0)
    fitted = fit_item_response(responses, num_abilities=1)
    assert abs(np.corrcoef(fitted.abilities_FD[:, 0], abilities)[0, 1]) > 0.97
    predicted = np.stack([fitted.predicted(ability) for ability in fitted.abilities_FD])
    assert np.abs(predicted.mean(axis=1) - responses.mean(axis=1)).max() < 0.04


def test_items_that_are_easier_than_the_others_are_seen_through() -> None:
    """Half of gmp-IRT is the mean of the answers, so that at best half of its error goes."""
    _, responses = simulated(60, 300, 1)
    first = np.argsort(responses[:40].mean(axis=0))[-60:-20]
    fitted = fit_item_response(responses[:40])
    truth = responses[40:].mean(axis=1)
    told = np.array([irt_value(fitted, first, model[first]) for model in responses[40:]])
    plain = responses[40:][:, first].mean(axis=1)
    assert np.sqrt(np.mean((plain - truth) ** 2)) > 0.2
    assert np.sqrt(np.mean((told - truth) ** 2)) < 0.65 * np.sqrt(np.mean((plain - truth) ** 2))


def test_the_ridge_draws_towards_equal_weights() -> None:
    _, responses = simulated(20, 100, 3)
    fitted = fit_item_response(responses)
    first, answers = np.arange(15), np.ones(15)
    mean = fitted.abilities_FD.mean(axis=0)
    strong, usual, weak = (ability_of(fitted, first, answers, ridge) for ridge in (1e9, None, 1e-3))
    np.testing.assert_allclose(strong, mean, atol=1e-4)
    assert np.linalg.norm(usual - mean) < np.linalg.norm(weak - mean)
    assert np.isfinite(weak).all()


def test_all_items_answered_leave_nothing_to_estimate() -> None:
    _, responses = simulated(20, 50, 4)
    fitted = fit_item_response(responses[:15])
    assert irt_value(fitted, np.arange(50), responses[16]) == pytest.approx(responses[16].mean())


def test_held_out_errors_are_not_those_of_the_models_that_were_fitted() -> None:
    """With as many models as this, in-sample predictions flatter."""
    _, responses = simulated(16, 200, 5)
    first = np.arange(20)
    fitted = fit_item_response(responses)
    inside = [irt_value(fitted, first, model[first]) - model.mean() for model in responses]
    outside = held_out_values(responses, first) - responses.mean(axis=1)
    assert np.sqrt(np.mean(np.square(outside))) > np.sqrt(np.mean(np.square(inside)))
