"""What benchmarks share: a journal that lets a killed run resume, data files, reference logs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from blake3 import blake3
from transformers import PreTrainedModel

from perta.data.examples import ExampleSet, load_examples
from perta.errors import DataError, DivergenceError
from perta.evidence.scoring.items import Item, Outcome, ScoringOptions, run_in_modes
from perta.options import DataConfig
from perta.store.atomic import write_text
from perta.version import __version__

Reference = Mapping[str, Any]


@dataclass
class Journal:
    """Outcomes appended to a file as they come.

    The first line holds a key of everything the outcomes depend on. A file with another key, or
    none, is started anew; a last line cut off by a kill is dropped.

    Attributes:
        path: JSONL file; None keeps nothing.
        key: hash of model, data and settings, see `open_journal`.
    """

    path: Path | None
    key: str
    entries: dict[str, Any] = field(default_factory=dict)
    _file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        lines = self._kept_lines()
        write_text(self.path, "".join(f"{line}\n" for line in lines))
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()

    def put(self, name: str, value: Any) -> None:
        """Remember a value under a name."""
        self.entries[name] = value
        if self._file:
            self._file.write(json.dumps({"name": name, "value": value}) + "\n")
            self._file.flush()

    def _kept_lines(self) -> list[str]:
        header = json.dumps({"key": self.key})
        if self.path is None or not self.path.is_file():
            return [header]
        lines = self.path.read_text("utf-8", errors="replace").split("\n")
        if lines[0] != header:
            return [header]
        kept = [header]
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                self.entries[entry["name"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue
            kept.append(line)
        return kept


def open_journal(
    path: Path | None,
    settings: Mapping[str, Any],
    models: Mapping[str, PreTrainedModel | str | None],
) -> Journal:
    """A journal that holds for these settings, models and this package's version alone.

    Args:
        path: JSONL file; None keeps nothing, and then no model is hashed.
        settings: what outcomes depend on beside the models.
        models: name -> model, or its fingerprint where that is known.
    """
    if path is None:
        return Journal(None, "")
    hashes = {
        name: model_fingerprint(model) if isinstance(model, PreTrainedModel) else model
        for name, model in models.items()
    }
    record = {**settings, **hashes, "version": __version__}
    text = json.dumps(record, sort_keys=True, default=str)
    return Journal(path, hashlib.sha256(text.encode()).hexdigest())


def model_fingerprint(model: PreTrainedModel) -> str:
    """BLAKE3 of a model's configuration and parameters, names and values."""
    digest = blake3(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_with_journal(
    model: PreTrainedModel,
    items: Mapping[str, Item],
    options: ScoringOptions,
    journal: Journal,
    advance: Callable[..., None],
) -> dict[str, Outcome]:
    """`run_in_modes` over named items, skipping those the journal holds.

    Raises:
        DivergenceError: the model's loss on an item is not finite.
    """
    names = [name for name in items if name not in journal.entries]
    advance(len(items) - len(names))

    def done(place: int, outcome: Outcome) -> None:
        for score in outcome.scores:
            if not math.isfinite(score.loss):
                raise DivergenceError(
                    f"The model's loss on {names[place]} is {score.loss}: its weights are "
                    "damaged. With an unlearned model, lower --scaling-coef; else check the "
                    "checkpoint."
                )
        journal.put(names[place], outcome.as_json())
        advance(1)

    run_in_modes(model, [items[name] for name in names], options, done)
    return {name: Outcome.from_json(journal.entries[name]) for name in items}


def load_file(
    folder: Path, name: str, config: DataConfig | None = None, limit: int | None = None
) -> ExampleSet | None:
    """A benchmark file's rows, the first `limit` of them; None where the file is missing."""
    path = folder / name
    if not path.is_file():
        return None
    examples = load_examples(path, config)
    return examples if limit is None else replace(examples, examples=examples.examples[:limit])


def reference_scores(
    reference: Reference, key: str, answers: Sequence[str], *, cut: bool
) -> list[float]:
    """Scores of the retrained model on this run's rows.

    Args:
        reference: the retrained model's results.
        key: metric with a score per row.
        answers: this run's reference answers, to recognise a log of other data.
        cut: the run looks at the first rows only, so the log may have more.

    Returns:
        One score per row.

    Raises:
        DataError: the log lacks the metric, or is of other rows.
    """
    values = (reference.get(key) or {}).get("value_by_index")
    if not values:
        raise DataError(f"The reference results hold no {key}. Give those of a retrained model.")
    if len(values) < len(answers) or (len(values) > len(answers) and not cut):
        raise DataError(
            f"The reference results have {len(values)} rows in {key} and this run "
            f"{len(answers)}: they are of another split."
        )
    _require_same_texts(reference, answers)
    try:
        return [float(values[str(i)]["score"]) for i in range(len(answers))]
    except (KeyError, TypeError) as error:
        raise DataError(f"The reference results' {key} lacks the score of a row.") from error


def _require_same_texts(reference: Reference, answers: Sequence[str]) -> None:
    logged = (reference.get("forget_Q_A_ROUGE") or {}).get("value_by_index") or {}
    pairs = [
        (text, logged[str(i)].get("ground_truth", text))
        for i, text in enumerate(answers)
        if str(i) in logged
    ]
    # Detokenisers move spaces; more than a few differing rows mean other data.
    different = sum("".join(a.split()) != "".join(b.split()) for a, b in pairs)
    if different > 0.1 * max(1, len(pairs)):
        raise DataError(
            f"{different} of {len(pairs)} answers in the reference results differ from the data's: "
            "they are of another split or benchmark."
        )
