"""The estimator ``irt``: what the first items say of a candidate's abilities, and these of all items.

The two-parameter logistic model with D abilities: p_i(theta) = sigmoid(a_i . theta - b_i). Items are fitted on the
run's own finished models; a candidate's abilities are a combination of theirs (MERGE^3, Mencattini et al. 2025). The
paper takes item parameters from public leaderboards and fits the combination's weights freely, which a few binary items
leave undetermined; here they are drawn towards equal weights. A number between 0 and 1 counts as a share of a hit.

girth 0.8 was tried for the fit: it takes hits only, and with 16 models and 360 items needed minutes, put many items on
its bounds and warned of divisions by zero. This is the maximum a posteriori by scipy's L-BFGS, in half a second.
Shape letters: F finished models, N items of all, n items of the first, D abilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import CampaignError
from evomerge.fidelity.estimator import Estimate, item_numbers
from evomerge.fidelity.rounds import Rounds
from evomerge.records import Floats, Items, Measurement, Objective

NUM_ABILITIES = 4
SPREAD_OF_OFFSETS = 2.0
MAX_STEPS = 200
ROUNDING = 1e-6  # of numbers that are 0 or 1
GROWTH = 1.25  # of the finished models before the items are fitted anew


class ItemResponses:
    """Estimates by gmp-IRT of each objective; its items are fitted anew whenever the models have grown by a quarter.

    The standard error is the root mean square of the errors that the estimator makes on the finished models, each half
    of them by items that were fitted on the other half. Raises: CampaignError for numbers outside [0, 1].
    """

    def __init__(self, objectives: Sequence[Objective], rounds: Rounds) -> None:
        self._objectives, self._rounds = objectives, rounds
        self._fits: dict[tuple[str, int], ItemResponse] = {}
        self._errors: dict[tuple[str, int, int], float] = {}

    def estimates(self, partial: Measurement, finished: Sequence[Measurement]) -> dict[str, Estimate]:
        """Return objective -> estimate. What finished first is never exchanged from call to call, only added to."""
        return {objective.name: self._estimate(objective, partial, finished) for objective in self._objectives}

    def _estimate(self, objective: Objective, partial: Measurement, finished: Sequence[Measurement]) -> Estimate:
        num_models = _num_fitted(len(finished))
        responses_FN = responses([item_numbers(model, objective) for model in finished[:num_models]], objective)
        (ours_n,) = responses([item_numbers(partial, objective)], objective)
        first_n = self._rounds.positions[objective.task][: len(ours_n)]
        fit_key, error_key = (objective.name, num_models), (objective.name, num_models, len(ours_n))
        if fit_key not in self._fits:
            self._fits[fit_key] = fit_item_response(responses_FN)
        if error_key not in self._errors:
            errors_F = held_out_values(responses_FN, first_n) - responses_FN.mean(axis=1)
            self._errors[error_key] = float(np.sqrt((errors_F**2).mean()))
        return Estimate(irt_value(self._fits[fit_key], first_n, ours_n), self._errors[error_key])


def responses(models: Sequence[Floats], objective: Objective) -> Floats:
    """Return models' numbers as responses in [0, 1], (F, N). Raises: CampaignError if that is not what they are."""
    numbers_FN = np.stack(models)
    low, high = float(numbers_FN.min()), float(numbers_FN.max())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise CampaignError(
            f"fidelity.estimator: irt needs scores in [0, 1] of every item, but {objective.name} ({objective.metric}) "
            f"has {low:.3g} to {high:.3g}; use paired"
        )
    return np.clip(numbers_FN, 0.0, 1.0)


def _num_fitted(num_finished: int) -> int:
    """Return the largest number on the grid 2, 3, 4, 5, 7, 9, ... (each a quarter more) that is not above this one."""
    number = 2
    while (larger := int(np.ceil(number * GROWTH))) <= num_finished:
        number = larger
    return number


@dataclass(frozen=True, slots=True)
class ItemResponse:
    """The fitted abilities of the models, and the slopes a and offsets b of the items."""

    abilities_FD: Floats
    slopes_ND: Floats
    offsets_N: Floats

    def predicted(self, ability_D: Floats) -> Floats:
        """Return the expected response to every item, (N,)."""
        return _sigmoid(self.slopes_ND @ ability_D - self.offsets_N)


def fit_item_response(responses_FN: Floats, num_abilities: int = NUM_ABILITIES) -> ItemResponse:
    """Return the most probable abilities and items, given responses in [0, 1].

    Priors: abilities and slopes standard normal, offsets normal with SPREAD_OF_OFFSETS. The first ability starts as the
    models' standing and slope 1; the others as small fixed noise, since equal ones could never part.
    """
    from scipy.optimize import minimize

    num_models, num_items = responses_FN.shape
    rng = np.random.default_rng(num_models)
    standing_F = responses_FN.mean(axis=1)
    abilities_FD = rng.normal(0, 0.1, (num_models, num_abilities))
    abilities_FD[:, 0] = (standing_F - standing_F.mean()) / max(float(standing_F.std()), 1e-9)
    slopes_ND = rng.normal(0, 0.1, (num_items, num_abilities))
    slopes_ND[:, 0] = 1.0
    rates_N = (responses_FN.sum(axis=0) + 0.5) / (num_models + 1)
    start = np.concatenate([abilities_FD.ravel(), slopes_ND.ravel(), np.log(1 / rates_N - 1)])
    found = minimize(
        _loss, start, (responses_FN, num_abilities), jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS}
    )
    best: Floats = found.x
    return _unpacked(best, responses_FN.shape, num_abilities)


def ability_of(fitted: ItemResponse, answered_n: Items, responses_n: Floats, ridge: float | None = None) -> Floats:
    """Return a candidate's abilities (D,): theta = sum_j lambda_j theta_j over the finished models.

    lambda maximizes the likelihood of the answers less ridge / 2 * sum_j (lambda_j - 1/F)^2; the default ridge is F, as
    strong as a standard normal prior about the models' mean. The weights that matter are lambda = 1/F + Theta s with
    only D numbers s, so that theta itself is fitted: the penalty is then ridge / 2 * d' (Theta' Theta)^-1 d for
    d = theta - mean. Newton's method with halved steps; the problem is convex.
    """
    abilities_FD = fitted.abilities_FD
    mean_D = abilities_FD.mean(axis=0)
    penalty_DD = (len(abilities_FD) if ridge is None else ridge) * np.linalg.pinv(abilities_FD.T @ abilities_FD)
    slopes_nD, offsets_n = fitted.slopes_ND[answered_n], fitted.offsets_N[answered_n]

    def loss(ability_D: Floats) -> float:
        logits_n = slopes_nD @ ability_D - offsets_n
        shift_D = ability_D - mean_D
        return float(_log_loss(logits_n, responses_n) + shift_D @ penalty_DD @ shift_D / 2)

    ability_D: Floats = mean_D.copy()
    for _ in range(50):
        expected_n = _sigmoid(slopes_nD @ ability_D - offsets_n)
        gradient_D = slopes_nD.T @ (expected_n - responses_n) + penalty_DD @ (ability_D - mean_D)
        curvature_DD = (slopes_nD.T * (expected_n * (1 - expected_n))) @ slopes_nD + penalty_DD
        step_D = np.linalg.solve(curvature_DD + 1e-9 * np.eye(len(mean_D)), gradient_D)
        before = loss(ability_D)
        while loss(ability_D - step_D) > before and np.abs(step_D).max() > 1e-9:
            step_D = step_D / 2
        ability_D -= step_D
        if np.abs(step_D).max() <= 1e-9:
            break
    return ability_D


def held_out_values(responses_FN: Floats, first_n: Items, num_folds: int = 2) -> Floats:
    """Return each model's estimate (F,) from its first items, by items that were fitted without it and its fold."""
    values_F = np.empty(len(responses_FN))
    for fold in range(num_folds):
        held_out = np.arange(len(responses_FN)) % num_folds == fold
        fitted = fit_item_response(responses_FN[~held_out])
        values_F[held_out] = [irt_value(fitted, first_n, model_N[first_n]) for model_N in responses_FN[held_out]]
    return values_F


def irt_value(fitted: ItemResponse, answered_n: Items, responses_n: Floats) -> float:
    """Return gmp-IRT: half the mean of the answers, half mp-IRT.

    mp-IRT is the mean over all items with predictions in the place of answers that are not there.
    """
    predicted_N = fitted.predicted(ability_of(fitted, answered_n, responses_n))
    predicted_N[answered_n] = responses_n
    return float(responses_n.mean() + predicted_N.mean()) / 2


def _loss(packed: Floats, responses_FN: Floats, num_abilities: int) -> tuple[float, Floats]:
    """Return minus the log of the posterior and its gradient."""
    item = _unpacked(packed, responses_FN.shape, num_abilities)
    logits_FN = item.abilities_FD @ item.slopes_ND.T - item.offsets_N
    surprise_FN = _sigmoid(logits_FN) - responses_FN
    offsets_N = item.offsets_N / SPREAD_OF_OFFSETS
    prior = ((item.abilities_FD**2).sum() + (item.slopes_ND**2).sum() + (offsets_N**2).sum()) / 2
    gradient = (
        surprise_FN @ item.slopes_ND + item.abilities_FD,
        surprise_FN.T @ item.abilities_FD + item.slopes_ND,
        offsets_N / SPREAD_OF_OFFSETS - surprise_FN.sum(axis=0),
    )
    return float(_log_loss(logits_FN, responses_FN) + prior), np.concatenate([part.ravel() for part in gradient])


def _unpacked(packed: Floats, shape: tuple[int, ...], num_abilities: int) -> ItemResponse:
    num_models, num_items = shape
    abilities, slopes, offsets = np.split(packed, np.cumsum([num_models * num_abilities, num_items * num_abilities]))
    return ItemResponse(abilities.reshape(num_models, -1), slopes.reshape(num_items, -1), offsets)


def _log_loss(logits: Floats, responses: Floats) -> float:
    """Return minus the log-likelihood of responses in [0, 1]."""
    return float(np.logaddexp(0, logits).sum() - (responses * logits).sum())


def _sigmoid(logits: Floats) -> Floats:
    from scipy.special import expit

    probabilities: Floats = expit(logits)
    return probabilities
