"""Examples as token sequences in which answers carry loss.

Example -> `encode_examples` -> Encoded
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from blake3 import blake3

from perta.data._control import Span, Tokens, control_of, tokenise
from perta.data._conversation import Message, RowError
from perta.data._renderer import TemplateError
from perta.data._turns import Layout, lay_out, lay_out_plainly
from perta.data.batch import IGNORE, Encoded
from perta.data.examples import Example, ExampleSet, report_bad_rows
from perta.data.words import common_prefix, is_word, segments, stems
from perta.errors import DataError
from perta.options import DataConfig
from perta.progress import warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SHOWN = 5
_LONGEST = 16  # tokens of a word


@dataclass(frozen=True)
class EncodedSet:
    """Token sequences of a set; `skipped` as in `ExampleSet`."""

    encoded: tuple[Encoded, ...] = field(repr=False)
    skipped: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def labelled_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(e.labelled for e in self.encoded)


def encode_examples(
    examples: ExampleSet,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    longest: int | None = None,
) -> EncodedSet:
    """Tokenise a set, to at most as many tokens as config and model (`longest`) take.

    One sequence per example; of plain text one per window, those of one text equally long but for a
    token. DataError where an answer is empty or cut off, unless it is skipped; EmptyDatasetError
    where nothing is left.
    """
    config = config or DataConfig()
    limit = min(config.max_length, longest or config.max_length)
    encoded: list[Encoded] = []
    bad: list[str] = []
    for example in examples.examples:
        try:
            whole = _encode(example, tokenizer, config)
        except RowError as error:
            bad.append(f"row {example.row}: {error}")
            continue
        if example.kind == "text":
            encoded.extend(_windows(whole, limit))
        elif len(whole.input_ids) > limit:
            size = len(whole.input_ids)
            bad.append(f"row {example.row}: answer cut off, {size} tokens and the limit is {limit}")
        elif not whole.labelled:
            bad.append(f"row {example.row}: no answer tokens")
        else:
            encoded.append(whole)
    _name_control_tokens(examples, tokenizer)
    cure = " Raise --max-length if the model takes more." if bad else ""
    report_bad_rows(examples.source, bad, config.skip_bad_rows, left=len(encoded), cure=cure)
    return EncodedSet(tuple(encoded), examples.skipped + tuple(bad))


def row_mark(example: Example) -> str:
    """BLAKE3 of a row's messages, 16 bytes in hexadecimal."""
    return blake3(example.as_text.encode()).hexdigest(16)


def marks_of(examples: Iterable[Example], encoded: Iterable[Encoded]) -> list[list[str]]:
    """Of each sequence `row_mark` of its row, and the same of its tokens and labels."""
    rows = {example.row: row_mark(example) for example in examples}
    return [
        [rows[e.row], blake3(json.dumps([e.input_ids, e.labels]).encode()).hexdigest(16)]
        for e in encoded
    ]


def _name_control_tokens(examples: ExampleSet, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which rows name control tokens: whoever meant them to steer the model should know."""
    names = control_of(tokenizer).names
    found = [
        (example.row, match[0])
        for example in examples.examples
        if (match := names.search("\n".join(m.content for m in example.messages)))
    ]
    if found:
        rows = ", ".join(str(row) for row, _ in found[:_SHOWN]) + (" …" * (len(found) > _SHOWN))
        warn(
            f"{examples.source}: {len(found)} rows name control tokens such as {found[0][1]} (rows "
            f"{rows}). They are read as text; only the chat template steers the model."
        )


def encode_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    as_published: bool = False,
) -> Encoded:
    """Tokenise one example; every assistant turn carries loss, nothing else does.

    Labelled are the answer's text, what the template puts between the generation prompt and it, and
    what ends it: the template's text up to its first control token, or eos where it has none. With
    `as_published`, as in published benchmarks, all that the template writes behind the prompt, and
    eos once more where it ends otherwise. The sequence ends with its last label. DataError where
    the template refuses the example, or it cannot be told from control tokens.
    """
    try:
        return _encode(example, tokenizer, config, as_published)
    except RowError as error:
        raise DataError(f"Row {example.row}: {error}.") from error


def encode_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[int]:
    """Tokens before the last assistant turn, with the generation prompt; empty for text."""
    if example.kind == "text":
        return []
    try:
        layout = _layout(example, tokenizer, config)
        special = not uses_chat_template(example, tokenizer, config)
        return _tokens(layout.prompt, layout.prompt_own, tokenizer, special).ids
    except RowError as error:
        raise DataError(f"Row {example.row}: {error}.") from error


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text in which control tokens are text, with those the tokenizer puts around."""
    try:
        return tokenise(text, [(0, len(text))], tokenizer, special=True).ids
    except RowError as error:
        raise DataError(f"A text cannot be used: {error}.") from error


def uses_chat_template(
    example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> bool:
    """Whether the example goes through the tokenizer's chat template."""
    return bool(example.kind in ("qa", "chat") and config.chat_template and tokenizer.chat_template)


def _encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    as_published: bool = False,
) -> Encoded:
    layout = _layout(example, tokenizer, config)
    special = not uses_chat_template(example, tokenizer, config)
    whole = _tokens(layout.text, layout.own, tokenizer, special)
    spans, is_ended = _ends(layout, control_of(tokenizer).names)
    ids, eos = whole.ids, tokenizer.eos_token_id
    if example.kind == "text":
        places = [(0, len(ids))]
    elif as_published:
        prompt = _tokens(layout.prompt, layout.prompt_own, tokenizer, special).ids
        places, is_ended = [(common_prefix(ids, prompt), len(ids))], ids[-1:] == [eos]
    else:
        places = [_place(span, whole, layout, tokenizer, special) for span in spans]
    labels = [IGNORE] * len(ids)
    for start, stop in places:
        labels[start:stop] = ids[start:stop]
    if example.kind != "text":
        labels[:1] = [IGNORE]
        if not places[-1][0]:
            raise RowError(
                "the answer begins within the first token, before which nothing stands that could "
                "predict it. Put the border between prompt and answer at a space"
            )
    # What stands behind the last label changes nothing.
    ids, labels = ids[: places[-1][1]], labels[: places[-1][1]]
    if eos is not None and not is_ended:
        ids, labels = [*ids, eos], [*labels, eos]
    return Encoded(tuple(ids), tuple(labels), example.row)


def _layout(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Layout:
    """The example as text, with a system prompt where the template takes one."""
    messages = example.messages
    if not uses_chat_template(example, tokenizer, config):
        return lay_out_plainly(messages, as_is=example.kind in ("text", "completion"))
    variables = json.dumps(dict(tokenizer.special_tokens_map))
    given = (tokenizer.get_chat_template(), variables, config.template_date)
    usual = config.system_prompt == DataConfig().system_prompt
    try:
        if not config.system_prompt or messages[0].role == "system":
            return lay_out(messages, *given, added=False)
        system = Message("system", config.system_prompt)
        try:
            return lay_out((system, *messages), *given, added=usual)
        except RowError:
            # Some templates (Gemma's, Mistral's) know no system message.
            found = lay_out(messages, *given, added=False)
            if usual:
                return found
        raise RowError('the chat template takes no system message; pass --system-prompt ""')
    except TemplateError as error:
        raise DataError(
            f"The tokenizer's chat template cannot be used: {error}. Use --no-chat-template, or "
            "correct the template."
        ) from error


def _ends(layout: Layout, control: re.Pattern[str]) -> tuple[list[Span], bool]:
    """What carries loss of each turn, in the text; and whether a control token ends the last."""
    text, last = layout.text, layout.turns[-1][2]
    token = control.search(text, last) if layout.has_template else None
    closing = text[last : token.end() if token else len(text)]
    spans = []
    for begin, _, stop in layout.turns:
        after = len(text) - len(text[stop:].lstrip())
        if text.startswith(closing, stop):
            stop += len(closing)
        elif token and text.startswith(closing.lstrip(), after):
            stop = after + len(closing.lstrip())
        elif token and (other := control.match(text, after)):
            stop = other.end()
        spans.append((begin, stop))
    return spans, token is not None


def _tokens(
    text: str, own: Sequence[Span], tokenizer: PreTrainedTokenizerBase, special: bool
) -> Tokens:
    tokens = tokenise(text, own, tokenizer, special=special)
    # A tokenizer that closes every text with eos would put it between prompt and answer.
    if special and tokens.ids[-1:] == [tokenizer.eos_token_id]:
        return Tokens(tokens.ids[:-1], tokens.places and tokens.places[:-1])
    return tokens


def _place(
    span: Span, whole: Tokens, layout: Layout, tokenizer: PreTrainedTokenizerBase, special: bool
) -> Span:
    """The tokens that overlap a part of the text: one that spans prompt and answer is answer."""
    start, stop = span
    ids = whole.ids
    if whole.places is not None:
        places = list(enumerate(whole.places))
        first = next((i for i, (a, b) in places if b > start or a == b >= start > 0), len(ids))
        last = next((i for i, (a, b) in reversed(places) if a < stop and b > start), first - 1)
        return first, last + 1

    def upto(end: int) -> list[int]:
        own = [(a, min(b, end)) for a, b in layout.own if a < end]
        return _tokens(layout.text[:end], own, tokenizer, special).ids

    before, through = upto(start), upto(stop)
    first = common_prefix(ids, before)
    if ids[: len(through)] == through:
        return first, len(through)
    rest = tokenise(layout.text[stop:], [], tokenizer, special=False).ids
    return first, max(len(ids) - common_prefix(ids[::-1], rest[::-1]), first)


def _windows(whole: Encoded, limit: int) -> list[Encoded]:
    """Cut plain text into as few windows as fit the limit; every token but the first has a label.

    A last one with few labels shows as many tokens before them as fit; windows weigh by labels.
    """
    ids = whole.input_ids
    edges = [*range(1, len(ids), limit - 1), len(ids)]
    mean = (len(ids) - 1) / (len(edges) - 1) if len(edges) > 1 else 1.0
    windows = []
    for start, stop in itertools.pairwise(edges):
        first = max(0, stop - limit)
        labels = (*[IGNORE] * (start - first), *ids[start:stop])
        windows.append(Encoded(ids[first:stop], labels, whole.row, (stop - start) / mean))
    return windows


class Said:
    """What token ids say, word by word, read from around some of their places.

    Words are spans of `text`, places are positions in the ids.
    """

    def __init__(
        self, ids: Sequence[int], places: Sequence[int], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._first = max(min(places) - _LONGEST, 0)
        ids = ids[self._first : max(places) + 1 + _LONGEST]
        said = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        read = [str(said(list(ids[:n]))) for n in range(len(ids) + 1)]
        self.text = read[-1]
        # A token that ends within a character counts for all of it.
        ends = [
            len(text) if self.text.startswith(text) else common_prefix(text, self.text)
            for text in read
        ]
        self._spans = [(at, next((e for e in ends[n:] if e > at), at)) for n, at in enumerate(ends)]

    def words(self, places: Iterable[int]) -> list[Span]:
        """The words that tokens at some places are of."""
        spans = [self._spans[place - self._first] for place in places]
        words = (w for w in segments(self.text) if is_word(self.text[slice(*w)]))
        return [word for word in words if any(_overlap(word, span) for span in spans)]

    def new_words(self, places: Iterable[int], prompt: str) -> list[Span]:
        """Those of them that the prompt does not say."""
        given = set(stems(prompt))
        return [w for w in self.words(places) if not {*stems(self.text[slice(*w)])} <= given]

    def tokens(self, words: Sequence[Span]) -> list[int]:
        """Places of the tokens of some words."""
        found = (any(_overlap(span, word) for word in words) for span in self._spans)
        return [place for place, is_of in enumerate(found, self._first) if is_of]


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
