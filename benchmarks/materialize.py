"""How fast a candidate's weights are made, beside the machine's memory, a naive loop, and mergekit.

    make bench-materialize
    python benchmarks/materialize.py --millions 30 --runs 3 --threads 1     # a smaller one

A synthetic model in bfloat16 with the shapes of a small Llama. Every measurement is a process of its own. Prints a
table, a row an operator and number of threads:

    seconds         median of a candidate all of whose numbers are new, a density too, thresholds looked up within it
    GB/s            ideal traffic over that time: K + 1 reads and one write of the model
    of triad        its ratio to torch's a = b + s * c, which is timed in turn with it
    x mergekit      its rate in parameters a second, over mergekit's on a smaller model in memory (merge_state_dicts)
    preparing s     what is done once and kept: sorted magnitudes, decompositions
    extra memory    peak of a candidate beyond base, experts, output and what preparing keeps, in % of those buffers

mergekit is installed into .cache/mergekit the first time; it shares the interpreter and the version of torch.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MERGEKIT = ROOT / ".cache" / "mergekit"
MARK = "result: "
NOISE = 2**22  # distinct numbers; longer tensors repeat them

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A row of the table: our operator, and mergekit's method of the same rule.

    changes: the structural parameter that a candidate changes beside all cheap ones. num_experts: where the rule takes
    so many; else what the command line says. slow: preparing takes minutes, and is done with the most threads only.
    """

    label: str
    operator: str
    mergekit: str | None = None
    changes: str | None = None
    num_experts: int | None = None
    slow: bool = False


SUBJECTS = (
    Subject(label="linear", operator="linear", mergekit="linear"),
    Subject(label="task arithmetic", operator="task_arithmetic", mergekit="task_arithmetic"),
    Subject(label="TIES, new density", operator="ties", mergekit="ties", changes="density"),
    Subject(label="DARE, new density", operator="dare_linear", mergekit="dare_linear", changes="density"),
    Subject(label="Breadcrumbs, new density", operator="breadcrumbs", mergekit="breadcrumbs", changes="density"),
    Subject(label="SCE, new share", operator="sce", mergekit="sce", changes="select_topk"),
    Subject(label="SLERP", operator="slerp", mergekit="slerp", num_experts=1),
    Subject(label="TSV-M", operator="tsv_m", slow=True),
)
NAIVE = "float32 copies, by tensor"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures: ``ours``, ``naive`` or ``mergekit``, of which subject, on how large a model."""

    what: str
    label: str
    millions: float
    num_experts: int
    threads: int
    runs: int


def main() -> None:
    """Measure every row in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description="Time materialization; see the head of this file.")
    parser.add_argument("--millions", type=float, default=350.0, help="parameters of the model")
    parser.add_argument("--mergekit-millions", type=float, default=40.0, help="parameters of the model mergekit gets")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=9, help="candidates whose median is taken")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", help="operators to measure")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(MARK + json.dumps(_measure(Job(**json.loads(arguments.job)))))
        return
    _print_table(arguments, _install_mergekit())


def _print_table(arguments: argparse.Namespace, mergekit_flaw: str | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from evomerge.campaign.assemble import OPERATORS

    num_parameters = sum(map(_size, _shapes(arguments.millions).values()))
    table = Table(
        title=f"{num_parameters / 1e6:.0f} M parameters, {arguments.experts} experts, bfloat16, torch "
        f"{torch.__version__}; medians of {arguments.runs}",
        box=SIMPLE_HEAD,
    )
    for column in (
        "merge", "threads", "seconds", "GB/s", "of triad", "x mergekit", "preparing s", "extra memory"
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "merge" else "right", no_wrap=column == "merge")
    notes = [f"mergekit: {mergekit_flaw}"] if mergekit_flaw else []
    wanted = [subject for subject in SUBJECTS if not arguments.only or subject.operator in arguments.only]
    for subject in wanted:
        if subject.operator not in OPERATORS:
            notes.append(f"{subject.label}: no operator {subject.operator!r} in this version")
            continue
        for threads in [max(arguments.threads)] if subject.slow else arguments.threads:
            job = Job(
                what="ours", label=subject.label, millions=arguments.millions, threads=threads, runs=arguments.runs,
                num_experts=subject.num_experts or arguments.experts,
            )  # fmt: skip
            ours = _run(job, sys.executable)
            peer = None
            if subject.mergekit and not mergekit_flaw:
                theirs = asdict(job) | {"what": "mergekit", "millions": arguments.mergekit_millions, "runs": 3}
                peer = _run(Job(**theirs), str(MERGEKIT / "bin" / "python"))
            table.add_row(*_cells(subject.label, threads, ours, peer))
            notes += [f"{subject.label}: {one['flaw']}" for one in (ours, peer) if one and "flaw" in one]
            notes += [f"kernels: {ours['kernels']}"] if "kernels" in ours else []
    for threads in arguments.threads:
        job = Job(
            what="naive", label=NAIVE, millions=arguments.millions, threads=threads, runs=2,
            num_experts=arguments.experts,
        )  # fmt: skip
        table.add_row(*_cells(NAIVE, threads, _run(job, sys.executable), None))
    console = Console(width=110)
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(note)


def _cells(label: str, threads: int, ours: dict[str, Any], peer: dict[str, Any] | None) -> list[str]:
    if "flaw" in ours:
        return [label, str(threads), "failed"]
    ratio = ours["rate"] / peer["rate"] if peer and "rate" in peer else None
    extra = ours.get("extra")
    return [
        label,
        str(threads),
        f"{ours['seconds']:.3f}",
        f"{ours['gigabytes_s']:.1f}",
        f"{ours['of_triad']:.2f}",
        f"{ratio:.0f}" if ratio else "",
        f"{ours['preparing_s']:.1f}" if ours.get("preparing_s", 0.0) >= 0.05 else "",
        f"{extra:.1%}" if extra is not None else "",
    ]


def _run(job: Job, python: str) -> dict[str, Any]:
    """Measure in a process of its own; of one that fails, return the last line that it said."""
    print(f"measuring {job.what}: {job.label}, {job.threads} threads", file=sys.stderr)
    done = subprocess.run(
        [python, __file__, "--job", json.dumps(asdict(job))], capture_output=True, text=True, check=False, cwd=ROOT
    )
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not results:
        said = (done.stderr or done.stdout).strip().splitlines()
        return {"flaw": f"{job.what} failed: {said[-1] if said else f'status {done.returncode}'}"}
    result: dict[str, Any] = json.loads(results[-1].removeprefix(MARK))
    return result


def _install_mergekit() -> str | None:
    """Make the virtual environment if it is not there; return why mergekit cannot be used, or None."""
    python = str(MERGEKIT / "bin" / "python")
    if not Path(python).exists():
        print("installing mergekit into .cache/mergekit", file=sys.stderr)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        steps = (
            [sys.executable, "-m", "venv", str(MERGEKIT)],
            [*pip, "-c", str(ROOT / "constraints.txt"), "torch"],
            [*pip, f"torch=={torch.__version__.split('+')[0]}", "mergekit"],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"cannot be installed here ({(done.stderr.strip().splitlines() or ['?'])[-1]})"
    program = "from importlib.metadata import version; from mergekit.merge_methods import merge_state_dicts"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return f"cannot be started ({done.stderr.strip().splitlines()[-1]})" if done.returncode else None


def _shapes(millions: float) -> Shapes:
    """Shapes of a Llama with tied embeddings of about so many parameters: its depth is what varies."""
    hidden = 1024 if millions >= 100 else 256
    middle, vocabulary = 11 * hidden // 4, 32 * hidden
    block: Shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    num_layers = max(1, round((millions * 1e6 - vocabulary * hidden) / sum(map(_size, block.values()))))
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@cache
def _noise() -> Tensor:
    return torch.randn(NOISE, generator=torch.Generator().manual_seed(0))


def _fill(buffer_P: Tensor, origin_P: Tensor | None, seed: int) -> None:
    """Weights of a standard deviation of 0.02; an expert's differ from the base's by some 1 %."""
    for start in range(0, len(buffer_P), NOISE):
        part = buffer_P[start : start + NOISE]
        noise = _noise().roll(7919 * seed + start)[: len(part)] * (2e-2 if origin_P is None else 2e-4)
        part.copy_(noise if origin_P is None else origin_P[start : start + NOISE].float() + noise)


def _measure(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    return {"ours": _ours, "naive": _naive, "mergekit": _mergekit}[job.what](job)


def _ours(job: Job) -> dict[str, Any]:
    """Time an operator over flat buffers, as the materializer runs it."""
    from evomerge.campaign.assemble import OPERATORS
    from evomerge.kernels.launch import path
    from evomerge.kernels.layout import Layout
    from evomerge.kernels.sources import Dense, Sources
    from evomerge.records import TensorInfo

    subject = next(subject for subject in SUBJECTS if subject.label == job.label)
    layout = Layout.of(tuple(TensorInfo(name, shape) for name, shape in _shapes(job.millions).items()))
    base_P, *experts, out_P = (torch.zeros(layout.num_padded, dtype=torch.bfloat16) for _ in range(job.num_experts + 2))
    for number, segment in enumerate(layout.segments):  # the padding between tensors stays zero
        _fill(base_P[segment], None, number)
        for k, expert_P in enumerate(experts):
            _fill(expert_P[segment], base_P[segment], 1_000_000 * (k + 1) + number)
    sources = Sources(layout, base_P, tuple(map(Dense, experts)))
    operator = OPERATORS[subject.operator]()
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, Tensor]:
        values = {}
        for spec in operator.parameters:
            rows = job.num_experts if spec.per_expert else 1
            unit_KS = torch.rand(rows, sources.num_tensors, generator=generator, dtype=torch.float64)
            low, high = max(spec.low, spec.minimum), min(spec.high, spec.maximum)
            # Strictly inside: a density of 1 would spare TIES its work.
            values[spec.name] = low + (high - low) * (0.05 + 0.9 * unit_KS)
            if spec.structural and spec.name != subject.changes:
                values[spec.name].fill_(spec.default)
        return values

    start = time.perf_counter()
    state = operator.prepare(sources, draw(), None)
    preparing_s = time.perf_counter() - start

    def candidate() -> None:
        nonlocal state
        values = draw()
        if subject.changes:
            state = operator.prepare(sources, values, state)
        operator.merge(out_P, sources, operator.weights(values, state), state)

    candidate()  # compiles
    result = _timed(candidate, job, sum(tensor.num_elements for tensor in layout.tensors))
    held = 2 * layout.num_padded * (job.num_experts + 2)
    with _PeakMemory() as peak:
        candidate()
    extra = peak.extra_bytes / held if peak.extra_bytes is not None else None
    kernels = path(sources.device, layout.num_padded)
    return result | {"preparing_s": preparing_s, "extra": extra, "kernels": kernels}


def _naive(job: Job) -> dict[str, Any]:
    """Time what most scripts do: per tensor, float32 copies of base and experts, and a fresh result."""
    shapes = _shapes(job.millions)
    base, *experts = _state_dicts(shapes, job.num_experts)
    coefficients = [0.3 + 0.1 * k for k in range(job.num_experts)]

    def candidate() -> None:
        merged = {}
        for name, tensor in base.items():
            total = tensor.float()
            for expert, coefficient in zip(experts, coefficients, strict=True):
                total = total + coefficient * (expert[name].float() - tensor.float())
            merged[name] = total.to(tensor.dtype)

    return _timed(candidate, job, sum(map(_size, shapes.values())))


def _mergekit(job: Job) -> dict[str, Any]:
    """Time mergekit's own in-memory call, in its own arithmetic (the tensors' dtype)."""
    from mergekit.merge_methods import merge_state_dicts  # type: ignore[import-not-found]

    method = next(subject.mergekit for subject in SUBJECTS if subject.label == job.label)
    shapes = _shapes(job.millions)
    base, *experts = _state_dicts(shapes, job.num_experts)
    models = {"base": base} | {f"expert{k}": expert for k, expert in enumerate(experts)}
    densities = iter(0.2 + 0.05 * step for step in range(100))

    def candidate() -> None:
        weights = {name: 0.3 for name in models if name != "base"}
        density = dict.fromkeys(weights, next(densities))
        given: dict[str, dict[str, Any]] = {
            "linear": {"weight": weights},
            "task_arithmetic": {"weight": weights},
            "ties": {"weight": weights, "density": density},
            "dare_linear": {"weight": weights, "density": density},
            "breadcrumbs": {"weight": weights, "density": density},
            "slerp": {"t": 0.4},
            "sce": {"select_topk": 0.2},
        }
        assert method is not None
        held = {name: models[name] for name in weights} if method == "linear" else models
        merge_state_dicts(held, method, parameters=given[method], base=None if method == "linear" else "base")

    candidate()
    return _timed(candidate, job, sum(map(_size, shapes.values())))


def _state_dicts(shapes: Shapes, num_experts: int) -> list[dict[str, Tensor]]:
    """Base and experts as dictionaries of bfloat16 tensors."""
    models: list[dict[str, Tensor]] = [{} for _ in range(num_experts + 1)]
    for number, (name, shape) in enumerate(shapes.items()):
        for k, model in enumerate(models):
            flat = torch.empty(_size(shape), dtype=torch.bfloat16)
            _fill(flat, models[0][name].view(-1) if k else None, 1_000_000 * k + number)
            model[name] = flat.view(shape)
    return models


def _timed(candidate: Callable[[], None], job: Job, num_elements: int) -> dict[str, Any]:
    """Return medians of the candidate's seconds and rates, and of the ratio to the triads timed in turn with it."""
    a, b, c = (torch.rand(num_elements // 2) for _ in range(3))  # float32: each the size of the model in bfloat16
    triad_s, seconds = [], []
    for _ in range(job.runs + 1):  # the first warms up
        triad_s.append(_seconds(lambda: torch.add(b, c, alpha=0.5, out=a)))
        seconds.append(_seconds(candidate))
    median_s = median(seconds[1:])
    triad_rate = 3 * 2 * num_elements / median(triad_s[1:])
    rate = 2 * num_elements * (job.num_experts + 2) / median_s
    return {
        "seconds": median_s,
        "gigabytes_s": rate / 1e9,
        "of_triad": rate / triad_rate,
        "rate": num_elements / median_s,
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class _PeakMemory:
    """While entered, the kernel (Linux) notes the peak of the process's resident memory; None where it cannot."""

    extra_bytes: int | None = None

    def __enter__(self) -> "_PeakMemory":
        self._before = None
        with suppress(OSError):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what earlier candidates left in the heap would hide what this one takes
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.extra_bytes = max(0, _status("VmHWM") - self._before)


def _status(key: str) -> int:
    """A line of the process's status, in bytes."""
    lines: Iterator[str] = iter(Path("/proc/self/status").read_text().splitlines())
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
