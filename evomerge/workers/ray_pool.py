"""The Ray pool: workers on this machine or on a cluster, each an actor with a resident model.

    starting --opened--> idle --submit--> busy --result--> idle
        ^                                  |
        '------ died, or took too long ----'

Workers start, die and come back while the others go on; Ray finds the machines and notices what is lost. A subject
whose worker dies goes to another one, a few times; after that it counts as what kills workers, and fails. Workers that
wait for room on the cluster begin when there is some: with ``count: auto`` the pool follows the cluster.

Base and experts are read from their files by one worker, and are then in the memory that Ray shares between the
processes of a machine.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from evomerge.errors import CandidateError, EvoMergeError, in_one_line
from evomerge.records import Measurement, Split, TaskItems
from evomerge.workers.pool import Outcome, Result, Scorer, Subject, fate_of
from evomerge.workers.ray_cluster import RayCluster, RayOptions

LOOK_S = 5.0  # between looks at the cluster while nothing happens
MAX_DEAD_STARTS = 3  # in a row, until one worker has opened


class Findings(Protocol):
    """What a worker found out about the campaign."""

    def agrees(self, other: Any) -> bool:
        """Whether both workers read the same checkpoints and items."""


class SharingScorer(Scorer, Protocol):
    """A scorer that says what its worker found out, and can lend its largest arrays to other processes."""

    findings: Any  # Findings

    def buffers(self) -> Sequence[Any]:
        """Return read-only arrays for others of this machine; empty if there is nothing to lend."""

    def adopt(self, buffers: Sequence[Any]) -> None:
        """Read from these arrays instead of from those of its own."""


MakeScorer = Callable[[Any, Sequence[Any]], SharingScorer]
"""(findings of the worker that lends its arrays, or None; the arrays) -> a scorer."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a worker says once its scorer is made."""

    where: str
    findings: Any
    num_buffers: int


class _Worker:
    """What runs in the actor's process. Errors of ours are returned: raised, they would come wrapped in Ray's."""

    def open(self, make: MakeScorer, folder: str, findings: Any, *buffers: Any) -> "_Opened | EvoMergeError":
        import ray

        if Path(folder).is_dir():
            os.chdir(folder)  # where the driver runs: relative names mean the same
        try:
            self._scorer = make(findings, buffers)
        except EvoMergeError as error:
            return error
        self._stage = -1
        where = f"{ray.util.get_node_ip_address()} pid {os.getpid()}"  # type: ignore[no-untyped-call]
        return _Opened(where, self._scorer.findings, len(self._scorer.buffers()))

    def buffers(self) -> Any:
        held = self._scorer.buffers()
        return held if len(held) > 1 else held[0]

    def adopt(self, *buffers: Any) -> None:
        self._scorer.adopt(buffers)

    def score(
        self, stage: int, held: list[Any], subject: Subject, split: Split, items: TaskItems | None
    ) -> "Measurement | EvoMergeError":
        import ray

        if stage != self._stage and held:
            self._scorer.configure(ray.get(held[0]))
            self._stage = stage
        try:
            return self._scorer.score(subject, split, items)
        except EvoMergeError as error:
            return error


@dataclass(slots=True)
class _Job:
    key: int
    subject: Subject
    split: Split
    items: TaskItems | None
    submitted: float
    attempts: int = 0
    deaths: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Slot:
    """A worker: ``ref`` is what it is at; starting as long as it is nowhere; at it, or idle, since ``since``."""

    actor: Any
    ref: Any = None
    where: str = ""
    job: _Job | None = None
    deadline: float = float("inf")
    since: float = 0.0
    idle_s: float = 0.0


class RayPool:
    """Scores on as many workers as the options say; begins as soon as the first has opened.

    make runs in every worker; notify is told what a person should know (a worker died, none is left). findings are
    those of the first worker. Raises: InputError if the first worker cannot open the campaign, or there is no cluster;
    EvoMergeError if workers die as they start.
    """

    def __init__(self, make: MakeScorer, options: RayOptions, notify: Callable[[str], None] = lambda _: None) -> None:
        self._make, self._options, self.notify = make, options, notify
        self._cluster = RayCluster(options)
        self._ray = self._cluster.ray
        self._slots: list[_Slot] = []
        self._jobs: deque[_Job] = deque()
        self._done: deque[Result] = deque()  # what nobody has taken yet: two workers may finish at once
        self._stage, self._stage_refs = 0, list[Any]()
        self._shared: list[Any] = []
        self._dead_starts, self._num_left_out = 0, 0
        self._told: set[str] = set()  # why workers were left out
        self._looked, self._is_waiting = time.monotonic(), False
        self.findings: Any = None
        try:
            self._look()
            while not self.num_workers:
                self._step(LOOK_S)
            self._grow(self._wanted())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, and Ray if it was started for them."""
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._slots.clear()
        self._cluster.close()

    @property
    def num_workers(self) -> int:
        """Workers that have opened."""
        return sum(bool(slot.where) for slot in self._slots)

    @property
    def num_free(self) -> int:
        """Workers that have nothing to do; one subject can wait for the first of them while there is none."""
        num_jobs = len(self._jobs) + sum(slot.job is not None for slot in self._slots)
        return max(max(self.num_workers, 1) - num_jobs, 0)

    def configure(self, stage_space: Any) -> None:
        """Begin a stage; workers read its space when their first subject of it comes."""
        self._stage += 1
        self._stage_refs = [self._ray.put(stage_space)]

    def submit(self, key: int, subject: Subject, split: Split, items: TaskItems | None = None) -> None:
        """Hand a subject to an idle worker, or to the next that is."""
        self._jobs.append(_Job(key, subject, split, items, time.monotonic()))
        self._dispatch()

    def results(self) -> Iterator[Result]:
        """Yield results in the order in which they finish, until nothing is left."""
        while self._done or self._jobs or any(slot.job for slot in self._slots):
            if self._done:
                yield self._done.popleft()
            else:
                self._step(LOOK_S)

    def _dispatch(self) -> None:
        for slot in self._slots:
            if self._jobs and slot.where and slot.job is None:
                slot.job = job = self._jobs.popleft()
                job.attempts += 1
                slot.ref = slot.actor.score.remote(self._stage, self._stage_refs, job.subject, job.split, job.items)
                now = time.monotonic()
                slot.deadline = now + (self._options.timeout_s or float("inf"))
                slot.idle_s, slot.since = now - slot.since, now

    def _step(self, limit_s: float) -> None:
        """Wait until something happens, or a while; and see to it."""
        busy = {slot.ref: slot for slot in self._slots if slot.ref is not None}
        now = time.monotonic()
        wait_s = min([limit_s, *(slot.deadline - now for slot in busy.values())])
        ready, _ = self._ray.wait(list(busy), timeout=max(wait_s, 0.0))
        for ref in ready:
            self._settle(busy[ref])
        for slot in [slot for slot in self._slots if time.monotonic() >= slot.deadline]:
            self._time_out(slot)
        if time.monotonic() - self._looked >= limit_s:
            self._look()
        self._dispatch()

    def _settle(self, slot: _Slot) -> None:
        """Take what a worker has brought: that it has opened, a result, or its death."""
        ref, slot.ref = slot.ref, None
        try:
            brought = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if slot.job is None and self._shared:  # what was lent is lost with the machine that held it
                return self._bury(slot, "what it was to read was lost")
            raise EvoMergeError(f"a worker raised {in_one_line(error.cause)}") from error
        except self._ray.exceptions.RayError as error:
            return self._bury(slot, self._reason(error))
        if slot.job is None:
            return self._opened(slot, brought)
        job, slot.job, slot.deadline = slot.job, None, float("inf")
        if isinstance(brought, EvoMergeError) and not isinstance(brought, CandidateError):
            raise brought
        return self._done.append(_result(job, slot, brought))

    def _opened(self, slot: _Slot, brought: "_Opened | EvoMergeError") -> None:
        if not isinstance(brought, _Opened):
            if self.findings is None:
                raise brought
            return self._leave_out(slot, f"a worker cannot open the campaign, and is left out: {brought}")
        if self.findings is None:
            self.findings = brought.findings
            if brought.num_buffers and self._wanted() > 1:
                refs = slot.actor.buffers.options(num_returns=brought.num_buffers).remote()
                self._shared = refs if isinstance(refs, list) else [refs]
                slot.actor.adopt.remote(*self._shared)
        elif not brought.findings.agrees(self.findings):
            return self._leave_out(
                slot, f"the worker on {brought.where} reads other checkpoints or items, and is left out"
            )
        slot.where, slot.since, self._dead_starts = brought.where, time.monotonic(), 0
        if self._is_waiting:
            self.notify("a worker has come; the search goes on")
            self._is_waiting, self._num_left_out = False, 0
        return None

    def _leave_out(self, slot: _Slot, why: str) -> None:
        """Do without a worker that would fail again wherever Ray puts it; while there is none, they go on trying."""
        if why not in self._told:
            self.notify(why)
            self._told.add(why)
        self._drop(slot)
        self._num_left_out += 1

    def _bury(self, slot: _Slot, reason: str) -> None:
        """Replace a worker that died; what it was at goes to another, or has killed enough of them."""
        job = slot.job
        if job is None:
            self._shared = []  # perhaps they are lost: the next one reads the files
            self._dead_starts += 1
            if self._dead_starts >= MAX_DEAD_STARTS and not self.num_workers:
                raise EvoMergeError(f"{self._dead_starts} workers died as they started; the last: {reason}")
            return self._replace(slot)
        self._replace(slot)
        job.deaths.append(f"{slot.where}: {reason}")
        if len(job.deaths) < self._options.attempts:
            self.notify(f"the worker on {slot.where} died ({reason}); its candidate goes to another")
            return self._jobs.appendleft(job)
        error = CandidateError(
            f"its worker died {len(job.deaths)} times, the last time on {slot.where}: {reason}", "killed workers"
        )
        return self._done.append(_result(job, slot, error))

    def _reason(self, error: Exception) -> str:
        """Say in a few words why a worker is gone; Ray's own errors fill a screen."""
        if isinstance(error, self._ray.exceptions.OutOfMemoryError):
            return "its machine ran out of memory"
        return "its machine was lost" if "node" in str(error).split("class_name")[0] else "its process ended"

    def _time_out(self, slot: _Slot) -> None:
        assert slot.job is not None
        self._replace(slot)
        error = CandidateError(f"it took longer than timeout_s: {self._options.timeout_s:g} seconds", "timed out")
        self._done.append(_result(slot.job, slot, error))

    def _look(self) -> None:
        """Follow the cluster as it grows and shrinks; say so if nobody is left."""
        self._looked = time.monotonic()
        wanted = self._wanted() if self.findings is not None else 1
        self._grow(wanted)
        for slot in [slot for slot in self._slots if not slot.where][: max(0, len(self._slots) - max(wanted, 1))]:
            self._drop(slot)
        if not self.num_workers and not self._is_waiting and (self.findings is not None or not self._cluster.room()):
            self._is_waiting = True
            each = f"{self._options.cpus:g} CPUs" + (f" and {self._cluster.gpus:g} GPUs" if self._cluster.gpus else "")
            self.notify(f"there is no worker; waiting until the cluster has room for one ({each})")

    def _grow(self, count: int) -> None:
        """Start workers until there are so many; Ray begins them when it has room."""
        while len(self._slots) < count:
            needs = {"num_cpus": self._options.cpus, "num_gpus": self._cluster.gpus}
            actor = self._ray.remote(_Worker).options(**needs, max_restarts=0, max_task_retries=0).remote()
            ref = actor.open.remote(self._make, os.getcwd(), self.findings if self._shared else None, *self._shared)
            self._slots.append(_Slot(actor, ref))

    def _replace(self, slot: _Slot) -> None:
        self._drop(slot)
        self._grow(len(self._slots) + 1)

    def _drop(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self._ray.kill(slot.actor)

    def _wanted(self) -> int:
        room = self._cluster.room() if self._options.count == "auto" else self._options.count
        return max(1, room - self._num_left_out)


def _result(job: _Job, slot: _Slot, outcome: Outcome) -> Result:
    now = time.monotonic()
    fate: dict[str, Any] = {"worker": slot.where, "attempts": job.attempts}
    fate |= {"queue_s": slot.since - job.submitted, "busy_s": now - slot.since, "idle_s": slot.idle_s}
    slot.since = now
    if job.deaths:
        fate["deaths"] = job.deaths
    return Result(job.key, outcome, fate | fate_of(outcome))
