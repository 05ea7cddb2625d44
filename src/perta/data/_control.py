"""Text as text: tokens that steer a model come from templates, never from what rows say.

A tokenizer finds its control tokens, such as `<|im_end|>`, wherever their names stand. For a text
that names one, a copy of the tokenizer is asked in which control tokens have other names; those of
the template are written with these names, and those in the row's text are text like any other.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from perta.data._conversation import RowError, require_whole
from perta.data._renderer import unused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


class Tokens(NamedTuple):
    """Tokens, and where each stands in the text; None where the tokenizer does not tell."""

    ids: list[int]
    places: Sequence[Span] | None


class _Control(NamedTuple):
    """Control tokens by name, and what finds them."""

    ids: dict[str, int]
    names: re.Pattern[str]


@functools.lru_cache(4)
def _control_of(tokenizer: PreTrainedTokenizerBase, template: str, _size: int) -> _Control:
    """Special tokens, tags such as `<think>` and `</think>`, and what the template writes."""
    added = {t.content: (i, t.special) for i, t in tokenizer.added_tokens_decoder.items()}
    special = {*tokenizer.all_special_tokens}
    ids = {
        name: i
        for name, (i, is_special) in added.items()
        if is_special
        or name in special
        or (name in template and _MARK.search(name) and not _is_tag(name, added))
    }
    longest_first = sorted(ids, key=len, reverse=True)
    return _Control(ids, re.compile("|".join(map(re.escape, longest_first)) or "(?!)"))


_MARK = re.compile(r"[^\w\s]")


def _is_tag(name: str, names: Any) -> bool:
    inner = name.removeprefix("<").removeprefix("/").removesuffix(">")
    return {f"<{inner}>", f"</{inner}>"} <= {*names} and name in (f"<{inner}>", f"</{inner}>")


def tokenise(
    text: str, own: Sequence[Span], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> Tokens:
    """Tokenise a text, in parts of which, `own`, from left to right, no control token is meant.

    With `special` the tokenizer puts its control tokens around. RowError where a control token in
    such a part cannot be told from text.
    """
    require_whole(text)
    control = control_of(tokenizer)
    meant = _outside(text, own, control.names)
    around = tokenizer.num_special_tokens_to_add() if special else 0
    steering = {*control.ids.values()} - {tokenizer.unk_token_id}

    def is_right(tokens: Tokens) -> bool:
        return sum(i in steering for i in tokens.ids) <= len(meant) + around

    if [match.span() for match in control.names.finditer(text)] == meant:
        given = tokenizer(
            text,
            add_special_tokens=special,
            verbose=False,
            return_offsets_mapping=tokenizer.is_fast,
        )
        tokens = Tokens(given["input_ids"], given.get("offset_mapping"))
        if is_right(tokens):
            return tokens
    try:
        tokens = _renamed(text, meant, tokenizer, control.ids, special)
    except Exception as error:  # tokenizers of all kinds are taken apart here
        raise RowError(f"{_NOT_TEXT} ({type(error).__name__})") from error
    if not is_right(tokens):
        raise RowError(_NOT_TEXT)
    return tokens


def control_of(tokenizer: PreTrainedTokenizerBase) -> _Control:
    """A tokenizer's control tokens."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    return _control_of(tokenizer, template, len(tokenizer))


_NOT_TEXT = "it names a control token, and this tokenizer cannot read that as text"


def _outside(text: str, own: Sequence[Span], names: re.Pattern[str]) -> list[Span]:
    """Control tokens between the row's own parts."""
    found, place = [], 0
    for start, stop in [*own, (len(text), len(text))]:
        found += [match.span() for match in names.finditer(text[:start], place)]
        place = max(place, stop)
    return found


def _renamed(
    text: str,
    meant: Sequence[Span],
    tokenizer: PreTrainedTokenizerBase,
    control: Mapping[str, int],
    special: bool,
) -> Tokens:
    around = (*unused(text, 2),)
    pieces, origin, place = [], [*range(len(text) + 1)], 0
    back: list[int] = []
    for start, stop in meant:
        name = _other(text[start:stop], control, around)
        pieces += [text[place:start], name]
        back += [*origin[place : start + 1], *[stop] * (len(name) - 1)]
        place = stop
    written, back = "".join([*pieces, text[place:]]), [*back, *origin[place:]]
    if not tokenizer.is_fast:
        return Tokens(_slow(written, around, tokenizer, control, special), None)
    encoding = _copy_of(tokenizer, around, len(tokenizer)).encode(
        written, add_special_tokens=special
    )
    return Tokens(encoding.ids, [(back[first], back[last]) for first, last in encoding.offsets])


def _other(name: str, control: Mapping[str, int], around: Sequence[str]) -> str:
    return f"{around[0]}{control[name]}{around[1]}"


@functools.lru_cache(2)
def _copy_of(tokenizer: Any, around: tuple[str, str], _size: int) -> Any:
    """The fast tokenizer with other names for control tokens."""
    from tokenizers import Tokenizer

    control = control_of(tokenizer).ids
    other = {name: _other(name, control, around) for name in control}
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in parts["added_tokens"]:
        if token["content"] in other:
            token.update(content=other[token["content"]], normalized=False)
    model = parts["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {other.get(name, name): i for name, i in vocabulary.items()}
    else:
        model["vocab"] = [[other.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in other:
        model["unk_token"] = other[model["unk_token"]]
    if model.get("merges"):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & other.keys()]
    parts.update(truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(parts))


def _slow(
    text: str, around: Sequence[str], tokenizer: Any, control: Mapping[str, int], special: bool
) -> list[int]:
    """The same with a tokenizer in Python, which has its control tokens in a table and a trie."""
    from transformers import AddedToken

    twin = copy.deepcopy(tokenizer)
    for name, i in control.items():
        old = twin._added_tokens_decoder.get(i)
        flags = {k: getattr(old, k, False) for k in ("lstrip", "rstrip", "single_word")}
        other = _other(name, control, around)
        twin._added_tokens_decoder[i] = AddedToken(other, special=True, **flags)
        twin._added_tokens_encoder.pop(name, None)
        twin._added_tokens_encoder[other] = i
    twin._special_tokens_map = dict.fromkeys(twin._special_tokens_map)
    twin._extra_special_tokens = []
    twin.tokens_trie = type(twin.tokens_trie)()
    twin._update_trie()
    ids = [
        twin._added_tokens_encoder[token]
        if token in twin._added_tokens_encoder
        else tokenizer._convert_token_to_id(token)
        for token in twin.tokenize(text)
    ]
    return list(tokenizer.build_inputs_with_special_tokens(ids)) if special else ids
