"""A tokenizer as GGUF files hold it: tokens by number, their types, merges, special ones.

llama.cpp splits text by rules of its own, named `pre` in a file; here a name is given only to a
`tokenizer.json` that says the very rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from gguf import TokenType

from perta.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAILS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_PATTERNS = {
    _SHORT + _TAILS + r"|\p{N}{1,3}" + _END: "llama-bpe",
    _SHORT + _TAILS + r"|\p{N}" + _END: "qwen2",
}
"""Rule by which text is split -> llama.cpp's name of it."""


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, folder: Path, cure: str
) -> None:
    """Say all that a file says of a tokenizer; `cure` ends the error about kinds not written."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = json.loads(backend.to_str()) if backend is not None else {}
    model = rules.get("model", {})
    if model.get("type") != "BPE":
        raise CheckpointError(f"{folder}: its tokenizer is no BPE, as GGUF files hold it. {cure}")
    count = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens, types = _tokens(rules, count)
    is_piece = bool(model.get("byte_fallback"))
    if is_piece:
        if not _joins_all(model["vocab"], merges):
            raise CheckpointError(
                f"{folder}: its tokenizer joins some pieces and not others that make the same "
                f"token, which llama.cpp does not. {cure}"
            )
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokens, merges))
        tokens_of_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
        types = [
            TokenType.BYTE if t in tokens_of_bytes else k
            for t, k in zip(tokens, types, strict=True)
        ]
    else:
        name = _split_rule(rules.get("pre_tokenizer") or {})
        if name is None:
            raise CheckpointError(
                f"{folder}: its tokenizer splits text by a rule that llama.cpp has no name for "
                f"here. {cure}"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id}
    special |= {"unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    for part, add in special.items():
        if (number := getattr(tokenizer, f"{part}_token_id")) is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    )
    has_space = "".join(tokenizer.tokenize("a")).startswith("▁")
    writer.add_add_space_prefix(is_piece and has_space)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(rules: Mapping[str, Any], count: int) -> tuple[list[str], list[TokenType]]:
    """Every token by its number, up to the rows of the embedding, and its type."""
    tokens = [f"[PAD{i}]" for i in range(count)]
    types = [TokenType.UNUSED] * count
    for token, number in rules["model"]["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in rules["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if (unknown := rules["model"].get("unk_token")) in rules["model"]["vocab"]:
        types[rules["model"]["vocab"][unknown]] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Scores that put merges in their order: llama.cpp joins the pair of the highest score."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _joins_all(vocabulary: Mapping[str, int], merges: Sequence[str]) -> bool:
    """Whether every pair of tokens that makes a token is joined, as SentencePiece does it."""
    known = set(merges)
    return all(
        f"{token[:cut]} {token[cut:]}" in known
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    )


def _split_rule(rule: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of a pre-tokenizer, if it has one that is known here."""
    parts = rule.get("pretokenizers", [rule])
    *firsts, last = [(part.get("type"), part) for part in parts]
    if last[0] != "ByteLevel" or last[1].get("add_prefix_space"):
        return None
    if not firsts:
        return "gpt-2" if last[1].get("use_regex", True) else None
    if len(firsts) > 1:
        return None
    kind, first = firsts[0]
    if kind == "Digits" and first.get("individual_digits") and last[1].get("use_regex", True):
        return "smollm"
    pattern = first.get("pattern", {}).get("Regex")
    is_split = kind == "Split" and first.get("behavior") == "Isolated" and not first.get("invert")
    return _PATTERNS.get(pattern) if is_split and not last[1].get("use_regex", True) else None
