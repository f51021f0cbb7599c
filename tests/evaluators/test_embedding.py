"""Sentence embeddings: a tiny BERT and a tiny Llama without its head."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_contract import EvaluatorContract
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from evomerge.errors import DataError
from evomerge.evaluators.embedding import EmbeddingEvaluator, EmbeddingOptions
from evomerge.evaluators.encoder import open_encoder
from evomerge.evaluators.evaluator import Metric

NUM_WORDS, NUM_PAIRS, NUM_QUERIES, NUM_PASSAGES, LIMIT = 40, 14, 12, 17, 32
TEMPERATURE = 0.2
WANTED = {"pairs": ["spearman"], "search": ["recall@2", "ndcg@3"]}
SIZES = {
    "vocab_size": NUM_WORDS + 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.3,
}


def make_bert() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def make_llama() -> Any:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def make_tokenizer() -> Any:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(NUM_WORDS))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What of a checkpoint the evaluator reads: tokenizer and configuration."""
    folder = tmp_path / "base"
    make_tokenizer().save_pretrained(folder)
    BertConfig(**SIZES).save_pretrained(folder)
    return folder


def words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, NUM_WORDS, rng.integers(low, high)))


def write(path: Path, lines: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_lines() -> dict[str, list[dict[str, Any]]]:
    """Texts of many lengths, scores with ties, queries with one to three positives; ids are names and numbers."""
    rng = np.random.default_rng(1)
    ids = [f"d{i}" if i % 2 else i for i in range(NUM_PASSAGES)]
    return {
        "pairs": [
            {"source": i, "text_a": words(rng, 1, 20), "text_b": words(rng, 1, 20), "score": float(i % 5)}
            for i in range(NUM_PAIRS)
        ],
        "search": [
            {
                "source": f"q{i}",
                "query": words(rng, 1, 8),
                "positives": [ids[p] for p in rng.choice(NUM_PASSAGES, 1 + i % 3, replace=False)],
            }
            for i in range(NUM_QUERIES)
        ],
        "search.corpus": [{"id": name, "text": words(rng, 1, 20)} for name in ids],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, lines in make_lines().items():
        write(tmp_path / "data" / f"{name}.jsonl", lines)
    return tmp_path / "data"


@pytest.fixture
def make(data: Path, base: Path) -> Callable[..., EmbeddingEvaluator]:
    def build(**options: Any) -> EmbeddingEvaluator:
        given = {"temperature": TEMPERATURE, "batch_size": 5, **options}
        return EmbeddingEvaluator(EmbeddingOptions(data=str(data), **given), WANTED, base)

    return build


def vector(model: Any, text: str, pooling: str, max_length: int = LIMIT) -> Tensor:
    """One text alone: nothing is padded."""
    encoded = make_tokenizer()(text, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        hidden_TH = model(input_ids=encoded["input_ids"]).last_hidden_state[0].double()
    return {"mean": hidden_TH.mean(0), "cls": hidden_TH[0], "last": hidden_TH[-1]}[pooling]


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


class EmbeddingTests(EvaluatorContract):
    tasks = mean_loss_tasks = ("pairs", "search")
    pooling: str

    @pytest.fixture
    def evaluator(self, make: Callable[..., EmbeddingEvaluator]) -> EmbeddingEvaluator:
        return make(pooling=self.pooling)

    @pytest.fixture
    def one_at_a_time(self, make: Callable[..., EmbeddingEvaluator]) -> EmbeddingEvaluator:
        return make(pooling=self.pooling, batch_size=1)

    def test_similarity_equals_a_direct_computation(self, evaluator: EmbeddingEvaluator, model: Any) -> None:
        items = np.array([3, 1, 13, 7, 2, 9, 0])
        lines = [make_lines()["pairs"][item] for item in items]
        cosines = [
            cosine(vector(model, line["text_a"], self.pooling), vector(model, line["text_b"], self.pooling))
            for line in lines
        ]
        scores = evaluator.score(model, "pairs", items)
        np.testing.assert_allclose(scores["spearman"], cosines, rtol=1e-4, atol=1e-5)
        gold = np.array([line["score"] for line in lines])
        np.testing.assert_allclose(scores["loss"], (np.array(cosines) - gold / 4) ** 2, rtol=1e-3, atol=1e-5)
        aggregate = evaluator.metrics("pairs")["spearman"].aggregate
        assert aggregate is not None
        assert aggregate(scores["spearman"], items) == pytest.approx(spearmanr(cosines, gold).statistic)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_retrieval_equals_a_direct_computation(
        self, make: Callable[..., EmbeddingEvaluator], model: Any, normalize: bool
    ) -> None:
        evaluator = make(pooling=self.pooling, normalize=normalize, query_prefix="w1 w2 ", passage_prefix="w3 ")
        lines, passages = make_lines()["search"], make_lines()["search.corpus"]
        corpus = [vector(model, "w3 " + passage["text"], self.pooling) for passage in passages]
        ids = [passage["id"] for passage in passages]
        scores = evaluator.score(model, "search", np.arange(NUM_QUERIES))
        for item, line in enumerate(lines):
            query = vector(model, "w1 w2 " + line["query"], self.pooling)
            similarity = [cosine(query, of_text) if normalize else float(query @ of_text) for of_text in corpus]
            right = [ids.index(passage) for passage in line["positives"]]
            first = sorted(range(NUM_PASSAGES), key=lambda i: -similarity[i])
            for k in (1, 2, 5, 10):
                expected = len(set(first[:k]) & set(right)) / len(right)
                assert scores[f"recall@{k}"][item] == pytest.approx(expected)
            assert scores["mrr"][item] == pytest.approx(1 / (1 + min(first.index(i) for i in right)))
            logits = np.array(similarity) / TEMPERATURE
            loss = np.logaddexp.reduce(logits) - np.logaddexp.reduce(logits[right])
            assert scores["loss"][item] == pytest.approx(loss, rel=1e-4, abs=1e-4)

    def test_a_model_with_a_head_is_scored_by_what_is_below_it(
        self, evaluator: EmbeddingEvaluator, model: Any, headed: Any
    ) -> None:
        for task in self.tasks:
            items = np.arange(6)
            one, other = evaluator.score(model, task, items), evaluator.score(headed, task, items)
            assert all(np.array_equal(one[metric], other[metric]) for metric in one)

    def test_nan_in_the_weights_is_nan_in_every_score(self, evaluator: EmbeddingEvaluator, model: Any) -> None:
        with torch.no_grad():
            next(model.parameters())[4 + 7] = math.nan  # one word; in some of the texts, and so in the corpus
        scores = evaluator.score(model, "search", np.arange(NUM_QUERIES))
        assert all(np.isnan(of_items).all() for of_items in scores.values())
        scores = evaluator.score(model, "pairs", np.arange(NUM_PAIRS))
        lines = make_lines()["pairs"]
        has_word = ["w7" in f"{line['text_a']} {line['text_b']}".split() for line in lines]
        assert np.isnan(scores["spearman"]).tolist() == has_word
        assert np.isnan(scores["loss"]).tolist() == has_word
        assert 0 < sum(has_word) < NUM_PAIRS


class TestBert(EmbeddingTests):
    pooling = "mean"

    @pytest.fixture
    def model(self) -> Any:
        return make_bert()

    @pytest.fixture
    def headed(self, model: Any) -> Any:
        headed = BertForMaskedLM(model.config).eval()
        headed.bert.load_state_dict(model.state_dict(), strict=False)
        return headed


class TestLlama(EmbeddingTests):
    pooling = "last"

    @pytest.fixture
    def model(self) -> Any:
        return make_llama()

    @pytest.fixture
    def headed(self, model: Any) -> Any:
        headed = LlamaForCausalLM(model.config).eval()
        headed.model.load_state_dict(model.state_dict())
        return headed


def test_gradients_of_the_corpus_are_whole_though_its_batches_run_twice(
    make: Callable[..., EmbeddingEvaluator],
) -> None:
    """As in one batch that keeps everything; and each parameter's gradient arrives once."""
    model, arrivals = make_bert(), []
    items = np.arange(4)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: arrivals.append(id(p))) for p in model.parameters()]
    make(batch_size=3).loss(model, "search", items, "ce").backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(arrivals) == len(set(arrivals)) == len(gradients)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    lines, passages = make_lines()["search"], make_lines()["search.corpus"]
    ids = [passage["id"] for passage in passages]
    tokenizer, losses = make_tokenizer(), []

    def embed(texts: list[str]) -> Tensor:
        hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        return torch.nn.functional.normalize(torch.stack(hidden), dim=-1)

    logits = embed([line["query"] for line in lines[:4]]) @ embed([p["text"] for p in passages]).T / TEMPERATURE
    for row, line in zip(logits.log_softmax(-1), lines, strict=False):
        losses.append(-row[[ids.index(passage) for passage in line["positives"]]].logsumexp(0))
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_listing_names_what_is_usual_and_what_is_wanted(make: Callable[..., EmbeddingEvaluator]) -> None:
    pairs, search = make().metrics("pairs"), make().metrics("search")
    assert [metric.direction for metric in pairs.values()] == ["max", "min"]
    assert list(pairs) == ["spearman", "loss"]
    names = ["recall@1", "recall@5", "recall@10", "ndcg@10", "mrr", "recall@2", "ndcg@3"]
    assert search == {**{name: Metric("max") for name in names}, "loss": Metric("min")}


def test_a_wanted_metric_that_there_is_not_is_not_listed(data: Path, base: Path) -> None:
    wanted = {"search": ["recall@0", "recall", "spearman", "precision@3", "mrr"]}
    metrics = EmbeddingEvaluator(EmbeddingOptions(data=str(data)), wanted, base).metrics("search")
    assert not {"recall@0", "recall", "spearman", "precision@3"} & metrics.keys()


def test_a_loss_that_there_is_not(make: Callable[..., EmbeddingEvaluator]) -> None:
    with pytest.raises(DataError, match=r"task pairs: .*'entropy'.* ce"):
        make().loss(make_bert(), "pairs", np.arange(3), "entropy")


def test_texts_are_cut(make: Callable[..., EmbeddingEvaluator]) -> None:
    model, items = make_bert(), np.arange(NUM_PAIRS)
    lines = make_lines()["pairs"]
    scores = make(pooling="mean", max_length=5).score(model, "pairs", items)
    cosines = [cosine(*(vector(model, line[key], "mean", 5) for key in ("text_a", "text_b"))) for line in lines]
    np.testing.assert_allclose(scores["spearman"], cosines, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"pooling": "cls"},
        {"normalize": False},
        {"temperature": 0.3},
        {"query_prefix": "w1 "},
        {"passage_prefix": "w1 "},
        {"max_length": 4},
        {"score": 1.5},
        {"text": "w1"},
    ],
)
def test_the_digest_tells_what_changes_scores(
    make: Callable[..., EmbeddingEvaluator], data: Path, change: dict[str, Any]
) -> None:
    before = make().digest
    assert make(batch_size=2).digest == before
    name = "pairs" if "score" in change else "search.corpus"
    if change.keys() & {"score", "text"}:
        lines = make_lines()[name]
        write(data / f"{name}.jsonl", [{**lines[0], **change}, *lines[1:]])
        change = {}
    assert make(**change).digest != before


class TestTheModelsOwnFiles:
    """What sentence-transformers writes beside a model says how it is pooled and cut."""

    @pytest.mark.parametrize(
        ("config", "pooling"),
        [
            (None, "mean"),
            ({"pooling_mode": "cls", "embedding_dimension": 24, "include_prompt": True}, "cls"),
            ({"pooling_mode": ["lasttoken"]}, "last"),
            (
                {"word_embedding_dimension": 24, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
                "cls",
            ),
            (
                {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False},
                "mean",
            ),
            ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ],
    )
    def test_pooling(self, base: Path, config: dict[str, Any] | None, pooling: str) -> None:
        if config is not None:
            (base / "1_Pooling").mkdir()
            (base / "1_Pooling" / "config.json").write_text(json.dumps(config))
        assert open_encoder(base, None, None, 8).pooling == pooling
        assert open_encoder(base, "mean", None, 8).pooling == "mean"

    @pytest.mark.parametrize(
        ("config", "modules", "words"),
        [
            ({"pooling_mode": "max"}, [], "the pooling max;"),
            ({"pooling_mode_weightedmean_tokens": True}, [], "the pooling weightedmean_tokens;"),
            ({"pooling_mode": ["mean", "cls"]}, [], "two poolings"),
            ({"pooling_mode_mean_tokens": False}, [], "no pooling"),
            ({"pooling_mode": "mean", "include_prompt": False}, [], "prompts left out"),
            ({"pooling_mode": "mean"}, ["sentence_transformers.models.Dense"], "the module Dense;"),
        ],
    )
    def test_what_is_not_offered(self, base: Path, config: dict[str, Any], modules: list[str], words: str) -> None:
        (base / "1_Pooling").mkdir()
        (base / "1_Pooling" / "config.json").write_text(json.dumps(config))
        types = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling", *modules]
        (base / "modules.json").write_text(json.dumps([{"idx": i, "type": name} for i, name in enumerate(types)]))
        with pytest.raises(DataError, match=words) as caught:
            open_encoder(base, None, None, 8)
        assert "mean, cls and last" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert open_encoder(base, "mean", None, 8).pooling == "mean"

    def test_a_file_that_is_not_json(self, base: Path) -> None:
        (base / "modules.json").write_text("{")
        with pytest.raises(DataError, match=r"modules\.json cannot be read"):
            open_encoder(base, None, None, 8)

    def test_length(self, base: Path) -> None:
        assert open_encoder(base, None, None, 8).limit == LIMIT
        (base / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": false}')
        assert open_encoder(base, None, None, 8).limit == 9
        assert open_encoder(base, None, 20, 8).limit == 20
        with pytest.raises(DataError, match=rf"max_length: {LIMIT + 1} tokens, but the model takes {LIMIT}"):
            open_encoder(base, None, LIMIT + 1, 8)


PAIR = {"source": 0, "text_a": "w1", "text_b": "w2", "score": 1.0}
OTHER = {**PAIR, "score": 2.0}
QUERY = {"source": 0, "query": "w1", "positives": ["d0"]}
PASSAGE = {"id": "d0", "text": "w1"}


@pytest.mark.parametrize(
    ("lines", "corpus", "words"),
    [
        ([{**PAIR, "query": "w1"}], [], ["line 1", "either text_a, text_b and score, or query and positives"]),
        ([{"source": 0, "text_a": "w1", "score": 1.0}], [], ["line 1", "found score, source, text_a"]),
        ([PAIR, QUERY], [PASSAGE], ["line 2", "same keys as in line 1"]),
        ([PAIR, {**OTHER, "text_b": 7}], [], ["line 2", "text_b to be a string, found 7"]),
        ([PAIR, {**OTHER, "score": "high"}], [], ["line 2", "finite number, found 'high'"]),
        ([PAIR, {**OTHER, "score": float("nan")}], [], ["line 2", "finite number, found nan"]),
        ([PAIR, {**OTHER, "score": True}], [], ["line 2", "finite number, found True"]),
        ([PAIR, PAIR], [], ["every score is 1"]),
        ([{**QUERY, "query": None}], [PASSAGE], ["line 1", "query to be a string"]),
        ([{**QUERY, "positives": []}], [PASSAGE], ["line 1", "at least one id"]),
        ([{**QUERY, "positives": "d0"}], [PASSAGE], ["line 1", "list of at least one id"]),
        ([{**QUERY, "positives": [["d0"]]}], [PASSAGE], ["line 1", "list of at least one id"]),
        ([{**QUERY, "positives": ["d0", "d0"]}], [PASSAGE], ["line 1", "twice among the positives"]),
        ([QUERY, {**QUERY, "positives": ["d0", "d1"]}], [PASSAGE], ["line 2", "no passage", "'d1'"]),
        ([{**QUERY, "positives": [0]}], [{"id": "0", "text": "w1"}], ["line 1", "no passage", "id 0"]),
        ([QUERY], [PASSAGE, PASSAGE], ["line 2", "'d0' is given twice"]),
        ([QUERY], [{**PASSAGE, "title": "w1"}], ["task.corpus.jsonl, line 1", "expected id", "title"]),
        ([QUERY], [{"id": None, "text": "w1"}], ["task.corpus.jsonl, line 1", "expected id"]),
        ([QUERY], [PASSAGE, ["d1", "w1"]], ["task.corpus.jsonl, line 2", "list"]),
        ([QUERY], None, ["task.corpus.jsonl", "found none"]),
    ],
)
def test_a_malformed_file_is_named(
    tmp_path: Path, base: Path, lines: list[Any], corpus: list[Any] | None, words: list[str]
) -> None:
    write(tmp_path / "data" / "task.jsonl", lines)
    if corpus:
        write(tmp_path / "data" / "task.corpus.jsonl", corpus)
    with pytest.raises(DataError) as caught:
        EmbeddingEvaluator(EmbeddingOptions(data=str(tmp_path / "data")), {"task": ["mrr"]}, base)
    for word in ["task task", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_without_tokens(tmp_path: Path, base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(base)
    write(tmp_path / "data" / "task.jsonl", [PAIR, {**OTHER, "text_a": " "}])
    with pytest.raises(DataError, match="task task: .*line 2: expected at least one token a text"):
        EmbeddingEvaluator(EmbeddingOptions(data=str(tmp_path / "data")), {"task": ["spearman"]}, base)


def test_a_model_without_hidden_states_to_pool(make: Callable[..., EmbeddingEvaluator]) -> None:
    class Scalar(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.scale * input_ids.sum()

    with pytest.raises(DataError, match="Scalar gives no last_hidden_state"):
        make().score(Scalar(), "pairs", np.arange(3))
