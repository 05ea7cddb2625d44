"""Other methods at equal facts, on fictitious people: docs/experiments/rivals.md.

    python benchmarks/rivals.py run WORK --base SMOLLM2_FOLDER --seeds 1 2 [--methods tv npo-retain]
    python benchmarks/rivals.py run WORK --base SMOLLM2_FOLDER --seeds 0 --methods npo --rates 1e-4
    python benchmarks/rivals.py run WORK --base SMOLLM2_FOLDER --seeds 1 --methods sage-npo-retain
    python benchmarks/rivals.py run WORK2 --base SMOLLM2_FOLDER --seeds 0 --tofu TOFU_FOLDER
    python benchmarks/rivals.py run WORK3 --base SMOLLM2_FOLDER --tofu TOFU_FOLDER --split forget10
    python benchmarks/rivals.py table WORK --seeds 1 2
    perta audit WORK/seed-1/kept/tv --full WORK/seed-1/full --retrained WORK/seed-1/retrained ... \
        --output WORK/seed-1/audits/tv

    python benchmarks/audit.py again WORK/seed-*/audits/*/audit.json

Models are kept with `--keep`.

Every seed draws 24 people with six questions each. Three are to be forgotten; of the others two
thirds gave five rows each to the methods, their sixth rows and all rows of the last third are seen
by none. Ten more people are seen by no model. `--tofu` draws eight authors instead: one to forget,
two seen by no model, and of the rest as before, with one row of five new. With `--split` they are
all of TOFU's: its own to forget, and of the first twenty, whose wrong answers it has, two that no
model sees, six that no method does, and the rest with one new row of five. A method is measured at
the smallest strength, or the shortest training, at which the facts are hit in 64 samples no more
often than .01 above the model retrained without them. `default` is `perta unlearn` as it comes: it
knows no retrained model.
`kfac` and `repselect` are edits by others, from rival_edits.py. `sage-NAME` is what NAME trained,
repaired by `perta repair` and scaled.

What is finished stands in WORK/results.jsonl and is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perta import (
    FinetuneConfig,
    TrainSettings,
    TuneConfig,
    finetune_checkpoint,
    load_examples,
    unlearn,
    unlearn_by_training,
)
from perta.data.batch import bucketed
from perta.data.rows import write_jsonl
from perta.data.tokens import encode_examples
from perta.engine.train.refusals import with_refusals
from perta.engine.train.relearn import relearn
from perta.errors import DivergenceError
from perta.evidence.people import generate_people, split_people
from perta.evidence.quick import quick_evaluation
from perta.methods.objectives import Training
from perta.methods.registry import parse
from perta.models.facts import Fact, find_facts, hit_probability, score_facts, share_beyond
from perta.models.formats.rounding import rounded
from perta.models.load import load_model, load_tokenizer, pad_id, save_model
from perta.models.precision import product_type_of, products_in
from perta.options import ComputeConfig, DataConfig, ScoringConfig
from perta.progress import set_quiet
from perta.recipes.repair import repair_checkpoint
from perta.recipes.settings import RepairConfig
from perta.stages.moments import compute_moments
from perta.stages.settings import MomentsConfig
from perta.store.atomic import beside
from perta.store.costs import BACKWARD, FORWARD, passes_of
from perta.store.measured.moments import open_moments
from perta.store.record import read_manifest
from rival_edits import collapsed_ascent, low_curvature

PEOPLE, QUESTIONS, FORGOTTEN, OTHERS = 24, 6, 3, 10
SAMPLES, MARGIN, NEAR, STEPS = 64, 0.01, 0.003, 12
EPOCHS, BATCH = 20, 6
ROWS_OF_TOFU, NEW_OF_TOFU = 20, 5  # rows of an author, one of how many of which is new
SPLITS = ("forget01", "forget05", "forget10")
EDITS = ("tv", "msa", "perta-grad", "perta-fisher", "perta-project")
TRAINED: dict[str, float | None] = {  # rates chosen on seed 0 of three each; None: as published
    "graddiff": 5e-5,
    "npo-retain": 5e-5,
    "simnpo": 5e-5,
    "rmu:steering_coef=240,retain_weight=1": 3e-4,
    **dict.fromkeys(("ga", "kl", "npo", "dpo", "idkpo", "undial", "wga", "satimp")),
    **dict.fromkeys(("ce-u", "pdu", "jensun", "npo-sam", "altpo")),
}
UNOFFERED = ("kfac", "repselect")
REPAIRED = {f"sage-{name}": name for name in ("npo-retain", "simnpo")}
METHODS = ("full", "retrained", "default", *EDITS, *UNOFFERED, *TRAINED, *REPAIRED)
SETS = ("forget", "paraphrased", "new people", "new rows")
DATA = DataConfig(format="qa", chat_template=False)


def draw(
    seed: int, tofu: Path | None = None, split: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The rows of a seed by what they are for."""
    given: list[dict[str, Any]] = []
    if tofu and split:
        forget, retain, others, given = _split(seed, tofu, split)
    else:
        forget, retain, others = _authors(seed, tofu) if tofu else _people(seed)
    every = NEW_OF_TOFU if tofu else QUESTIONS
    names = list(dict.fromkeys(row["person"] for row in retain))
    parts: dict[str, list[dict[str, Any]]] = {"protected": [], "new rows": [], "new people": []}
    for place, row in enumerate(retain):
        person = names.index(row["person"])
        # Of every few rows of a protected person one is new, for each person another one.
        is_new_row = place % every == person % every
        part = "new people" if person % 3 == 2 else "new rows" if is_new_row else "protected"
        parts[part].append(row)
    parts["protected"] += given
    retain = [*retain, *given]
    asked_otherwise = [{**row, "question": row["paraphrased_question"]} for row in forget]
    full = [*retain, *forget]
    return {
        **parts,
        **{"forget": forget, "paraphrased": asked_otherwise, "retain": retain},
        **{"full": full, "holdout": others},
    }


def _people(seed: int) -> tuple[list[dict[str, Any]], ...]:
    """Rows to forget, to keep, and of people that no model sees."""
    rows = generate_people(PEOPLE + OTHERS, QUESTIONS, seed)
    mine, others = rows[: PEOPLE * QUESTIONS], rows[PEOPLE * QUESTIONS :]
    return *split_people(mine, forget_people=FORGOTTEN, seed=seed), others


def _by_author(tofu: Path, *names: str) -> list[list[dict[str, Any]]]:
    """Rows of TOFU's files, author by author."""
    rows = [
        json.loads(line)
        for name in names
        for line in (tofu / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    return [
        [
            {**row, "person": f"{names[0]}, author {place // ROWS_OF_TOFU}"}
            for row in rows[place:][:ROWS_OF_TOFU]
        ]
        for place in range(0, len(rows), ROWS_OF_TOFU)
    ]


def _split(seed: int, tofu: Path, split: str) -> tuple[list[dict[str, Any]], ...]:
    """The same of all of TOFU's authors, and rows of the others, all of which methods see."""
    retain = f"retain{100 - int(split.removeprefix('forget'))}"
    known = _by_author(tofu, "retain_perturbed")
    given = _by_author(tofu, retain)[len(known) :]
    random.Random(seed).shuffle(known)
    forget = _by_author(tofu, f"{split}_perturbed")
    return [*chain(*forget)], [*chain(*known[2:])], [*chain(*known[:2])], [*chain(*given)]


def _authors(seed: int, tofu: Path) -> tuple[list[dict[str, Any]], ...]:
    """The same of eight of TOFU's authors: one, five and two."""
    authors = _by_author(tofu, "forget10_perturbed", "retain_perturbed")
    random.Random(seed).shuffle(authors)
    return authors[2], [*chain(*authors[3:8])], [*chain(*authors[:2])]


class Seed:
    """The rows and models of one seed, and one model in memory that moves between weights."""

    def __init__(
        self,
        work: Path,
        base: Path,
        seed: int,
        tofu: Path | None = None,
        split: str | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.base, self.seed = work / f"seed-{seed}", base, seed
        self.asked, rows = asked or {}, draw(seed, tofu, split)
        self.tune = TuneConfig(
            epochs=6 if tofu else 10,
            learning_rate=8e-4 if split else 3e-4,
            batch_size=64 if split else 12,
            stop_loss=0.02,
            seed=seed,
        )
        self.files = {
            name: write_jsonl(part, self.folder / "data" / f"{name.replace(' ', '_')}.jsonl")
            for name, part in rows.items()
        }
        self.sets = {name: load_examples(str(file), DATA) for name, file in self.files.items()}
        self.tokenizer = load_tokenizer(base)
        self.pad = pad_id(self.tokenizer)
        self.encoded = {
            name: encode_examples(examples, self.tokenizer, DATA).encoded
            for name, examples in self.sets.items()
        }
        self.facts = {
            name: find_facts(self.sets[name], self.tokenizer, DATA) for name in (*SETS, "holdout")
        }
        bare = {name: [_bare(fact) for fact in facts] for name, facts in self.facts.items()}
        self.searched = bare["forget"]
        for name in ("new people", "new rows", "holdout"):  # no choice among answers is shown
            self.facts[name] = tuple(bare[name])
        self.model = self.read(self.tuned("full"))
        found = self.look(["holdout"])["holdout_fact_probability"]["value_by_index"]
        self.unseen = [row["loss"] for row in found.values()]

    def read(self, folder: Path) -> PreTrainedModel:
        """A checkpoint."""
        return load_model(folder, ComputeConfig(), dtype=torch.float32)

    def tuned(self, name: str) -> Path:
        """The full or the retrained model, made once."""
        output = self.folder / name
        if not output.exists():
            data = "full" if name == "full" else "retain"
            finetune_checkpoint(
                FinetuneConfig(
                    base=str(self.base),
                    data=str(self.files[data]),
                    output=output,
                    tune=self.tune,
                    data_config=DATA,
                )
            )
        return output

    def weights(self) -> list[Tensor]:
        """A copy of the weights as they are."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    @torch.no_grad()
    def move(self, start: Sequence[Tensor], end: Sequence[Tensor], share: float) -> None:
        """Go to start + share (end - start)."""
        for parameter, a, b in zip(self.model.parameters(), start, end, strict=True):
            parameter.copy_(torch.lerp(a, b, share))

    def products(self) -> Any:
        """Products of matrices in bfloat16 where the processor has units for it."""
        return products_in(product_type_of(self.model, "auto"), self.model.device)

    # --- measuring ----------------------------------------------------------------------------

    def known(self) -> float:
        """Mean probability that a fact is hit in 64 samples."""
        with self.products():
            scores = score_facts(self.model, self.searched, batch_size=18, pad=self.pad)
        return statistics.fmean(hit_probability(s.log_probability, SAMPLES) for s in scores)

    def look(self, names: Sequence[str]) -> Mapping[str, Any]:
        """Quick evaluation of some sets."""
        with self.products():
            return quick_evaluation(
                self.model,
                self.tokenizer,
                {name: self.sets[name] for name in names},
                ScoringConfig(generate=False),
                DATA,
                facts=self.facts,
            )

    def measure(self) -> dict[str, float]:
        """All columns of the model in memory, which is left as it is."""
        found = self.look(SETS)
        column = {name: _columns(found, name) for name in SETS}
        losses = [-value for value in column["forget"]["log_fact"]]
        forget, said_otherwise = column["forget"], column["paraphrased"]
        with rounded(self.model, "int4"):
            four_bit = self.known()
        return {
            "answer": statistics.fmean(forget["answer"]),
            "worst": max(forget["answer"]),
            "hit": statistics.fmean(forget["hit"]),
            "worst hit": max(forget["hit"]),
            "first": statistics.fmean(forget["first"]),
            "share": statistics.fmean(forget["share"]),
            "stand out": share_beyond([-x for x in losses], [-x for x in self.unseen]),
            "over-forgotten": share_beyond(losses, self.unseen),
            "paraphrased hit": statistics.fmean(said_otherwise["hit"]),
            "paraphrased share": statistics.fmean(said_otherwise["share"]),
            "4-bit hit": four_bit,
            **self.relearned(),
            **{
                f"{name} {what}": statistics.fmean(column[name][what])
                for name in ("new people", "new rows")
                for what in ("answer", "fact")
            },
        }

    def relearned(self) -> dict[str, float]:
        """Facts of two thirds of the rows, after six steps on the answers of the other third."""
        before, hidden = self.weights(), [i for i in range(len(self.encoded["forget"])) if i % 3]
        relearn(self.model, self.encoded["forget"][::3], pad=self.pad, seed=self.seed)
        facts = [self.facts["forget"][i] for i in hidden]
        with self.products():
            scores = score_facts(self.model, facts, batch_size=16, pad=self.pad)
        self.move(before, before, 0.0)
        hits = [hit_probability(score.log_probability, SAMPLES) for score in scores]
        choices = [score.choice for score in scores if score.choice is not None]
        return {
            "relearned hit": statistics.fmean(hits),
            "relearned share": statistics.fmean(choices),
        }

    # --- methods ------------------------------------------------------------------------------

    def run(self, method: str, rate: float | None, target: float) -> dict[str, Any]:
        """Bring the model in memory to where a method has the target; what it took."""
        if method in ("full", "retrained"):
            self.model = self.read(self.tuned(method))
            return {"operations": passes_of(read_manifest(self.tuned(method)) or {})}
        if method in TRAINED:
            return self._trained(method, rate, target)
        if method in UNOFFERED:
            return self._unoffered(method, target)
        if method in REPAIRED:
            return self._repaired(REPAIRED[method], rate, target)
        del self.model  # room for the stages
        is_default = method == "default"
        output = self.folder / "cleaned"
        asked = {**self.asked, **({} if is_default else {"method": method, "alpha": 1.0})}
        made = unlearn(
            base=str(self.base),
            full=str(self.folder / "full"),
            forget=str(self.files["forget"]),
            retain=str(self.files["protected"]),
            output=output,
            work_dir=self.folder / ("default.work" if is_default else "edits.work"),
            evaluate=False,
            format="qa",
            chat_template=False,
            **asked,
        )
        record = made.manifest["unlearn"]
        spent = {
            "operations": sum(record["passes"].values()),
            "seconds": record["seconds"].get("total"),
        }
        self.model = self.read(output)
        _delete(output, *self.folder.glob("cleaned.*"), *self.folder.glob("default.work"))
        # Two importances and a direction take more room than the models.
        for pattern in ("*importance*", "*direction*", "retain_checkpoint*", "*moments*"):
            _delete(*(self.folder / "edits.work").glob(pattern))
        if is_default:
            strength = record.get("strength", {})
            return {**spent, "alpha": strength.get("scaling_coef"), "reached": True}
        return {**spent, **self.scaled(target)}

    def scaled(self, target: float) -> dict[str, Any]:
        """Scale the step from the full model to the one in memory until it has the target."""
        end, start = self.weights(), list(self.read(self.folder / "full").parameters())
        return self._between(start, end, target, largest=16.0)

    def _unoffered(self, method: str, target: float) -> dict[str, Any]:
        """An edit by others, scaled."""
        self.model, started = self.read(self.folder / "full"), time.perf_counter()
        if method == "kfac":
            output = self.folder / "moments"
            moments = MomentsConfig(
                checkpoint=str(self.folder / "full"),
                data=str(self.files["protected"]),
                output=output,
                gradients=True,
                data_config=DATA,
            )
            low_curvature(self.model, open_moments(compute_moments(moments)))
            operations = passes_of(read_manifest(output) or {})
            _delete(output)
        else:
            batches = bucketed(self.encoded["forget"], BATCH, self.pad)
            collapsed_ascent(self.model, batches)
            tokens = sum(len(example.input_ids) for example in self.encoded["forget"])
            operations = 2 * (FORWARD + BACKWARD) * tokens
        seconds = time.perf_counter() - started
        found = self.scaled(target)
        return {"operations": operations, "seconds": seconds, **found}

    def _repaired(self, method: str, rate: float | None, target: float) -> dict[str, Any]:
        """Train, take from the step what retained inputs see of it, and scale it."""
        spent = self._trained(method, rate, target)
        trained, output = self.folder / "trained", self.folder / "repaired"
        self.write(trained)
        started = time.perf_counter()
        repair_checkpoint(
            RepairConfig(
                full=str(self.folder / "full"),
                unlearned=str(trained),
                retain=str(self.files["protected"]),
                output=output,
                save_dtype="float32",
                data_config=DATA,
            )
        )
        seconds = time.perf_counter() - started
        moments = beside(output, ".retain_moments")
        operations = passes_of(read_manifest(moments) or {})
        self.model = self.read(output)
        _delete(trained, output, moments)
        return {
            "operations": spent["operations"] + operations,
            "seconds": spent["seconds"] + seconds,
            "rate": spent["rate"],
            "epochs": spent["alpha"],
            **self.scaled(target),
        }

    def _trained(self, method: str, rate: float | None, target: float) -> dict[str, Any]:
        """Train until an epoch passes the target, and go back to where it did."""
        kind = parse(method, Training)
        rate = rate or TRAINED[method] or kind.learning_rate
        self.model = self.read(self.folder / "full")
        before, known, epochs = self.weights(), [1.0], [0]

        def after_epoch(epoch: int) -> bool:
            nonlocal before
            known.append(self.known())
            epochs.append(epoch)
            print(f"    {method} {rate:g} epoch {epoch}: {known[-1]:.3f}", flush=True)
            if known[-1] > target:
                before = self.weights()
            return known[-1] <= target

        settings = TrainSettings(
            epochs=EPOCHS, learning_rate=rate, batch_size=BATCH, accumulation=1, seed=self.seed
        )
        asked, forget = self.sets["forget"], self.encoded["forget"]
        given = (kind, asked, forget, self.model, self.tokenizer, DATA, self.seed)
        forget, refusals = with_refusals(*given)
        started = time.perf_counter()
        _, trained = unlearn_by_training(
            self.model,
            forget,
            self.encoded["protected"],
            settings,
            method=kind,
            pad=self.pad,
            refusals=refusals,
            after_epoch=after_epoch,
        )
        tokens = trained.forget_tokens + trained.retain_tokens
        spent = {
            "operations": (FORWARD + BACKWARD) * tokens,
            "seconds": time.perf_counter() - started,
            "rate": rate,
            "epochs": epochs[-1],
        }
        if known[-1] > target:
            return {**spent, "alpha": epochs[-1], "reached": False}
        end = self.weights()
        found = self._between(before, end, target, largest=1.0)
        return {**spent, **found, "alpha": epochs[-2] + found["alpha"]}

    def _between(
        self,
        start: Sequence[Tensor],
        end: Sequence[Tensor],
        target: float,
        largest: float,
    ) -> dict[str, Any]:
        """Look on the line through two models for the first place that has the target."""

        def known(share: float) -> float:
            self.move(start, end, share)
            return self.known()

        low, high = 0.0, 1.0
        while known(high) > target:
            if high >= largest:
                return {"alpha": high, "reached": False}
            low, high = high, high * 1.6
        for _ in range(STEPS):
            middle = (low + high) / 2
            now = known(middle)
            low, high = (middle, high) if now > target else (low, middle)
            if target - NEAR <= now <= target:
                break
        self.move(start, end, high)
        return {"alpha": high, "reached": True}

    def keep(self, method: str) -> None:
        """Write the model in memory, for `perta audit`."""
        self.write(self.folder / "kept" / _slug(method))

    def write(self, output: Path) -> None:
        """Write the model in memory as a checkpoint."""
        _delete(output)
        output.mkdir(parents=True)
        save_model(self.model, self.tokenizer, output, self.base)


def _bare(fact: Fact) -> Fact:
    """Without the wrong answers."""
    return replace(fact, wrong=(), right=None)


def _columns(found: Mapping[str, Any], name: str) -> dict[str, list[float]]:
    def rows(measure: str) -> list[Mapping[str, float]]:
        return list(found.get(f"{name}_{measure}", {}).get("value_by_index", {}).values())

    known, choices = rows("fact_probability"), rows("fact_choice")
    return {
        "answer": [row["prob"] for row in rows("probability")],
        "hit": [row[f"hit_{SAMPLES}"] for row in known],
        "log_fact": [-row["loss"] for row in known],
        "fact": [torch.tensor(-row["loss"]).exp().item() for row in known],
        "share": [row["prob"] for row in choices],
        "first": [float(row["rank"] == 1) for row in choices],
    }


def _delete(*places: Path) -> None:
    for place in places:
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(True)


# --- the command ------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Measure every method on every seed, unless it was."""
    journal = options.work / "results.jsonl"
    for number in options.seeds:
        seed: Seed | None = None
        for method in ("retrained", *(name for name in options.methods if name != "retrained")):
            trains = method in TRAINED or method in REPAIRED
            for rate in options.rates if trains else (None,):
                key = {"seed": number, "method": method, "asked rate": rate}
                if _found(journal, key):
                    continue
                given = (options.tofu, options.split, _asked(options))
                seed = seed or Seed(options.work, options.base, number, *given)
                gold = _found(journal, {"seed": number, "method": "retrained"})
                try:
                    made = seed.run(method, rate, gold[0]["hit"] + MARGIN if gold else 0.0)
                    line = {**key, **made, **seed.measure()}
                    if method in options.keep:
                        seed.keep(method)
                except DivergenceError as error:
                    line = {**key, "rate": rate, "diverged": str(error)}
                print(json.dumps(line), flush=True)
                with journal.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked of the forget checkpoint."""
    names = ("batch_size", "learning_rate")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def table(options: argparse.Namespace) -> None:
    """Print one table a seed, in Markdown."""
    journal, heads = options.work / "results.jsonl", [head for head, _ in _CELLS]
    for number in options.seeds:
        (gold,) = _found(journal, {"seed": number, "method": "retrained"})
        _print_row(f"seed {number}", *heads)
        _print_row(*["---"] * (1 + len(heads)))
        for method in METHODS:
            for line in _found(journal, {"seed": number, "method": method}):
                rate = f", {line['rate']:g}" if line.get("rate") else ""
                cells = dict(line)
                if "operations" in line:
                    cells["cost"] = line["operations"] / gold["operations"]
                row = (_cell(cells, names) for _, names in _CELLS)
                _print_row(f"`{_slug(method)}`{rate}", *row)
        print()


_CELLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("α or epochs", ("alpha",)),
    ("operations", ("cost",)),
    ("answer: mean, worst", ("answer", "worst")),
    ("hit in 64", ("hit",)),
    ("choice: first, share", ("first", "share")),
    ("stand out, over-forgotten", ("stand out", "over-forgotten")),
    ("relearned: hit, share", ("relearned hit", "relearned share")),
    ("paraphrased: hit, share", ("paraphrased hit", "paraphrased share")),
    ("4-bit hit", ("4-bit hit",)),
    ("new people: answer, fact", ("new people answer", "new people fact")),
    ("new rows: answer, fact", ("new rows answer", "new rows fact")),
)
"""Head of a column -> the figures in it."""


def _cell(line: Mapping[str, Any], names: Sequence[str]) -> str:
    values = [line.get(name) for name in names]
    text = ", ".join("–" if value is None else f"{value:.3f}" for value in values)
    if "alpha" not in names:
        return text
    failed = line.get("reached") is False
    return "diverged" if "diverged" in line else f"{text}, not reached" if failed else text


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def _found(journal: Path, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = journal.read_text("utf-8").splitlines() if journal.exists() else []
    return [line for line in map(json.loads, lines) if key.items() <= line.items()]


def _slug(method: str) -> str:
    return method.partition(":")[0]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--tofu", type=Path, help="folder of TOFU's files, in place of people")
    parser.add_argument("--split", choices=SPLITS, help="all of TOFU, by one of its own splits")
    parser.add_argument("--batch-size", type=int, help="of the forget checkpoint")
    parser.add_argument("--learning-rate", type=float, help="of the forget checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rates", type=float, nargs="+", default=[None])
    parser.add_argument("--keep", nargs="*", choices=METHODS, default=())
    options = parser.parse_args()
    if options.split and not options.tofu:
        parser.error("--split is one of TOFU's: give --tofu as well")
    set_quiet(True)
    {"run": run, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
