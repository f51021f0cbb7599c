"""What every proposer must do; a test class inherits it and says which proposer it is."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from evomerge.proposers.proposer import Problem, Proposer
from evomerge.records import Arrival, Candidate, Observation, Options
from evomerge.space.space import Dimension

NUM_DIMENSIONS = 3


def objectives(point: np.ndarray, num_objectives: int) -> np.ndarray:
    """Distances to as many corners: a front of convex combinations, maximized."""
    corners = np.eye(NUM_DIMENSIONS)[:num_objectives]
    return -((point - corners) ** 2).sum(axis=1)


def box(start: float, num_dimensions: int) -> tuple[Dimension, ...]:
    """Coefficients of as many experts, each in [0, 1]."""
    return tuple(
        Dimension(parameter="coefficient", expert=f"expert{d}", group=None, low=0.0, high=1.0, start=start)
        for d in range(num_dimensions)
    )


class ProposerContract:
    proposer_type: ClassVar[type]
    options: ClassVar[dict[str, Any]] = {}
    num_asks: ClassVar[int] = 26
    num_objectives: ClassVar[int] = 2
    has_losses: ClassVar[bool] = True

    def problem(self, seed: int = 0, history: tuple[Observation, ...] = ()) -> Problem:
        return Problem(
            dimensions=box(0.25, NUM_DIMENSIONS),
            num_objectives=self.num_objectives,
            seed=(seed, 0),
            tasks=tuple(f"task{m}" for m in range(self.num_objectives)),
            experts=tuple(f"expert{d}" for d in range(NUM_DIMENSIONS)),
            history=history,
        )

    def make(self, seed: int = 0, history: tuple[Observation, ...] = ()) -> Proposer:
        options: Options = self.proposer_type.options_type(**self.options)
        return self.proposer_type(self.problem(seed, history), options)

    def observe(self, index: int, candidate: Candidate, *, failed: bool = False) -> Observation:
        point = np.array(candidate.point)
        arrival = None
        if candidate.descent is not None and not failed:
            point = np.clip(point + 0.01 * (index + 1), 0, 1)
            moments = tuple(point.tolist())
            anchors = moments * self.num_objectives if candidate.descent.anchors else ()
            arrival = Arrival(
                point=moments, first_moment=moments, second_moment=moments, losses=(1.0,), anchors=anchors
            )
        if failed:
            return Observation(index=index, point=point, values_M=None)
        values = objectives(point, self.num_objectives)
        small = np.full(self.num_objectives, 1e-3)
        return Observation(
            index=index,
            point=point,
            values_M=values,
            stderr_M=small,
            losses_M=-values if self.has_losses else np.full(self.num_objectives, np.nan),
            loss_stderr_M=small,
            arrival=arrival,
        )

    def run(self, proposer: Proposer, num_asks: int, failing: frozenset[int] = frozenset()) -> list[Candidate]:
        """Ask and tell one by one, as the inline pool does."""
        asked: list[Candidate] = []
        for index in range(num_asks):
            (candidate,) = proposer.ask(1, [])
            asked.append(candidate)
            proposer.tell(self.observe(index, candidate, failed=index in failing))
        return asked

    def test_points_lie_in_the_box_and_are_plain_floats(self) -> None:
        for candidate in self.run(self.make(), self.num_asks):
            assert len(candidate.point) == NUM_DIMENSIONS
            assert all(type(x) is float and 0 <= x <= 1 for x in candidate.point)

    def test_same_seed_same_candidates(self) -> None:
        np.random.seed(1)
        first = self.run(self.make(), self.num_asks)
        np.random.seed(2)
        assert self.run(self.make(), self.num_asks) == first

    def test_global_random_state_is_left_alone(self) -> None:
        before = np.random.get_state()[1].copy()
        self.run(self.make(), self.num_asks)
        assert (np.random.get_state()[1] == before).all()

    @pytest.mark.parametrize("failing", [frozenset(), frozenset({0, 3, 7})])
    def test_a_proposer_rebuilt_from_its_record_goes_on_exactly(self, failing: frozenset[int]) -> None:
        """Killed after any record, or between an issue and its record: what comes next is the same."""
        whole = self.run(self.make(), self.num_asks, failing)
        for cut in range(0, self.num_asks - 1, 3):
            rebuilt = self.make()
            for index, candidate in enumerate(whole[:cut]):
                rebuilt.recall(candidate)
                rebuilt.tell(self.observe(index, candidate, failed=index in failing))
            rebuilt.recall(whole[cut])  # issued, not finished
            rebuilt.tell(self.observe(cut, whole[cut], failed=cut in failing))
            (following,) = rebuilt.ask(1, [])
            assert following == whole[cut + 1], f"after {cut} results"

    def test_proposals_follow_from_the_order_of_results_alone(self) -> None:
        """Asked several at once and told in any order; then again, one by one, and rebuilt from the record at times."""
        rng, proposer, pending = np.random.default_rng(0), self.make(), dict[int, Candidate]()
        record: list[tuple[int, Candidate, Observation | None]] = []  # what was asked, and what was told of it
        num_asked = 0
        while num_asked < self.num_asks:
            for candidate in proposer.ask(int(rng.integers(1, 4)), list(pending.values())):
                record.append((num_asked, candidate, None))
                pending[num_asked] = candidate
                num_asked += 1
            index = int(rng.choice(list(pending)))
            candidate = pending.pop(index)
            record.append((index, candidate, self.observe(index, candidate)))
            proposer.tell(self.observe(index, candidate))
        again, pending = self.make(), {}
        for place, (index, candidate, told) in enumerate(record):
            if rng.random() < 0.2:
                again = self.rebuilt(record[:place])
            if told is not None:
                del pending[index]
                again.tell(told)
            else:
                assert again.ask(1, list(pending.values())) == [candidate], f"candidate {index} of {num_asked}"
                pending[index] = candidate

    def rebuilt(self, record: Sequence[tuple[int, Candidate, Observation | None]]) -> Proposer:
        proposer = self.make()
        for _, candidate, told in record:
            if told is None:
                proposer.recall(candidate)
            else:
                proposer.tell(told)
        return proposer

    def test_all_candidates_failing_is_no_reason_to_stop_or_crash(self) -> None:
        assert len(self.run(self.make(), self.num_asks, frozenset(range(self.num_asks)))) == self.num_asks

    def test_several_pending_told_in_reverse(self) -> None:
        proposer = self.make()
        index, rounds = 0, 0
        while index < self.num_asks and rounds < self.num_asks:
            asked = proposer.ask(4, [])
            assert len(asked) <= 4
            for offset in reversed(range(len(asked))):
                proposer.tell(self.observe(index + offset, asked[offset]))
            index, rounds = index + len(asked), rounds + 1
        assert index >= self.num_asks

    def test_history_of_earlier_stages_is_accepted(self) -> None:
        rng = np.random.default_rng(0)
        earlier = [Candidate(point=tuple(rng.random(NUM_DIMENSIONS).tolist())) for _ in range(6)]
        history = tuple(self.observe(index, candidate) for index, candidate in enumerate(earlier))
        assert len(self.run(self.make(history=history), 5)) == 5
