"""From Python: search a family of small experts, look at the front, pick a model and let it predict.

First ``evomerge families make digits --out demo/digits`` (a minute), then
``python examples/python_api.py demo/digits demo/python-api``.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import evomerge


def main(family: Path, out: Path) -> None:
    """Search the family in ``family``; leave the run and two pictures in ``out``."""
    campaign = evomerge.read_campaign(family / "campaign.yaml")
    run = evomerge.search(campaign, out / "run")  # again: resumes, or finds it finished
    run = evomerge.open(out / "run")  # the same from another process, also while the search goes on

    print(run.trials_frame().groupby("state").size())
    first, *_ = [objective.name for objective in run.steering]
    columns = ["trial", f"search/{first}", f"test/{first}", f"test_stderr/{first}"]
    print(run.front_frame()[columns].head())

    evomerge.figures.front(run).write_html(out / "front.html", include_plotlyjs="directory")

    floor = {first: run.searched["base"].scores[first].value}  # no worse than the base
    trial = run.pick(at_knee=True, minimum=floor)
    evomerge.figures.coefficients(run, trial).write_html(out / "coefficients.html", include_plotlyjs="directory")

    model, processor = run.materialize(trial)  # of a language model, processor is its tokenizer
    assert processor is None, "the digits' pixels come as they are"
    data = load_file(family / "data" / f"{first}.safetensors")
    with torch.inference_mode():
        features = model(pixel_values=data["pixel_values"][:8]).pooler_output
    predicted = (features @ data["head.weight"].T + data["head.bias"]).argmax(-1)
    print(f"trial {trial.number} on {first}: {predicted.tolist()}, labels {data['labels'][:8].tolist()}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
