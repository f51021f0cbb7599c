"""The model card of an exported model, in Hugging Face's format."""

import yaml

from evomerge.records import Recipe, Trial
from evomerge.run import Run


def model_card(run: Run, trial: Trial, recipe: Recipe, inexpressible: str | None) -> str:
    """Return the card's Markdown: what was merged, what it scores on which items, how to build it again.

    inexpressible: why mergekit cannot make the same merge, if it cannot.
    """
    head = yaml.safe_dump(
        {
            "base_model": [recipe.base, *recipe.experts.values()],
            "library_name": "transformers",
            "tags": ["merge", "evomerge"],
        },
        sort_keys=False,
    )
    tested, searched = run.tested.get(f"trial:{trial.number}"), run.searched[f"trial:{trial.number}"]
    rows = [
        f"| {objective.name} | {objective.measure} ({objective.direction}) | "
        + (
            f"{score.value:.4f} ± {score.stderr:.4f}"
            if tested and (score := tested.scores[objective.name])
            else "not scored"
        )
        + f" | {searched.scores[objective.name].value:.4f} |"
        for objective in run.objectives
    ]
    lines = [
        f"---\n{head}---",
        f"# {run.campaign.name}, trial {trial.number}",
        f"A merge of {', '.join(recipe.experts)} by {recipe.operator}"
        f"{f' in {len(recipe.layers)} layers' if recipe.layers else ''}, found by evomerge among {len(run.trials)} "
        "candidates. Search scores steered the choice and are optimistic; test scores were not used for it. "
        "± is one standard error.",
        "| objective | metric | test | search |\n|---|---|---|---|\n" + "\n".join(rows),
    ]
    if tested:
        lines.append(f"SHA-256 of the merged tensors as scored: `{tested.weights}`.")
    lines.append(
        "Build it again from `recipe.yaml`, which lies beside this card:\n\n    evomerge merge recipe.yaml --out merged"
    )
    lines.append(
        f"mergekit cannot make this merge: {inexpressible}."
        if inexpressible
        else "`mergekit.yaml` describes the same merge for mergekit:\n\n    mergekit-yaml mergekit.yaml merged"
    )
    return "\n\n".join(lines) + "\n"
