"""NSGA-II of pymoo over a pipe; runs in an environment that has pymoo and nothing of evomerge.

The first line of input has the settings; each line of output is a generation of points in [0, 1]^D, and the next line
of input its losses. It ends with its input.

Shape letters: N points of a generation, D dimensions, M objectives.
"""

import json
import sys

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.problem import Problem
from pymoo.problems.static import StaticProblem


def main() -> None:
    """Answer losses with the next generation."""
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no reply
    settings = json.loads(sys.stdin.readline())
    problem = Problem(n_var=settings["num_dimensions"], n_obj=settings["num_objectives"], xl=0.0, xu=1.0)
    algorithm = NSGA2(pop_size=settings["population"], eliminate_duplicates=True)
    algorithm.setup(problem, termination=("n_gen", sys.maxsize), seed=settings["seed"], verbose=False)
    while True:
        generation = algorithm.ask()
        print(json.dumps(generation.get("X").tolist()), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        Evaluator().eval(StaticProblem(problem, F=np.array(json.loads(line))), generation)
        algorithm.tell(infills=generation)


if __name__ == "__main__":
    main()
