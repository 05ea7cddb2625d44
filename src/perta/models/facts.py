"""Facts: the part of an answer that neither the question nor the template gives away.

The mean over an answer's tokens is mostly sentence template. The fact is what is to be forgotten:
in "Ada Ashbank was born in 1961." the year. `find_facts` marks its tokens, `score_facts` says how
probable a model finds them.

For a row with question q, answer a and fact tokens F:

    loss             = -1/|F| sum_{t in F} log p(a_t | q, a_<t)        nats per fact token
    log_probability  =        sum_{t in F} log p(a_t | q, a_<t)
    choice           = P / (P + sum_k P_k),  P = exp(log_probability), P_k of wrong answer k
    rank             = 1 + number of wrong answers with P_k > P

A model that knows nothing has a choice of about 1 / (1 + wrong answers). Sums favour short wrong
answers, in all models alike: compare with a model that never saw the rows.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from perta.data.batch import IGNORE, Encoded, bucketed, rows_per_pass
from perta.data.examples import (
    FACT_COLUMN,
    PARAPHRASED,
    WRONG,
    Example,
    ExampleSet,
)
from perta.data.tokens import Said, encode_example, encode_examples, encode_prompt
from perta.data.words import common_prefix, is_word, segments, stems
from perta.errors import ConfigError, DataError
from perta.models.load import pad_id
from perta.models.loss import answer_logits, losses_of, token_losses
from perta.options import DataConfig
from perta.parallel import everywhere, gathered, portion, turns, wherever
from perta.progress import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Source = Literal["fact column", "wrong answers", "surprise", "answer"]
Span = tuple[int, int]

SAMPLES = 64  # samples of which one may hit the fact, in results
_SURPRISE = 2.0
"""Nats from which a token is a surprise. With SmolLM2-135M and 176 rows of `perta people`, whose
facts are known, the words of such tokens are 96% of their tokens, and 86% of what is found is
theirs; F1 is within 0.03 of that from 1.5 to 4 nats, and above 2 facts of other rows are missed."""

_GUESSED = 1.0
"""The same for answers in which nothing is: the base model may guess a year by chance."""

_SYMBOLS = frozenset("#%&*@/\\")
"""Punctuation to Unicode that may end a name."""
_BATCH = 8  # rows per pass of the model that is asked what surprises it
_ELSE = "\u2020"  # text that no answer goes on with
_REACH = 4  # tokens that one character beyond a span may change
_SHOWN_ROWS = 10


@dataclass(frozen=True)
class Fact:
    """The fact of one row."""

    row: int  # 1-based row in its file
    encoded: Encoded  # question and right answer; only the fact's tokens are labelled
    wrong: tuple[Encoded, ...]  # the same for each wrong answer; empty where there is none
    source: Source  # how the fact's tokens were found
    # The right answer in the form of the wrong ones; None where `encoded` has it.
    right: Encoded | None = None
    # What tells that a model knows it: of what others say or choose as often, the other chance.
    judged_by: Literal["both", "choice", "hits"] = "both"

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """What `fact_score` wants the loss of: the fact, and the answers to choose among."""
        choice = (self.right, *self.wrong) if self.right else self.wrong
        return (self.encoded, *choice)


@dataclass(frozen=True)
class FactScore:
    """What a model knows of one fact, given question and answer before it."""

    row: int
    loss: float  # mean over the fact's tokens, nats
    log_probability: float  # sum over the fact's tokens, nats
    choice: float | None  # probability among right and wrong answers; None without wrong ones
    rank: int | None  # the right one's place among them, from 1; None likewise

    @property
    def probability(self) -> float:
        """Probability of the whole fact."""
        return math.exp(self.log_probability)


# --- finding --------------------------------------------------------------------------------


def find_facts(
    examples: ExampleSet,
    tokenizer: PreTrainedTokenizerBase,
    data_config: DataConfig | None = None,
    *,
    base: PreTrainedModel | None = None,
    longest: int | None = None,
) -> tuple[Fact, ...]:
    """Mark the fact of every row, one for each sequence that `encode_examples` gives, in its order.

    The first of these that a row has, and that leaves a token:

    1. A column with the fact, a part of the answer.
    2. Wrong answers. With r the right answer in their form (the paraphrase where that is more
       like them), the fact is what of r stands behind the words that all of them begin with and
       before those that all end in, wherever the answer says it. Where the answer puts it in other
       words, the fact is the answer's words that the paraphrase repeats, and that the question and
       at least half of the wrong answers lack; if there is none, what stands behind the beginning
       that the answer shares with all wrong ones.
    3. Surprise: of the answer's words that the question lacks, or of all where it lacks none, those
       with a token whose -log p under the base model, where it is given, is `_SURPRISE` or more, or
       else `_GUESSED`.
    4. The whole answer.

    A fact is made of whole words: what wrong answers share by chance within one, such as the 19 of
    a year, still has to be said. Earlier turns, end tokens and the punctuation behind the fact are
    no part of it. `base` has not seen the rows; `longest` is the most tokens that the model takes.
    DataError where a fact is not in its answer, or its column cannot be used.
    """
    config = data_config or DataConfig()
    encoded = encode_examples(examples, tokenizer, config, longest=longest).encoded
    by_row = {example.row: example for example in examples.examples}
    _refuse_text(examples, config)
    limit = min(config.max_length, longest or config.max_length)
    facts: list[Fact] = []
    for sequence in encoded:
        row = _Row(by_row[sequence.row], sequence, tokenizer, config, limit)
        facts.append(_told(row, examples.source) or row.whole_answer())
    if base is not None:
        prompts = {row: example.prompt for row, example in by_row.items()}
        facts = _surprising(facts, prompts, tokenizer, base)
    looked = {f.row for f in facts if base is not None or WRONG in by_row[f.row].fields}
    lost = [f.row for f in facts if f.source == "answer" and f.row in looked]
    if lost:
        shown = ", ".join(map(str, lost[:_SHOWN_ROWS])) + (" …" if len(lost) > _SHOWN_ROWS else "")
        warn(
            f"{examples.source}: no fact was found in {len(lost)} of {len(facts)} rows (rows "
            f"{shown}); their whole answer counts. Name the fact in a column `{FACT_COLUMN}`."
        )
    return tuple(facts)


def values_of(fact: Fact, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a fact says that its prompt does not: whole words, as far as they stand together.

    Nothing of what the tokenizer has no words for.
    """
    unsaid = (IGNORE, tokenizer.unk_token_id)
    places = [place for place, label in enumerate(fact.encoded.labels) if label not in unsaid]
    if not places:
        return []
    said = Said(fact.encoded.input_ids, places, tokenizer)
    return [said.text[slice(*span)] for span in _joined(said.text, said.new_words(places, prompt))]


def unsayable(
    facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, name: str | None
) -> list[int]:
    """Rows whose fact has unknown tokens, which are any word's; as a whole answer, only such.

    Nothing can be told of them. A warning names them as rows of the set `name`, where that is one.
    """
    unknown = tokenizer.unk_token_id
    found = dict[int, None]()
    for fact in facts:
        labels = [label for label in fact.encoded.labels if label != IGNORE]
        if (all if fact.source == "answer" else any)(label == unknown for label in labels):
            found[fact.row] = None
    if found and name:
        shown = ", ".join(map(str, found))
        warn(
            f"{name}: the tokenizer has no words for the facts of {len(found)} rows, which are not "
            f"judged (rows {shown})"
        )
    return list(found)


def require_sayable(facts: Sequence[Fact]) -> None:
    """Stop where nothing is left of a forget set without those rows."""
    if not facts:
        raise ConfigError(
            "--forget: the tokenizer has no words for any of the facts, so the model cannot say "
            "them and nothing can be told. Give rows in its words."
        )


def _refuse_text(examples: ExampleSet, config: DataConfig) -> None:
    """Stop at, or tell of, facts that plain text has no use for."""
    name = config.fact_column or FACT_COLUMN
    told = [e.row for e in examples.examples if e.kind == "text" and e.fields.get(name)]
    if told and config.fact_column:
        raise DataError(
            f"{examples.source}, row {told[0]}: --fact-column {name} is for rows with an answer, "
            "and this is plain text, of which all counts. Write such rows as questions and "
            "answers, or leave it out."
        )
    if told:
        warn(
            f"{examples.source}: the column `{name}` is not used, because the rows are plain text, "
            "of which all counts. Write them as questions and answers to name their facts."
        )


def is_told(examples: ExampleSet, data_config: DataConfig) -> bool:
    """Whether every row has a column that tells its fact, so that no base model is asked."""
    names = (data_config.fact_column or FACT_COLUMN, WRONG)
    return all(any(e.fields.get(name) for name in names) for e in examples.examples)


class _Row:
    """One row being marked."""

    def __init__(
        self,
        example: Example,
        encoded: Encoded,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        limit: int,
    ) -> None:
        self.example, self.config, self.limit = example, config, limit
        self._encoded, self._tokenizer = encoded, tokenizer
        self._known: dict[str, Encoded] = {}
        self._prompt = encode_prompt(example, tokenizer, config)

    def whole_answer(self) -> Fact:
        """The answer's text as its fact."""
        if self.example.kind == "text":
            return Fact(self.example.row, self._encoded, (), "answer")
        answer = self.example.answer
        start = len(answer) - len(answer.lstrip())
        span = _trimmed(answer, (start, len(answer))) or (start, len(answer.rstrip()))
        return Fact(self.example.row, self.marked(answer, [span]), (), "answer")

    def marked(self, answer: str, spans: Sequence[Span]) -> Encoded:
        """Question and answer, labelled on the tokens that overlap the spans of the answer."""
        whole = self._encode(answer)
        labels = [IGNORE] * len(whole.input_ids)
        for span in spans:
            start, stop = self._tokens(answer, span)
            labels[start:stop] = whole.input_ids[start:stop]
        return replace(whole, labels=tuple(labels))

    def _tokens(self, answer: str, span: Span) -> Span:
        """Place of the tokens that overlap a span of the answer."""
        ids = self._encode(answer).input_ids
        # Text that goes on otherwise has other tokens from the first that reaches into the span.
        start = common_prefix(ids, self._encode(answer[: span[0]]).input_ids)
        start = max(start, common_prefix(ids, self._prompt))
        other = self._encode(answer[: span[1]] + _ELSE).input_ids
        least = max(common_prefix(ids, other), start + 1)
        # The next token may hold the end of the fact and what follows. Decoding tells, unless the
        # tokenizer does not give the text back, because it changes case or lacks words.
        text = answer[slice(*span)]
        reach = range(least, min(least + _REACH, len(ids)) + 1)
        said = partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)
        return start, next((n for n in reach if text in str(said(list(ids[start:n])))), least)

    def _encode(self, answer: str) -> Encoded:
        if answer not in self._known:
            row = self.example.with_answer(answer)
            self._known[answer] = encode_example(row, self._tokenizer, self.config)
        return self._known[answer]


def _told(row: _Row, source: str) -> Fact | None:
    """The fact by what the row's columns say; None where they say nothing."""
    example = row.example
    if example.kind == "text":
        return None
    fact = _column(row, source)
    wrong = _wrong_answers(example, source)
    span = _in_answer(fact, example, source) if fact else None
    if span and not wrong:
        return Fact(example.row, row.marked(example.answer, [span]), (), "fact column")
    if not wrong:
        return None
    found = _by_wrong_answers(row, wrong)
    if span:
        own = row.marked(example.answer, [span])
        right = found.right or found.encoded
        named = replace(found, encoded=own, source="fact column")
        return replace(named, right=None if right == own or not found.wrong else right)
    return found if found.source == "wrong answers" or found.wrong else None


def _column(row: _Row, source: str) -> str | None:
    """What the column with the fact says; None where it is empty or not there."""
    name = row.config.fact_column or FACT_COLUMN
    if row.config.fact_column and name not in row.example.fields:
        raise DataError(
            f"{source}, row {row.example.row}: no column {name!r} for --fact-column. Every row "
            "needs it; leave it empty where the fact is to be found otherwise."
        )
    value = row.example.fields.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{source}, row {row.example.row}: column {name!r} holds {type(value).__name__}; the "
            "fact is a text, a part of the answer."
        )
    return value.strip()


def _in_answer(fact: str, example: Example, source: str) -> Span:
    places = [m.span() for m in re.finditer(re.escape(fact), example.answer)]
    span = _first_said(fact, places, example)
    if span is None:
        raise DataError(
            f"{source}, row {example.row}: the fact {fact!r} is not in the answer "
            f"{example.answer!r}. Write it as the answer has it."
        )
    return _trimmed(example.answer, span) or span


def _first_said(fact: str, places: Sequence[Span], example: Example) -> Span | None:
    """Where the answer says the fact first, whole words first, or last if the question says it."""
    answer = example.answer
    edges = {edge for segment in segments(answer) for edge in segment}
    places = [p for p in places if set(p) <= edges] or list(places)
    if not places:
        return None
    return places[-1] if fact.casefold() in example.prompt.casefold() else places[0]


def _wrong_answers(example: Example, source: str) -> list[str]:
    """The row's wrong answers, each once."""
    value = example.fields.get(WRONG)
    listed = [value] if isinstance(value, str) else value
    if listed is None or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(listed, (list, tuple)) or not all(
        isinstance(text, str) and text.strip() for text in listed
    ):
        raise DataError(
            f"{source}, row {example.row}: column {WRONG!r} must be a list of texts, none empty."
        )
    right = {example.answer, example.fields.get(PARAPHRASED)}
    return [text for text in dict.fromkeys(listed) if text not in right]


def _by_wrong_answers(row: _Row, wrong: Sequence[str]) -> Fact:
    """The fact as what separates the right answer from the wrong ones."""
    example, answer = row.example, row.example.answer
    right = _same_form(example, wrong)
    texts = (right, *wrong)
    places = [_trimmed(t, s) for t, s in zip(texts, _apart(right, wrong), strict=True)]
    values = [text[slice(*place)] for text, place in zip(texts, places, strict=True) if place]
    span = places[0] if right == answer else None
    if right != answer and places[0]:
        span = _said(values[0], example)
    if span and len(values) == len(texts):
        # Only the fact is exchanged, in the answer's own words.
        own, *others = (
            row.marked(answer[: span[0]] + v + answer[span[1] :], [(span[0], span[0] + len(v))])
            for v in (answer[slice(*span)], *values[1:])
        )
        return _fits(row, Fact(example.row, own, tuple(others), "wrong answers"))
    found = [span] if span else _repeated(example, wrong)
    own = row.marked(answer, found) if found else row.whole_answer().encoded
    fact = Fact(example.row, own, (), "wrong answers" if found else "answer")
    if len(values) < len(texts):
        return fact
    first, *others = (row.marked(t, [p]) for t, p in zip(texts, places, strict=True) if p)
    return _fits(row, replace(fact, wrong=tuple(others), right=first))


def _fits(row: _Row, fact: Fact) -> Fact:
    """The fact; without the answers to choose among where one is too long for the model."""
    size = max(len(sequence.input_ids) for sequence in fact.sequences)
    if size <= row.limit:
        return fact
    warn(
        f"row {fact.row}: a paraphrased or wrong answer makes {size} tokens, and the limit is "
        f"{row.limit}. The row has no choice among answers."
    )
    return replace(fact, wrong=(), right=None)


def _same_form(example: Example, wrong: Sequence[str]) -> str:
    """The right answer worded most like the wrong ones: the answer or its paraphrase."""
    paraphrase = example.fields.get(PARAPHRASED)
    if not isinstance(paraphrase, str) or not paraphrase.strip():
        return example.answer
    others = [_words(text) for text in wrong]

    def likeness(form: str) -> float:
        words = _words(form)
        return sum(SequenceMatcher(None, words, w, autojunk=False).ratio() for w in others)

    return max((example.answer, paraphrase), key=likeness)


def _apart(right: str, wrong: Sequence[str]) -> list[Span]:
    """Of the right and each wrong answer the span of words that any wrong answer lacks."""
    texts = (right, *wrong)
    before, behind = _shared(_words(right), [*map(_words, wrong)])
    spans = []
    for text in texts:
        inner = segments(text)[before:]
        inner = inner[: len(inner) - behind]
        spans.append((inner[0][0], inner[-1][1]) if inner else (0, 0))
    return spans


def _shared(right: Sequence[str], wrong: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Number of words that all begin with, and that all end in behind those."""
    before = common_prefix(right, *wrong)
    rest = min(map(len, (right, *wrong))) - before
    return before, min(rest, common_prefix(*(words[::-1] for words in (right, *wrong))))


def _said(fact: str, example: Example) -> Span | None:
    """Where the answer says a fact, whatever its case."""
    places = [m.span() for m in re.finditer(re.escape(fact), example.answer, re.IGNORECASE)]
    return _first_said(fact, places, example)


def _repeated(example: Example, wrong: Sequence[str]) -> list[Span]:
    """The fact of an answer whose wrong answers are worded freely; see `find_facts`."""
    answer = example.answer
    paraphrase = example.fields.get(PARAPHRASED)
    if isinstance(paraphrase, str):
        words = [set(stems(text)) for text in wrong]
        wanted = set(stems(paraphrase)) - set(stems(example.prompt))
        kept = {w for w in wanted if 2 * sum(w in others for others in words) <= len(wrong)}
        places = [s for s in segments(answer) if kept.intersection(stems(answer[slice(*s)]))]
        if places:
            return _joined(answer, places)
    span = _trimmed(answer, _apart(answer, wrong)[0])
    return [span] if span else []


def _joined(text: str, places: Iterable[Span]) -> list[Span]:
    """Words with nothing but space between them, as one span."""
    joined: list[Span] = []
    for start, stop in places:
        if joined and not text[joined[-1][1] : start].strip():
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _words(text: str) -> list[str]:
    return [text[start:stop] for start, stop in segments(text)]


def _trimmed(text: str, span: Span) -> Span | None:
    """A span without punctuation and space at its end; None where no word is left."""
    start, stop = span
    while stop > start and _is_closing(text[stop - 1]):
        stop -= 1
    return (start, stop) if is_word(text[start:stop]) else None


def _is_closing(character: str) -> bool:
    if character.isspace():
        return True
    category = unicodedata.category(character)
    return category in ("Po", "Pe", "Pf", "Pi") and character not in _SYMBOLS


def _surprising(
    facts: Sequence[Fact],
    prompts: Mapping[int, str],
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
) -> list[Fact]:
    """Facts of whole answers, cut down to the words that surprise; `prompts` by row."""
    silent = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    whole = [fact for fact in facts if fact.source == "answer"]
    sequences = [fact.encoded for fact in whole]
    losses = wherever(_losses_by_token, base, sequences, pad_id(tokenizer))
    found = {}
    for fact, own in zip(whole, losses, strict=True):
        labels = fact.encoded.labels
        places = [place for place, label in enumerate(labels) if place and label != IGNORE]
        told = [place for place in places if labels[place] not in silent]
        if not told:  # a text of one token, which nothing foretells
            continue
        said = Said(fact.encoded.input_ids, told, tokenizer)
        by_place = dict(zip(places, own, strict=True))
        words = _surprising_words(said, {p: by_place[p] for p in told}, prompts[fact.row])
        kept = {*said.tokens(words)} & {*told}
        if kept:
            cut = tuple(label if p in kept else IGNORE for p, label in enumerate(labels))
            encoded = replace(fact.encoded, labels=cut)
            found[id(fact)] = replace(fact, encoded=encoded, source="surprise")
    return [found.get(id(fact), fact) for fact in facts]


def _surprising_words(said: Said, losses: Mapping[int, float], prompt: str) -> list[Span]:
    """Words with a token of so high a loss; none where the answer has to count as a whole."""
    new = said.new_words(losses, prompt)
    for least in (_SURPRISE, _GUESSED):
        surprising = said.words(place for place, loss in losses.items() if loss >= least)
        if found := [word for word in surprising if word in new or not new]:
            return found
    return []


@torch.no_grad()
def _losses_by_token(model: nn.Module, examples: Sequence[Encoded], pad: int) -> list[list[float]]:
    """Loss of every labelled token of every example, nats."""
    device = next(model.parameters()).device
    losses: list[list[float]] = [[] for _ in examples]
    size = portion(rows_per_pass(_BATCH, device), len(examples))
    for batch, counts in turns(model, bucketed(examples, size, pad)):
        answers = answer_logits(model, batch.to(device))
        values = token_losses(answers).tolist() if counts else []
        for example, value in zip(answers.example.tolist(), values, strict=counts):
            losses[int(batch.index[example])].append(value)
    return [max(own, key=len) for own in zip(*gathered(losses), strict=True)]


# --- scoring --------------------------------------------------------------------------------


def score_facts(
    model: nn.Module, facts: Sequence[Fact], *, batch_size: int = 8, pad: int
) -> list[FactScore]:
    """What a model knows of facts, in order; `batch_size` does not change the result."""
    sequences = [sequence for fact in facts for sequence in fact.sequences]
    losses: Iterator[float] = iter(
        everywhere(losses_of, model, sequences, batch_size=batch_size, pad=pad)
    )
    return [fact_score(fact, [next(losses) for _ in fact.sequences]) for fact in facts]


def fact_score(fact: Fact, losses: Sequence[float]) -> FactScore:
    """Score of a fact from the mean losses of its `sequences`; equations in this file's head."""
    sums = [-loss * s.labelled for loss, s in zip(losses, fact.sequences, strict=True)]
    choice = rank = None
    if fact.wrong:
        right, *wrong = sums[1:] if fact.right else sums
        choice = math.exp(-_log_sum([0.0, *(value - right for value in wrong)]))
        rank = 1 + sum(value > right for value in wrong)
    return FactScore(fact.row, losses[0], sums[0], choice, rank)


def hit_probability(log_p: float, k: int) -> float:
    """Probability of at least one hit in k independent samples: 1 - (1 - p)^k.

    It is exact to rounding for p next to 0 and next to 1; log p above 0 counts as 0.
    """
    log_p = min(log_p, 0.0)
    if log_p == 0.0:
        return float(k > 0)
    # log(1 - p), by the form that cancels nothing.
    miss = math.log(-math.expm1(log_p)) if log_p > -math.log(2) else math.log1p(-math.exp(log_p))
    return -math.expm1(k * miss)


def _log_sum(values: Sequence[float]) -> float:
    most = max(values)
    if not math.isfinite(most):
        return most
    return most + math.log(math.fsum(math.exp(value - most) for value in values))


# --- distributions --------------------------------------------------------------------------


def share_beyond(values: Sequence[float], yardstick: Sequence[float]) -> float:
    """Share of values above the 95th percentile (linear interpolation) of a yardstick's, unseen.

    Values like its own have a share of about 0.05. DataError where a side is empty.
    """
    if not len(values) or not len(yardstick):
        raise DataError("A share beyond the yardstick needs values on both sides.")
    limit = float(np.quantile(np.asarray(yardstick, dtype=np.float64), 0.95))
    return sum(value > limit for value in values) / len(values)
