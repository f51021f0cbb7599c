"""What a language model is told of a search, and how its answer is read.

A prompt, for two experts and two objectives:

    You choose numbers for the merge of several models into one, so that the merged model scores higher.
    Every number is an integer from 0 to 100. What they are, in order:
    coefficient maths, from -0.2 at 0 to 1.2 at 100
    coefficient chat, from -0.2 at 0 to 1.2 at 100
    Merges that were scored, the worst first: [numbers] and 2 scores. Higher is better in each:
    [36, 36] 0.512 0.43
    [44, 31] 0.547 0.441, limits missed by 0.02
    [41, 33] 0.55 0.44
    Merges that are being scored: [47, 30] [39, 40]
    Propose 4 different lists of 2 numbers around which higher scores are likely. They may favour different scores.
    Answer with nothing but JSON: {"means": [[integer, ...], ...]}

Reference: Lange et al. 2024, EvoLLM, arxiv.org/abs/2402.18381: coordinates as integers, members from worst to best with
their scores, the answer is where the search goes on.
Shape letters: D dimensions, B coordinates that are asked for, M objectives.
"""

import json
import re
from collections.abc import Sequence

import numpy as np

from evomerge.errors import DataError
from evomerge.proposers.proposer import Problem
from evomerge.records import Floats, Items, Observation

TOP = 100  # the largest integer: a coordinate is told in hundredths
MEANS = re.compile(r'"means"\s*:\s*')


def write_prompt(
    problem: Problem, columns_B: Items, shown: Sequence[Observation], pending: Sequence[Floats], num_means: int
) -> str:
    """Return the prompt. columns_B: the coordinates that are asked for; shown: worst first, none failed."""
    lines = [
        "You choose numbers for the merge of several models into one, so that the merged model scores higher.",
        f"Every number is an integer from 0 to {TOP}. What they are, in order:",
    ]
    for column in columns_B:
        dimension = problem.dimensions[column]
        lines.append(f"{dimension.name}, from {dimension.low:g} at 0 to {dimension.high:g} at {TOP}")
    if left_out := problem.num_dimensions - len(columns_B):
        lines.append(f"{left_out} more numbers are not shown; they stay as they are in the best merge.")
    scores, each = ("1 score", "") if problem.num_objectives == 1 else (f"{problem.num_objectives} scores", " in each")
    lines.append(f"Merges that were scored, the worst first: [numbers] and {scores}. Higher is better{each}:")
    lines += [_line(observation, columns_B) for observation in shown]
    if pending:
        under_way = " ".join(str(to_grid(point_D[columns_B])) for point_D in pending)
        lines.append(f"Merges that are being scored: {under_way}")
    lists = f"{num_means} different lists" if num_means > 1 else "1 list"
    favour = " They may favour different scores." if num_means > 1 and problem.num_objectives > 1 else ""
    lines.append(f"Propose {lists} of {len(columns_B)} numbers around which higher scores are likely.{favour}")
    lines.append('Answer with nothing but JSON: {"means": [[integer, ...], ...]}')
    return "\n".join(lines)


def read_means(reply: str, num_coordinates: int, num_means: int) -> list[list[int]]:
    """Return up to ``num_means`` different lists of integers from 0 to 100; those of another form are left out.

    Words around the JSON do no harm, and of several drafts the last counts.
    Raises: DataError where there is none of that form.
    """
    drafts = list(MEANS.finditer(reply))
    expected = f'expected {{"means": [...]}} with a list of {num_coordinates} integers from 0 to {TOP}'
    if not drafts:
        raise DataError(f"{expected}, found no means")
    try:
        given, _ = json.JSONDecoder().raw_decode(reply, drafts[-1].end())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{expected}, found no JSON after means") from error
    means: list[list[int]] = []
    for mean in given if isinstance(given, list) else []:
        is_list = isinstance(mean, list) and len(mean) == num_coordinates
        if is_list and all(type(x) is int and 0 <= x <= TOP for x in mean) and mean not in means:
            means.append(mean)
    if not means:
        raise DataError(f"{expected}, found {json.dumps(given):.80}")
    return means[:num_means]


def to_grid(point_B: Floats) -> list[int]:
    """Return coordinates of [0, 1] as integers from 0 to 100."""
    return [int(x) for x in np.rint(TOP * point_B)]


def _line(observation: Observation, columns_B: Items) -> str:
    assert observation.values_M is not None
    scores = " ".join(f"{value:.4g}" for value in observation.values_M)
    missed = f", limits missed by {observation.violation:.2g}" if observation.violation > 0 else ""
    return f"{to_grid(observation.point[columns_B])} {scores}{missed}"
