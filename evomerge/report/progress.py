"""What a person sees while something runs: a bar a phase, what was found so far, and the time left."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.progress import TaskID

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.stages import Stage
from evomerge.families.family import FamilySummary, make
from evomerge.front.so_far import SoFar
from evomerge.ledger.location import Location
from evomerge.records import Trial
from evomerge.report.console import Loading, make_progress, say
from evomerge.run.rescore import Rescored
from evomerge.run.rescore import rescore as run_rescore
from evomerge.run.run import Run, open_run
from evomerge.run.search import search as run_search


class SearchProgress:
    """A bar a phase; beside the search's, the best of each objective and the hypervolume so far."""

    def __init__(self, location: Location, loading: Loading) -> None:
        self.location = location
        self.has_begun = False
        self._loading, self._progress = loading, make_progress()
        self._task: TaskID | None = None
        self._so_far: SoFar | None = None

    def __enter__(self) -> "SearchProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, stages: Sequence[Stage]) -> None:
        """Say what will be searched."""
        self._loading.stop()
        say(f"search   {chain(stages)}")

    def phase(self, title: str, total: int, done: int) -> None:
        """Begin a bar; what an earlier process did counts as done."""
        if not self.has_begun:
            self.has_begun = True
            self._progress.start()
        self._task = self._progress.add_task(title, total=total, completed=done, note="", visible=done < total)
        if title == "search":
            run = open_run(self.location)
            self._so_far = SoFar(run.objectives, run.searched["base"])
            for trial in run.trials:
                if trial.order is not None:
                    self._so_far.add(trial)
            self._show(self._so_far)

    def issue(self, trial: Trial) -> None:
        """Nothing to show."""

    def advance(self, trial: Trial | None) -> None:
        """Move the bar by one."""
        assert self._task is not None
        if trial is not None and self._so_far is not None:
            self._so_far.add(trial)
            self._show(self._so_far)
        self._progress.advance(self._task)

    def note(self, line: str) -> None:
        """Say what is being loaded, or print a line above the bars."""
        if self.has_begun:
            self._progress.console.print(line, soft_wrap=True)
        else:
            self._loading(line)

    def _show(self, so_far: SoFar) -> None:
        assert self._task is not None
        if not so_far.counts["scored"]:
            return
        ended = "".join(f" · {so_far.counts[how]} {how}" for how in ("stopped", "failed") if so_far.counts[how])
        best = [f"{value:.2f}" for value in so_far.best.values()]
        shown = " ".join(best[:4]) + (" ..." if len(best) > 4 else "")
        self._progress.update(self._task, note=f"best {shown} · hv {so_far.volume:.2g}{ended}")


def search(campaign: Campaign, location: Location, loading: Loading) -> tuple[bool, Run]:
    """Run a campaign behind progress bars; return whether it had been finished before, and the run."""
    progress = SearchProgress(location, loading)
    with progress:
        run = run_search(campaign, location, watcher=progress)
    return not progress.has_begun, run


def rescore(run: Run, trial: Trial, tasks: Path) -> Rescored:
    """Score a model and its references on further tasks behind a progress bar."""
    with Loading() as loading, counting("models") as count:

        def advance(done: int, total: int) -> None:
            loading.stop()
            count(done, total)

        return run_rescore(run, trial, tasks, loading, advance)


def make_family(name: str, out: Path) -> FamilySummary:
    """Train a family behind a progress bar."""
    with make_progress() as progress:
        bar = progress.add_task(name, total=100, note="")
        family = make(name, out, progress=lambda text, share: progress.update(bar, note=text, completed=100 * share))
        progress.update(bar, completed=100)
    return family


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """Give what is told how many of how many are done; from then on there is a progress bar."""
    with make_progress() as progress:
        bar = progress.add_task(title, total=None, note="", visible=False)
        yield lambda done, total: progress.update(bar, completed=done, total=total, visible=True)


def chain(stages: Sequence[Stage]) -> str:
    """Name the stages, each with its evaluations and dimensions, and why it was chosen."""
    return ", then ".join(
        f"{stage.proposer} {stage.num_evaluations} in {stage.num_dimensions} dimensions"
        + (f" ({stage.reason})" if stage.reason else "")
        for stage in stages
    )
