"""Tiny random causal models of many architectures, and a tokenizer of one token a word."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from evomerge.materialize.resident import quiet_transformers

NUM_WORDS, LIMIT = 40, 48
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "vocab_size": NUM_WORDS + 2,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of a kind of AutoConfig's, with weights large enough to matter."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **({k: v for k, v in SIZES.items() if hasattr(known, k)} | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def word_tokenizer(**changes: Any) -> Any:
    """One token a word, w0 to w39; <s> is put in front."""
    words = {"<s>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(NUM_WORDS)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", **changes)


def write_base(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write a checkpoint."""
    tokenizer.save_pretrained(folder)
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder
