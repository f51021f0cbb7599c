"""The driver: asks, issues, submits, records, tells; and scores the reference models and the final front.

It owns no state that the ledger does not hold: a killed run starts here again and goes on where the record ends.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from evomerge.campaign.course import Course
from evomerge.campaign.plan import Plan
from evomerge.campaign.references import best_scalar, reference_recipes
from evomerge.campaign.stages import Stage
from evomerge.clock import Clock
from evomerge.driver.draining import Draining
from evomerge.driver.racing import RacingPool, finished_models, make_race
from evomerge.driver.watcher import Watcher
from evomerge.errors import EvoMergeError
from evomerge.evidence.summary import Summarizer, all_sources
from evomerge.front.front import front_of, observe
from evomerge.ledger.ledger import Ledger
from evomerge.proposers.proposer import Proposer, proposing
from evomerge.records import Measurement, Recipe, Split, Trial, as_it_went
from evomerge.workers.pool import Pool, Result


class Driver:
    """Runs the stages of one plan, along their course, against one ledger.

    Once ``draining`` is true, nothing new is begun; what is under way is recorded, and KeyboardInterrupt is raised.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, pool: Pool, hashes: Mapping[str, str], watcher: Watcher, draining: Draining
    ) -> None:
        self.plan, self.ledger, self.pool, self.hashes = plan, ledger, pool, hashes
        self.watcher, self.draining = watcher, draining

    def run(self, stages: Sequence[Stage], course: Course, seed: int) -> None:
        """Score the references, run every stage, and score the front once on the test items."""
        self._course = course
        references = reference_recipes(self.plan)
        self._measure("reference models", references, "search")
        sources = all_sources(self.plan.objectives, self.plan.sources("search"))
        recorded = self.ledger.measurements("search")
        self._summarizer = Summarizer(self.plan.objectives, sources, recorded)
        measured = self._summarizer.add_to_all(recorded)
        pool = self.pool
        if self.plan.fidelity:
            race = make_race(self.plan, self.plan.fidelity, {name: measured[name] for name in references}, seed)
            pool = RacingPool(self.pool, race, self._summarizer, finished_models(measured, self._trials(), references))
        total = sum(stage.num_evaluations for stage in stages)
        self.watcher.phase("search", total, sum(trial.order is not None for trial in self.ledger.trials()))
        for number, stage in enumerate(stages):
            trials = self._trials()
            leg = course.leg(number, trials)
            self.ledger.begin_stage(number, leg.facts())
            pool.configure(leg.plan.stage_space)
            with proposing():
                proposer = stage.make_proposer(leg.problem((seed, number), measured))
            own = [trial for trial in trials if trial.stage == number]
            self._run_stage(number, own, stage.num_evaluations, proposer, pool)
        self._score_front(references)

    def _run_stage(
        self, number: int, trials: Sequence[Trial], num_evaluations: int, proposer: Proposer, pool: Pool
    ) -> None:
        """Hand the proposer the stage's record, and the pool what has not finished; go on until nothing is to be asked.

        trials: those of the stage, as they are recorded.
        """
        with proposing():
            for trial, is_told in as_it_went(trials):
                if is_told:
                    proposer.tell(observe(trial, self.plan.objectives))
                else:
                    proposer.recall(trial.candidate)
        pending = {trial.number: trial for trial in trials if trial.order is None}
        for trial in pending.values():
            pool.submit(trial.number, trial.candidate, "search")
            self.watcher.issue(trial)
        clock = Clock()
        num_issued = len(trials)
        while True:
            while room := 0 if self.draining else min(pool.num_free, num_evaluations - num_issued):
                with proposing():
                    asked = proposer.ask(room, [trial.candidate for trial in pending.values()])
                clock.lap("propose")
                if not asked:
                    break
                issued = self.ledger.issue_all(number, num_issued, asked)
                clock.lap("record")
                for trial in issued:
                    pool.submit(trial.number, trial.candidate, "search")
                    pending[trial.number] = trial
                    clock.lap("submit")
                    self.watcher.issue(trial)
                    clock.lap("show")
                num_issued += len(issued)
            if not pending:
                return self._stop_if_asked()
            result = next(pool.results())
            clock.lap("wait")
            result = replace(result, fate={**result.fate, "driver": clock.take()})
            trial = self._record(pending.pop(result.key), result)
            clock.lap("record")
            with proposing():
                proposer.tell(observe(trial, self.plan.objectives))
            clock.lap("propose")
            self.watcher.advance(trial)
            clock.lap("show")

    def _record(self, trial: Trial, result: Result) -> Trial:
        outcome = result.outcome
        if not isinstance(outcome, Measurement):
            return self.ledger.record(trial, str(outcome), None, result.fate)
        recipe = self._course.recipe(replace(trial, measurement=outcome))
        fingerprint = recipe.fingerprint(self.hashes)
        return self.ledger.record(trial, self._summarizer.add(outcome), fingerprint, result.fate)

    def _trials(self) -> list[Trial]:
        """All trials, with the summaries among their scores, which earlier versions did not record."""
        return [
            replace(trial, measurement=self._summarizer.add(trial.measurement)) if trial.measurement else trial
            for trial in self.ledger.trials()
        ]

    def _score_front(self, references: Mapping[str, Recipe]) -> None:
        """Score the front's members and the references beside it on the test items."""
        subjects = {name: recipe for name, recipe in references.items() if not name.startswith("scalar:")}
        best = best_scalar(self._summarizer.add_to_all(self.ledger.measurements("search")), self.plan)
        subjects[best] = references[best]
        for trial in front_of(self._trials(), self.plan.objectives):
            subjects[f"trial:{trial.number}"] = self._course.recipe(trial)
        if subjects.keys() - self.ledger.measurements("test").keys():
            self.ledger.touch_test_items()
        self._measure("test items", subjects, "test")

    def _measure(self, title: str, subjects: Mapping[str, Recipe], split: Split) -> None:
        """Score what the ledger does not hold yet; a reference model that fails ends the run."""
        held = self.ledger.measurements(split)
        missing = [name for name in subjects if name not in held]
        self.watcher.phase(title, len(subjects), len(subjects) - len(missing))
        left, under_way = deque(enumerate(missing)), 0
        while True:
            while left and self.pool.num_free and not self.draining:
                key, name = left.popleft()
                self.pool.submit(key, subjects[name], split)
                under_way += 1
            if not under_way:
                return self._stop_if_asked()
            result = next(self.pool.results())
            under_way -= 1
            name, outcome = missing[result.key], result.outcome
            if not isinstance(outcome, Measurement):
                raise EvoMergeError(f"{name} cannot be scored on the {split} items: {outcome}")
            self.ledger.measure(name, outcome)
            self.watcher.advance(None)

    def _stop_if_asked(self) -> None:
        if self.draining:
            raise KeyboardInterrupt
