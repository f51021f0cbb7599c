class Silent:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []
        self.num_advances = 0

    def phase(self, title: str, total: int, done: int) -> None:
        self.phases.append((title, total, done))

    def advance(self, trial: object) -> None:
        self.num_advances += 1
