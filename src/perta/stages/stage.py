"""Run one stage: reuse a finished output, refuse a foreign one, write a new one whole.

A finished output is known by its record's key, wherever it lies: see `taking_over`.

`run_measurement` is what importance and moments share: one checkpoint, one data set.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from perta.data.examples import ExampleSet, load_examples
from perta.data.tokens import EncodedSet, encode_examples
from perta.engine.shard import check_shard, in_parts, is_sharded
from perta.errors import CheckpointError, OutputExistsError
from perta.models.load import (
    load_model,
    load_tokenizer,
    longest_input,
    pad_id,
    pick_device,
    picked,
)
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, at_home
from perta.progress import reused, say
from perta.stages.settings import FinetuneConfig, ImportanceConfig, MomentsConfig
from perta.store.atomic import atomic_file, atomic_folder, check_writable, recover
from perta.store.checkpoint import GGUF, matches, open_index
from perta.store.fingerprint import COUNTED, content_of, files_of, fingerprint, is_as_written
from perta.store.provenance import full_models
from perta.store.record import (
    MANIFEST,
    NOT_IN_KEY,
    aggregates,
    check_output,
    check_separate,
    content_of_results,
    make_manifest,
    read_manifest,
    settings_of,
    stage_key,
    write_manifest,
)
from perta.temporary import during

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _FileResults(dict[str, Any]):
    """What a results file holds; its repr has means alone, for the values may be texts."""

    def __repr__(self) -> str:
        """Metric -> aggregate."""
        return f"{type(self).__name__}({aggregates(self)})"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every metric as a row of a table: `pandas.DataFrame(results.rows)`."""
        return [{"metric": name, "value": value} for name, value in aggregates(self).items()]


_PRIVATE = {"direction"}
"""Stages whose output holds what is removed, and nothing else; it is for its owner alone."""

Make = Callable[[Path], Mapping[str, Any]]


class Place(Protocol):
    """Where an output goes, whole or not at all; the options of a stage are one."""

    @property
    def output(self) -> Path:
        """The final folder or file."""

    @property
    def overwrite(self) -> bool:
        """Whether it replaces one that does not match."""


class At(NamedTuple):
    """A place for what is no stage of its own."""

    output: Path
    overwrite: bool = False


_beside: ContextVar[tuple[Path, ...]] = ContextVar("beside", default=())
"""Folders in whose entries a stage looks for its output before it makes it."""


_asking: ContextVar[dict[Path, Path] | None] = ContextVar("asking", default=None)
"""While stages are only asked: output -> where it lies already."""


class NotMadeError(Exception):
    """A stage was only asked whether its output is there already, and it is not."""


@contextmanager
def only_asking() -> Iterator[Mapping[Path, Path]]:
    """Let stages write nothing; output -> where it lies, if elsewhere; NotMadeError if nowhere."""
    found: dict[Path, Path] = {}
    with during(_asking, found):
        yield found


def taking_over(folders: Iterable[Path]) -> AbstractContextManager[None]:
    """Let stages link, or copy, what lies in other folders and is what they would make."""
    return during(_beside, tuple(folders))


def run_stage(
    stage: str,
    place: Place,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Make,
    *,
    look: Callable[[], Mapping[str, str]] | None = None,
    reads: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """Produce a stage's output folder, or reuse it; returns its manifest.

    `make` fills the folder it is given, and returns results worth recording. `look` finds `inputs`
    again: CheckpointError where they are others once the output is made. ConfigError where it
    overlaps what is read, OutputExistsError where another one is there and must not be replaced.
    """
    wanted = _Wanted(stage, place, settings, inputs)
    if (finished := wanted.there(reads)) is not None:
        return finished
    started = time.perf_counter()
    with atomic_folder(place.output, place.overwrite, private=stage in _PRIVATE) as partial:
        more = dict(make(partial))
        wanted.check_unchanged(look)
        taken = time.perf_counter() - started
        content, files = content_of(partial), files_of(partial)
        manifest = wanted.manifest(taken, content=content, files=files, **more)
        write_manifest(partial, manifest)
    return manifest


def evaluated(reference: str | Path, folder: Path) -> dict[str, str]:
    """`checkpoint` -> fingerprint; of an own output that is converted to be read its record's.

    Such are adapters, GGUF files and quantised checkpoints; `merged` is what they are read as.
    """
    merged, own = fingerprint(folder), at_home(reference)
    own = own.parent if own.name == GGUF and own.is_file() else own
    if own != folder and is_as_written(own):
        return {"checkpoint": content_of(own), "merged": merged}
    return {"checkpoint": merged}


def run_file_stage(
    stage: str,
    place: Place,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Callable[[], Mapping[str, Any]],
    *,
    look: Callable[[], Mapping[str, str]] | None = None,
    reads: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """The same for a stage whose output is one JSON file with its manifest under `perta`."""
    wanted = _Wanted(stage, place, settings, inputs, is_file=True)
    if (finished := wanted.there(reads)) is not None:
        return finished
    check_writable(place.output)
    started = time.perf_counter()
    results = _FileResults(make())
    wanted.check_unchanged(look)
    taken = time.perf_counter() - started
    results["perta"] = wanted.manifest(taken, content=content_of_results(results))
    # The answers in it may be those that were to be forgotten.
    with atomic_file(place.output, place.overwrite, private=True) as partial:
        # Strict JSON: a NaN would make the file unreadable to everyone else.
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False, default=str)
        partial.write_text(text + "\n", "utf-8")
    return results


@dataclass(frozen=True)
class _Wanted:
    """An output as it is wanted: of which stage, where, and what decides it."""

    stage: str
    place: Place
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    is_file: bool = False

    @cached_property
    def _key(self) -> str:
        return stage_key(self.stage, self.settings, self.inputs)

    def there(self, reads: Iterable[str | Path]) -> dict[str, Any] | None:
        """The finished output, one from elsewhere put in its place included; None without one."""
        output, asked = self.place.output, _asking.get()
        reads = [*reads, *self._named()]
        # A new file beside the weights is welcome, unless it would be read as a part of them.
        within = self.is_file and not matches(output.name, (*COUNTED, MANIFEST, "*.jsonl"))
        check_separate(output, reads, within=within)
        if asked is None:
            recover(output)
        if (finished := self._finished(output)) is not None:
            _tell_reused(f"{self.stage}: {output} is up to date, reused")
            return finished
        check_output(output, reads, overwrite=self.place.overwrite, within=self.is_file)
        self._refuse_foreign()
        for other in self._others():
            try:
                if (finished := self._finished(other)) is None:
                    continue
                if asked is None:
                    self._take(other)
                else:
                    asked[output] = other
            except OSError:
                continue  # it went while it was read, or is not ours to read
            _tell_reused(f"{self.stage}: {other} is what is needed, reused")
            return finished
        if asked is not None:
            raise NotMadeError
        return None

    def _named(self) -> Iterator[str]:
        """What the user gave as inputs: an adapter, where the stage reads what was made of it."""
        for name in self.inputs.keys() & self.settings.keys():
            given = self.settings[name]
            yield from map(str, given if isinstance(given, tuple | list) else [given])

    def _finished(self, place: Path) -> dict[str, Any] | None:
        """Manifest or results of what was made from these inputs and settings, and not changed."""
        is_there = place.is_file() if self.is_file else place.is_dir()
        manifest = read_manifest(place) if is_there else None
        if manifest is None or manifest.get("key") != self._key:
            return None
        if not self.is_file:
            return manifest if is_as_written(place) else None
        results = _FileResults(json.loads(place.read_text("utf-8")))
        return results if manifest.get("content") == content_of_results(results) else None

    def _others(self) -> Iterator[Path]:
        """What lies in other folders and may be the same."""
        pattern = f"*{self.place.output.suffix}" if self.is_file else f"*/{MANIFEST}"
        for path in (p for folder in _beside.get() for p in sorted(folder.glob(pattern))):
            yield path if self.is_file else path.parent

    def _take(self, other: Path) -> None:
        """Link a finished output to its place here, or copy it."""
        output, overwrite = self.place.output, self.place.overwrite
        if self.is_file:
            with atomic_file(output, overwrite, private=True) as partial:
                shutil.copyfile(other, partial)
            return
        with atomic_folder(output, overwrite) as partial:
            shutil.copytree(other, partial, copy_function=_link, dirs_exist_ok=True)

    def _refuse_foreign(self) -> None:
        """Stop before any work when the output is there and is not what would be made."""
        refuse_other(self.stage, self.place, self.settings, self.inputs)
        if self.place.output.exists() and not self.place.overwrite:
            manifest = read_manifest(self.place.output) or {}
            raise exists_error(self.place.output, changed_or_older(manifest, self._key))

    def check_unchanged(self, look: Callable[[], Mapping[str, str]] | None) -> None:
        """Stop where inputs are not those that the record would name."""
        now = look() if look else self.inputs
        changed = [name for name, value in self.inputs.items() if now.get(name) != value]
        if changed:
            raise CheckpointError(
                f"{', '.join(changed)} changed while it was read, so the result would be of two "
                "things at once; nothing was written. Make sure that nothing writes to the inputs, "
                "and run again."
            )

    def manifest(self, taken: float, **more: Any) -> dict[str, Any]:
        """The record of the output, which took so many seconds."""
        seconds = {self.stage: taken}
        return make_manifest(self.stage, self.settings, self.inputs, seconds=seconds, **more)


def _tell_reused(message: str) -> None:
    reused()
    if _asking.get() is None:
        say(message)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def as_part(key: str | None) -> dict[str, str]:
    """What the record of a whole run's last stage says until that of the run is written."""
    return {} if key is None else {"part_of": key}


def earlier_full(*places: Path) -> dict[str, list[str]]:
    """What a record says of the full models of removals before; nothing at the first removal.

    `places` are of the model that this one begins with, as it was given and as it is read. It may
    be deleted one day, and whoever audits later has to know them all the same.
    """
    for record in (read_manifest(place) or {} for place in places if is_as_written(place)):
        if found := full_models(record):
            return {"earlier_full": found}
    return {}


def refuse_other(
    stage: str, place: Place, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
    """Stop when the output is there and was made by something else, or otherwise."""
    output = place.output
    if place.overwrite or not output.exists():
        return
    manifest = read_manifest(output)
    made = manifest if manifest and manifest.get("stage") == stage else None
    if why := other_origin(manifest, made, settings, inputs):
        raise exists_error(output, why)


def other_origin(
    manifest: Mapping[str, Any] | None,
    made: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> str | None:
    """Why an output with this manifest is another one; `made` is the part of it to compare with."""
    if manifest is None:
        return "was not made by perta"
    if made is None:
        return f"was made by `perta {manifest.get('stage')}`"
    changed = changes(made, settings, inputs)
    return f"was made with other {', '.join(changed)}" if changed else None


def exists_error(output: Path, why: str) -> OutputExistsError:
    """The error for an output that is there and is not what would be made."""
    return OutputExistsError(
        f"{output} exists and {why}. Choose another --output, or pass --overwrite to replace it."
    )


def changed_or_older(manifest: Mapping[str, Any], key: str) -> str:
    """Why what was made with these settings and inputs, as its record says, is not reused."""
    if manifest.get("key") == key:
        return "was changed since"
    return "was made by another version of perta"


def changes(
    manifest: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> list[str]:
    """Names of the settings and inputs in which an output differs from what is wanted."""
    # Records are JSON, which has no tuples.
    plain = {name: [*v] if isinstance(v, tuple) else v for name, v in settings.items()}
    old, other = manifest.get("inputs", {}), manifest.get("settings", {})
    names = [name for name, value in inputs.items() if old.get(name) != value]
    left_out = {*inputs, *NOT_IN_KEY}
    return names + [n for n, value in plain.items() if n not in left_out and other.get(n) != value]


@dataclass(frozen=True)
class Subject:
    """What is measured on what; `settings` has the device and type that were picked."""

    checkpoint: Path
    examples: ExampleSet
    tokenizer: PreTrainedTokenizerBase
    encoded: EncodedSet
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    look: Callable[[], Mapping[str, str]]

    @property
    def pad(self) -> int:
        """Padding token."""
        return pad_id(self.tokenizer)

    def run(self, stage: str, place: Place, make: Make) -> None:
        """`run_stage` of it."""
        reads: tuple[str | Path, ...] = (self.checkpoint, self.examples.source)
        run_stage(stage, place, self.settings, self.inputs, make, look=self.look, reads=reads)


def read_subject(name: str, config: ImportanceConfig | MomentsConfig | FinetuneConfig) -> Subject:
    """Check the checkpoint, the option `name`, and the data that a stage works on."""
    checkpoint = resolve_checkpoint(getattr(config, name))
    examples = load_examples(config.data, config.data_config)
    tokenizer, longest = load_tokenizer(checkpoint), longest_input(checkpoint)
    encoded = encode_examples(examples, tokenizer, config.data_config, longest=longest)

    read = {name: checkpoint}
    if isinstance(config, MomentsConfig) and config.facts_by:
        read["facts_by"] = resolve_checkpoint(config.facts_by)

    def look() -> dict[str, str]:
        return {n: fingerprint(place) for n, place in read.items()} | {"data": examples.fingerprint}

    settings = {**settings_of(config), **picked(config.compute, checkpoint)}
    return Subject(checkpoint, examples, tokenizer, encoded, settings, look(), look)


@contextmanager
def loaded(
    folder: Path, compute: ComputeConfig, shard: bool | None, beside: int | None = None
) -> Iterator[PreTrainedModel]:
    """A model for passes, divided where that is asked or one GPU is too small (`is_sharded`).

    `beside` are bytes for each of its weights that are held too; without, gradients of weights
    are not taken.
    """
    device, dtype = pick_device(compute), picked(compute, folder)["dtype"]
    each = getattr(torch, dtype).itemsize + (beside or 0)
    if not is_sharded(shard, device, open_index(folder).numel * each):
        yield load_model(folder, compute)
        return

    def load() -> PreTrainedModel:
        return load_model(folder, compute, waits=True).requires_grad_(beside is not None)

    with in_parts(load, device) as model:
        yield model


def run_measurement(
    stage: str,
    config: ImportanceConfig | MomentsConfig,
    measure: Callable[[PreTrainedModel, Subject, Path], Mapping[str, Any]],
    beside: int | None = None,
    prepare: Callable[[Subject], Subject] | None = None,
) -> Path:
    """Measure into a new folder, with a model `loaded` for that, or reuse the finished one.

    `prepare` says before what else is measured on.
    """
    check_shard(config.shard)
    subject = read_subject("checkpoint", config)

    def make(folder: Path) -> Mapping[str, Any]:
        ready = prepare(subject) if prepare else subject
        with loaded(subject.checkpoint, config.compute, config.shard, beside) as model:
            results = measure(model, ready, folder)
        return {**results, "skipped_rows": list(ready.encoded.skipped)}

    subject.run(stage, config, make)
    return config.output
