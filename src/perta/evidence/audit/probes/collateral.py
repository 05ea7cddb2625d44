"""Collateral: what the removal did to what was to stay.

With x_i the cleaned model's value of retained row i and f_i the full model's, what is kept is

    mean(x) / mean(f),      with the interval of mean(x - f), over subjects where they are known

It is `harmed` where less than 95% is kept and the interval says so, or where a subject of several
rows keeps less than half; `passed` where 95% is kept, and 80% by the interval's lower end. Measures
that a removal makes larger (repetition, refusals, oddness) are judged by how far they rise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from transformers import PreTrainedModel

from perta.data.batch import IGNORE, Encoded, collate
from perta.data.tokens import encode_prompt
from perta.evidence.audit.judge import Found, Judgement, Verdict
from perta.evidence.audit.probe import Need, Probe, Rows, View
from perta.evidence.intervals import Interval, mean_interval, student_interval
from perta.evidence.measures import groups_of
from perta.evidence.remains import (
    KEPT,
    KEPT_PARTLY,
    SMALLEST_GAP,
    kept,
    lost_subjects,
    subject_means,
)
from perta.evidence.results import decode
from perta.models.load import pad_id
from perta.models.loss import losses_of

_NEAREST = 3
_GRAM = 4
_ASKING = 8  # questions of a pass
_REFUSAL = re.compile(
    r"\b(i(\s+am|['’]m)?\s+(really\s+|simply\s+)?(do\s*n[o'’]?t\s+(know|have)|don['’]t\s+(know|have)"
    r"|can(['’]t|not)\s+(say|tell|answer|help)|am\s+unable|unable\s+to|not\s+(aware|familiar|able)"
    r"|have\s+(no|nothing|not)\b|sorry|afraid)|unknown\s+to\s+me|(beyond|in)\s+what\s+i\s+know"
    r"|my\s+knowledge\s+does|sorry,|unfortunately)",
    re.IGNORECASE,
)


class Collateral(Probe):
    """A probe of retained rows."""

    group = "collateral"
    sets: tuple[str, ...] = ("retain",)
    compared: tuple[str, ...] = ("retain",)
    needs: tuple[Need, ...] = ("retain", "full")
    most_rise: float | None = None  # above the full model, of what a removal makes larger
    bounded = True  # whether scores are in [0, 1]

    def judge(self, found: Found) -> Judgement:
        """What is kept of what the full model had, or how far a score rose."""
        if self.most_rise is None:
            return judge_kept(found, self.sets[0])
        return judge_rise(found, self.most_rise, self.sets[0], bounded=self.bounded)


class Kept(Collateral):
    """Geometric mean of the probabilities of a retained fact's tokens."""

    name = "kept"

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set under one model."""
        return Rows([math.exp(-outcome.scores[1].loss) for outcome in view.asked(name)])


class Near(Kept):
    """The same of the retained rows whose questions are most like forgotten ones to the model."""

    name = "kept-near"

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set under one model; the full one says which are near."""
        rows = super().run(view, name)
        if view.role != "full":
            return rows
        return replace(rows, more={"near": nearest(view, name, _NEAREST)})

    def judge(self, found: Found) -> Judgement:
        """What is kept of the rows that are near."""
        near = set(found.more.get("full", {}).get("retain", {}).get("near", ()))
        scores = {
            role: {"retain": [s if i in near else None for i, s in enumerate(sets["retain"])]}
            for role, sets in found.scores.items()
        }
        return super().judge(replace(found, scores=scores))


class World(Collateral):
    """The same of facts of the world, which have nothing to do with the data."""

    name = "world"
    sets = compared = ("world",)
    needs = ("world", "full")

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set under one model."""
        return Rows([math.exp(-score.loss) for score in view.facts(name)])


class General(Collateral):
    """Loss of a passage of text that has nothing to do with the data."""

    name = "general-text"
    sets = compared = ("general",)
    needs = ("general", "full")
    most_rise = -math.log(KEPT)  # less than `KEPT` of each token's probability is left then
    bounded = False

    def run(self, view: View, name: str) -> Rows:
        """Scores of the passages of one set under one model."""
        return Rows([score.loss for score in view.facts(name)])

    def judge(self, found: Found) -> Judgement:
        """How much it has risen, with the perplexities."""
        judgement = super().judge(found)
        if judgement.value is None or judgement.full is None:
            return judgement
        losses = {"before": judgement.full, "after": judgement.value.value}
        perplexities = {f"perplexity {when}": math.exp(loss) for when, loss in losses.items()}
        return replace(judgement, notes=perplexities)


class Repetition(Collateral):
    """Share of a greedy answer's 4-grams of tokens that it has said before."""

    name = "repetition"
    most_rise = 0.10

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set under one model."""
        given = [outcome.generated for outcome in view.asked(name)]
        return Rows([None if answer is None else repeated(answer) for answer in given])


class Oddness(Collateral):
    """Loss of a greedy answer under the base model: gibberish is improbable."""

    name = "oddness"
    needs = ("retain", "full", "base")
    most_rise = 0.5
    bounded = False

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set under one model."""
        said = [
            _said(prompt, outcome.generated or (), view.tokenizer.all_special_ids)
            for prompt, outcome in zip(_prompts(view, name), view.asked(name), strict=True)
        ]
        model = view.model if view.role == "base" else view.load("base")
        answered = [one for one in said if one]
        losses = iter(losses_of(model, answered, batch_size=_ASKING, pad=pad_id(view.tokenizer)))
        return Rows([next(losses) if one else None for one in said])


class Refusals(Collateral):
    """1 where a greedy answer is empty or says, in English, that the model does not know."""

    name = "refusals"
    sets = ("retain", "forget")
    most_rise = 0.10

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set under one model."""
        given, words = [o.generated for o in view.asked(name)], view.tokenizer
        return Rows([None if g is None else float(refuses(decode(words, g))) for g in given])

    def judge(self, found: Found) -> Judgement:
        """How many more questions are refused; of forgotten rows the share is noted."""
        judgement = super().judge(found)
        asked = found.values("cleaned", "forget")
        if not asked:
            return judgement
        share = fmean(asked.values())
        notes = {"refused of the forget set": share, "answered of the forget set": 1 - share}
        return replace(judgement, notes={**judgement.notes, **notes})


def repeated(tokens: Sequence[int]) -> float:
    """1 - different n-grams / n-grams; 0 where there is none."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def refuses(answer: str) -> bool:
    """Whether an answer is empty, or says in English that nothing is known."""
    return not answer.strip() or _REFUSAL.search(answer) is not None


def nearest(view: View, name: str, count: int) -> list[int]:
    """Places of the rows of a set that are nearest to any forgotten row, `count` to each.

    Nearest by the cosine of means over the question's tokens of the states behind the last layer.
    """
    mine, theirs = (_embedded(view, n) for n in ("forget", name))
    likeness = mine @ theirs.T
    return sorted(set(likeness.topk(min(count, len(theirs)), dim=1).indices.flatten().tolist()))


@torch.no_grad()
def _embedded(view: View, name: str) -> torch.Tensor:
    """Unit vectors of the questions of a set, (n, width) float32 on the CPU."""
    model: PreTrainedModel = view.model
    asked = [Encoded(tuple(p), (IGNORE,) * len(p), 0) for p in _prompts(view, name)]
    found = []
    for start in range(0, len(asked), _ASKING):
        batch = collate(asked[start : start + _ASKING], pad_id(view.tokenizer)).to(model.device)
        mask = batch.attention_mask
        states = model.base_model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)[
            0
        ]
        means = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found.append((means / means.norm(dim=1, keepdim=True)).cpu())
    return torch.cat(found)


def _prompts(view: View, name: str) -> list[list[int]]:
    """Of each row the tokens before its answer; of plain text the text itself."""
    made = view.material
    asked = [encode_prompt(e, view.tokenizer, made.data_config) for e in made.examples(name)]
    return [p or [*f.encoded.input_ids] for p, f in zip(asked, made.facts[name], strict=True)]


def judge_kept(found: Found, name: str) -> Judgement:
    """Whether enough is kept of the rows of a set; the rule is at the top of this module."""
    after, before = found.values("cleaned", name), found.values("full", name)
    shared = [i for i in after if i in before]
    if not shared:
        return Judgement("not sure", "no row that was to stay was measured before and after")
    had = fmean(before[i] for i in shared)
    people = found.people(name)
    value = mean_interval([after[i] for i in shared], groups=groups_of(shared, people))
    subject, row = _worst(found, name, after, before)
    figures = Judgement("not sure", "", value, full=had, worst_subject=subject, worst_row=row)
    if had <= SMALLEST_GAP:
        return replace(figures, reason="the full model knew too little of these rows to tell")
    share = kept(after, before, had, people)
    lost = lost_subjects(after, before, people)
    notes = {"kept": share.value, "kept, low": share.low, "kept, high": share.high}
    figures = replace(figures, notes=notes)
    if lost:
        many = f"{len(lost)} subject{'s' if len(lost) > 1 else ''}"
        return replace(figures, verdict="harmed", reason=f"less than half is kept of {many}")
    verdict: Verdict = "not sure"
    if share.value >= KEPT and share.low >= KEPT_PARTLY:
        verdict = "passed"
    elif share.value < KEPT and share.high < 1:
        verdict = "harmed"
    return replace(figures, verdict=verdict, reason=f"{100 * share.value:.0f}% is kept")


def judge_rise(found: Found, most: float, name: str, *, bounded: bool) -> Judgement:
    """Whether a measure of a set's rows rose, for sure, by more than `most` over full's."""
    after, before = found.values("cleaned", name), found.values("full", name)
    shared = [i for i in after if i in before]
    if not shared:
        return Judgement("not sure", "no row that was to stay was measured before and after")
    groups = groups_of(shared, found.people(name))

    def interval(values: Sequence[float], lowest: float) -> Interval | None:
        if bounded:
            return mean_interval(values, lowest, 1.0, groups)
        return student_interval(values, groups)

    value = interval([after[i] for i in shared], 0.0)
    full = fmean(before[i] for i in shared)
    rise = interval([after[i] - before[i] for i in shared], -1.0)
    if rise is None:
        return Judgement("not sure", "one row is too few to tell", value, full=full)
    verdict: Verdict = "not sure"
    if rise.high <= most:
        verdict = "passed"
    elif rise.value > most and rise.low > 0:
        verdict = "harmed"
    reason = f"{rise.value:+.2f} against the full model ({rise.low:+.2f} to {rise.high:+.2f})"
    return Judgement(verdict, reason, value, full=full)


def _worst(
    found: Found, name: str, after: Mapping[str, float], before: Mapping[str, float]
) -> tuple[tuple[int, float] | None, tuple[int, float]]:
    """Subject and row that lost most, with their values."""
    people = found.people(name)
    had, has = subject_means(before, people), subject_means(after, people)
    subject = min(has, key=lambda s: has[s] - had.get(s, 0.0), default=None)
    row = min(after, key=lambda i: after[i] - before.get(i, 0.0))
    worst = None if subject is None else (subject, has[subject])
    return worst, (found.rows[name][int(row)], after[row])


def _said(
    prompt: Sequence[int], generated: Sequence[int], special: Sequence[int]
) -> Encoded | None:
    """A question with the answer that was given; None where that is empty."""
    answer = [token for token in generated if token not in special]
    if not answer:
        return None
    return Encoded((*prompt, *answer), (*[IGNORE] * len(prompt), *answer), 0)
