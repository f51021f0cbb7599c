"""What the families share while they train: isolation from the caller, a progress meter, and one training loop."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils import logging

from evomerge.families.recipes import Schedule

Progress = Callable[[str, float], None]
State = dict[str, Tensor]

REPORT_EVERY_S = 0.2
WARM_UP_STEPS = 10
MAX_GRADIENT_NORM = 1.0


class Meter:
    """Counts finished work, reports it at most every REPORT_EVERY_S seconds, and keeps the CPU seconds of each part."""

    def __init__(self, total: float, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._total = total
        self._done = 0.0
        self._progress = progress
        self._reported_at = -math.inf

    def advance(self, message: str, work: float = 0.0) -> None:
        """Add ``work`` (in the unit of ``total``) and report, unless the last report is very recent."""
        self._done += work
        now = time.monotonic()
        if self._progress is not None and now - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = now
            self._progress(message, min(1.0, self._done / self._total))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Book the CPU seconds of the block under ``name``, and report its beginning."""
        self._reported_at = -math.inf
        self.advance(name)
        started = time.process_time()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.process_time() - started, 2)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run the block on one CPU thread with a seeded generator of its own, and leave the caller's settings as they were.

    One thread, because sums split over threads would round differently from machine to machine and small tensors
    train several times slower on two contended threads. The default generator is seeded directly:
    ``torch.manual_seed`` would reseed the caller's accelerators too.
    """
    num_threads, had_bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(num_threads)
        if had_bars:
            logging.enable_progress_bar()


def fit(
    parameters: Iterable[nn.Parameter], loss_of_step: Callable[[], Tensor], schedule: Schedule, done: Callable[[], None]
) -> None:
    """Train ``parameters`` in place on the losses that ``loss_of_step`` draws; ``done`` is called after each step."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(
        trained, schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warm_cosine, num_steps=schedule.steps))
    for _ in range(schedule.steps):
        optimizer.zero_grad()
        loss_of_step().backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        done()


def copy_state(model: nn.Module) -> State:
    """Return a copy of the model's tensors that later training does not touch."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def uniform_average(experts: Iterable[State]) -> State:
    """Return the plain mean of the experts, summed in float32."""
    states = list(experts)
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}


def _warm_cosine(step: int, num_steps: int) -> float:
    """Return the learning rate of ``step`` as a fraction of its peak."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / num_steps))) + 1e-3
