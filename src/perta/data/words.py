"""Words of any script.

The published ROUGE tokenizer keeps a to z and 0 to 9 alone. Here a word is a run of letters,
digits and their combining marks; in scripts that put no space between words, such as Chinese,
Japanese and Thai, every character is one.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)


def segments(text: str) -> list[tuple[int, int]]:
    """Start and end of every word, and of every character that is neither word nor space."""
    found: list[tuple[int, int]] = []
    inside = False  # whether the next letter belongs to the last segment
    for i, character in enumerate(text):
        kind = _kind(character)
        adjoins = bool(found) and found[-1][1] == i
        if adjoins and (kind == "mark" or (inside and kind == "letter")):
            found[-1] = (found[-1][0], i + 1)
        elif kind != "space":
            found.append((i, i + 1))
            inside = kind == "letter"
        else:
            inside = False
    return found


def is_word(text: str) -> bool:
    """Whether a text has a letter or a digit."""
    return any(character.isalnum() for character in text)


def stems(text: str) -> list[str]:
    """Words for comparison: without case, English ones stemmed (Porter) as in published ROUGE."""
    plain = unicodedata.normalize("NFKC", text)
    words = [plain[start:stop].casefold() for start, stop in segments(plain)]
    return [stem for word in words if is_word(word) for stem in _stem(word)]


@functools.cache
def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    if unicodedata.category(character).startswith("M"):
        return "mark"
    code = ord(character)
    joins = character.isalnum() and not any(low <= code <= high for low, high in _UNSPACED)
    return "letter" if joins else "alone"


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> tuple[str, ...]:
    return tuple(_english().tokenize(word)) if word.isascii() else (word,)


@functools.cache
def _english() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
