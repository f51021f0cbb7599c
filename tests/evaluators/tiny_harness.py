"""A tiny causal model with a tokenizer on disk, and a folder of lm-eval tasks of every output type for it."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_models import tiny
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from evomerge.materialize.resident import quiet_transformers

LIMIT = 96  # tokens: some few-shot prompts are longer and are cut
TEXT = "the old fox ran over a red hill and saw nine lazy dogs sleep under one big tree near my river"
WORDS = TEXT.split()
NUM_DOCS, NUM_TRAIN = 14, 9
MEAN = {"aggregation": "mean", "higher_is_better": True}
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<s>it: {% endif %}"

TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} is",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "num_fewshot": 3,
        "metric_list": [{"metric": name, **MEAN} for name in ("acc", "acc_norm", "acc_mutual_info")],
    },
    "letter": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "gold",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc", **MEAN},
            {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
        ],
    },
    "last": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}} ",
        "doc_to_target": "{{last}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **MEAN},
        ],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{(text + ' ') * 6}}",  # longer than the model takes: several windows
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}} and",
        "doc_to_target": "{{last}}",
        "num_fewshot": 2,
        "generation_kwargs": {"until": ["\n", " a"], "max_gen_toks": 9},
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "word",
                "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}],
            },
        ],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "said": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0},
        "metric_list": [
            {"metric": "length", **MEAN},
            {"metric": "code", "aggregation": "mean", "higher_is_better": False},
        ],
    },
}
RESULTS = """
import zlib

def said(doc, results):
    return {"length": len(results[0]), "code": zlib.crc32(results[0].encode()) % 1000 / 8}
"""


def docs(num: int, seed: int) -> list[dict[str, Any]]:
    """Documents of a few random words, with four choices."""
    rng = random.Random(seed)
    return [
        {
            "text": " ".join(rng.choices(WORDS, k=rng.randint(3, 9))),
            "last": rng.choice(WORDS),
            "choices": [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(4)],
            "gold": rng.randrange(4),
        }
        for _ in range(num)
    ]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    """Write documents; return the path."""
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def write_task(folder: Path, name: str, **section: Any) -> None:
    """Write a task file, of the folder's documents unless the section has others; None removes a key."""
    files = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
    splits = {"training_split": "train", "test_split": "test", "metadata": {"version": 1}}
    whole = {"task": name, **source, **splits, **section}
    text = yaml.safe_dump({key: value for key, value in whole.items() if value is not None})
    (folder / f"{name}.yaml").write_text(text)


def write_tasks(folder: Path) -> Path:
    """Write all tasks and their documents into a folder; return it."""
    write_lines(folder / "train.jsonl", docs(NUM_TRAIN, seed=1))
    write_lines(folder / "test.jsonl", docs(NUM_DOCS, seed=2))
    (folder / "results.py").write_text(RESULTS)
    for name, section in TASKS.items():
        write_task(folder, name, **section)
    with (folder / "said.yaml").open("a") as file:
        file.write("process_results: !function results.said\n")
    return folder


def make_tokenizer() -> Any:
    """Byte-level pairs of letters, so that words have several tokens; <s> is put in front."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([doc["text"] for doc in docs(60, seed=3)], trainer)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


def make_model() -> Any:
    """A random Llama of that vocabulary, the same every time."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return tiny("llama", vocab_size=290, max_position_embeddings=LIMIT, **ids)


def save(folder: Path) -> Path:
    """Save model and tokenizer; return the folder."""
    with quiet_transformers(), torch.no_grad():
        make_model().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder
