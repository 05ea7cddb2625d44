"""A forget checkpoint in rounds: what an edit leaves is learned again, and added.

One strength for all rows forgets them unevenly: where the last fact is gone, the first are far
beyond unseen, and retained rows have paid for that. So each round tunes on the rows that still
stand out, the first from the base, later ones from what the edit has made of the full model, and
goes as far as half of them need, the first a third as far:

    S_0 = all forget rows
    M_0 = θ_full
    τ_0 = (θ₀ tuned on the facts of S_0) − θ₀,   without the last third of the blocks
    τ_k = (M_k tuned on the facts of S_k) − M_k
    Δ_k = the direction of τ_k
    α_k = the smallest α at which at most half of S_k stands out,   M_{k+1} = M_k − α_k Δ_k
    α_0 = 0.35 times that, for others go on from there, or all of it where the second finds none
    S_{k+1} = the rows that stand out at M_{k+1}

until none does. A later τ_k is the step of somebody who teaches the edited model the rows again. It
is short, and little else lies on it, where the base has to learn the whole row. But a row that is
known as ever teaches nothing: where no strength of τ_k is enough, τ_k = (θ₀ tuned on S_k) − θ₀.

Then copies of M are each taught a third of all rows. A row comes back where a copy that was taught
others chooses its fact among wrong answers, as a row does that stands out, or says it in 64 samples
with more than .05. Some do whatever is forgotten, for a model that never saw them guesses too. The
last rounds are of what comes back alone, and of rows that still stand out, until none stands out
and at most a quarter comes back. Of a few strengths each takes the smallest that is enough, else
the one that leaves least, and they end where none leaves less: rows that stand out count first.

A late block sees what earlier ones have looked up, and takes it from whoever has it, so the first
round widens to all blocks only where half of the rows cannot be had without.

The directions of the structured methods are linear in τ, so all rounds are one edit, with the
forget checkpoint

    θ_f = θ₀ + Σ_k α_k τ_k,

whose strength is then 1, or what the retain budget allows. Where no round found a strength θ_f is
θ₀ + τ_0, of all blocks, and it is searched for. What stands out is said in `strength`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import mkdtemp
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perta.data.batch import IGNORE
from perta.engine.edit.memory import Changes
from perta.engine.train.tune import tune
from perta.errors import DivergenceError
from perta.methods.registry import get_method
from perta.models.facts import Fact, hit_probability, score_facts
from perta.models.formats.low_rank import is_adapter, load_tuned, save_tuned, write_sum
from perta.models.layers import Slot, late_slots, stored_weights
from perta.models.load import counting_tokens, load_tokenizer, pad_id, picked, save_model
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, Device, TuneConfig
from perta.progress import say
from perta.recipes.strength._search import LARGEST, search_coarsely
from perta.recipes.strength.choose import CHOICES, HELD_OUT, Unseen, surprises_of
from perta.stages.edit import load_changes
from perta.stages.settings import EditConfig
from perta.stages.stage import Place, run_stage
from perta.store.atomic import beside, scratch_folder
from perta.store.fingerprint import fingerprint
from perta.store.record import settings_of

_FIRST = 0.35
"""Share that the first round takes of the strength it finds: docs/experiments/facts.md."""

_LASTS = (0.5, 1.0)
"""Strengths of a last round, and for how many such rounds others leave room, as there."""
_AGAIN = 3

_PARTS, _STEPS, _SAMPLES, _BACK = 3, 6, 64, 0.05
"""Copies that are taught a part of the rows each, in how many steps, and how likely a fact of the
others may then be in one of so many samples."""

_FEW = 4
"""One row of how many may come back; of models that never saw them one of three does, as there."""

_SLOWEST = 9
"""Share of its learning rate below which tuning that diverges is not tried again."""


@dataclass(frozen=True)
class Round:
    """What one round did."""

    rows: int  # forget rows that it tuned on
    scaling_coef: float  # α_k
    left: tuple[int, ...]  # numbers of the rows that stand out after it
    untouched: int  # layers and experts in the last third of the blocks that it left as they were
    # Of the last ones: rows that come back once others were taught, and how likely a fact is then
    # said in 64 samples, in mean; None where there are too few rows to teach some.
    returning: tuple[int, ...] | None = None
    comes_back: float | None = None


@dataclass(frozen=True)
class _Left:
    """Places of the rows that an edit leaves."""

    standing: list[int]
    returning: list[int] | None = None  # that come back once others were taught
    comes_back: float | None = None  # how likely facts then are

    @property
    def places(self) -> list[int]:
        """Of both kinds, each once."""
        return sorted({*self.standing, *(self.returning or ())})

    def __str__(self) -> str:
        if self.returning is None:
            return f"{len(self.standing)} stand out; what comes back nobody can tell from one fact"
        back = len(self.returning)
        return f"{len(self.standing)} stand out, {back} come back once others are taught"

    @property
    def badness(self) -> tuple[int, int]:
        """What there should be as little of; a row that stands out counts more than others."""
        return len(self.standing), len(self.places)


def write_rounds(
    place: Place,
    edit: EditConfig,
    unseen: Unseen,
    config: TuneConfig,
    compute: ComputeConfig,
    most: int,
) -> Path:
    """Write the forget checkpoint of all rounds, at most `most`; its record says what they did.

    `edit` is that of the first round, its checkpoints local folders: the forget checkpoint is θ₀
    tuned on all forget rows. `unseen` is from `calibrate`, `config` says how later rounds tune.
    Weights are float32. PertaError where training diverges, or input cannot be used.
    """
    # Rounds are of the weights themselves, however the models are stored.
    full = resolve_checkpoint(edit.full, base=edit.base, exact=edit.output_format != "checkpoint")
    edit = replace(edit, full=str(full), base=str(resolve_checkpoint(edit.base)))
    folders = {"base": edit.base, "full": edit.full, "forget_checkpoint": edit.forget_checkpoint}
    folders |= {name: getattr(edit, name) for name in ("forget_moments", "retain_moments")}

    def look() -> dict[str, str]:
        return {name: fingerprint(Path(str(place))) for name, place in folders.items() if place}

    judged: dict[str, Any] = {"least": unseen.least, "calibrated_on": unseen.calibrated_on}
    judged["chances"] = tuple(fact.judged_by for fact in unseen.facts)
    method = get_method(edit.weighting.method).record()
    settings = {**settings_of(config), **settings_of(edit.weighting), **method, "most": most}
    settings |= judged | picked(compute, Path(edit.full))
    settings |= {
        "first": f"{_FIRST}, without the late blocks",
        "later": "from the edited model, else from the base",
        "last": [*_LASTS, _AGAIN, _PARTS, _STEPS, _BACK, _FEW, "of the rows that come back"],
    }

    def make(folder: Path) -> Mapping[str, Any]:
        with scratch_folder(beside(place.output, ".rounds")) as scratch:
            run = _Run(edit, unseen, config, compute, scratch)
            with counting_tokens(run.model) as tokens:
                rounds = run.all(most)
            run.write(folder)
        passes = 3 * run.tuned + run.read + tokens()
        return {"rounds": [asdict(made) for made in rounds], "passes": passes}

    run_stage("rounds", place, settings, look(), make, look=look)
    return place.output


class _Run:
    """The rounds of one request; `model` is θ_full less what they take.

    `tuned` and `read` count tokens of other models.
    """

    def __init__(
        self,
        edit: EditConfig,
        unseen: Unseen,
        config: TuneConfig,
        compute: ComputeConfig,
        scratch: Path,
    ) -> None:
        self._edit, self._unseen, self._config = edit, unseen, config
        self._compute, self._scratch = compute, scratch
        self.tokenizer = load_tokenizer(Path(edit.base))
        self.model = self._load(edit.full)
        self.tuned = self.read = 0
        # Task vectors so far: checkpoint, α_k, and the parameters that are left out.
        self._taken: list[tuple[Path, float, frozenset[str]]] = []
        self._pad = pad_id(self.tokenizer)

    def all(self, most: int) -> list[Round]:
        """At most so many rounds: until no row stands out or none helps, then the last ones."""
        checkpoint = Path(str(self._edit.forget_checkpoint))
        late: Sequence[Slot] = late_slots(self.model)
        rows: Sequence[int] = range(len(self._unseen.facts))
        rounds: list[Round] = []
        goes_on = most <= 2  # whether the first round has gone all the way
        anew = False  # whether a round starts from the base
        while rows and len(rounds) < max(most - _AGAIN, 1):
            if rounds:
                checkpoint, late = self._tune(rows, anew=anew), ()
            # Without a later one that goes on from there the first goes all the way.
            share = 1.0 if rounds or goes_on else _FIRST
            scaling_coef, left = self._forget(checkpoint, rows, late, share)
            if scaling_coef is None and late:
                late = ()
                continue
            if scaling_coef is None:
                say(f"round {len(rounds) + 1}: no strength takes half of the {len(rows)} rows")
                if not rounds:
                    self._add(checkpoint, 1.0, late)  # the search says how far it gets
                    break
                # A row that is hardly touched is hardly learned again.
                if len(rounds) == 1 and not goes_on:
                    goes_on = True
                    rows = self._go_on(rounds)
                elif anew:
                    break
                else:
                    anew = True
                continue
            anew = False
            self._add(checkpoint, scaling_coef, late)
            numbers = self._numbers(left)
            rounds.append(Round(len(rows), scaling_coef, numbers, untouched=len(late)))
            say(f"round {len(rounds)}: {len(rows)} rows, {len(left)} stand out after it")
            rows = left
        if rounds and most > 1:
            self._harden(rounds, most)
        return rounds

    def _go_on(self, rounds: list[Round]) -> list[int]:
        """Take what the first round left of its strength; the rows that then stand out."""
        checkpoint, taken, names = self._taken.pop()
        late = [slot for slot in late_slots(self.model) if slot[0] in names]
        self._move(self._changes(checkpoint, late), taken / _FIRST - taken)
        self._add(checkpoint, taken / _FIRST, late)
        left = self._unseen.standing_out(
            self._surprises(self.model, range(len(self._unseen.facts)))
        )
        rounds[0] = replace(rounds[0], scaling_coef=taken / _FIRST, left=self._numbers(left))
        say(f"round 1 all the way: {len(left)} stand out after it")
        return left

    def _harden(self, rounds: list[Round], most: int) -> None:
        """Add the last rounds, and what comes back to the one that is the last now."""
        left = self._look()
        rounds[-1] = self._seen(rounds[-1], left)
        say(f"before the last rounds: {left}")
        while not self._is_enough(left) and len(rounds) < most:
            places = left.places
            checkpoint = self._tune(places)
            scaling_coef, left = self._take(checkpoint, left)
            if not scaling_coef:
                break
            self._add(checkpoint, scaling_coef, ())
            rounds.append(self._seen(Round(len(places), scaling_coef, (), untouched=0), left))
            say(f"round {len(rounds)}: {len(places)} rows, and after it {left}")

    def _is_enough(self, left: _Left) -> bool:
        back = len(left.returning or ())
        return not left.standing and _FEW * back <= len(self._unseen.facts)

    def _seen(self, made: Round, left: _Left) -> Round:
        back = None if left.returning is None else self._numbers(left.returning)
        standing = self._numbers(left.standing)
        return replace(made, left=standing, returning=back, comes_back=left.comes_back)

    def _numbers(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._unseen.facts[place].row for place in places)

    def _tune(self, rows: Sequence[int], *, anew: bool = False) -> Path:
        """θ₀ and the step that teaches `model`, or anew θ₀ itself, the facts of some rows."""
        device, merges = self.model.device, not self._config.lora_rank
        taught = self._taught(rows, self._config, merges=merges, anew=anew)
        if merges and not anew:  # an adapter is the step alone
            torch.nn.Module.to(taught, "cpu")
            _add(taught, self._load(self._edit.base, "cpu"), less=self.model)
        folder = Path(mkdtemp(dir=self._scratch))
        save_tuned(taught, self.tokenizer, folder, Path(self._edit.base), self._edit.base)
        del taught
        torch.nn.Module.to(self.model, device)
        return folder

    def _taught(
        self, rows: Sequence[int], config: TuneConfig, *, merges: bool = True, anew: bool = False
    ) -> PreTrainedModel:
        """A copy of `model`, which goes to the CPU, or of θ₀ that is taught the facts of some rows.

        A rate that suits the base may be too high for what an edit leaves: then it is a third.
        """
        try:
            return self._teach(rows, config, merges=merges, anew=anew)
        except DivergenceError:
            rate, usual = config.learning_rate, self._config.learning_rate
            if rate is None or usual is None or rate < usual / _SLOWEST:
                raise
        slower = replace(config, learning_rate=rate / 3)
        return self._taught(rows, slower, merges=merges, anew=anew)

    def _teach(
        self, rows: Sequence[int], config: TuneConfig, *, merges: bool, anew: bool
    ) -> PreTrainedModel:
        examples = [self._unseen.facts[place].encoded for place in rows]
        torch.nn.Module.to(self.model, "cpu")  # a GPU may hold no other model beside one in tuning
        taught = self._load(self._edit.base if anew else self._edit.full)
        if not anew:
            taught.load_state_dict(self.model.state_dict())
        dtype, pad = self._compute.dtype, self._pad
        taught, done = tune(taught, examples, config, pad=pad, dtype=dtype, merges=merges)
        self.tuned += done.tokens
        return taught

    def _look(self) -> _Left:
        """What stands out in `model`, and in copies of it that are taught other rows."""
        unseen, every = self._unseen, range(len(self._unseen.facts))
        standing = unseen.standing_out(self._surprises(self.model, every))
        parts = _parts(unseen.facts)
        if len(parts) < 2:
            return _Left(standing)
        device, returning, hits = self.model.device, set[int](), list[float]()
        for shown in parts:
            attack = replace(
                self._config,
                epochs=_STEPS,
                accumulation=math.ceil(len(shown) / self._config.batch_size),
                schedule="constant",
                warmup_ratio=0.0,
                stop_loss=0.0,
            )
            taught = self._taught(shown, attack)
            hidden = [place for place in every if place not in shown]
            asked = [replace(unseen.facts[place], wrong=(), right=None) for place in hidden]
            with counting_tokens(taught) as tokens:
                scores = score_facts(taught, asked, pad=self._pad)
                said = [hit_probability(score.log_probability, _SAMPLES) for score in scores]
                returning.update(_said_again(unseen, hidden, said))
                if unseen.calibrated_on == CHOICES:
                    others = [place for place in hidden if place not in returning]
                    pairs = zip(others, self._surprises(taught, others), strict=True)
                    returning.update(
                        place for place, value in pairs if unseen.stands_out(place, value)
                    )
            self.read += tokens()
            hits += said
            del taught
        torch.nn.Module.to(self.model, device)
        return _Left(standing, sorted(returning), fmean(hits))

    def _changes(self, checkpoint: Path, late: Sequence[Slot]) -> Changes:
        """What the edit takes with a forget checkpoint, at α = 1, but of the late layers."""
        with scratch_folder(self._scratch / "changes") as scratch:
            edit = replace(
                self._edit, forget_checkpoint=str(checkpoint), direction=scratch / "direction"
            )
            changes = load_changes(edit, self._compute)
        found = (changes.full.find(weight.name) for weight in stored_weights(self.model, late))
        names = {entry.name for entry in found if entry}
        kept = {name: c for name, c in changes.tensors.items() if name not in names}
        return replace(changes, tensors=kept)

    @torch.no_grad()
    def _move(self, changes: Changes, strength: float) -> None:
        """Take as much more from `model`."""
        for memory, where, change in changes.located(self.model):
            if change.delta is not None:
                delta = cast(Tensor, change.step(memory.device))
                memory[where] = memory[where].sub(delta, alpha=strength)

    def _surprises(self, model: PreTrainedModel, places: Sequence[int]) -> list[float]:
        """What a model makes of some rows' facts, nats."""
        facts = [self._unseen.facts[place] for place in places]
        return surprises_of(model, facts, self._unseen.calibrated_on, self._pad)

    def _take(self, checkpoint: Path, before: _Left) -> tuple[float, _Left]:
        """Take from `model` the least that is enough, or that leaves least; and what it leaves."""
        changes, at, tried = self._changes(checkpoint, ()), 0.0, {0.0: before}
        for strength in _LASTS:
            self._move(changes, strength - at)
            at, tried[strength] = strength, self._look()
            if self._is_enough(tried[strength]):
                return strength, tried[strength]
        best = min(tried, key=lambda strength: tried[strength].badness)
        self._move(changes, best - at)
        return best, tried[best]

    def _forget(
        self, checkpoint: Path, rows: Sequence[int], late: Sequence[Slot], share: float
    ) -> tuple[float | None, list[int]]:
        """Take from `model`, but its late layers, a share of what half of the rows need.

        Returns the strength, None where there is none, and the rows that then stand out.
        """
        changes = self._changes(checkpoint, late)
        now, unseen = 0.0, self._unseen

        def surprises(scaling_coef: float, places: Sequence[int]) -> list[float]:
            nonlocal now
            self._move(changes, scaling_coef - now)
            now = scaling_coef
            return self._surprises(self.model, places)

        def left(scaling_coef: float) -> list[int]:
            return unseen.standing_out(surprises(scaling_coef, range(len(unseen.facts))))

        # Of all rows some may look unseen from the start, and count for nothing.
        margins = dict.fromkeys(rows if len(rows) < len(unseen.facts) else left(0.0), 0.0)

        def forgets(scaling_coef: float) -> bool:
            if unseen.calibrated_on == HELD_OUT:  # where all rows together can stand out
                return 2 * len(margins.keys() & left(scaling_coef)) <= len(margins)
            # One row more than half decides, if all of those stand out.
            order, half = sorted(margins, key=margins.__getitem__), len(margins) // 2
            standing = 0
            for places in filter(None, (order[: half + 1], order[half + 1 :])):
                for place, value in zip(places, surprises(scaling_coef, places), strict=True):
                    margins[place] = value - unseen.least[place]
                    standing += unseen.stands_out(place, value)
                if standing > half:
                    return False
            return True

        # Without the late blocks it takes two or three times the strength.
        found_at = search_coarsely(forgets, 2 * LARGEST if late else LARGEST)
        chosen = None if found_at is None else share * found_at
        return chosen, left(chosen or 0.0)

    def _add(self, checkpoint: Path, weight: float, late: Sequence[Slot]) -> None:
        """Make a round's task vector part of the forget checkpoint."""
        self._taken.append((checkpoint, weight, frozenset(name for name, _ in late)))

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Write the forget checkpoint: an adapter where every round left one."""
        base = Path(self._edit.base)
        if all(is_adapter(checkpoint) for checkpoint, _, _ in self._taken):
            write_sum(folder, self._taken)
            return
        total, start = (self._load(base, "cpu") for _ in range(2))  # a GPU has no room for them
        for checkpoint, weight, late in self._taken:
            _add(total, self._load(checkpoint, "cpu"), less=start, weight=weight, without=late)
        save_model(total, self.tokenizer, folder, base)

    def _load(self, folder: str | Path, device: Device | None = None) -> PreTrainedModel:
        compute = replace(self._compute, device=device or self._compute.device)
        model = load_tuned(Path(folder), Path(self._edit.base), compute, dtype=torch.float32)
        merged: PreTrainedModel = model.merge_and_unload() if is_adapter(Path(folder)) else model
        return merged


def _parts(facts: Sequence[Fact]) -> list[list[int]]:
    """Places of all rows in up to three parts in turn; rows of one fact lie in one of them."""
    numbers: dict[tuple[int, ...], int] = {}
    parts: list[list[int]] = [[] for _ in range(_PARTS)]
    for place, fact in enumerate(facts):
        said = tuple(label for label in fact.encoded.labels if label != IGNORE)
        parts[numbers.setdefault(said, len(numbers)) % _PARTS].append(place)
    return [part for part in parts if part]


def _said_again(unseen: Unseen, places: Sequence[int], hits: Sequence[float]) -> list[int]:
    """Places of the facts that are said more often than `_BACK`, and than one that is unseen."""
    found = []
    for place, hit in zip(places, hits, strict=True):
        fact, bound = unseen.facts[place], _BACK
        if unseen.calibrated_on != CHOICES:
            tokens = sum(label != IGNORE for label in fact.encoded.labels)
            bound = max(bound, hit_probability(-unseen.least[place] * tokens, _SAMPLES))
        elif fact.judged_by == "choice":  # the base model says it
            continue
        if hit > bound:
            found.append(place)
    return found


@torch.no_grad()
def _add(
    model: PreTrainedModel,
    other: PreTrainedModel,
    *,
    less: PreTrainedModel,
    weight: float = 1.0,
    without: frozenset[str] = frozenset(),
) -> None:
    """Add to a model's parameters, in place, what others have more than the like of `less`."""
    for (name, mine), more, old in zip(
        model.named_parameters(), other.parameters(), less.parameters(), strict=True
    ):
        if name not in without:
            mine.add_(more - old, alpha=weight)
