"""Sentence embeddings on local data: one JSON Lines file a task, all lines of one form.

    <task>.jsonl         {"source": ..., "text_a": ..., "text_b": ..., "score": 3.5}     similarity
    <task>.jsonl         {"source": ..., "query": ..., "positives": ["d1", ...]}         retrieval
    <task>.corpus.jsonl  {"id": "d1", "text": ...}                                       the passages to retrieve from

Texts become tokens once; all vectors, the corpus's too, are made anew for every model and every call.
Shape letters: N items, B queries of a batch, C passages of a corpus, H size of a vector, P positives of a query.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from evomerge.errors import DataError
from evomerge.evaluators.encoder import Pooling, TextEncoder, Tokens, open_encoder
from evomerge.evaluators.evaluator import LOSS, ItemScores, Metric, Wanted, digest_of, half
from evomerge.evaluators.lines import path_of, read_lines
from evomerge.evaluators.ranking import RANK_METRIC, positive_ranks, rank_metric, spearman
from evomerge.records import Floats, Items, Options, digest

LISTED = ("recall@1", "recall@5", "recall@10", "ndcg@10", "mrr")
KEYS = ({"text_a", "text_b", "score"}, {"query", "positives"})


class EmbeddingOptions(Options):
    """data: the folder of the task files; pooling, max_length (tokens): by default as the base's own files say.

    query_prefix stands before queries and both texts of a pair, passage_prefix before passages. normalize: retrieve by
    the cosine, else by the inner product; temperature: what similarities are divided by in the loss of retrieval.
    batch_size: texts a forward.
    """

    data: str
    pooling: Pooling | None = None
    max_length: int | None = Field(default=None, ge=1)
    query_prefix: str = ""
    passage_prefix: str = ""
    normalize: bool = True
    temperature: float = Field(default=0.05, gt=0)
    batch_size: int = Field(default=64, ge=1)


class _Task(Protocol):
    """One form of task: its texts, its metrics, and what a model makes of its items."""

    encoder: TextEncoder

    @property
    def texts(self) -> Iterable[Tokens]: ...

    @property
    def metrics(self) -> Mapping[str, Metric]: ...

    def measure(self, model: nn.Module, items: Items) -> dict[str, Tensor]:
        """Return (N,) of every metric and the loss; the loss is differentiable in the model's parameters."""


class EmbeddingEvaluator:
    """Similarity and retrieval with the vectors of a text encoder.

    Raises: DataError for a missing or malformed file, or a base that is no encoder of texts.
    """

    losses = frozenset({"ce"})

    def __init__(self, options: EmbeddingOptions, wanted: Wanted, base: Path) -> None:
        encoder = open_encoder(base, options.pooling, options.max_length, options.batch_size)
        self._tasks: dict[str, _Task] = {}
        self.sources: dict[str, Sequence[int | str]] = {}
        paths = []
        for task, metrics in wanted.items():
            path = path_of(Path(options.data), task)
            lines = read_lines(path, task, _flaw)
            self.sources[task] = [line["source"] for line in lines]
            paths.append(path)
            if "text_a" in lines[0]:
                self._tasks[task] = _Similarity(f"task {task}: {path}", lines, encoder, options.query_prefix)
            else:
                paths.append(path_of(Path(options.data), f"{task}.corpus"))
                passages = read_lines(paths[-1], task, _flaw_of_passage, sourced=False)
                self._tasks[task] = _Retrieval(f"task {task}: {path}", (lines, passages), encoder, options, metrics)
        self.digest = digest(
            {
                "files": digest_of(paths),
                "tokens": {task: _hash(held.texts) for task, held in self._tasks.items()},
                "pooling": encoder.pooling,
                **options.model_dump(include={"normalize", "temperature"}),
            }
        )

    def metrics(self, task: str) -> Mapping[str, Metric]:
        """Depends on the form: ``spearman``, or ``recall@k`` and ``ndcg@k`` (any k) and ``mrr``; and ``loss``."""
        return self._tasks[task].metrics

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Score each item; of ``spearman`` its cosine. The corpus is embedded once a call."""
        with torch.inference_mode():
            measured = self._tasks[task].measure(model, items)
        return {metric: tensor.float().cpu().numpy() for metric, tensor in measured.items()}

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Mean of ``loss`` over the items; of retrieval, the gradient goes through queries and all passages."""
        if name != "ce":
            raise DataError(f"task {task}: a search asks for the loss {name!r}; embeddings have ce alone")
        return self._tasks[task].measure(model, items)[LOSS].mean()

    def halved(self) -> "EmbeddingEvaluator":
        """Take half as many texts a forward."""
        twin = copy(self)
        twin._tasks = {task: copy(held) for task, held in self._tasks.items()}
        for held in twin._tasks.values():
            held.encoder = replace(held.encoder, batch_size=half(held.encoder.batch_size))
        return twin


class _Similarity:
    """Pairs of texts with a gold score, which is scaled to 0..1 over the file.

    The loss of a pair is the squared difference of its cosine and its score (Reimers and Gurevych 2019, section 3): up
    to a constant, minus the log-density of the score in a normal distribution of variance 1/2 around the cosine.
    """

    def __init__(self, where: str, lines: Sequence[Mapping[str, Any]], encoder: TextEncoder, prefix: str) -> None:
        scores_N = np.array([line["score"] for line in lines], dtype=np.float64)
        if scores_N.min() == scores_N.max():
            raise DataError(f"{where}: every score is {scores_N[0]:g}; expected scores to rank by")
        self._gold_N = (scores_N - scores_N.min()) / (scores_N.max() - scores_N.min())
        self.encoder = encoder
        self._texts_a, self._texts_b = (
            _tokenized(where, [prefix + line[key] for line in lines], encoder) for key in ("text_a", "text_b")
        )
        self.texts = [*self._texts_a, *self._texts_b]
        self.metrics = {"spearman": Metric("max", partial(_spearman, self._gold_N)), LOSS: Metric("min")}

    def measure(self, model: nn.Module, items: Items) -> dict[str, Tensor]:
        texts = [of_side[item] for of_side in (self._texts_a, self._texts_b) for item in items]
        a_NH, b_NH = self.encoder.embed(model, texts).tensor_split(2)
        cosines_N = cosine_similarity(a_NH, b_NH)
        gold_N = torch.from_numpy(self._gold_N[items]).to(cosines_N)
        return {"spearman": cosines_N, LOSS: (cosines_N - gold_N) ** 2}


class _Retrieval:
    """Queries, and which passages of a corpus answer them.

    The loss of a query is -log of the share that its positives have in the softmax of its similarities with all
    passages, divided by the temperature: InfoNCE (van den Oord et al. 2018) over the corpus.
    """

    def __init__(
        self,
        where: str,
        lines: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]],
        encoder: TextEncoder,
        options: EmbeddingOptions,
        wanted: Sequence[str],
    ) -> None:
        queries, passages = lines
        self.encoder, self._options = encoder, options
        self._positives = _positives(where, queries, passages)
        self._queries = _tokenized(where, [options.query_prefix + line["query"] for line in queries], encoder)
        texts = [options.passage_prefix + line["text"] for line in passages]
        self._corpus = _tokenized(f"{where} (corpus)", texts, encoder)
        self.texts = [*self._queries, *self._corpus]
        self._ranked = list(dict.fromkeys([*LISTED, *(metric for metric in wanted if RANK_METRIC.fullmatch(metric))]))
        self.metrics = {**{metric: Metric("max") for metric in self._ranked}, LOSS: Metric("min")}

    def measure(self, model: nn.Module, items: Items) -> dict[str, Tensor]:
        corpus_CH = self._embed(model, self._corpus, recompute=True)
        queries_NH = self._embed(model, [self._queries[item] for item in items])
        batches = [
            self._measure(queries_BH @ corpus_CH.T, [self._positives[item] for item in batch])
            for queries_BH, batch in zip(
                queries_NH.split(self.encoder.batch_size),
                torch.from_numpy(items).split(self.encoder.batch_size),
                strict=True,
            )
        ]
        return {metric: torch.cat([batch[metric] for batch in batches]) for metric in self.metrics}

    def _embed(self, model: nn.Module, texts: Sequence[Tokens], *, recompute: bool = False) -> Tensor:
        vectors_NH = self.encoder.embed(model, texts, recompute=recompute)
        return normalize(vectors_NH, dim=-1) if self._options.normalize else vectors_NH

    def _measure(self, similarity_BC: Tensor, positives: Sequence[list[int]]) -> dict[str, Tensor]:
        device = similarity_BC.device
        num_B = torch.tensor([len(of_query) for of_query in positives], device=device)
        width = int(num_B.max())
        filled = [[*of_query, *of_query[:1] * (width - len(of_query))] for of_query in positives]
        positives_BP = torch.tensor(filled, device=device)
        ranks_BP = positive_ranks(similarity_BC.detach(), positives_BP, num_B)
        logits_BC = similarity_BC / self._options.temperature
        is_filling_BP = torch.arange(width, device=device) >= num_B[:, None]
        right_BP = logits_BC.gather(1, positives_BP).masked_fill(is_filling_BP, -inf)
        loss_B = logits_BC.logsumexp(1) - right_BP.logsumexp(1)
        return {**{metric: rank_metric(metric, ranks_BP, num_B) for metric in self._ranked}, LOSS: loss_B}


def _spearman(gold_N: Floats, cosines: npt.NDArray[Any], items: Items) -> float:
    return spearman(cosines, gold_N[items])


def _positives(
    where: str, queries: Sequence[Mapping[str, Any]], passages: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """Return which lines of the corpus answer each query. Raises: DataError for an id that is not there once."""
    line_of: dict[int | str, int] = {}
    for number, passage in enumerate(passages):
        if line_of.setdefault(passage["id"], number) != number:
            raise DataError(f"{where} (corpus), line {number + 1}: the id {passage['id']!r} is given twice")
    for number, query in enumerate(queries, start=1):
        if missing := [passage for passage in query["positives"] if passage not in line_of]:
            raise DataError(f"{where}, line {number}: no passage of the corpus has the id {missing[0]!r}")
    return [[line_of[passage] for passage in query["positives"]] for query in queries]


def _tokenized(where: str, texts: Sequence[str], encoder: TextEncoder) -> list[Tokens]:
    tokenized = encoder.tokenize(texts)
    for number, tokens in enumerate(tokenized, start=1):
        if not len(tokens):
            raise DataError(f"{where}, line {number}: expected at least one token a text, found none")
    return tokenized


def _hash(texts: Iterable[Tokens]) -> str:
    whole = hashlib.sha256()
    for tokens in texts:
        whole.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return whole.hexdigest()


def _flaw(line: Mapping[str, Any]) -> str | None:
    """Say what is wrong with an item, if anything is."""
    if set(line) - {"source"} not in KEYS:
        return (
            "expected source and either text_a, text_b and score, or query and positives; found "
            f"{', '.join(sorted(line))}"
        )
    for key in ("text_a", "text_b", "query"):
        if not isinstance(line.get(key, ""), str):
            return f"expected {key} to be a string, found {line[key]!r:.100}"
    score, positives = line.get("score", 0), line.get("positives", [0])
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < inf:
        return f"expected score to be a finite number, found {score!r:.100}"
    if not isinstance(positives, list) or not positives or not all(map(_is_id, positives)):
        return f"expected positives to be a list of at least one id of the corpus, found {positives!r:.100}"
    if len(set(positives)) < len(positives):
        return "an id stands twice among the positives"
    return None


def _flaw_of_passage(line: Mapping[str, Any]) -> str | None:
    if set(line) != {"id", "text"} or not _is_id(line["id"]) or not isinstance(line["text"], str):
        return f"expected id, a string or a whole number, and text, a string; found {dict(line)!r:.100}"
    return None


def _is_id(given: object) -> bool:
    return isinstance(given, int | str) and not isinstance(given, bool)
