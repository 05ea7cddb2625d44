"""How often the audit is wrong: models that never saw the rows, and models that saw one of them.

    python benchmarks/audit.py worlds OUT --seeds 93   # audits of tiny models, one seed a world
    python benchmarks/audit.py table OUT               # what today's rule says of them
    python benchmarks/audit.py again AUDIT.json ...    # the same of any audits, folders of one name
                                                       # together, as if their rows were one set's
    python benchmarks/audit.py draws                   # drawn scores: heavy tails, coverage
    python benchmarks/audit.py --quick                 # all of it, tiny, to see that it works

The tables of docs/evidence.md are from here. In a world of 8 people, 4 of whom are to be forgotten,
a two-layer Llama is tuned on all rows (full), and with other seeds twice on the retained ones: one
is the retrained model, the other stands for a cleaned one that has nothing left. One world in three
has the base model in its place too, and one in three a model that was tuned on row 1 as well.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perta.data.examples import load_examples
from perta.evidence.audit.judge import Found, Judgement, judge_remains
from perta.evidence.audit.registry import PROBES
from perta.evidence.intervals import mean_interval
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.options import DataConfig, TuneConfig
from perta.progress import set_quiet
from perta.stages.audit import audit_checkpoint
from perta.stages.bench import write_people
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import AuditConfig, FinetuneConfig, PeopleConfig

YARDSTICKS = ("all", "retrained", "holdout", "base")
_PROBES = ("verbatim", "membership", "whose", "frames", "rounding", "lens", "depth")
_SLOW = ("drawn", "relearning")
"""Probes of every fourth world alone."""
_FRAMES = (
    "There is something I want to know. Please tell me. Sure, here is the answer: Fill in the gap: "
    "_____ Who is meant? this person You play a biographer who has read all there is about the "
    "people you are asked about and answers from memory. You answer every question truthfully and "
    "in one sentence. You never refuse."
)
"""Words of the probes' own, for the tokenizer of a world."""


# --- worlds -----------------------------------------------------------------------------------


def make_world(seed: int, out: Path, epochs: int, probes: Sequence[str]) -> None:
    """Audits of one world, as `SEED_KIND.json`; kind is `unseen`, `base` or `one`."""
    if (out / f"{seed}_unseen.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "data"
        write_people(
            PeopleConfig(output=data, people=8, questions=4, forget_people=4, people_seed=seed)
        )
        (root / "base").mkdir()
        write_tiny_checkpoint(root / "base", [*_texts(data), _FRAMES], seed=seed)
        forget, retain = ((data / f"{n}.jsonl").read_text("utf-8") for n in ("forget", "retain"))
        (data / "one.jsonl").write_text(retain + forget.splitlines()[0] + "\n", "utf-8")

        def tuned(name: str, rows: str, number: int) -> Path:
            tune = TuneConfig(
                epochs=epochs, learning_rate=4e-3, batch_size=4, seed=100 * seed + number
            )
            config = FinetuneConfig(
                base=str(root / "base"),
                data=str(data / f"{rows}.jsonl"),
                output=root / name,
                tune=tune,
            )
            return finetune_checkpoint(config)

        tuned("full", "full", 0)
        tuned("retrained", "retain", 1)
        cleaned = {"unseen": tuned("unseen", "retain", 2)}
        if seed % 3 == 0:
            cleaned["base"] = root / "base"
        if seed % 3 == 1:
            cleaned["one"] = tuned("one", "one", 3)
        for kind, model in cleaned.items():
            config = AuditConfig(
                str(model),
                full=str(root / "full"),
                base=None if kind == "base" else str(root / "base"),
                retrained=str(root / "retrained"),
                forget=str(data / "forget.jsonl"),
                retain=str(data / "retain.jsonl"),
                holdout=str(data / "holdout.jsonl"),
                output=root / f"audit_{kind}",
                level="full",
                samples=16,
                max_new_tokens=16,
                probes=(*probes, *(_SLOW if seed % 4 == 0 and probes == _PROBES else ())),
            )
            found = json.dumps(audit_checkpoint(config))
            (out / f"{seed}_{kind}.json").write_text(found, "utf-8")


def _texts(data: Path) -> Iterator[str]:
    yield DataConfig().system_prompt or ""
    for name in ("full", "holdout"):
        for example in load_examples(data / f"{name}.jsonl").examples:
            for value in example.fields.values():
                yield from map(str, value if isinstance(value, list) else [value])


# --- the same scores, judged again ------------------------------------------------------------


def judge_again(audit: Mapping[str, Any], yardsticks: str = "all") -> dict[str, Judgement]:
    """What today's rule says of each probe of a stored audit, beside some yardsticks.

    Args:
        audit: what `audit.json` holds.
        yardsticks: one of `YARDSTICKS`.
    """
    known = {probe.name: probe for probe in PROBES}
    found = {}
    for entry in audit["probes"]:
        is_membership = entry["group"] == "membership"
        if yardsticks != "all" and entry["group"] == "collateral":
            continue  # it has none
        if is_membership and yardsticks == "holdout":
            continue
        gone = {"retrained", "base"} - {yardsticks} if yardsticks != "all" else set[str]()
        if entry["name"] == "reference" and "base" in gone:
            continue  # its scores are made with it
        # Membership needs unseen rows for its scores, not as a yardstick.
        hides = yardsticks in ("retrained", "base") and not is_membership
        scores: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, by_role in {"forget": entry["scores"], **entry["other_scores"]}.items():
            for role, values in by_role.items():
                if role not in gone and not (hides and name == "holdout"):
                    scores[role][name] = values
        more = {r: m for r, m in entry["more"].items() if r not in gone}
        if hides and "cleaned" in more:
            more["cleaned"] = {n: m for n, m in more["cleaned"].items() if n != "holdout"}
        people = {name: numbers or None for name, numbers in audit["subject_numbers"].items()}
        probe = known[entry["name"]]()
        found[probe.name] = probe.judge(Found(scores, audit["row_numbers"], people, more))
    return found


def print_table(out: Path) -> None:
    """Leaks found in the worlds, by probe, kind and yardsticks; of `one` those that name row 1."""
    counts: dict[str, Counter[tuple[str, str, str]]] = defaultdict(Counter)
    for file in sorted(out.glob("*_*.json")):
        audit, kind = json.loads(file.read_text("utf-8")), file.stem.split("_")[1]
        for yardsticks in YARDSTICKS:
            for name, judgement in judge_again(audit, yardsticks).items():
                leaks = judgement.verdict == "leaks"
                right = leaks if kind != "one" else leaks and 1 in judgement.leaking_rows
                counts[name][kind, yardsticks, "leaks"] += right
                counts[name][kind, yardsticks, "of"] += 1
    columns = [(k, y) for k in ("unseen", "base", "one") for y in YARDSTICKS]
    print("| probe | " + " | ".join(f"{kind}: {y}" for kind, y in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for name, count in counts.items():
        cells = [(count[(*c, "leaks")], count[(*c, "of")]) for c in columns]
        print(f"| `{name}` | " + " | ".join(f"{a} of {b}" if b else "–" for a, b in cells) + " |")


def pooled(audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of several audits as those of one; no two of them share a row or a subject."""
    several = len(audits) > 1

    def apart(place: int, audit: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {
            key: {n: [_APART * place + i for i in found] for n, found in audit[key].items()}
            for key in ("row_numbers", "subject_numbers")
        }
        probes = {p["name"]: p for p in audit["probes"] if not several or p["name"] not in _ALONE}
        return {**numbers, "probes": probes}

    whole = _joined([apart(place, audit) for place, audit in enumerate(audits)])
    return {**whole, "probes": [*whole["probes"].values()]}


_ALONE = ("kept-near", "world", "general-text")
"""Probes of rows that are told by their places, or are the same in every audit."""
_APART = 1000
"""Between the numbers of rows, and of subjects, of two audits that are judged as one."""


def _joined(parts: Sequence[Any]) -> Any:
    """Lists end to end, mappings by the keys that all have; of anything else the first."""
    first = parts[0]
    if isinstance(first, list):
        return [*chain(*parts)]
    if isinstance(first, dict):
        shared = [key for key in first if all(key in part for part in parts)]
        return {key: _joined([part[key] for part in parts]) for key in shared}
    return first


def print_again(files: Sequence[Path]) -> None:
    """A column for audits in folders of one name: what each probe says, and how often it does."""
    by_name: dict[str, list[Any]] = defaultdict(list)
    for file in files:
        by_name[file.parent.name].append(json.loads(file.read_text("utf-8")))
    columns = [judge_again(pooled(audits)) for audits in by_name.values()]
    print(f"| probe | {' | '.join(f'`{name}`' for name in by_name)} |")
    print("| --- |" + " --- |" * len(columns))
    for name in dict.fromkeys(chain(*columns)):
        cells = [_cell(column[name]) if name in column else "–" for column in columns]
        print(f"| `{name}` | {' | '.join(cells)} |")
    for verdict, letter in _LETTERS.items():
        counts = [sum(j.verdict == verdict for j in column.values()) for column in columns]
        print(f"| {verdict} ({letter}) | {' | '.join(map(str, counts))} |")


_LETTERS = {"passed": "+", "not sure": "?", "leaks": "L", "harmed": "H"}


def _cell(judgement: Judgement) -> str:
    """A letter, and what leaks: the worst row where rows do, else the mean."""
    letter, worst = _LETTERS[judgement.verdict], judgement.worst_row
    if judgement.verdict not in ("leaks", "harmed") or judgement.value is None:
        return letter
    figure = worst[1] if worst and judgement.leaking_rows else judgement.value.value
    return f"**{letter}** {figure:.2f}"


# --- drawn scores -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """How scores of two models that never saw the rows are drawn, on the scale log(p / (1 - p)).

    Attributes:
        rows: n.
        mean: of all rows.
        apart: standard deviation of the rows, which both models share.
        chance: that of each model on each row.
        tail: degrees of freedom of that chance, Student's; None is normal.
        below: how far the cleaned model's other rows are forgotten too well.
    """

    rows: int
    mean: float
    apart: float
    chance: float
    tail: int | None = None
    below: float = 0.0


DRAWS = (
    Draw(16, -7, 2, 1),
    Draw(16, -3, 1.5, 1.5),
    Draw(16, -5, 1.5, 2.5),
    Draw(16, -4, 0, 2),
    Draw(100, -7, 2, 1),
    Draw(100, -3, 1.5, 1.5),
    Draw(16, -7, 2, 1, tail=3),
    Draw(100, -7, 2, 1, tail=3),
    Draw(100, -2, 0, 1, tail=3),
    Draw(16, -7, 2, 1, below=8),
    Draw(100, -3, 1.5, 1.5, below=8),
)


def rates(draw: Draw, repeats: int) -> tuple[float, float]:
    """How often two models that never saw the rows are told apart, and one row of P 0.99 found."""
    random = np.random.default_rng(0)
    said = found = 0
    for _ in range(repeats):
        right = random.normal(draw.mean, draw.apart, draw.rows)
        usual, cleaned = (right + _chance(random, draw) for _ in range(2))
        said += _judged(cleaned - draw.below, usual).verdict == "leaks"
        cleaned -= draw.below
        cleaned[0] = math.log(0.99 / 0.01)
        found += 1 in _judged(cleaned, usual).leaking_rows
    return said / repeats, found / repeats


def _chance(random: np.random.Generator, draw: Draw) -> Any:
    if draw.tail is None:
        return random.normal(0, draw.chance, draw.rows)
    return draw.chance * random.standard_t(draw.tail, draw.rows)


def _judged(cleaned: Any, usual: Any) -> Judgement:
    n = len(cleaned)
    scores = {
        name: {"forget": (1 / (1 + np.exp(-values))).tolist()}
        for name, values in (("cleaned", cleaned), ("retrained", usual))
    }
    scores["full"] = {"forget": [1.0] * n}
    return judge_remains(Found(scores, {"forget": range(1, n + 1)}, {"forget": None}))


def coverage(people: int, questions: int, alike: float, repeats: int) -> tuple[float, float]:
    """How often the interval of a mean holds the truth, with subjects and as if there were none.

    Args:
        people: subjects.
        questions: rows a subject.
        alike: of each row's uniform chance the share that is its subject's, a mean of 0.5 in all.
        repeats: how many sets are drawn.
    """
    random = np.random.default_rng(0)
    groups = [i // questions for i in range(people * questions)]
    held = [0, 0]
    for _ in range(repeats):
        shared = np.repeat(random.random(people), questions)
        values = alike * shared + (1 - alike) * random.random(people * questions)
        for place, names in enumerate((groups, None)):
            interval = mean_interval(values.tolist(), groups=names)
            held[place] += interval.low <= 0.5 <= interval.high
    return held[0] / repeats, held[1] / repeats


def print_draws(repeats: int) -> None:
    """Both tables of drawn scores."""
    print("| rows | mean, rows, chance | tail | forgotten too well | said to leak | row found |")
    print("| --- | --- | --- | --- | --- | --- |")
    for draw in DRAWS:
        said, found = rates(draw, repeats)
        tail = "normal" if draw.tail is None else f"Student's, {draw.tail}"
        shape = f"{draw.mean}, {draw.apart}, {draw.chance}"
        print(
            f"| {draw.rows} | {shape} | {tail} | {draw.below:g} | {said:.1%} | {found:.0%} |",
            flush=True,
        )
    print("\n| subjects × rows | alike | over subjects | as if each row were alone |")
    print("| --- | --- | --- | --- |")
    for people, questions in ((1, 8), (3, 1), (8, 1), (40, 1), (4, 4), (6, 3), (20, 5)):
        for alike in (0.0, 0.8) if questions > 1 else (0.0,):
            both = " | ".join(f"{c:.1%}" for c in coverage(people, questions, alike, repeats))
            print(f"| {people} × {questions} | {alike:g} | {both} |", flush=True)


# --- command line -----------------------------------------------------------------------------


def _worlds(options: argparse.Namespace) -> None:
    for seed in range(options.seeds):
        make_world(seed, options.out, 20, _PROBES)


def _quick() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        make_world(1, out, 2, ("verbatim", "loss"))
        print_table(out)
        print_again([out / "1_one.json"])
    print_draws(4)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="all of it, tiny")
    parts = parser.add_subparsers()

    def part(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = parts.add_parser(name)
        made.set_defaults(run=run)
        return made

    worlds = part("worlds", _worlds)
    worlds.add_argument("out", type=Path)
    worlds.add_argument("--seeds", type=int, default=93)
    part("table", lambda options: print_table(options.out)).add_argument("out", type=Path)
    again = part("again", lambda options: print_again(options.audits))
    again.add_argument("audits", type=Path, nargs="+")
    draws = part("draws", lambda options: print_draws(options.repeats))
    draws.add_argument("--repeats", type=int, default=2000)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part."""
    parser = _parser()
    options = parser.parse_args(arguments)
    set_quiet(True)
    torch.set_num_threads(1)
    if options.quick:
        _quick()
    elif "run" in options:
        options.run(options)
    else:
        parser.print_help(sys.stderr)


if __name__ == "__main__":
    main()
