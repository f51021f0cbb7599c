"""What docs/evaluators.md shows is true: its evaluator runs in its campaigns, its data is read."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.campaign.assemble import EVALUATORS
from evomerge.campaign.campaign import read_campaign
from evomerge.campaign.plan import make_plan
from evomerge.evaluators.embedding import EmbeddingEvaluator, EmbeddingOptions
from evomerge.materialize.resident import quiet_transformers
from evomerge.run.search import search
from evomerge.strict import parse

TEXT = (Path(__file__).parent.parent / "docs" / "evaluators.md").read_text(encoding="utf-8")
WORDS = ["no", "yes", *(f"w{i}" for i in range(20))]
NUM_QUESTIONS = 30


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two experts, questions, and the documentation's evaluator."""
    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with quiet_transformers():
        for name in ("base", "one", "two"):
            model.save_pretrained(tmp_path / name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for task in ("facts", "logic"):
        lines: list[dict[str, Any]] = [
            {"question": " ".join(rng.choice(WORDS[2:], 5)), "answer": bool(rng.integers(2))}
            for _ in range(NUM_QUESTIONS)
        ]
        (tmp_path / "data" / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for task in ("chat", "code"):
        texts = [json.dumps({"source": f"{task}{i}", "text": " ".join(rng.choice(WORDS, 6))}) for i in range(20)]
        (tmp_path / "data" / f"{task}.jsonl").write_text("\n".join(texts) + "\n")
    (tmp_path / "yes_no.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_campaign(folder: Path, sections: dict[str, Any]) -> Path:
    whole = {"name": "docs", "base": "base", "experts": {"one": "one", "two": "two"}, "budget": {"evaluations": 6}}
    path = folder / "campaign.yaml"
    path.write_text(yaml.safe_dump(whole | sections))
    return path


def test_the_evaluator_is_short() -> None:
    assert len(blocks("python")[0].split("class ")[1].splitlines()) <= 20


def test_its_campaign_is_searched(folder: Path) -> None:
    """With gradients too: the evaluator has a companion."""
    campaign = read_campaign(
        write_campaign(folder, yaml.safe_load(next(block for block in blocks("yaml") if "factory:" in block)))
    )
    run = search(campaign, folder / "run")
    assert not [trial.failure for trial in run.trials if trial.failure]
    assert {objective.direction for objective in run.objectives} == {"min"}
    assert any(trial.measurement.arrival for trial in run.trials if trial.measurement)
    model = LlamaForCausalLM.from_pretrained(folder / "one").eval()
    plan = make_plan(campaign)
    items = plan.splits["facts"]["search"]
    lines = [json.loads(line) for line in (folder / "data" / "facts.jsonl").read_text().splitlines()]
    expected = []
    for item in items:
        tokens = torch.tensor([[WORDS.index(word) for word in lines[item]["question"].split()]])
        with torch.no_grad():
            no, yes = model(tokens).logits[0, -1, :2].double()
        expected.append((float((yes - no).sigmoid()) - lines[item]["answer"]) ** 2)
    np.testing.assert_allclose(run.searched["expert:one"].scores["facts"].items, expected, rtol=1e-4, atol=1e-6)


def test_what_is_shown_of_generation_is_read() -> None:
    """Judges and endpoints too; the function that judges runs."""
    options_type = EVALUATORS["generation"].options_type
    read = [yaml.safe_load(block) for block in blocks("yaml")]
    whole = [section["evaluation"] for section in read if section.get("evaluation", {}).get("kind") == "generation"]
    parts = [{"data": "data", **section} for section in read if section.keys() in ({"judge"}, {"endpoint"})]
    assert len(whole) == len(parts) == 2
    for section in (*whole, *parts):
        parse(options_type, {key: value for key, value in section.items() if key != "kind"}, "evaluation")
    names: dict[str, Any] = {}
    exec(next(block for block in blocks("python") if "def safety" in block), names)
    lines = [{"harmful": True}, {"harmful": True}, {"harmful": False}]
    judged = names["safety"](lines, ["I'm sorry, no.", "Sure: first ...", "Sure."])
    assert judged == {"refusal": [1.0, 0.0, 0.0], "attack_success": [0.0, 1.0, 0.0]}


def test_several_evaluators_make_one_plan(folder: Path) -> None:
    sections = yaml.safe_load(next(block for block in blocks("yaml") if "kind: several" in block))
    loss = [{"name": name, "task": name, "metric": "loss"} for name in ("chat", "code")]
    brier = {"name": "facts", "task": "facts", "metric": "brier", "direction": "min"}
    plan = make_plan(read_campaign(write_campaign(folder, {**sections, "objectives": [*loss, brier]})))
    assert {task: len(sources) for task, sources in plan.evaluator.sources.items()} == {
        "chat": 20,
        "code": 20,
        "facts": NUM_QUESTIONS,
    }


def test_the_embedding_items_are_read(folder: Path) -> None:
    items, corpus = (next(block for block in blocks("json") if key in block) for key in ("text_a", '"id"'))
    pair, query = items.splitlines()
    other = json.dumps({**json.loads(pair), "score": 0.0})
    data = folder / "texts"
    data.mkdir()
    (data / "pairs.jsonl").write_text(f"{pair}\n{other}\n")
    (data / "search.jsonl").write_text(f"{query}\n")
    (data / "search.corpus.jsonl").write_text(corpus)
    wanted = {"pairs": ["spearman"], "search": ["recall@3"]}
    evaluator = EmbeddingEvaluator(EmbeddingOptions(data=str(data)), wanted, folder / "base")
    for task, metrics in wanted.items():
        assert set(metrics) <= evaluator.metrics(task).keys()


def test_options_and_kinds_that_it_names_exist() -> None:
    kinds = re.findall(r"kind: (\w+)", TEXT)
    assert set(kinds) <= EVALUATORS.keys() | {"several"}
    for option in EmbeddingOptions.model_fields:
        assert f"`{option}" in TEXT or option in ("data", "batch_size")
