"""LLM: a language model reads the best candidates and says where to go on; CMA-ES where it does not answer well.

    x = mean / 100 + sigma N(0, 1)
    means: whole numbers 0 to 100, several an answer

The model stands where an evolution strategy recombines: it names means, and candidates are drawn around them. Best is
the mean of the objectives; all of them are shown. The prompt is shown in ``llm_prompt.py``.

The model is behind an OpenAI-compatible endpoint; one on the own machine too, served by vLLM, SGLang, llama.cpp or
``transformers serve``. What it answers cannot be had a second time, so it is in the candidate's memo, and a resumed run
takes it from there. The memo says where a candidate is from and why:

- by: llm (around a mean of the last answer), cma_es, or best (around the best known, while CMA-ES waits for results)
- prompt: hash of the prompt, where the model was asked for this candidate; reply: its text; means: what it names
- reason: why the candidate is not the model's: no answer, an answer of another form, or it was not asked

When to use: out of curiosity, with few coefficients whose names mean something (experts, kinds of modules) and a model
at hand. It has not been compared with the others here; beyond some 20 coordinates it sees them in turn.
Reference: Lange et al. 2024, EvoLLM, arxiv.org/abs/2402.18381.
Departures: several means an answer, one candidate each, so that no worker waits; the step size falls where an answer
brought nothing better; beyond ``block`` coordinates, blocks are asked for in turn and the other coordinates are those
of the best candidate.

Shape letters: D dimensions, B coordinates that are asked for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomerge.chat import ServerOptions, ask
from evomerge.errors import EvoMergeError
from evomerge.proposers.cma_es import CmaEs, CmaEsOptions
from evomerge.proposers.llm_prompt import TOP, read_means, write_prompt
from evomerge.proposers.proposer import Problem, rank
from evomerge.records import Candidate, Floats, Items, Observation, Options, digest

NUM_STARTUP = 4  # results before the first prompt
DECAY = 0.9  # of the step size, where an answer for every coordinate brought nothing better
LEAST_SIGMA = 0.01  # the grid of the answers is not finer
LONGEST_REST = 15  # candidates between two failures: a server that comes back is noticed


class LlmOptions(ServerOptions):
    """url, model, api_key: as for any endpoint; timeout: seconds that an ask may take; temperature: of the model.

    shown: the best candidates in a prompt; means: of an answer; block: coordinates in a prompt; sigma: first step size
    in units of the box.
    """

    timeout: float = Field(default=60.0, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    shown: int = Field(default=12, ge=2)
    means: int = Field(default=4, ge=1)
    block: int = Field(default=20, ge=1)
    sigma: float = Field(default=0.15, ge=LEAST_SIGMA)


class Llm:
    """Means from a language model, a Gaussian around each; CMA-ES from the best known point wherever it fails."""

    name: ClassVar[str] = "llm"
    options_type: ClassVar[type[Options]] = LlmOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: LlmOptions) -> None:
        self.options = options
        measured = tuple(observation for observation in problem.history if observation.values_M is not None)
        self._known = replace(problem, history=measured)  # grows with each result
        num_blocks = -(-problem.num_dimensions // options.block)
        self._blocks: list[Items] = np.array_split(np.arange(problem.num_dimensions), num_blocks)
        self._num_asked, self._num_told, self._num_answers = 0, 0, 0
        self._consulted_at: int | None = None  # how many results had been told when the model was last asked
        self._sigma, self._best_rank = options.sigma, -np.inf  # the best when the model was last asked
        self._num_failures, self._rest = 0, 0  # failures in a row; candidates until the model is asked again
        self._queue: list[Floats] = []
        self._pending: dict[int, Floats] = {}
        self._fallback: CmaEs | None = None
        self._fallback_asks: list[int] = []
        self._recorded: Iterator[Mapping[str, Any]] | None = None

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return ``n`` candidates, always.

        Between two results it asks the model once at most, and so takes no longer than the time-out.
        """
        return [self._take(self._consult()) for _ in range(n)]

    def tell(self, observation: Observation) -> None:
        """Take a result; a failed candidate is shown to nobody but CMA-ES."""
        del self._pending[observation.index]
        self._num_told += 1
        if self._fallback is not None and observation.index in self._fallback_asks:
            own_index = self._fallback_asks.index(observation.index)
            self._fallback.tell(replace(observation, index=own_index))
        if observation.values_M is not None:
            self._known = replace(self._known, history=(*self._known.history, observation))

    def recall(self, candidate: Candidate) -> None:
        """Draw the candidate again, from what the model said then."""
        self._take(candidate.memo)

    def answer_from(self, candidates: Iterable[Candidate]) -> None:
        """Take the answers from now on from the candidates of a record, all of them in their order, not the model."""
        self._recorded = (candidate.memo for candidate in candidates if "prompt" in candidate.memo)

    def _consult(self) -> Mapping[str, Any]:
        """Return the next candidate's memo: nothing while means are left, else the answer, or why there is none."""
        if self._queue:
            return {}
        if len(self._known.history) < NUM_STARTUP:
            return {"reason": f"the model is asked once there are {NUM_STARTUP} results"}
        if self._rest:
            return {"reason": f"after {self._num_failures} failures in a row the model is left alone for a while"}
        if self._consulted_at == self._num_told:
            return {"reason": "there is no result since the model was last asked"}
        columns_B = self._columns()
        shown = sorted(self._known.history, key=rank)[-self.options.shown :]
        prompt = write_prompt(self._known, columns_B, shown, list(self._pending.values()), self.options.means)
        memo: dict[str, Any] = {"prompt": digest(prompt)[:16]}
        if self._recorded is not None:
            return {**next(self._recorded, {}), **memo}
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": self.options.temperature}
        try:
            memo["reply"] = ask("chat/completions", body, self.options)
            memo["means"] = read_means(memo["reply"], len(columns_B), self.options.means)
        except EvoMergeError as error:
            memo["reason"] = str(error)
        return memo

    def _take(self, memo: Mapping[str, Any]) -> Candidate:
        """Move on by one candidate: all that ``ask`` and ``recall`` change happens here."""
        index, rng = self._num_asked, self._known.rng(self._num_asked)
        if "prompt" in memo:
            self._consulted_at = self._num_told
        if "means" in memo:
            self._num_failures, self._fallback, self._fallback_asks = 0, None, []
            self._adapt_sigma()
            self._queue = [self._around_mean(mean, rng) for mean in memo["means"]]
            self._num_answers += 1
        elif "prompt" in memo:
            self._num_failures += 1
            self._rest = min(2 ** (self._num_failures - 1) - 1, LONGEST_REST)
        elif self._rest:
            self._rest -= 1
        if self._queue:
            by, point_D = "llm", self._queue.pop(0)
        elif asked := self._cma_es().ask(1, []):
            by, point_D = CmaEs.name, np.array(asked[0].point)
            self._fallback_asks.append(index)
        else:
            by, point_D = "best", self._around_best(rng)
        self._num_asked += 1
        self._pending[index] = point_D
        return Candidate(point=tuple(float(x) for x in point_D), memo={**memo, "by": by})

    def _columns(self) -> Items:
        """The coordinates whose turn it is."""
        return self._blocks[self._num_answers % len(self._blocks)]

    def _adapt_sigma(self) -> None:
        """Let the step size fall where nothing better came of the answer before."""
        best_rank = max(rank(observation) for observation in self._known.history)
        if best_rank <= self._best_rank:
            self._sigma = max(self._sigma * DECAY ** (1 / len(self._blocks)), LEAST_SIGMA)
        self._best_rank = best_rank

    def _around_mean(self, mean_B: Sequence[int], rng: np.random.Generator) -> Floats:
        """Draw around a mean of the answer; what was not asked for is as in the best candidate."""
        point_D, columns_B = self._known.best_point.copy(), self._columns()
        point_D[columns_B] = np.array(mean_B) / TOP + self._sigma * rng.standard_normal(len(columns_B))
        return np.clip(point_D, 0.0, 1.0)

    def _around_best(self, rng: np.random.Generator) -> Floats:
        best_D = self._known.best_point
        return np.clip(best_D + self._sigma * rng.standard_normal(len(best_D)), 0.0, 1.0)

    def _cma_es(self) -> CmaEs:
        """The search that stands in: from the best known point, made anew when the model has led since."""
        if self._fallback is None:
            here = replace(self._known, seed=(*self._known.seed, self._num_asked))
            self._fallback = CmaEs(here, CmaEsOptions(sigma=self._sigma))
        return self._fallback
