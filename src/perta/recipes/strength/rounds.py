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
    α_0 = 0.35 times that, for others go on from there
    S_{k+1} = the rows that stand out at M_{k+1}

until none does. A later τ_k is the step of somebody who teaches the edited model the rows again. It
is short, and little else lies on it, where the base has to learn the whole row. The last round is
of all rows once more. Of a few strengths it takes the smallest at which as few rows as possible
stand out, and from which little comes back when a copy is taught a third of them: facts of the
others are then said in 64 samples with .05 in mean.

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

from perta.engine.edit.memory import Changes
from perta.engine.train.tune import tune
from perta.methods.registry import get_method
from perta.models.facts import hit_probability, score_facts
from perta.models.formats.low_rank import is_adapter, load_tuned, save_tuned, write_sum
from perta.models.layers import Slot, late_slots, stored_weights
from perta.models.load import counting_tokens, load_tokenizer, pad_id, picked, save_model
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, Device, TuneConfig
from perta.progress import say
from perta.recipes.strength._search import LARGEST, search_coarsely
from perta.recipes.strength.choose import HELD_OUT, Unseen, surprises_of
from perta.stages.edit import load_changes
from perta.stages.settings import EditConfig
from perta.stages.stage import Place, run_stage
from perta.store.atomic import beside, scratch_folder
from perta.store.fingerprint import fingerprint
from perta.store.record import settings_of

_FIRST = 0.35
"""Share that the first round takes of the strength it finds: docs/experiments/facts.md."""

_LASTS = (0.25, 0.5, 0.75, 1.0)
"""Strengths of the last round, as there."""

_STEPS = 6
_BACK = 0.05
"""Steps in which a third of the rows is taught, and how likely a fact of the others may then be in
one of `_SAMPLES` samples."""
_SAMPLES = 64


@dataclass(frozen=True)
class Round:
    """What one round did."""

    rows: int  # forget rows that it tuned on
    scaling_coef: float  # α_k
    left: tuple[int, ...]  # numbers of the rows that stand out after it
    untouched: int  # layers and experts in the last third of the blocks that it left as they were
    comes_back: float | None = None  # of the last: how likely facts are when others were taught


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
        "later": "from the edited model",
        "last": [*_LASTS, _STEPS, _BACK, "fewest"],
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
        """Rounds until no row stands out, or all but one are done, or none helps; and the last."""
        every = range(len(self._unseen.facts))
        rows: Sequence[int] = every
        checkpoint = Path(str(self._edit.forget_checkpoint))
        late: Sequence[Slot] = late_slots(self.model)
        rounds: list[Round] = []

        def take(scaling_coef: float, left: Sequence[int], back: float | None = None) -> None:
            self._add(checkpoint, scaling_coef, late)
            numbers = tuple(self._unseen.facts[place].row for place in left)
            rounds.append(Round(len(rows), scaling_coef, numbers, len(late), back))
            more = "" if back is None else f"; taught others, it says {back:.0%} of facts again"
            say(f"round {len(rounds)}: {len(rows)} rows, {len(numbers)} stand out after it{more}")

        while rows and len(rounds) < max(most - 1, 1):
            if rounds:
                checkpoint, late = self._tune(rows), ()
            # Without a later one that goes on from there the first goes all the way.
            share = _FIRST if not rounds and most > 2 else 1.0
            scaling_coef, rows_left = self._forget(checkpoint, rows, late, share)
            if scaling_coef is None and late:
                late = ()
                continue
            if scaling_coef is None:
                say(f"round {len(rounds) + 1}: no strength takes half of the {len(rows)} rows")
                if not rounds:
                    self._add(checkpoint, 1.0, late)  # the search says how far it gets
                break
            take(scaling_coef, rows_left)
            rows = rows_left
        if rounds and most > 1:
            rows, late = every, ()
            checkpoint = self._tune(rows)
            take(*self._harden(checkpoint))
        return rounds

    def _tune(self, rows: Sequence[int]) -> Path:
        """θ₀ and the step that teaches `model` the facts of some rows again."""
        device, merges = self.model.device, not self._config.lora_rank
        taught = self._taught(rows, self._config, merges=merges)
        if merges:  # else it is the step alone
            torch.nn.Module.to(taught, "cpu")
            _add(taught, self._load(self._edit.base, "cpu"), less=self.model)
        folder = Path(mkdtemp(dir=self._scratch))
        save_tuned(taught, self.tokenizer, folder, Path(self._edit.base), self._edit.base)
        del taught
        torch.nn.Module.to(self.model, device)
        return folder

    def _taught(
        self, rows: Sequence[int], config: TuneConfig, *, merges: bool = True
    ) -> PreTrainedModel:
        """A copy of `model`, which goes to the CPU, that is taught the facts of some rows."""
        examples = [self._unseen.facts[place].encoded for place in rows]
        torch.nn.Module.to(self.model, "cpu")  # a GPU may hold no other model beside one in tuning
        taught = self._load(self._edit.full)
        taught.load_state_dict(self.model.state_dict())
        dtype, pad = self._compute.dtype, self._pad
        taught, done = tune(taught, examples, config, pad=pad, dtype=dtype, merges=merges)
        self.tuned += done.tokens
        return taught

    def _comes_back(self) -> float | None:
        """How likely facts are when others, a third of all, were taught; None with too few."""
        facts = self._unseen.facts
        shown = range(1, len(facts), 3)
        hidden = [replace(f, wrong=(), right=None) for i, f in enumerate(facts) if i % 3 != 1]
        if not shown:
            return None
        device = self.model.device
        attack = replace(
            self._config,
            epochs=_STEPS,
            accumulation=math.ceil(len(shown) / self._config.batch_size),
            schedule="constant",
            warmup_ratio=0.0,
            stop_loss=0.0,
        )
        taught = self._taught(shown, attack)
        found = score_facts(taught, hidden, pad=self._pad)
        self.read += sum(len(fact.encoded.input_ids) for fact in hidden)
        del taught
        torch.nn.Module.to(self.model, device)
        return fmean(hit_probability(score.log_probability, _SAMPLES) for score in found)

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

    def _left(self) -> list[int]:
        """Places of the rows that stand out."""
        unseen = self._unseen
        found = surprises_of(self.model, unseen.facts, unseen.calibrated_on, self._pad)
        return unseen.standing_out(found)

    def _harden(self, checkpoint: Path) -> tuple[float, list[int], float | None]:
        """Take from `model` until as few rows as possible stand out, and little comes back.

        Returns the strength, the rows that stand out at it, and what comes back.
        """
        changes, at, left = self._changes(checkpoint, ()), 0.0, dict[float, list[int]]()
        for strength in _LASTS:
            self._move(changes, strength - at)
            at, left[strength] = strength, self._left()
        first, back = min(_LASTS, key=lambda strength: len(left[strength])), None
        for strength in (strength for strength in _LASTS if strength >= first):
            self._move(changes, strength - at)
            at, back = strength, self._comes_back()
            if back is None or back <= _BACK:
                break
        return at, left[at], back

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
            facts = [unseen.facts[place] for place in places]
            return surprises_of(self.model, facts, unseen.calibrated_on, self._pad)

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
