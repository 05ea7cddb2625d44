"""`perta bench tofu`, `people` and `muse`: checkpoint + benchmark -> results JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.benchmarks.common import Reference
from perta.benchmarks.muse import run_muse
from perta.benchmarks.tofu import run_tofu
from perta.checkpoint import fingerprint
from perta.config_bench import BenchmarkConfig, MuseConfig, PeopleBenchConfig, TofuConfig
from perta.data import rows_fingerprint
from perta.errors import DataError
from perta.manifest import settings_of
from perta.model import (
    cache_folder,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve_checkpoint,
)
from perta.people import write_jsonl
from perta.progress import say
from perta.provenance import check_reference
from perta.results import Results, read_results
from perta.stage import run_file_stage

Run = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Reference | None, Path], Results]

_TOFU_SUBSETS = (
    *(f"{split}_perturbed" for split in ("forget01", "forget05", "forget10")),
    "retain_perturbed",
    "real_authors_perturbed",
    "world_facts_perturbed",
    "holdout01",
    "holdout05",
    "holdout10",
)
_MUSE_SUBSETS = {
    "knowmem": ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"),
    "verbmem": ("forget",),
    "privleak": ("forget", "holdout", "retain"),
}


def bench_tofu(config: TofuConfig) -> Results:
    """Evaluate a checkpoint with the TOFU metrics and write the results (`perta bench tofu`).

    Args:
        config: checkpoint, data, split, reference and output.

    Returns:
        What the results file holds; see `run_tofu`.

    Raises:
        PertaError: input that cannot be used.
    """
    return _tofu_metrics("tofu", config, _tofu_folder(config.data))


def bench_people(config: PeopleBenchConfig) -> Results:
    """Evaluate a checkpoint on fictitious people with the TOFU metrics (`perta bench people`).

    Args:
        config: checkpoint, a folder of `perta people`, reference and output.

    Returns:
        What the results file holds; see `run_tofu`.

    Raises:
        PertaError: input that cannot be used.
    """
    if not Path(config.data).is_dir():
        raise DataError(f"There is no folder {config.data}. Make it with `perta people`.")
    return _tofu_metrics("people", config, Path(config.data))


def _tofu_metrics(name: str, config: TofuConfig | PeopleBenchConfig, folder: Path) -> Results:
    more = {}
    if config.reference_checkpoint:
        reference_model = resolve_checkpoint(config.reference_checkpoint)
        more["reference_checkpoint"] = fingerprint(reference_model)

    def run(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reference: Reference | None,
        journal: Path,
    ) -> Results:
        return run_tofu(
            model,
            tokenizer,
            folder,
            config.forget_split,
            reference=reference,
            reference_model=(
                load_model(reference_model, config.compute) if config.reference_checkpoint else None
            ),
            compat=config.compat,
            limit=config.limit,
            batch_size=config.evaluation_batch_size,
            gradient_norms=config.gradient_norms,
            journal=journal,
        )

    return _bench(name, config, folder, more, run)


def bench_muse(config: MuseConfig) -> Results:
    """Evaluate a checkpoint with the MUSE metrics and write the results (`perta bench muse`).

    Args:
        config: checkpoint, data, corpus, reference and output.

    Returns:
        What the results file holds; see `run_muse`.

    Raises:
        PertaError: input that cannot be used.
    """
    folder = _muse_folder(config.data, config.corpus)

    def run(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reference: Reference | None,
        journal: Path,
    ) -> Results:
        return run_muse(
            model,
            tokenizer,
            folder,
            config.corpus,
            reference=reference,
            compat=config.compat,
            limit=config.limit,
            batch_size=config.evaluation_batch_size,
            journal=journal,
        )

    return _bench("muse", config, folder, {}, run)


def _bench(
    name: str, config: BenchmarkConfig, data: Path, more: Mapping[str, str], run: Run
) -> Results:
    checkpoint = resolve_checkpoint(config.checkpoint)
    reference = read_results(config.reference) if config.reference else None
    settings = {
        **settings_of(config),
        "device": pick_device(config.compute).type,
        "dtype": str(pick_dtype(config.compute)).removeprefix("torch."),
    }
    inputs = {"checkpoint": fingerprint(checkpoint), "data": _folder_fingerprint(data), **more}
    if config.reference:
        inputs["reference"] = fingerprint(config.reference)
        _check_reference(config, settings, inputs, reference or {})
    # Outcomes are kept as they come, so that a run that was killed goes on where it stopped.
    journal = config.output.with_name(config.output.name + ".journal")

    def make() -> Mapping[str, Any]:
        tokenizer = load_tokenizer(checkpoint)
        return run(load_model(checkpoint, config.compute), tokenizer, reference, journal)

    results = run_file_stage(
        f"bench {name}", config.output, settings, inputs, make, overwrite=config.overwrite
    )
    journal.unlink(missing_ok=True)
    return results


def _check_reference(
    config: BenchmarkConfig,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    reference: Mapping[str, Any],
) -> None:
    evaluation = {"settings": settings, "inputs": inputs}
    if not check_reference(evaluation, reference.get("perta", {}), str(config.reference)):
        say(f"Reference: {config.reference}, of the retrained model as stated by the user")


def _folder_fingerprint(folder: Path) -> str:
    files = sorted(folder.glob("*.jsonl"))
    return rows_fingerprint([{"name": file.name, "content": fingerprint(file)} for file in files])


def _tofu_folder(data: str) -> Path:
    if Path(data).is_dir():
        return Path(data)
    _require_id(data)
    folder = cache_folder() / "tofu"
    for subset in _TOFU_SUBSETS:
        _fetch(data, subset, "train", folder / f"{subset}.jsonl")
    return folder


def _muse_folder(data: str, corpus: str) -> Path:
    if Path(data).is_dir():
        return Path(data)
    _require_id(data)
    folder = cache_folder() / "muse"
    for subset, splits in _MUSE_SUBSETS.items():
        for split in splits:
            target = folder / f"{corpus}_{subset}_{split}.jsonl"
            _fetch(f"{data}/MUSE-{corpus.capitalize()}", subset, split, target)
    return folder


def _require_id(data: str) -> None:
    if data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise DataError(
            f"There is no folder {data}. Give one with the benchmark's JSONL files, or leave "
            "--data out to fetch them from the hub."
        )


def _fetch(name: str, subset: str, split: str, target: Path) -> None:
    """Download one file of a benchmark, once."""
    if target.exists():
        return
    import datasets

    say(f"Fetching {name}, {subset} ({split})")
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises a dozen unrelated classes here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(
            f"{subset} of {name} could not be fetched from the hub: {reason} Give a folder with "
            "the benchmark's JSONL files as --data."
        ) from error
    write_jsonl((dict(row) for row in rows), target)
