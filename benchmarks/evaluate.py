"""What lm-eval's tasks cost a candidate beyond the forwards, and whether they score as on lm-eval's command line.

    make bench-evaluate

On the ``text`` family's base: a candidate's seconds beyond the model's forward and generate, and in them, for 300
multiple-choice and 60 generation items (CPU seconds of the thread, so that what else runs on the machine counts
little), with prompts that are templates, as in lm-eval's own tasks, and with prompts that are plain fields; how many
kinds of prompts 50 candidates see; and every metric beside that of ``lm_eval run``, item by item, in float32 and
bfloat16, and for a merge of the family's experts that was exported.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np
import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from evomerge.evaluators import sequences
from evomerge.evaluators.lm_eval import LmEvalEvaluator
from evomerge.evaluators.lm_eval_tasks import LmEvalOptions
from evomerge.families.family import FamilySummary, make
from evomerge.interop.read import read_any_recipe
from evomerge.materialize.materializer import Materializer
from evomerge.publish.export import merge_recipe

NUM_RUNS, NUM_CANDIDATES, BATCH_SIZE = 5, 50, 64
TIMED = {"choice": 300, "sort": 60}  # task -> items
FEW = 8
DTYPES = [("float32", ""), ("bfloat16", ""), ("bfloat16", ",softmax_dtype=float32")]

MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "num_fewshot": 1,
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "sort": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 1,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **MEAN},
        ],
    },
    "english": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
}


PLAIN_FIELDS = {
    "choice": {"doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "gold"},
    "sort": {"doc_to_text": "prompt", "doc_to_target": "answer"},
}


class Inside:
    """Seconds spent in a model's forward and generate, and a hash of all tokens that its forward was fed.

    ``moving``: seconds, inside or outside, in which kept keys and values are laid out for the rows of the next forward.
    """

    def __init__(self, model: Any) -> None:
        self.seconds, self.moving, self.fed, self._depth = 0.0, 0.0, hashlib.sha256(), 0
        model.forward, model.generate = self._timed(model.forward), self._timed(model.generate)
        for owner, name in ((DynamicCache, "batch_repeat_interleave"), (sequences, "_joined")):
            setattr(owner, name, self._moving(getattr(owner, name)))

    def _moving(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args)
            finally:
                taken = time.thread_time() - started
                self.moving += taken
                if self._depth:
                    self.seconds -= taken

        return timed

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.thread_time() - started
                    tokens = kwargs.get("input_ids", args[0] if args else None)
                    self.fed.update(tokens.numpy().tobytes())

        return timed

    def run(self, score: Callable[[], object]) -> tuple[float, float, float]:
        """Return the seconds that a scoring took beyond the model, moving keys and values, and in the model."""
        self.seconds, self.moving, self.fed = 0.0, 0.0, hashlib.sha256()
        started = time.thread_time()
        score()
        return time.thread_time() - started - self.seconds - self.moving, self.moving, self.seconds


def main() -> None:
    """Print the tables."""
    logging.disable(logging.WARNING)
    family = make("text", Path(".cache/families/text"))
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(family.path / "data", Path(folder) / "all", {})
        write_tasks(family.path / "data", Path(folder) / "timed", TIMED)
        write_tasks(family.path / "data", Path(folder) / "plain", TIMED, PLAIN_FIELDS)
        write_tasks(family.path / "data", Path(folder) / "few", {"choice": FEW})
        base = family.path / "base"
        overhead(base, Path(folder) / "timed", "templates")
        overhead(base, Path(folder) / "plain", "plain fields")
        prompts(base, Path(folder) / "few")
        equality(base, Path(folder) / "all", "the base", DTYPES)
        merged = Path(folder) / "merged"
        equality(merged, Path(folder) / "all", "an exported merge", DTYPES[:1], merge(family, merged))


def merge(family: FamilySummary, out: Path) -> Any:
    """Export 0.4 of each expert; return the same merge as a worker holds it, in memory."""
    recipe = out.with_suffix(".yaml")
    experts = {name: str(family.path / "experts" / name) for name in family.experts}
    sections = {"base": str(family.path / "base"), "experts": experts, "dtype": "float32"}
    recipe.write_text(yaml.safe_dump({**sections, "operator": {"name": "task_arithmetic"}, "coefficient": 0.4}))
    with quiet():
        merge_recipe(recipe, out, "cpu", lambda _: None)
        read = read_any_recipe(recipe)
        materializer = Materializer(read.base, read.experts, dtype="float32")
        materializer.build(read.operator, read.recipe)
        return materializer.resident.module


def write_tasks(
    data: Path,
    folder: Path,
    num_items: Mapping[str, int],
    changes: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> None:
    """Write task files with the first items of each task (by default all); few-shot examples come from the others."""
    folder.mkdir()
    for task, section in TASKS.items():
        lines = (data / f"{'english' if task == 'last_word' else task}.jsonl").read_text().splitlines()
        count = num_items.get(task, len(lines))
        (folder / f"{task}.jsonl").write_text("\n".join(lines[:count]))
        (folder / f"{task}-train.jsonl").write_text("\n".join(lines[-20:]))
        files = {"test": str(folder / f"{task}.jsonl"), "train": str(folder / f"{task}-train.jsonl")}
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
        splits = {"test_split": "test", "fewshot_split": "train", "training_split": "train"}
        joined = {"target_delimiter": "", "fewshot_delimiter": "\n"}
        (folder / f"{task}.yaml").write_text(
            yaml.safe_dump({"task": task, **source, **splits, **joined, **section, **changes.get(task, {})})
        )


def overhead(base: Path, folder: Path, prompts_are: str) -> None:
    """Time lm-eval's two ways and ours, in turn."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = load(base)
    inside, manager = Inside(model), TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(model, tokenizer=tokenizer(base), batch_size=BATCH_SIZE)
    with quiet():
        prebuilt = manager.load(list(TIMED))
    for task in prebuilt["tasks"].values():
        task.set_fewshot_seed(1234)
    ours, plain = (evaluator(base, folder, list(TIMED), prefix_cache=cache) for cache in (True, False))

    def score(by: LmEvalEvaluator) -> None:
        for task, count in TIMED.items():
            by.score(model, task, np.arange(count))

    ways: dict[str, Callable[[], object]] = {
        "lm_eval.simple_evaluate": lambda: lm_eval.simple_evaluate(
            lm, tasks=list(TIMED), task_manager=manager, bootstrap_iters=0
        ),
        "lm_eval.evaluate, tasks loaded before": lambda: lm_eval.evaluate(lm, prebuilt, bootstrap_iters=0),
        "evomerge": lambda: score(ours),
        "evomerge, prefix_cache: false": lambda: score(plain),
    }
    seconds: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    with quiet():
        for _ in range(NUM_RUNS + 1):
            for way, run in ways.items():
                seconds[way].append(inside.run(run))
    title = f"CPU seconds a candidate, medians of {NUM_RUNS}; {TIMED} items, prompts are {prompts_are}"
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("way", "beyond the model", "from", "to", "moving keys and values", "in the model"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, values in seconds.items():
        beyond, moving, within = zip(*values[1:], strict=True)  # the first warms up
        medians = [statistics.median(part) for part in (beyond, moving, within)]
        shown = (medians[0], min(beyond), max(beyond), *medians[1:])
        table.add_row(way, *(f"{value:.3f}" for value in shown))
    show(table)


def prompts(base: Path, folder: Path) -> None:
    """Count the kinds of prompts that candidates of different weights are fed."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = load(base)
    inside = Inside(model)
    lm = HFLM(model, tokenizer=tokenizer(base), batch_size=BATCH_SIZE)
    with quiet():
        prebuilt = TaskManager(include_path=str(folder), include_defaults=False).load(["choice"])
    prebuilt["tasks"]["choice"].set_fewshot_seed(1234)
    ours = evaluator(base, folder, ["choice"])
    kinds: dict[str, set[str]] = {"lm_eval.evaluate, tasks loaded before": set(), "evomerge": set()}
    with quiet():
        for seed in range(NUM_CANDIDATES):
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            inside.run(lambda: lm_eval.evaluate(lm, prebuilt, bootstrap_iters=0))
            kinds["lm_eval.evaluate, tasks loaded before"].add(inside.fed.hexdigest())
            inside.run(lambda: ours.score(model, "choice", np.arange(FEW)))
            kinds["evomerge"].add(inside.fed.hexdigest())
    for way, found in kinds.items():
        print(f"{way}: {NUM_CANDIDATES} candidates, {len(found)} different sets of prompts")
    again = evaluator(base, folder, ["choice"])
    print(f"digest {ours.digest[:16]}, of an evaluator built anew {again.digest[:16]}")


def equality(base: Path, folder: Path, what: str, dtypes: Sequence[tuple[str, str]], resident: Any = None) -> None:
    """Run lm-eval's command line on a checkpoint, and compare with our scores of it, or of the model in memory."""
    table = Table(title=f"{what} beside lm_eval run, item by item", box=SIMPLE_HEAD)
    columns = ("dtype", "task", "metric", "lm_eval run", "evomerge", "items that differ", "largest difference")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    ours = evaluator(base, folder, list(TASKS))
    for dtype, softmax in dtypes:
        values, samples = command_line(base, folder, f"{dtype}{softmax}")
        model = load(base).to(getattr(torch, dtype)) if resident is None else resident
        for task in TASKS:
            items = np.arange(len(ours.sources[task]))
            for metric, of_items in ours.score(model, task, items).items():
                if metric == "loss":
                    continue
                aggregate = ours.metrics(task)[metric].aggregate
                value = aggregate(of_items, items) if aggregate else float(of_items.astype(np.float64).mean())
                pairs = [(first(mine), first(samples[task][item][metric])) for item, mine in enumerate(of_items)]
                apart = [abs(mine - theirs) for mine, theirs in pairs]
                differ = f"{sum(gap > 0 for gap in apart)} of {len(apart)}"
                row = (
                    dtype + softmax.replace("_dtype=float32", " float32"),
                    task,
                    metric,
                    f"{values[task][f'{metric},none']:.7g}",
                    f"{value:.7g}",
                )
                table.add_row(*row, differ, f"{max(apart):.2g}")
        print(f"compared {dtype}{softmax}", file=sys.stderr)
    show(table)


def command_line(base: Path, folder: Path, dtype: str) -> tuple[Any, dict[str, dict[int, Any]]]:
    """Return what ``lm_eval run`` reports: task -> metric -> value, and task -> document -> its logged sample."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--log_samples"]
        command += ["--model_args", f"pretrained={base},dtype={dtype}", "--tasks", ",".join(TASKS)]
        command += ["--include_path", str(folder), "--batch_size", str(BATCH_SIZE), "--output_path", out]
        subprocess.run(command, check=True, capture_output=True)
        results = json.loads(next(Path(out).rglob("results_*.json")).read_text())["results"]
        samples = {
            task: {
                (sample := json.loads(line))["doc_id"]: sample
                for line in next(Path(out).rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
            }
            for task in TASKS
        }
        return results, samples


def first(value: Any) -> float:
    """Return a number, or the log-likelihood that stands before a weight."""
    return float(value[0] if isinstance(value, list | tuple) else value)


def evaluator(base: Path, folder: Path, tasks: list[str], *, prefix_cache: bool = True) -> LmEvalEvaluator:
    """Build the evaluator of task files."""
    options = LmEvalOptions(include_path=str(folder), batch_size=BATCH_SIZE, prefix_cache=prefix_cache)
    return LmEvalEvaluator(options, {task: [] for task in tasks}, base)


def load(base: Path) -> Any:
    """Load the base in float32."""
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def tokenizer(base: Path) -> Any:
    """Load the base's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars from the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def show(table: Table) -> None:
    """Print a table as wide as it is."""
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
