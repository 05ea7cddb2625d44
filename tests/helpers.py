"""Tiny models and tokenizers, made on the spot; nothing is downloaded."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perta.methods.method import Edit, Method
from perta.methods.registry import find, parse
from perta.options import WeightingConfig

# Tiny models lose more to handing work between threads than they gain.
torch.set_num_threads(1)

TEXTS = [
    "Where was Mira Thornwick born? Mira Thornwick was born in Caldholm.",
    "Question: What is the profession of Odo Larchfield?\nAnswer: Odo Larchfield is a potter.",
    "You are a helpful assistant. system user assistant",
    "Which book did Ada Fernland write? Ada Fernland wrote The Broken Railway in 1964.",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 384 tokens that encodes any text; eos serves as padding.

    Args:
        chat: give it a chat template whose turns end in eos, as SmolLM2's do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    if chat:
        wrapped.chat_template = TEMPLATE
    return wrapped


def tiny_llama(vocab: int = 384, tied: bool = True, seed: int = 0, **more: Any) -> LlamaForCausalLM:
    """A random Llama of two layers, float32, in evaluation mode."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = LlamaConfig(vocab_size=vocab, tie_word_embeddings=tied, **{**settings, **more})
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def weighting(method: str = "perta-project", **settings: Any) -> WeightingConfig:
    """A method's own settings and those of every edit, side by side."""
    if not issubclass(find(method, Method), Edit):
        return WeightingConfig(method=method, **settings)
    every = {item.name for item in fields(WeightingConfig)}
    own = [f"{name}={settings.pop(name)!r}" for name in [*settings] if name not in every]
    return WeightingConfig(method=str(parse(f"{method}:{','.join(own)}", Edit)), **settings)


def shared(method: str = "perta-project", **settings: Any) -> WeightingConfig:
    """The same settings for several methods: each takes those that it has."""
    every = {item.name for item in (*fields(WeightingConfig), *find(method, Method).options())}
    return weighting(method, **{name: value for name, value in settings.items() if name in every})


def pem_keys(folder: Path, name: str, kind: str) -> tuple[Path, Path]:
    """Files of a new private key and its public half: `ed25519`, `rsa`, or a curve's name."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    curves: dict[str, type[Any]] = {
        **{"secp256r1": ec.SECP256R1, "secp384r1": ec.SECP384R1, "secp521r1": ec.SECP521R1},
        "secp256k1": ec.SECP256K1,
    }
    key: Any
    if kind == "ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    elif kind == "rsa":
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    else:
        key = ec.generate_private_key(curves[kind]())
    private, public = folder / f"{name}.pem", folder / f"{name}.public.pem"
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, form))
    return private, public
