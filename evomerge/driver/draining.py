"""Ctrl-C, or a batch system's SIGTERM: the first lets what is under way finish, the second stops at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Draining:
    """While entered, True from the first signal on. Only the main thread can take signals; elsewhere it stays False."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify, self._asked = notify, False

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> "Draining":
        self._is_main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS} if self._is_main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._notify("stopping when what is under way has finished; Ctrl-C again stops at once")
