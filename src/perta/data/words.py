"""Words of any script.

The published ROUGE tokenizer keeps a to z and 0 to 9 alone. Here a word is a run of letters,
digits and their combining marks; in scripts that put no space between words, such as Chinese,
Japanese and Thai, every character is one.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any

import regex

# Thai and Lao, Myanmar, Khmer, Hiragana and Katakana, Han.
_UNSPACED = (
    r"\u0E00-\u0EFF\u1000-\u109F\u1780-\u17FF\u3040-\u30FF\u31F0-\u31FF"
    r"\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\U00020000-\U000323AF"
)
_LETTER = rf"[[\p{{L}}\p{{N}}]--[{_UNSPACED}]]"
_SEGMENT = regex.compile(rf"(?V1){_LETTER}({_LETTER}|\p{{M}})*|[^\s\x1c-\x1f]\p{{M}}*")


def segments(text: str) -> list[tuple[int, int]]:
    """Start and end of every word, and of every character that is neither word nor space."""
    return [match.span() for match in _SEGMENT.finditer(text)]


def common_prefix(*sequences: Sequence[object]) -> int:
    """Length of what all begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def is_word(text: str) -> bool:
    """Whether a text has a letter or a digit."""
    return any(character.isalnum() for character in text)


def stems(text: str) -> list[str]:
    """Words for comparison: without case, English ones stemmed (Porter) as in published ROUGE."""
    plain = unicodedata.normalize("NFKC", text)
    words = [plain[start:stop].casefold() for start, stop in segments(plain)]
    return [stem for word in words if is_word(word) for stem in _stem(word)]


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> tuple[str, ...]:
    return tuple(_english().tokenize(word)) if word.isascii() else (word,)


@functools.cache
def _english() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
