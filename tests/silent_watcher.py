class Silent:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []
        self.num_advances = 0
        self.notes: list[str] = []

    def begin(self, stages: list[object]) -> None:
        self.stages = stages

    def phase(self, title: str, total: int, done: int) -> None:
        self.phases.append((title, total, done))

    def issue(self, trial: object) -> None:
        pass

    def advance(self, trial: object) -> None:
        self.num_advances += 1

    def note(self, line: str) -> None:
        self.notes.append(line)


class Interrupt(Exception):
    """What ``Interrupting`` raises."""


class Interrupting(Silent):
    """Raises after so many search trials, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, trial: object) -> None:
        super().advance(trial)
        if trial is not None:
            self.after -= 1
            if self.after == 0:
                raise Interrupt
