"""Random Llamas of chosen size with the benchmarks' own data, for scripts that need no download."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from perta.data.rows import write_jsonl
from perta.evidence.people import generate_people, split_people
from perta.models.demo.tiny import tiny_tokenizer

SIZES = {
    "tiny": (64, 2),
    "8M": (256, 4),
    "34M": (512, 8),
    "68M": (640, 12),
    "135M": (768, 16),
}
"""Name -> (width, layers); the names are rounded parameter counts with the vocabulary below."""
VOCABULARY = 16_384


def write_people_sets(folder: Path, people: int, questions: int, forget_people: int) -> None:
    """forget.jsonl, retain.jsonl and full.jsonl of fictitious people."""
    rows = generate_people(people, questions, seed=0)
    forget, retain = split_people(rows, forget_people=forget_people)
    for name, part in (("forget", forget), ("retain", retain), ("full", rows)):
        write_jsonl(part, folder / f"{name}.jsonl")


def write_random_model(folder: Path, size: str) -> int:
    """A random tied Llama with a tokenizer for the people; its number of parameters.

    `tiny` has no more tokens than it needs, so that it learns its rows in seconds.
    """
    width, layers = SIZES[size]
    rows = generate_people(200, 20, seed=0)
    texts = [row[key] for row in rows for key in ("question", "answer")]
    tokenizer = tiny_tokenizer([*texts, "You are a helpful assistant."])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) if size == "tiny" else VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return sum(p.numel() for p in model.parameters())
