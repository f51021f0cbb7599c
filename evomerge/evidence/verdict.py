"""Whether a model of the front is better than a reference beyond noise, given how many are compared.

Shape letters: K models, M objectives, N items, R resamples, S sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evidence.compare import Difference, gains, paired_difference
from evomerge.evidence.intervals import cautious_differences
from evomerge.evidence.resampling import contributions, resampled_counts
from evomerge.evidence.scores import source_codes
from evomerge.evidence.summary import Sources
from evomerge.records import Floats, Measurement, Objective

NUM_RESAMPLES = 2000
LEVEL = 0.05
NUM_NAMED = 3  # objectives that a sentence names


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a model gains over the reference in one objective.

    chance: that the largest gain of all that were compared, in standard errors, is as large as this if none is real.
    """

    model: str
    objective: str
    difference: Difference
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Every gain of the front's models over a reference, the largest in standard errors first."""

    reference: str
    gains: tuple[Gain, ...]

    @property
    def winners(self) -> tuple[Gain, ...]:
        """The gains that are beyond noise: if no gain is real, there is one in 1 of 20 runs."""
        return tuple(gain for gain in self.gains if gain.chance <= LEVEL)

    @property
    def text(self) -> str:
        """The verdict in a sentence, without a full stop."""
        largest = self.gains[0]
        is_only = len({gain.objective for gain in self.gains}) == 1
        if not self.winners:
            found = f"largest gain {_signed(largest.difference)}" + ("" if is_only else f" in {largest.objective}")
            where = "" if is_only else " in any objective"
            return f"no model on the front is better than {self.reference} beyond noise{where} ({found})"
        best = {gain.objective: gain for gain in reversed(self.winners)}  # the last that is put in stays
        named = [
            f"{gain.model} {_signed(gain.difference)}" + ("" if is_only else f" in {gain.objective}")
            for gain in self.winners
            if gain is best[gain.objective]
        ]
        rest = len(named) - NUM_NAMED
        more = [f"and gains in {rest} more objective{'s' if rest > 1 else ''}"] if rest > 0 else []
        num_better, num_models = (len({gain.model for gain in some}) for some in (self.winners, self.gains))
        return (
            f"{num_better} of {num_models} models on the front {'is' if num_better == 1 else 'are'} better than "
            f"{self.reference} beyond noise: {', '.join(named[:NUM_NAMED] + more)}"
        )


def verdict(
    members: Mapping[str, Measurement],
    reference: Measurement,
    name: str,
    objectives: Sequence[Objective],
    sources: Sources,
) -> Verdict:
    """Compare the front's members (one at least, by the names to show) with a reference, on the same test items.

    name: what to call the reference. The chances are those of the largest of all gains (Westfall and Young 1993, 2.6),
    which are as dependent as the models are alike, with Student's tails for few sources.
    """
    items = [np.stack([gains(member, reference, objective) for member in members.values()]) for objective in objectives]
    of_items = [sources[objective.name] for objective in objectives]
    codes = [source_codes(of_objective) for of_objective in of_items]
    differences = [cautious_differences(*of_objective) for of_objective in zip(items, codes, strict=True)]
    values_MK, errors_MK = (np.stack(part) for part in zip(*differences, strict=True))
    certain_MK = np.where(values_MK > 0, np.inf, 0.0)  # the same gain on every item
    ratios_MK = np.divide(values_MK, errors_MK, out=certain_MK, where=errors_MK > 0)
    fewest = max(1, min(int(codes_N.max()) for codes_N in codes))
    largest_R = _largest_by_chance(contributions(items, of_items), errors_MK, fewest)
    found = [
        Gain(
            model=model,
            objective=objective.name,
            difference=paired_difference(member, reference, [objective], sources),
            chance=float((1 + (largest_R >= ratios_MK[m, k]).sum()) / (1 + len(largest_R))),
        )
        for m, objective in enumerate(objectives)
        for k, (model, member) in enumerate(members.items())
    ]
    order = np.argsort(-ratios_MK.ravel(), kind="stable")
    return Verdict(reference=name, gains=tuple(found[i] for i in order))


def luck_text(what: str, num_candidates: int, optimism: float, gap: Difference) -> str:
    """Say by how much the best of so many candidates must look better than it is, and what test items say.

    optimism: an estimate of what cannot be negative; noise may make it so.
    """
    flattery = f"about {optimism:.3f}" if round(optimism, 3) > 0 else "less than 0.001"
    change = "scored the same,"
    if round(gap.value, 3):
        change = f"{'lost' if gap.value > 0 else 'gained'} {abs(gap.value):.3f}"
    start = f"the best {what} of {num_candidates} candidates flatters by {flattery}"
    return f"{start}; on test items it {change} ±{gap.stderr:.3f}"


def _largest_by_chance(sums_MKS: Floats, errors_MK: Floats, freedom: int) -> Floats:
    """Return the largest of all gains in standard errors (R,), where sources are drawn anew and no gain is real."""
    sums_CS, errors_C = sums_MKS.reshape(-1, sums_MKS.shape[-1]), errors_MK.ravel()
    largest = [
        np.max(counts_RS @ sums_CS[errors_C > 0].T / errors_C[errors_C > 0], axis=1, initial=0.0)
        for counts_RS in resampled_counts(sums_CS.shape[1], NUM_RESAMPLES)
    ]
    tails_R = np.random.default_rng(0x7A11).chisquare(freedom, NUM_RESAMPLES)
    heavier_R: Floats = np.concatenate(largest) * np.sqrt(freedom / tails_R)
    return heavier_R


def _signed(difference: Difference) -> str:
    return f"{difference.value:+z.3f} ±{difference.stderr:.3f}"
