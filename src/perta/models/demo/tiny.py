"""A tiny Llama with a word-level tokenizer, made on the spot: for tests and `demo --tiny`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perta.models.load import save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} <|end|>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(texts: Iterable[str], *, chat: bool = True) -> PreTrainedTokenizerBase:
    """A tokenizer whose vocabulary is the words and punctuation of some texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    # A word keeps the space before it, so that decoding gives the text back.
    split = pre_tokenizers.Split(Regex(r" ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]|\s"), "isolated")
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(f" {text}")}
    words |= {word.removeprefix(" ") for word in words}
    vocabulary = [*special, *sorted((words | {" ", "\n"}) - {""})]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = split
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_llama(
    vocabulary: int, *, tied: bool = True, seed: int = 0, **sizes: int
) -> PreTrainedModel:
    """A random two-layer Llama of about 0.1 million parameters, or of other `sizes`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tiny: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=vocabulary,
        **{**tiny, **sizes},
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def write_tiny_checkpoint(
    folder: Path, texts: Sequence[str], *, seed: int = 0, blocks: int = 2
) -> None:
    """Write a random tiny model with its tokenizer into an existing folder."""
    tokenizer = tiny_tokenizer(texts)
    model = tiny_llama(len(tokenizer), seed=seed, num_hidden_layers=blocks)
    save_model(model, tokenizer, folder, None)
