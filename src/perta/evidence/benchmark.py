"""What a benchmark is, and what benchmarks share: journal, data files, reference logs.

A benchmark is one subclass of `Benchmark` in one file. `perta bench FILE.py` runs one of a user's
own:

    class Loss(Benchmark[LossConfig]):
        name, summary, config = "loss", "Loss on the rows of a file.", LossConfig

        def run(self, model, tokenizer, config, given):
            ...
            return {"rows_loss": table(rows, "score")}
"""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Generic, Self, TypeVar, get_type_hints

import torch
from blake3 import blake3
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.examples import ExampleSet, load_examples
from perta.data.rows import write_jsonl
from perta.errors import ConfigError, DataError, first_line
from perta.evidence.results import Results, require_finite
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import Item, Outcome, ScoringOptions, end_tokens, run_in_modes
from perta.evidence.settings import BenchmarkConfig
from perta.models.load import longest_input, pad_id
from perta.models.resolve import cache_folder
from perta.options import DataConfig
from perta.progress import say, track
from perta.store.atomic import write_text
from perta.store.fingerprint import content_of, fingerprint, run_file
from perta.store.parse import parse_json
from perta.store.record import content_of_results
from perta.version import __version__

Reference = Mapping[str, Any]
_Config = TypeVar("_Config", bound=BenchmarkConfig)
_Plain = TypeVar("_Plain")


@dataclass(frozen=True)
class Given:
    """What a run gets beside model, tokenizer and options."""

    data: Path  # what `Benchmark.folder` returned
    reference: Reference | None  # results of the retrained model, if named
    journal: Path  # file for outcomes, so that a killed run goes on; gone once results are written


class Benchmark(ABC, Generic[_Config]):
    """A benchmark: a name, options, data, and what it measures of a model."""

    name: str  # what it is called; its results say `bench NAME`
    summary: str  # one sentence of help
    config: type[_Config]  # class of its options, a `BenchmarkConfig` with `data`

    def folder(self, config: _Config) -> Path:
        """Folder (or file) with its data, fetched where it can be."""
        data = Path(getattr(config, "data", ""))
        if not data.exists():
            raise DataError(f"There is no {data}. Give the benchmark's data as --data.")
        return data

    def inputs(self, config: _Config) -> dict[str, str]:
        """Fingerprints of what results depend on beside model, data and options."""
        del config
        return {}

    def check(self, config: _Config, given: Given) -> None:
        """Refuse what would stop the run later; called before the model is loaded."""

    @abstractmethod
    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: _Config,
        given: Given,
    ) -> Results:
        """Results in the form of published logs, see `results`."""

    def source(self) -> str | None:
        """Hash of the file that defines it, for one from outside the package."""
        if type(self).__module__.startswith("perta."):
            return None  # the package's version is recorded
        try:
            return fingerprint(Path(inspect.getfile(type(self))))
        except (OSError, TypeError) as error:
            raise ConfigError(
                f"The benchmark {self.name} is defined in no file, so a change of its code would "
                "go unseen and old results be reused. Define it in a file."
            ) from error


def load_benchmark(path: Path) -> Benchmark[Any]:
    """The benchmark that a Python file defines; a ConfigError as `own_class`."""
    benchmark: Benchmark[Any] = own_class(path, Benchmark, ("name", "summary", "config"))()
    # Inherited options are annotated with names that its own file need not know.
    hints = get_type_hints(benchmark.config, include_extras=True)
    benchmark.config.__init__.__annotations__ = {**hints, "return": None}
    return benchmark


def own_class(path: Path, kind: type[Any], parts: Sequence[str]) -> type[Any]:
    """The one class of a kind that a user's Python file defines; it has all `parts`.

    Raises:
        ConfigError: the file cannot be run, or does not define exactly one complete such class.
    """
    module = run_file(path)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, kind)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1 or inspect.isabstract(found[0]):
        raise ConfigError(
            f"{path} must define one subclass of {kind.__module__}.{kind.__qualname__} with a "
            f"method `run`; it defines {len(found)}."
        )
    lacking = [part for part in parts if not hasattr(found[0], part)]
    if lacking:
        raise ConfigError(f"{path}: {found[0].__name__} lacks {', '.join(lacking)}.")
    return found[0]


def hub_files(data: str, folder: str, parts: Mapping[Path | str, tuple[str, str, str]]) -> Path:
    """A folder with a benchmark's files, each downloaded once: file -> (id, subset, split).

    Raises:
        DataError: there is no such folder, or the hub cannot be reached.
    """
    if Path(data).is_dir():
        return Path(data)
    if data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise DataError(
            f"There is no folder {data}. Give one with the benchmark's JSONL files, or leave "
            "--data out to fetch them from the hub."
        )
    target = cache_folder() / folder
    for file, (name, subset, split) in parts.items():
        _fetch(name, subset, split, target / file)
    return target


@dataclass
class Journal:
    """Outcomes appended to a file as they come.

    The first line holds a key of everything the outcomes depend on, and every other one the hash
    of its own. A file with another key, or none, is started anew; a line that is not as it was
    written, such as a last one cut off by a kill, is dropped.
    """

    path: Path | None  # JSONL file; None keeps nothing
    key: str  # hash of model, data and settings, see `open_journal`
    entries: dict[str, Any] = field(default_factory=dict)
    _file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        lines = self._kept_lines()
        write_text(self.path, "".join(f"{line}\n" for line in lines), private=True)
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def put(self, name: str, value: Any) -> None:
        """Remember a value under a name."""
        self.entries[name] = value
        if self._file:
            entry = {"name": name, "value": value}
            self._file.write(json.dumps({**entry, "hash": content_of_results(entry)}) + "\n")
            self._file.flush()

    def kept(self, name: str, make: Callable[[], _Plain]) -> _Plain:
        """A plain value that is made once in all runs, under a name of its own."""
        if name not in self.entries:
            self.put(name, make())
        value: _Plain = self.entries[name]
        return value

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
                entry = parse_json(line, str(self.path), DataError)
                if entry.pop("hash") != content_of_results(entry):
                    continue
                self.entries[entry["name"]] = entry["value"]
            except (DataError, KeyError, TypeError):
                continue
            kept.append(line)
        return kept


def is_journal(path: Path) -> bool:
    """Whether a file that is there is a journal, or empty."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(9) in (b"", b'{"key": "')


def open_journal(
    path: Path | None, settings: Mapping[str, Any], models: Mapping[str, PreTrainedModel | None]
) -> Journal:
    """A journal that holds for these settings, models and this package's version alone.

    Without a path nothing is kept, and no model is hashed.
    """
    if path is None:
        return Journal(None, "")
    hashes = {name: model and model_fingerprint(model) for name, model in models.items()}
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


def published_options(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, compat: bool
) -> ScoringOptions:
    """Of a published benchmark; `compat` hides padding inside prompts as its own code does."""
    padding = pad_id(tokenizer)
    masking = Masking(padding, padding if compat else None)
    ends, longest = end_tokens(model, tokenizer), longest_input(model)
    return ScoringOptions(masking, ends, batch_size, longest=longest)


def run_with_journal(
    what: str | None,
    model: PreTrainedModel,
    items: Mapping[str, Item],
    options: ScoringOptions,
    journal: Journal,
) -> dict[str, Outcome]:
    """`run_in_modes` over named items, but those the journal holds; each loss has to be finite.

    `what` stands on the progress bar, None is a part of another's; outcomes are in the order of
    `items`.
    """
    names = [name for name in items if name not in journal.entries]
    with track(what, len(items)) if what else nullcontext(_unseen) as advance:
        advance(len(items) - len(names))

        def done(place: int, outcome: Outcome) -> None:
            for score in outcome.scores:
                require_finite(score, names[place])
            journal.put(names[place], asdict(outcome))
            advance(1)

        run_in_modes(model, [items[name] for name in names], options, done)
    return {name: Outcome.from_json(journal.entries[name]) for name in items}


def _unseen(n: int) -> None:
    """Progress that is shown by a bar around it."""


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

    With `cut` the run looks at the first rows only, so the log may have more.

    Raises:
        DataError: the log lacks the metric `key`, or is of other rows.
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


def _fetch(name: str, subset: str, split: str, target: Path) -> None:
    """Download one file of a benchmark, once; what is not as it came is fetched again."""
    mark = target.with_name(f"{target.name}.blake3")
    if target.is_file() and mark.is_file() and mark.read_bytes() == content_of(target).encode():
        return
    import datasets

    say(f"Fetching {name}, {subset} ({split})")
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises a dozen unrelated classes here
        raise DataError(
            f"{subset} of {name} could not be fetched from the hub: {first_line(error)} "
            "Give a folder with the benchmark's JSONL files as --data."
        ) from error
    write_jsonl((dict(row) for row in rows), target)
    write_text(mark, content_of(target))
