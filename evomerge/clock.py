"""Where time goes, in seconds by part."""

import time


class Clock:
    """Counts seconds from one lap to the next, by part; a part may have several laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap to a part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Return the seconds since the last time they were taken, and count from 0 again."""
        seconds, self.seconds = self.seconds, {}
        return seconds
