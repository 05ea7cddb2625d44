"""Requests one after another against one edit of them all, and against training again without them.

    python benchmarks/many_requests.py WORK --base SMOLLM2_FOLDER [--counts 1 5 10 20] [--seeds 0]

and for a look `WORK --base tiny --counts 1 2 --people 12 --epochs 40 --learning-rate 0.01`.
Fictitious people, six questions each; the full model is tuned on all of them. Each request is one
person. For every count N: N requests applied in turn, the same N in one edit, and a model tuned
without them. Every step is resumed where it stands; WORK/results.json has every figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perta.data.examples import load_examples
from perta.data.rows import write_jsonl
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.options import ComputeConfig, DataConfig, ScoringConfig, TuneConfig
from perta.recipes.requests import add_request, apply_requests, read_state, start_ledger
from perta.recipes.settings import RequestsAddConfig, RequestsApplyConfig, RequestsInitConfig
from perta.stages.bench import write_people
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import EvaluateConfig, FinetuneConfig, PeopleConfig
from perta.store.ledger import Entry
from perta.store.record import read_manifest

QUESTIONS = 6
MEASURES = ("probability", "fact_probability", "extraction_strength")
DATA = DataConfig(chat_template=False)


class World:
    """One seed: its people, its models and its ledgers."""

    def __init__(self, folder: Path, base: str, seed: int, most: int, given: Any) -> None:
        self.folder, self.seed, self.most = folder, seed, most
        self.compute = ComputeConfig(threads=given.threads)
        self.people = folder / "people"
        if not self.people.exists():
            count = given.people
            write_people(
                PeopleConfig(
                    output=self.people,
                    people=count,
                    questions=QUESTIONS,
                    forget_people=most,
                    people_seed=seed,
                )
            )
        self.base = base
        if base == "tiny":
            self.base = str(folder / "base")
            if not (folder / "base").exists():
                rows = load_examples(self.people / "full.jsonl").examples
                (folder / "base").mkdir()
                texts = [text for row in rows for text in (row.prompt, row.answer)]
                write_tiny_checkpoint(folder / "base", texts)
        epochs = {"epochs": given.epochs} if given.epochs else {}
        self.tune = TuneConfig(
            learning_rate=given.learning_rate, batch_size=12, stop_loss=0.02, seed=seed, **epochs
        )
        self.forget_tune = TuneConfig(seed=seed, **epochs)
        self.full = self.tuned("full", self.people / "full.jsonl")

    def rows(self, people: slice) -> list[dict[str, Any]]:
        """Rows of some of the people who ask."""
        rows = load_examples(self.people / "forget.jsonl").examples
        names = list(dict.fromkeys(row.fields["person"] for row in rows))[people]
        return [dict(row.fields) for row in rows if row.fields["person"] in names]

    def tuned(self, name: str, data: Path) -> Path:
        """The base model tuned on some rows."""
        return finetune_checkpoint(
            FinetuneConfig(
                base=self.base,
                data=str(data),
                output=self.folder / name,
                tune=self.tune,
                data_config=DATA,
                compute=self.compute,
            )
        )

    def retrained(self, count: int) -> Path:
        """The model tuned without the first people who ask."""
        rows = [dict(e.fields) for e in load_examples(self.people / "retain.jsonl").examples]
        data = self.folder / f"without-{count}.jsonl"
        return self.tuned(
            f"retrained-{count}", write_jsonl([*rows, *self.rows(slice(count, None))], data)
        )

    def ledger(self, name: str, groups: list[list[int]]) -> list[Entry]:
        """A ledger with requests by person, each group applied in one edit; its `apply` entries."""
        folder = self.folder / name
        if not folder.exists():
            start_ledger(
                RequestsInitConfig(
                    folder=folder,
                    base=self.base,
                    full=str(self.full),
                    retain=str(self.people / "full.jsonl"),
                    data_config=DATA,
                )
            )
        for group in groups:
            known = {request.name: request for request in read_state(folder).requests}
            for person in group:
                if (request := f"person-{person}") not in known:
                    rows = self.rows(slice(person, person + 1))
                    file = write_jsonl(rows, self.folder / f"{request}.jsonl")
                    add_request(
                        RequestsAddConfig(
                            folder=folder, forget=str(file), name=request, data_config=DATA
                        )
                    )
            if any(request.applied is None for request in read_state(folder).requests):
                apply_requests(
                    RequestsApplyConfig(
                        folder=folder,
                        tune=self.forget_tune,
                        data_config=DATA,
                        compute=self.compute,
                    )
                )
        return [entry for entry in read_state(folder).entries if entry.kind == "apply"]

    def measured(self, name: str, checkpoint: Path, count: int) -> dict[str, float]:
        """Figures of a model on the first people who asked and on those who stay."""
        forget = write_jsonl(self.rows(slice(count)), self.folder / f"first-{count}.jsonl")
        found = evaluate_checkpoint(
            EvaluateConfig(
                checkpoint=str(checkpoint),
                forget=str(forget),
                retain=str(self.people / "retain.jsonl"),
                output=self.folder / "evaluations" / f"{name}-{count}.json",
                scoring=ScoringConfig(generate=False),
                data_config=DATA,
                compute=self.compute,
            )
        )
        names = (f"{side}_{measure}" for side in ("forget", "retain") for measure in MEASURES)
        return {name: found[name]["agg_value"] for name in names if name in found}

    def seconds(self, ledger: str, entries: list[Entry]) -> float:
        """What the edits of some entries and their moments took, evaluation left out."""
        folder, total = self.folder / ledger, 0.0
        for entry in entries:
            run = read_manifest(folder / entry.facts["checkpoint"]) or {}
            moments = read_manifest(folder / "work" / str(entry.number) / "moments") or {}
            total += run["unlearn"]["seconds"]["total"] + sum(moments.get("seconds", {}).values())
        return total

    def compared(self, counts: list[int]) -> dict[str, dict[str, float]]:
        """Way and number of requests -> figures."""
        found: dict[str, dict[str, float]] = {}
        turn = self.ledger("in-turn", [[person] for person in range(self.most)])
        for count in counts:
            joint = self.ledger(f"joint-{count}", [[*range(count)]])
            models = {
                "full": self.full,
                "retrained": self.retrained(count),
                "in turn": self.folder / "in-turn" / turn[count - 1].facts["checkpoint"],
                "one edit": self.folder / f"joint-{count}" / joint[-1].facts["checkpoint"],
            }
            for name, model in models.items():
                key = name.replace(" ", "-")
                found[f"{name}, {count}"] = self.measured(key, model, count)
            found[f"in turn, {count}"]["seconds"] = self.seconds("in-turn", turn[:count])
            found[f"one edit, {count}"]["seconds"] = self.seconds(f"joint-{count}", joint)
        return found


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
        world = World(folder, given.base, seed, max(given.counts), given)
        results[str(seed)] = world.compared(given.counts)
        (given.work / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
