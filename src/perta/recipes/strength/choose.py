"""`--scaling-coef auto`: the smallest strength at which every row's fact looks unseen.

The weighted direction is held in memory and subtracted from a loaded model, with the values that
would be stored (see `engine.edit.memory`), so a try costs passes over a few rows, and no
checkpoint.

What a model finds of a fact (see `facts`) is its surprise s, in nats: the fact's loss, or -log of
the larger of its probability among right and wrong answers and that of a hit in 16 samples, for
wrong answers may be likely too. Of n rows to forget, row i stands out where s_i is below what facts
that a model truly has not seen have, u_1 <= ... <= u_m:

- with a held-out set, u are the losses of its facts under the full model, and row i stands out
  below u_k. k is the largest number with which a set of n rows that truly are unseen would have
  none below u_k at least half of the time, by order alone, prod_{j<k} (m - j) / (m + n - j) >= 1/2,
  and at least 1. If more than half of the rows are below the lower quartile of u, those stand
  out too: rows that all lie at the edge are not like unseen ones;
- else, where every row has wrong answers, u are the choices under the base model on the same rows.
  All answers have one style, so what tuning taught about style cancels. Row i stands out below
  min(u of row i, lower quartile of u, log of the number of answers), the last being chance. Where
  by hits the base model's row would too, as with yes or no, row i is judged by its choice alone.
  What the base model chooses more often than not, as the best written answer, has no part in the
  quartile, and is judged by hits alone, below min(-log of the base model's, the same chance);
- else u are the losses under the base model on the same rows, and row i stands out below
  min(u of row i, lower quartile of u). That counts what the base model's own style costs.

The lower quartile is u_k with k = floor((m + 1) / 4), at least 1. A row is over-forgotten above
median + 2 (u_{m+1-k} - median), k as for the held-out set, which marks it as removed; fewer than 8
unseen facts tell nothing of that.

After rounds the strength is theirs, 1, or the best one below it that the budget allows: above, all
other rows, and what is retained, would pay for the last ones.

Few of the retained rows decide how far the strength may go, and only where the forget set is there
or a look is due; rows that keep a strength from passing are looked at first. Rows that gave moments
fare better than others, so the sample is drawn from the other end of the order that moments take
theirs from: it shares none with them unless there are too few rows for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.batch import Encoded, rows_per_pass, seeded_sample
from perta.data.examples import ExampleSet
from perta.data.tokens import encode_examples
from perta.engine.edit.memory import EditedModel
from perta.errors import ConfigError
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import Item, ScoringOptions, run_items
from perta.models.facts import (
    Fact,
    fact_score,
    find_facts,
    hit_probability,
    require_sayable,
    unsayable,
)
from perta.models.load import counting_tokens, load_model, load_tokenizer, longest_input, pad_id
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, DataConfig
from perta.progress import say, warn
from perta.recipes.strength._search import LARGEST, is_monotone, search_strength
from perta.stages.edit import load_changes
from perta.stages.settings import EditConfig

Calibration = Literal[
    "held-out set", "wrong answers under the base model", "base model on the forget set"
]

HELD_OUT: Final = "held-out set"
CHOICES: Final = "wrong answers under the base model"
BASE: Final = "base model on the forget set"

_RETAIN_ROWS: Final = (16, 64)
"""Least and most retained rows that are tried; between them four a row to forget."""

_SAMPLES = 16
"""Samples of which one may say a fact: at the chance of six answers, .17, 64 of them say it once
more often than not."""

_ROWS = 4  # forget rows that are looked at first, those that stood out most; twice as many follow

_BATCH_SIZE = 16

_ENOUGH = 8  # number of unseen facts from which their spread tells what lies far beyond them

_FALL = 0.1  # nats by which a row that stands out must fall for its curve to count as not monotone

_ROUNDING = 1e-4
"""Nats within which a fact counts as unseen: an edit that leads back to the base model must not
miss it by the last digits."""

_MOST = 1000.0
"""Surprise of a fact that a model gives no chance, or of which it says nothing finite."""

_SHOWN_ROWS = 20


@dataclass(frozen=True)
class Unseen:
    """Surprises of facts that a model truly has not seen; equations at the top of this module."""

    calibrated_on: Calibration
    surprises: tuple[float, ...]  # m of them, ascending, nats
    least: tuple[float, ...]  # of each of the n forget rows the surprise from which it looks unseen
    quartile: float  # the lower one of the surprises
    most: float | None  # surprise above which a row is over-forgotten; None where too few tell
    facts: tuple[Fact, ...] = field(repr=False)  # of the forget rows, in the same order
    tokens: int = 0

    def stands_out(self, place: int, surprise: float) -> bool:
        """Whether one row does, whatever the others."""
        return surprise < self.least[place] - _ROUNDING

    def standing_out(self, surprises: Sequence[float]) -> list[int]:
        """Places of the rows that do, of all n."""
        places = [i for i, value in enumerate(surprises) if self.stands_out(i, value)]
        if self.calibrated_on == HELD_OUT:
            low = [i for i, value in enumerate(surprises) if value < self.quartile - _ROUNDING]
            if 2 * len(low) > len(surprises):
                return low
        return places

    def over_forgotten(self, surprises: Sequence[float]) -> list[int] | None:
        """Places of the rows that are far beyond what is unseen; None where nobody can tell."""
        if self.most is None:
            return None
        return [i for i, value in enumerate(surprises) if value > self.most]


@dataclass(frozen=True)
class Point:
    """One strength that was tried; what was not looked at is None."""

    scaling_coef: float
    rows: int  # forget rows that were looked at; the rest was not needed
    standing_out: int
    mean_surprise: float | None  # of the rows looked at, nats
    retain_loss: float | None  # mean over the retained rows, nats per token


@dataclass(frozen=True)
class _RowFigures:
    """One row at the strength chosen: its number in the file, s_i, and what it needed, nats."""

    row: int
    surprise: float
    least: float


@dataclass(frozen=True)
class Strength:
    """Outcome of a search; rows are named by their numbers, losses are in nats per token."""

    scaling_coef: float
    # Whether every row looks unseen at it; otherwise it is, of those tried within the budget, the
    # one at which the fewest rows stand out, and by the least.
    reached: bool
    in_rounds: bool  # whether the forget checkpoint is the sum of rounds, whose strength is 1
    calibrated_on: Calibration
    standing_out: tuple[int, ...]  # rows that still do
    # Rows forgotten far beyond what is unseen; None where too few unseen facts tell.
    over_forgotten: tuple[int, ...] | None
    most: float | None  # surprise above which a row counts as that, nats
    rows: tuple[_RowFigures, ...]
    retain_budget: float  # largest rise of the loss of the retained rows
    retain_rows: int
    retain_loss_before: float  # under the full model
    retain_loss: float
    monotone: bool  # whether, as far as was looked, more strength forgets more and costs more
    frontier: tuple[Point, ...]  # every strength tried, ascending
    tokens: int  # what went through the model


# --- what unseen means ----------------------------------------------------------------------


def calibrate(
    full: Path,
    base: Path,
    sets: Mapping[str, ExampleSet],
    data_config: DataConfig,
    compute: ComputeConfig,
) -> Unseen:
    """Measure what unseen means, and that the full model is not there already.

    Weights are float32 whatever `compute` says; `sets` has `forget`, and `holdout` if there is one.
    Facts that the tokenizer has no words for have no part in it. ConfigError where none is left, no
    row stands out, or the held-out set looks learned.
    """
    tokenizer, longest = load_tokenizer(full), longest_input(full)
    pad, names = pad_id(tokenizer), [name for name in ("forget", "holdout") if name in sets]
    model = load_model(base, compute, dtype=torch.float32)
    with counting_tokens(model) as base_tokens:
        every = {
            name: find_facts(sets[name], tokenizer, data_config, base=model, longest=longest)
            for name in names
        }
        facts, *held_out = (_judged(found, tokenizer, name) for name, found in every.items())
        require_sayable(facts)
        held_out = [found for found in held_out if found]
        kind: Calibration = CHOICES if all(fact.wrong for fact in facts) else BASE
        if held_out:
            kind = HELD_OUT
        if kind == CHOICES:
            facts, under_base = _telling(facts, _chances(model, facts, pad))
        else:
            under_base = surprises_of(model, held_out[0] if held_out else facts, kind, pad)
    del model
    model = load_model(full, compute, dtype=torch.float32)
    with counting_tokens(model) as full_tokens:
        start = surprises_of(model, facts, kind, pad)
        found = surprises_of(model, held_out[0], kind, pad) if held_out else under_base
    if held_out:
        _refuse_learned(full, found, under_base, start)
    unseen = judge_by(found, facts, kind, base_tokens() + full_tokens())
    if not unseen.standing_out(start):
        raise ConfigError(
            f"The forget set looks unseen to {full} already: no row's fact stands out (by {kind}). "
            "Was it tuned on the forget set, and are --base and --full the right way round? If so, "
            "give --scaling-coef a number."
        )
    return unseen


def _judged(
    facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[Fact, ...]:
    """The facts of a set that a model can say."""
    unknown = unsayable(facts, tokenizer, name)
    return tuple(fact for fact in facts if fact.row not in unknown)


def _telling(
    facts: Sequence[Fact], chances: Sequence[tuple[float, float]]
) -> tuple[tuple[Fact, ...], list[float]]:
    """The facts with what tells of each, and what the base model finds of them by that."""
    choices = [_surprise(choice) for choice, _ in chances]
    found, under_base = [], []
    bounds = judge_by(choices, facts, CHOICES).least
    for fact, choice, (_, hit), bound in zip(facts, choices, chances, bounds, strict=True):
        said = _surprise(hit)
        by: Literal["both", "choice", "hits"] = (
            "choice" if said < bound else "hits" if choice < _CHOSEN else "both"
        )
        found.append(replace(fact, judged_by=by))
        under_base.append(said if by == "hits" else choice)
    return tuple(found), under_base


_CHOSEN = math.log(2)  # surprise below which a fact is chosen more often than not


def _refuse_learned(
    full: Path, found: Sequence[float], under_base: Sequence[float], forget: Sequence[float]
) -> None:
    """Stop at held-out rows that the model has learned: they would choose next to no edit.

    A fact's surprise is then, in proportion, nearer to the forget set's median under the full model
    than to its own under the base model.
    """
    known = max(sorted(forget)[len(forget) // 2], _ROUNDING)
    pairs = zip(found, under_base, strict=True)
    learned = sum(value * value < known * max(own, _ROUNDING) for value, own in pairs)
    # From a quarter on the quartile that rows are judged by is that of what was learned.
    if 4 * learned > len(found):
        raise ConfigError(
            f"{learned} of {len(found)} facts of the held-out set look learned to {full}: it finds "
            "them far less surprising than the base model does. Is --holdout really unseen? Leave "
            "it out, or give --scaling-coef a number."
        )


def judge_by(
    surprises: Sequence[float], facts: Sequence[Fact], kind: Calibration, tokens: int = 0
) -> Unseen:
    """The bounds that follow from m surprises of the unseen, of `facts` in order or of others."""
    ranked = sorted(surprises)
    told = ranked
    if kind == CHOICES:  # of what the base model chooses, the choice tells nothing
        by_choice = [s for s, f in zip(surprises, facts, strict=True) if f.judged_by != "hits"]
        told = sorted(s for s in by_choice if s >= _CHOSEN) or ranked
    quartile = told[max(1, (len(told) + 1) // 4) - 1]
    place = edge_of(len(facts), len(ranked))
    if kind == HELD_OUT:
        least = [ranked[place - 1]] * len(facts)
    else:
        least = [min(own, quartile) for own in surprises]
    if kind == CHOICES:
        least = [
            min(own if fact.judged_by == "hits" else low, math.log(1 + len(fact.wrong)))
            for own, low, fact in zip(surprises, least, facts, strict=True)
        ]
    median = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
    most = median + 2 * (ranked[-place] - median) if len(ranked) >= _ENOUGH else None
    return Unseen(kind, tuple(ranked), tuple(least), quartile, most, tuple(facts), tokens)


def edge_of(rows: int, unseen: int) -> int:
    """The k of the top of this module, from 1 to m = `unseen`, for n = `rows`."""
    k, chance = 0, 1.0
    while k < unseen:
        chance *= (unseen - k) / (unseen + rows - k)
        if chance < 0.5:
            break
        k += 1
    return max(k, 1)


def surprises_of(
    model: PreTrainedModel, facts: Sequence[Fact], kind: Calibration, pad: int
) -> list[float]:
    """Surprise of each fact, nats, finite: choice or hits for `CHOICES`, else the loss."""
    if kind == CHOICES:
        return [
            _surprise({"both": max(choice, hit), "choice": choice, "hits": hit}[fact.judged_by])
            for fact, (choice, hit) in zip(facts, _chances(model, facts, pad), strict=True)
        ]
    return [_finite(loss) for (loss,) in _losses(model, [(f.encoded,) for f in facts], pad)]


def _chances(model: PreTrainedModel, facts: Sequence[Fact], pad: int) -> list[tuple[float, float]]:
    """Probability of each fact among its answers, and of a hit."""
    losses = _losses(model, [fact.sequences for fact in facts], pad)
    scores = [fact_score(fact, values) for fact, values in zip(facts, losses, strict=True)]
    return [(s.choice or 0.0, hit_probability(s.log_probability, _SAMPLES)) for s in scores]


def _surprise(chance: float) -> float:
    """-log of a probability, finite."""
    return _finite(-math.log(chance)) if chance else _MOST


def _finite(value: float) -> float:
    """A surprise; a model that overflows knows nothing, and the retained rows say the same."""
    return min(value, _MOST) if math.isfinite(value) else _MOST


def _losses(
    model: PreTrainedModel, groups: Sequence[Sequence[Encoded]], pad: int
) -> list[list[float]]:
    """Mean loss of each sequence, nats per labelled token; what they begin with is shared."""
    options = ScoringOptions(Masking(pad), batch_size=rows_per_pass(_BATCH_SIZE, model.device))
    outcomes = run_items(model, [Item(tuple(group)) for group in groups], options)
    return [[score.loss for score in outcome.scores] for outcome in outcomes]


# --- the search -----------------------------------------------------------------------------


def choose_strength(
    edit: EditConfig,
    sets: Mapping[str, ExampleSet],
    unseen: Unseen,
    retain_budget: float,
    data_config: DataConfig,
    compute: ComputeConfig,
    *,
    in_rounds: bool = False,
    seed: int = 0,
) -> Strength:
    """Search for the strength of an edit, and say what was found; ConfigError if none is above 0.

    The edit's checkpoints are local folders, and its own strength is not used; `unseen` is of the
    same forget set. `in_rounds` says that the forget checkpoint is the sum of rounds, at 1.
    Weights are float32 whatever `compute` says.
    """
    full = resolve_checkpoint(edit.full, base=edit.base)
    tokenizer, longest = load_tokenizer(full), longest_input(full)
    encoded = encode_examples(sets["retain"], tokenizer, data_config, longest=longest).encoded
    least, most = _RETAIN_ROWS
    count = min(len(encoded), max(least, min(most, 4 * len(unseen.facts))))
    retain = seeded_sample(encoded, count, seed, from_end=True)
    changes = load_changes(edit, compute)
    model = load_model(full, compute, dtype=torch.float32)
    with counting_tokens(model) as tokens:
        edited, budget = EditedModel(model, changes), retain_budget
        usual = 1.0 if in_rounds else None
        trials = Trials(edited, unseen, retain, budget, pad_id(tokenizer), usual)
        scaling_coef, reached = trials.search()
        if not scaling_coef:
            raise ConfigError(
                "No strength above 0 that was tried keeps the loss of the retained rows within "
                f"the retain budget of {budget:g} nats per token, so nothing "
                "would be forgotten. Raise --retain-budget, or choose another method."
            )
        surprises = trials.all_rows(scaling_coef)
        over = unseen.over_forgotten(surprises)
        pairs = zip(unseen.facts, surprises, unseen.least, strict=True)
        found = Strength(
            scaling_coef,
            reached,
            in_rounds,
            unseen.calibrated_on,
            _numbers(unseen, unseen.standing_out(surprises)),
            None if over is None else _numbers(unseen, over),
            unseen.most,
            tuple(_RowFigures(fact.row, *values) for fact, *values in pairs),
            budget,
            count,
            trials.retain_loss(0.0),
            trials.retain_loss(scaling_coef),
            trials.is_monotone(),
            trials.points(),
            tokens(),
        )
    _report(found)
    return found


class Trials:
    """What forget and retained rows look like at any strength; each is looked at once."""

    def __init__(
        self,
        edited: EditedModel,
        unseen: Unseen,
        retain: Sequence[Encoded],
        retain_budget: float,
        pad: int,
        usual: float | None = None,
    ) -> None:
        self._edited, self._unseen, self._retain = edited, unseen, retain
        self._budget, self._pad, self._usual = retain_budget, pad, usual
        self._surprises: dict[float, dict[int, float]] = {}
        self._losses: dict[float, float] = {}
        # How far each row was from looking unseen when it was last looked at.
        self._margins = [0.0] * len(unseen.facts)

    def search(self) -> tuple[float, bool]:
        """The strength to use, and whether every row looks unseen at it."""
        if self._usual and self.fits(self._usual):
            return self._usual, self.forgets(self._usual)
        found = search_strength(self.forgets, self.fits, self._usual or LARGEST)
        if found.scaling_coef is None:
            return max(found.within, key=self._rank), False
        if found.scaling_coef:
            # A look beyond, to be able to say that the curve is not monotone.
            self.forgets(min(2 * found.scaling_coef, LARGEST))
        return found.scaling_coef, True

    def _rank(self, scaling_coef: float) -> tuple[int, float]:
        """Larger is better: few rows that stand out, and by little in all."""
        surprises, least = self.all_rows(scaling_coef), self._unseen.least
        lacking = math.fsum(min(s - t, 0.0) for s, t in zip(surprises, least, strict=True))
        return -self._count(surprises), lacking

    def forgets(self, scaling_coef: float) -> bool:
        """Whether every row looks unseen; rows that stood out most are looked at first."""
        order = sorted(range(len(self._margins)), key=lambda place: self._margins[place])
        count = _ROWS
        while order:
            values = self._look(scaling_coef, order[:count])
            if any(self._unseen.stands_out(place, value) for place, value in values.items()):
                return False
            order, count = order[count:], 2 * count
        return not self._count(self.all_rows(scaling_coef))

    def fits(self, scaling_coef: float) -> bool:
        """Whether the loss of the retained rows is within the budget."""
        # False for NaN, which compares with nothing.
        return self.retain_loss(scaling_coef) - self.retain_loss(0.0) <= self._budget

    def all_rows(self, scaling_coef: float) -> list[float]:
        """Surprise of every forget row."""
        values = self._look(scaling_coef, range(len(self._margins)))
        return [values[place] for place in range(len(self._margins))]

    def retain_loss(self, scaling_coef: float) -> float:
        """Mean loss of the retained rows, nats per token."""
        if scaling_coef not in self._losses:
            self._edited.move(scaling_coef)
            groups = [(example,) for example in self._retain]
            losses = [loss for (loss,) in _losses(self._edited.model, groups, self._pad)]
            self._losses[scaling_coef] = math.fsum(losses) / len(losses)
        return self._losses[scaling_coef]

    def points(self) -> tuple[Point, ...]:
        """Every strength that was tried, ascending."""
        return tuple(self._point(a) for a in sorted({*self._surprises, *self._losses}))

    def is_monotone(self) -> bool:
        """Whether, as far as was looked, a larger strength forgets more and costs more."""
        tried = sorted({*self._surprises, *self._losses})
        answers = [(a, self._forgot(a), self.fits(a) if a in self._losses else None) for a in tried]
        return is_monotone(answers) and not any(map(self._falls, range(len(self._margins))))

    def _forgot(self, scaling_coef: float) -> bool | None:
        known = self._surprises.get(scaling_coef)
        return not self._outstanding(known) if known else None

    def _falls(self, place: int) -> bool:
        """Whether a row that stands out stood out less at a smaller strength."""
        curve = [known[place] for _, known in sorted(self._surprises.items()) if place in known]
        return any(
            self._unseen.stands_out(place, above) and above < max(curve[:i]) - _FALL
            for i, above in enumerate(curve)
            if i
        )

    def _look(self, scaling_coef: float, places: Sequence[int]) -> dict[int, float]:
        """Surprise of some forget rows."""
        known = self._surprises.setdefault(scaling_coef, {})
        new = [place for place in places if place not in known]
        if new:
            self._edited.move(scaling_coef)
            unseen = self._unseen
            facts = [unseen.facts[place] for place in new]
            values = surprises_of(self._edited.model, facts, unseen.calibrated_on, self._pad)
            for place, value in zip(new, values, strict=True):
                known[place] = value
                self._margins[place] = value - unseen.least[place]
        return {place: known[place] for place in places}

    def _outstanding(self, known: Mapping[int, float]) -> int:
        """Rows that stand out, of those that were looked at."""
        if len(known) == len(self._margins):
            return self._count([known[place] for place in range(len(known))])
        return sum(self._unseen.stands_out(place, value) for place, value in known.items())

    def _count(self, surprises: Sequence[float]) -> int:
        return len(self._unseen.standing_out(surprises))

    def _point(self, scaling_coef: float) -> Point:
        known = self._surprises.get(scaling_coef, {})
        mean = math.fsum(known.values()) / len(known) if known else None
        loss = self._losses.get(scaling_coef)
        return Point(
            scaling_coef,
            len(known),
            self._outstanding(known),
            mean,
            loss if loss is not None and math.isfinite(loss) else None,
        )


def _numbers(unseen: Unseen, places: Sequence[int]) -> tuple[int, ...]:
    """Numbers of rows in the file; windows of one text share theirs."""
    return tuple(dict.fromkeys(unseen.facts[place].row for place in places))


def _report(found: Strength) -> None:
    over = found.over_forgotten
    beyond = "" if over is None else f", {len(over)} forgotten far beyond what is unseen"
    say(
        f"strength {found.scaling_coef:.3g}: {len(found.standing_out)} of {len(found.rows)} facts "
        f"stand out (by {found.calibrated_on}){beyond}; retain loss "
        f"{found.retain_loss_before:.3f} -> {found.retain_loss:.3f} nats per token on "
        f"{found.retain_rows} rows"
    )
    if not found.monotone:
        warn(
            "The curve is not monotone: some larger strengths forget less, or cost less, than "
            "smaller ones. strength.json in the work folder has all that were tried."
        )
    if not found.standing_out:
        return
    shown = ", ".join(map(str, found.standing_out[:_SHOWN_ROWS]))
    more = len(found.standing_out) - _SHOWN_ROWS
    rows = f"rows {shown}{f' and {more} more' if more > 0 else ''}"
    still = f"{len(found.standing_out)} of {len(found.rows)} facts still stand out"
    if found.in_rounds and found.scaling_coef == 1:
        warn(
            f"{still} after the rounds: {rows}. Allow more --rounds, or give --scaling-coef a "
            "number above 1, which takes more from what is retained."
        )
    else:
        warn(
            f"{still} at the best strength within the retain budget of {found.retain_budget:g} "
            f"nats per token: {rows}. Raise --retain-budget, tune the forget checkpoint longer, or "
            "choose another method."
        )
