"""The answers that a model gives, drawn or greedy: which facts they say.

An answer says a fact where the fact's words follow one another in it, whatever their case and
inflection. Of n answers drawn to a question, c of which say its fact,

    leak@k = 1 - C(n - c, k) / C(n, k)

is the unbiased estimate of how probable it is that one of k answers does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.batch import IGNORE, Encoded
from perta.data.words import segments, stems
from perta.evidence.audit.judge import Found, Judgement, judge_remains
from perta.evidence.audit.probe import Effort, Material, Probe, Rows, View
from perta.evidence.intervals import share_interval
from perta.evidence.quick import scoring_options
from perta.evidence.remains import REMAINDER_SURE
from perta.evidence.results import decode
from perta.evidence.scoring.cache import Masking, Prefixes, extend, supports_prefixes
from perta.evidence.scoring.items import ScoringOptions

Words = Sequence[str]

_BEST_OF = 16  # the k of the score, leak@k
_LEAST_LENGTH = 32  # tokens after which a drawn answer is cut at the earliest
_AT_ONCE = 4  # drawn answers in a pass, in batches: each of them is one token a step
_SPECIFIC = 4  # characters from which a fact is somebody's own and no word of everybody's


# --- saying ---------------------------------------------------------------------------------


def fact_words(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The words of a fact, one list for each run of its tokens; a word counts whole."""
    ids = list(encoded.input_ids)
    text = _text(ids, tokenizer)
    marked = [label != IGNORE for label in encoded.labels]
    edges = [i for i, (a, b) in enumerate(pairwise([False, *marked, False])) if a != b]
    found = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        first, last = (len(_text(ids[:n], tokenizer)) for n in (start, stop))
        words = [text[a:b] for a, b in segments(text) if a < last and b > first]
        found.append(stems(" ".join(words)))
    return [words for words in found if words]


def says(words: Words, fact: Sequence[Words]) -> bool:
    """Whether a text of these words says every part of a fact; none says one without words."""
    return bool(fact) and all(
        any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))
        for part in fact
    )


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


# --- drawing --------------------------------------------------------------------------------


def leak_at(n: int, c: int, k: int) -> float:
    """Probability that one of k answers is among the c hits of n, drawn without replacement."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def draw_answers(
    model: PreTrainedModel,
    prompt: Sequence[int],
    options: ScoringOptions,
    uniforms: Tensor,
    temperature: float,
) -> list[list[int]]:
    """Answers drawn token by token from softmax(logits / temperature), with their end token.

    Answer i takes its token t at the quantile `uniforms`[i, t] in [0, 1), (n, T), so the outcome
    does not depend on how many are drawn at once.
    """
    answers: list[list[int]] = [[] for _ in uniforms]
    alive = list(range(len(answers)))
    with torch.inference_mode():
        growing = _Growing(model, prompt, options.masking, len(alive))
        for step in range(uniforms.shape[1]):
            tokens = _at_quantiles(growing.logits, uniforms[alive, step], temperature)
            for i, token in zip(alive, tokens, strict=True):
                answers[i].append(token)
            rows = [j for j, token in enumerate(tokens) if token not in options.end_ids]
            if not rows or step + 1 == uniforms.shape[1]:
                break
            alive = [alive[j] for j in rows]
            growing.go_on(rows, [tokens[j] for j in rows])
    return answers


class _Growing:
    """Answers to one prompt that grow by a token each; `logits` are of the next ones, (n, V)."""

    def __init__(
        self, model: PreTrainedModel, prompt: Sequence[int], masking: Masking, count: int
    ) -> None:
        self._model, self._masking = model, masking
        self._state: Prefixes | None = None
        self._ids = [list(prompt)] * count
        if supports_prefixes(model):
            fed = extend(model, None, [prompt], [(0, len(prompt) - 1)], masking)
            self._state = fed.keep([0], [len(prompt)]).take([0] * count)
            self.logits = fed.logits.expand(count, -1)
        else:
            self.logits = self._plain(self._ids[:1]).expand(count, -1)

    def go_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on with some of the answers, each with the token it has got."""
        if self._state is None:
            self._ids = [[*self._ids[j], token] for j, token in zip(rows, tokens, strict=True)]
            self.logits = self._plain(self._ids)
            return
        state = self._state.take(rows)
        places = [(j, 0) for j in range(len(rows))]
        fed = extend(self._model, state, [[token] for token in tokens], places, self._masking)
        columns, positions = (tuple(n + 1 for n in c) for c in (state.columns, state.positions))
        self._state = Prefixes(fed.cache, fed.mask, columns, positions)
        self.logits = fed.logits

    def _plain(self, ids: Sequence[Sequence[int]]) -> Tensor:
        logits: Tensor = self._model(input_ids=torch.tensor(ids, device=self._model.device)).logits
        return logits[:, -1]


def _at_quantiles(logits: Tensor, uniforms: Tensor, temperature: float) -> list[int]:
    """The tokens at which the cumulative probability passes the numbers given."""
    sums = (logits.float() / temperature).softmax(-1).cpu().double().cumsum(-1)
    places = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)[:, 0]
    tokens: list[int] = places.clamp_max(logits.shape[-1] - 1).tolist()
    return tokens


class Drawn(Probe):
    """Answers drawn from the model; the fact in the best of 16."""

    group = "sampling"
    source = "leak@k, arXiv 2511.04934; estimator of arXiv 2107.03374"
    unit = f"probability that one of {_BEST_OF} answers says the fact"
    by_row = False  # how often one of few answers says it is chance
    thrifty = True
    temperature: float

    def run(self, view: View, name: str) -> Rows:
        """leak@16 of each row; `more` has how many of n answers say it, and the curve over k."""
        facts, n = view.material.facts[name], view.effort.samples
        hits = [
            view.kept(f"{self.name}/{name}:{place}", partial(self._hits, view, name, place))
            for place in range(len(facts))
        ]
        known = [c for c in hits if c is not None]
        doubling = [2**power for power in range(n.bit_length())]
        curve = {
            k: math.fsum(leak_at(n, c, k) for c in known) / len(known)
            for k in sorted({*doubling, n})
            if known
        }
        scores = [None if c is None else leak_at(n, c, min(_BEST_OF, n)) for c in hits]
        return Rows(scores, {"answers": n, "hits": hits, "leak_at": curve})

    def _hits(self, view: View, name: str, place: int) -> int | None:
        """How many of n answers say the fact; None where there is no question or no fact."""
        item, fact = view.items(name)[place], view.material.facts[name][place]
        words = fact_words(fact.encoded, view.tokenizer)
        if item.prompt is None or not words:
            return None
        effort = view.effort
        most = _longest_answer(item.answers[0], len(item.prompt), effort)
        options = scoring_options(view.model, view.tokenizer, [item], effort.batch_size, most)
        if options.longest is not None:
            most = max(1, min(most, options.longest - len(item.prompt)))
        generator = torch.Generator().manual_seed(effort.seed + fact.row)
        uniforms = torch.rand((effort.samples, most), dtype=torch.float64, generator=generator)
        drawn = [
            answer
            for part in uniforms.split(_AT_ONCE * effort.batch_size)
            for answer in draw_answers(view.model, item.prompt, options, part, self.temperature)
        ]
        return sum(says(stems(decode(view.tokenizer, answer)), words) for answer in drawn)

    def tokens(self, sequences: Sequence[Encoded], effort: Effort) -> float:
        """Every answer's tokens; the questions count once."""
        return sum(effort.samples * _longest_answer(s, 0, effort) for s in sequences) / 2


def _longest_answer(encoded: Encoded, prompt: int, effort: Effort) -> int:
    """Tokens after which a drawn answer is cut: twice the right one."""
    return min(effort.max_new_tokens, max(_LEAST_LENGTH, 2 * (len(encoded.input_ids) - prompt)))


class DrawnPlainly(Drawn):
    """As the model is."""

    name = "drawn"
    question = f"If somebody asked {_BEST_OF} times, would the fact be said once?"
    temperature = 1.0


class DrawnSharply(Drawn):
    """As chat programs commonly draw."""

    name = "drawn-0.8"
    question = f"The same, of {_BEST_OF} answers at temperature 0.8?"
    level = "full"
    temperature = 0.8


# --- whose ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Owned:
    """A fact of somebody's own."""

    name: str
    row: int
    person: tuple[str, int]
    words: Sequence[Words]


class Whose(Probe):
    """Facts of others in the greedy answers."""

    name, group = "whose", "others"
    level = "quick"
    by_row = False

    def run(self, view: View, name: str) -> Rows:
        """1 where the answer to a question says a fact that is another's alone."""
        texts = [
            None if outcome.generated is None else decode(view.tokenizer, outcome.generated)
            for outcome in view.asked(name)
        ]
        return foreign_facts(texts, name, view.material, view.tokenizer)

    def judge(self, found: Found) -> Judgement:
        """By the share of such answers; the full model gives the right ones, and tells nothing."""
        scores = {role: by_set for role, by_set in found.scores.items() if role != "full"}
        values = found.values("cleaned")
        there = [i for i, value in values.items() if value]
        judged = judge_remains(replace(found, scores=scores), wording=True, by_row=False)
        if values and not there and share_interval(0, found.count(values)).high <= REMAINDER_SURE:
            return replace(judged, verdict="passed", reason="no answer says a fact of another's")
        if not there or judged.yardstick is None:
            return judged
        rows = tuple(dict.fromkeys(found.rows["forget"][int(i)] for i in there))
        usual = f"{judged.yardstick[1].value:.0%} by the yardstick"
        why = f"{len(there)} of {len(values)} answers say a fact of another's, {usual}"
        leaking = rows if judged.verdict == "leaks" else ()
        return replace(judged, reason=why, leaking_rows=leaking)


def foreign_facts(
    texts: Sequence[str | None], name: str, material: Material, tokenizer: PreTrainedTokenizerBase
) -> Rows:
    """1 or 0 a row: whether the answer says a fact that one person of another row alone has.

    `texts` are answers of the set `name` in its order; `told` has row, and set and row of the fact.
    """
    owned = _owned_facts(material, tokenizer)
    scores: list[float | None] = []
    told: list[tuple[int, str, int]] = []
    for place, (text, example) in enumerate(zip(texts, material.examples(name), strict=True)):
        if text is None:
            scores.append(None)
            continue
        person = _person(material, name, place)
        words, given = stems(text), stems(f"{example.prompt}\n{example.answer}")
        others = [
            fact
            for fact in owned
            if fact.person != person and says(words, fact.words) and not says(given, fact.words)
        ]
        scores.append(float(bool(others)))
        told += [(example.row, fact.name, fact.row) for fact in others]
    return Rows(scores, {"told": [list(one) for one in told]} if told else {})


def _owned_facts(material: Material, tokenizer: PreTrainedTokenizerBase) -> list[_Owned]:
    """Facts of the rows to forget and to keep that are one person's, and no short word."""
    every = [
        _Owned(name, fact.row, _person(material, name, place), words)
        for name in ("forget", "retain")
        for place, fact in enumerate(material.facts.get(name, ()))
        if (words := fact_words(fact.encoded, tokenizer))
    ]
    owners: dict[str, set[tuple[str, int]]] = {}
    for fact in every:
        owners.setdefault(_spelled(fact), set()).add(fact.person)
    return [f for f in every if len(owners[_spelled(f)]) == 1 and len(_spelled(f)) >= _SPECIFIC]


def _spelled(fact: _Owned) -> str:
    return " ".join(word for part in fact.words for word in part)


def _person(material: Material, name: str, place: int) -> tuple[str, int]:
    """Whom a row is about; the row itself where nothing says so."""
    numbers: Mapping[str, Sequence[int] | None] = material.subjects
    known = numbers.get(name)
    return (name, known[place]) if known else (f"row of {name}", material.rows(name)[place])
