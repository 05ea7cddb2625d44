"""What a benchmark is, and what benchmarks share: journal, data files, reference logs.

A benchmark is one subclass of `Benchmark` in one file. `perta bench FILE.py` runs one of a user's
own: docs/evidence.md has one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Generic, Self, TypeVar, get_type_hints

import torch
from blake3 import blake3
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.errors import ConfigError, DataError
from perta.evidence.results import Results, require_finite
from perta.evidence.scoring.items import Item, Outcome, ScoringOptions, run_in_modes
from perta.evidence.settings import BenchmarkConfig
from perta.progress import track
from perta.store.atomic import write_text
from perta.store.own_code import code_of, is_ours, run_file
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
        if is_ours(type(self)):
            return None
        if (found := code_of(type(self))) is None:
            raise ConfigError(
                f"The benchmark {self.name} is defined in no file, so a change of its code would "
                "go unseen and old results be reused. Define it in a file."
            )
        return found


def load_benchmark(path: Path) -> Benchmark[Any]:
    """The benchmark that a Python file defines; a ConfigError as `own_class`."""
    benchmark: Benchmark[Any] = own_class(path, Benchmark, ("name", "summary", "config"))()
    # Inherited options are annotated with names that its own file need not know.
    hints = get_type_hints(benchmark.config, include_extras=True)
    benchmark.config.__init__.__annotations__ = {**hints, "return": None}
    return benchmark


def own_class(path: Path, kind: type[Any], parts: Sequence[str]) -> type[Any]:
    """The one class of a kind that a user's file defines, with all `parts`, or a ConfigError."""
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


@dataclass
class Journal:
    """Outcomes appended to a file as they come.

    The first line holds a key of everything that they depend on, every other one the hash of its
    own. A file with another key is started anew; a line that is not as it was written, such as a
    last one cut off by a kill, is dropped.
    """

    path: Path | None  # JSONL file; None keeps nothing
    key: str  # hash of model, data and settings, see `open_journal`
    entries: dict[str, Any] = field(default_factory=dict)
    _file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        write_text(self.path, "".join(f"{line}\n" for line in self._kept_lines()), private=True)
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
    """A journal that holds for these settings, models and version alone; none without a path."""
    if path is None:
        return Journal(None, "")
    hashes = {name: model and _model_fingerprint(model) for name, model in models.items()}
    text = json.dumps({**settings, **hashes, "version": __version__}, sort_keys=True, default=str)
    return Journal(path, hashlib.sha256(text.encode()).hexdigest())


def _model_fingerprint(model: PreTrainedModel) -> str:
    """BLAKE3 of a model's configuration and parameters, names and values."""
    digest = blake3(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_with_journal(
    what: str | None,
    model: PreTrainedModel,
    items: Mapping[str, Item],
    options: ScoringOptions,
    journal: Journal,
) -> dict[str, Outcome]:
    """`run_in_modes` over named items but those the journal holds; without `what` without a bar."""
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
