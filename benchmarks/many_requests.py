"""Requests one after another against one edit of them all, and against training again without them.

    python benchmarks/many_requests.py WORK --base SMOLLM2_FOLDER [--counts 1 5 10 20] [--seeds 0]

and for a look `WORK --base tiny --counts 1 2 --people 12 --epochs 40 --learning-rate 0.01`.
Fictitious people, six questions each; the full model is tuned on all of them. Each request is one
person. For every count N, all of it judged on the first N people together:

    in turn      N requests, each applied to the checkpoint of the one before
    one edit     the same N in one edit of the full model
    kept         one edit of the full model by the sum of what the N in turn subtracted, with one
                 strength for all: θ_f = θ₀ + Σ αᵢ (θ_f,i − θ₀), no round beyond
    retrained    the base tuned without any of the people who ever ask

Some who stay are kept from every edit: what is lost on them is what nothing protected. A model
learns half of the rows again, and is asked for the other half. Models that were looked at are
deleted, so the whole needs some ten copies of the model. Each step goes on where it was stopped;
WORK/results.json has every figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perta.data.examples import load_examples
from perta.data.rows import write_jsonl
from perta.methods.registry import at_strength, with_defaults
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.models.load import load_model, load_tokenizer, pad_id, save_model
from perta.options import ComputeConfig, DataConfig, ScoringConfig, TuneConfig
from perta.recipes.requests.apply import apply_requests
from perta.recipes.requests.settings import (
    RequestsAddConfig,
    RequestsApplyConfig,
    RequestsInitConfig,
)
from perta.recipes.requests.state import read_state
from perta.recipes.requests.take import add_request, start_ledger
from perta.recipes.strength.choose import calibrate, choose_strength, surprises_of
from perta.stages.bench import write_people
from perta.stages.edit import edit_checkpoint
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import EditConfig, EvaluateConfig, FinetuneConfig, PeopleConfig
from perta.store.record import read_manifest

QUESTIONS, ASIDE = 6, 5
FACTS, _COST = "forget_fact_probability", "cost of"
DATA = DataConfig(chat_template=False)
Row = dict[str, float]


class World:
    """One seed: its people, its models and its ledgers."""

    def __init__(self, folder: Path, seed: int, given: Any) -> None:
        self.folder, self.seed, self.most = folder, seed, max(given.counts)
        self.counts: list[int] = sorted(given.counts)
        self.compute = ComputeConfig(threads=given.threads)
        people = folder / "people"
        if not people.exists():
            write_people(
                PeopleConfig(
                    output=people,
                    people=given.people,
                    questions=QUESTIONS,
                    forget_people=self.most,
                    people_seed=seed,
                )
            )
        self.asking, self.staying = (
            self.by_person(people / f) for f in ("forget.jsonl", "retain.jsonl")
        )
        self.known = self.file("known", self.asking + self.staying[:-ASIDE])
        self.base = given.base
        if given.base == "tiny":
            self.base = str(folder / "base")
            if not (folder / "base").exists():
                rows = load_examples(people / "full.jsonl").examples
                (folder / "base").mkdir()
                texts = [text for row in rows for text in (row.prompt, row.answer)]
                write_tiny_checkpoint(folder / "base", texts)
        epochs = {"epochs": given.epochs} if given.epochs else {}
        self.tune = TuneConfig(
            learning_rate=given.learning_rate, batch_size=12, stop_loss=0.02, seed=seed, **epochs
        )
        self.forget_tune = TuneConfig(seed=seed, **epochs)
        self.full = self.tuned(self.base, "full", self.asking + self.staying, self.tune)
        self.retrained = self.tuned(self.base, "retrained", self.staying, self.tune)

    def by_person(self, file: Path) -> list[list[dict[str, Any]]]:
        """Rows of a file, those of each person together."""
        people: dict[str, list[dict[str, Any]]] = {}
        for row in load_examples(file).examples:
            people.setdefault(row.fields["person"], []).append(dict(row.fields))
        return list(people.values())

    def file(self, name: str, people: list[list[dict[str, Any]]]) -> Path:
        """A file with the rows of some people."""
        file = self.folder / f"{name}.jsonl"
        return write_jsonl([row for rows in people for row in rows], file)

    def tuned(self, base: str | Path, name: str, people: Any, tune: TuneConfig) -> Path:
        """A model tuned on the rows of some people."""
        return finetune_checkpoint(
            FinetuneConfig(
                base=str(base),
                data=str(self.file(f"tuned-{name}", people)),
                output=self.folder / name,
                tune=tune,
                data_config=DATA,
                compute=self.compute,
            )
        )

    def applied(self, name: str, people: range) -> Path:
        """The checkpoint once some people's requests are applied, those that wait in one edit."""
        folder = self.folder / name
        if not folder.exists():
            start_ledger(
                RequestsInitConfig(
                    folder=folder,
                    base=self.base,
                    full=str(self.full),
                    retain=str(self.known),
                    data_config=DATA,
                )
            )
        for person in people:
            if f"{person}" not in {request.name for request in read_state(folder).requests}:
                add_request(
                    RequestsAddConfig(
                        folder=folder,
                        forget=str(self.file(f"asks-{person}", [self.asking[person]])),
                        name=f"{person}",
                        data_config=DATA,
                    )
                )
        if any(request.applied is None for request in read_state(folder).requests):
            apply_requests(
                RequestsApplyConfig(
                    folder=folder, tune=self.forget_tune, data_config=DATA, compute=self.compute
                )
            )
        return read_state(folder).current[0]

    def kept(self, count: int, run: Path, checkpoint: Path) -> Path:
        """θ_f of all requests so far, that of one more added to it."""
        made, before = self.folder / "kept" / f"{count}", self.folder / "kept" / f"{count - 1}"
        if not made.exists():
            record = (read_manifest(checkpoint) or {})["unlearn"]
            made.parent.mkdir(exist_ok=True)
            total, more, base = (
                load_model(Path(place), self.compute, dtype=torch.float32)
                for place in (before if count > 1 else self.base, run / "forget_rounds", self.base)
            )
            weight = record["strength"]["scaling_coef"]
            with torch.no_grad():
                for into, one, start in zip(
                    total.parameters(), more.parameters(), base.parameters(), strict=True
                ):
                    into.add_(one - start, alpha=weight)
            partial = made.with_suffix(".partial")
            save_model(total, load_tokenizer(Path(self.base)), partial, Path(self.base))
            partial.rename(made)
        shutil.rmtree(before, ignore_errors=True)
        return made

    def by_kept(self, count: int, work: Path) -> Path:
        """One edit of the full model by what was subtracted in turn."""
        edit = EditConfig(
            base=self.base,
            full=str(self.full),
            forget_checkpoint=str(self.folder / "kept" / f"{count}"),
            retain_moments=self.folder / "in-turn" / "moments",
            output=self.folder / f"kept-{count}",
            direction=self.folder / f"kept-{count}.work" / "direction",
            edit_threads=self.compute.threads,
        )
        files = {"forget": self.folder / f"first-{count}.jsonl", "retain": work / "retain.jsonl"}
        sets = {name: load_examples(file, DATA) for name, file in files.items()}
        unseen = calibrate(self.full, Path(self.base), sets, DATA, self.compute)
        found = choose_strength(edit, sets, unseen, 0.1, DATA, self.compute, seed=self.seed)
        weighting = at_strength(with_defaults(edit.weighting), found.scaling_coef)
        return edit_checkpoint(replace(edit, weighting=weighting))

    # --- what is measured ---------------------------------------------------------------------

    def evaluated(self, name: str, checkpoint: Path, forget: Any, retain: Any) -> Any:
        """Evaluation of a model, without texts."""
        return evaluate_checkpoint(
            EvaluateConfig(
                checkpoint=str(checkpoint),
                forget=str(self.file(f"forget-{name}", forget)),
                retain=str(self.file(f"retain-{name}", retain)),
                output=self.folder / "evaluations" / f"{name}.json",
                scoring=ScoringConfig(generate=False),
                data_config=DATA,
                compute=self.compute,
            )
        )

    def measured(self, way: str, checkpoint: Path, count: int) -> Row:
        """Figures of a model on the first people who asked and on those who stay."""
        name, first = f"{way}-{count}", self.asking[:count]
        seen = self.evaluated(name, checkpoint, first, self.staying[:-ASIDE])
        aside = self.evaluated(f"{name}-aside", checkpoint, first, self.staying[-ASIDE:])
        facts = per_row(seen)
        row = {"forget facts": mean(facts), "worst row": max(facts)}
        row |= self.standing(checkpoint, count)
        for side, found in (("protected", seen), ("aside", aside)):
            row[f"{side} answers"] = found["retain_probability"]["agg_value"]
            row[f"{side} facts"] = found["retain_fact_probability"]["agg_value"]
            row[f"{side} extracted"] = found["retain_extraction_strength"]["agg_value"]
        again = TuneConfig(
            epochs=3,
            learning_rate=self.tune.learning_rate,
            batch_size=12,
            stop_loss=0,
            seed=self.seed,
        )
        tuned = self.tuned(checkpoint, f"again-{name}", [rows[::2] for rows in first], again)
        other = [rows[1::2] for rows in first]
        found = self.evaluated(f"{name}-again", tuned, other, self.staying[-ASIDE:])
        row["other half, one half relearned"] = mean(per_row(found))
        shutil.rmtree(tuned)
        return row

    def standing(self, checkpoint: Path, count: int) -> Row:
        """Shares of rows that stand out or are far beyond unseen, by the rule of the search."""
        forget = load_examples(self.folder / f"first-{count}.jsonl", DATA)
        unseen = calibrate(self.full, Path(self.base), {"forget": forget}, DATA, self.compute)
        model = load_model(checkpoint, self.compute, dtype=torch.float32)
        pad = pad_id(load_tokenizer(Path(self.base)))
        now = surprises_of(model, unseen.facts, unseen.calibrated_on, pad)
        beyond, rows = unseen.over_forgotten(now), len(now)
        found = {"stand out": len(unseen.standing_out(now)) / rows}
        return found if beyond is None else {**found, "far beyond unseen": len(beyond) / rows}

    def cost(self, checkpoint: Path) -> Row:
        """What made a checkpoint, and the moments for it: tokens passed and seconds."""
        run = (read_manifest(checkpoint) or {})["unlearn"]
        moments = checkpoint.parents[1] / "work" / checkpoint.name / "moments"
        made = read_manifest(moments) or {}
        edits = {k: v for k, v in run["passes"].items() if not k.startswith("evaluate")}
        seconds = run["seconds"]["total"] + sum(made.get("seconds", {}).values())
        passes = sum(edits.values()) + made.get("passes", 0)
        return {"thousand token passes": passes / 1000, "seconds": seconds}

    def compared(self) -> dict[str, Row]:
        """Way and number of requests -> figures."""
        file = self.folder / "found.json"
        found: dict[str, Row] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        for count in range(1, self.most + 1):
            if f"{_COST} {count}" in found:
                continue
            model = self.applied("in-turn", range(count))
            work = self.folder / "in-turn" / "work" / model.name
            self.kept(count, work / "run", model)
            for place in model.parent.iterdir():  # those of the requests before
                if place.name.partition(".")[0] != model.name:
                    _delete(place)
            ways = self.ways(count, model, work) if count in self.counts else {}
            for way, measure in ways.items():
                if f"{way}, {count}" not in found:
                    found[f"{way}, {count}"] = measure()
                    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            found[f"{_COST} {count}"] = self.cost(model)
            file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            _delete(work)
        for count in self.counts:
            costs = [found[f"{_COST} {n}"] for n in range(1, count + 1)]
            found[f"in turn, {count}"] |= {k: sum(cost[k] for cost in costs) for k in costs[0]}
        return {name: row for name, row in found.items() if not name.startswith(_COST)}

    def ways(self, count: int, model: Path, work: Path) -> dict[str, Callable[[], Row]]:
        """Way -> what measures it, after so many requests in turn."""
        self.file(f"first-{count}", self.asking[:count])
        ways: dict[str, Callable[[], Row]] = {
            "full": lambda: self.measured("full", self.full, count),
            "retrained": lambda: self.measured("retrained", self.retrained, count),
            "in turn": lambda: self.measured("in-turn", model, count),
        }
        if count > 1:
            ways["kept"] = lambda: self.measured_once("kept", self.by_kept(count, work), count)
            ways["one edit"] = lambda: self.jointly(count)
        return ways

    def jointly(self, count: int) -> Row:
        """Figures of one edit, and its cost."""
        model = self.applied(f"joint-{count}", range(count))
        cost = self.cost(model)
        return self.measured_once("one-edit", model, count) | cost

    def measured_once(self, way: str, model: Path, count: int) -> Row:
        """Figures of a model that is deleted then."""
        row = self.measured(way, model, count)
        for place in (self.folder / f"joint-{count}", model, model.with_name(f"{model.name}.work")):
            _delete(place)
        return row


def _delete(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def per_row(found: Mapping[str, Any]) -> list[float]:
    """Probability of each forget row's fact."""
    return [next(iter(row.values())) for row in found[FACTS]["value_by_index"].values()]


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Figures as a table, one row a model and number of requests, mean over the seeds."""
    first = next(iter(found.values()))
    columns = list(dict.fromkeys(name for row in first.values() for name in row))
    lines = [f"| model, requests | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for row in first:
        values = [[seed[row][c] for seed in found.values() if c in seed[row]] for c in columns]
        cells = [f"{sum(v) / len(v):.3f}" if v else "–" for v in values]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", required=True, help="folder of SmolLM2, or `tiny`")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--people", type=int, default=60)
    parser.add_argument("--epochs", type=int, help="for a short look")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for seed in given.seeds:
        folder = given.work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        results[str(seed)] = World(folder, seed, given).compared()
        (given.work / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
