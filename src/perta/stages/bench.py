"""Benchmarks: checkpoint + benchmark -> results JSON (`perta bench`).

General ability is measured by lm-evaluation-harness, which is optional (`pip install lm-eval`). Its
own tasks need the hub for their data; tasks of a local folder with local data work offline. Scores
come with the harness's standard errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.examples import rows_fingerprint
from perta.data.rows import write_jsonl
from perta.errors import ConfigError, DataError, first_line
from perta.evidence.benchmark import Reference
from perta.evidence.muse import run_muse
from perta.evidence.results import Results, read_results
from perta.evidence.tofu import run_tofu
from perta.models.load import load_model, load_tokenizer, pick_device, pick_dtype
from perta.models.resolve import cache_folder, resolve_checkpoint
from perta.progress import say
from perta.stages.settings import (
    AbilityConfig,
    BenchmarkConfig,
    MuseConfig,
    PeopleBenchConfig,
    TofuConfig,
)
from perta.stages.stage import run_file_stage
from perta.store.fingerprint import fingerprint
from perta.store.provenance import check_reference
from perta.store.record import settings_of

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
        raise DataError(
            f"{subset} of {name} could not be fetched from the hub: {first_line(error)} "
            "Give a folder with the benchmark's JSONL files as --data."
        ) from error
    write_jsonl((dict(row) for row in rows), target)


def bench_ability(config: AbilityConfig) -> Results:
    """Evaluate a checkpoint on tasks of lm-evaluation-harness (`perta bench ability`).

    Args:
        config: checkpoint, tasks and output.

    Returns:
        `TASK/METRIC` -> {"agg_value", "standard_error"}, and what made it under `perta`.

    Raises:
        ConfigError: the harness is not installed, or no such task exists.
        DataError: a task's data cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "General ability is measured by lm-evaluation-harness, which is not installed here. "
            "Run `pip install lm-eval`."
        ) from error
    checkpoint = resolve_checkpoint(config.checkpoint)
    manager = _tasks(config, TaskManager)
    unknown = _unknown(config, manager)
    if unknown:
        raise ConfigError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}. `lm-eval ls tasks` lists "
            "its own; --include-path adds a folder of task files."
        )
    dtype = str(pick_dtype(config.compute)).removeprefix("torch.")
    device = pick_device(config.compute).type
    settings = {
        **settings_of(config),
        "device": device,
        "dtype": dtype,
        "lm_eval": lm_eval.__version__,
    }

    def make() -> Results:
        try:
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(checkpoint), "dtype": dtype},
                tasks=list(config.tasks),
                task_manager=manager,
                device=device,
                batch_size=config.evaluation_batch_size,
                limit=config.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        except (OSError, ConnectionError, ValueError) as error:
            raise DataError(
                f"The tasks {', '.join(config.tasks)} could not be run: {first_line(error)} "
                "The harness's own tasks fetch their data from the hub; offline, give local ones "
                "with --include-path."
            ) from error
        return _aggregates(found["results"])

    inputs = {"checkpoint": fingerprint(checkpoint)}
    if config.include_path:
        inputs["include_path"] = _folder_hash(config.include_path)
    return run_file_stage(
        "bench ability", config.output, settings, inputs, make, overwrite=config.overwrite
    )


def _tasks(config: AbilityConfig, manager: Any) -> Any:
    """The folder's tasks alone where they suffice: indexing the harness's own takes minutes."""
    if config.include_path is None:
        return manager()
    local = manager(include_path=str(config.include_path), include_defaults=False)
    if not _unknown(config, local):
        return local
    return manager(include_path=str(config.include_path))


def _unknown(config: AbilityConfig, manager: Any) -> list[str]:
    return [task for task in config.tasks if not manager.match_tasks([task])]


def _aggregates(results: dict[str, Any]) -> Results:
    table: Results = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, form = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, float):
                continue
            error = values.get(f"{metric}_stderr,{form}")
            table[f"{task}/{metric}"] = {
                "agg_value": value,
                "standard_error": error if isinstance(error, float) else None,
            }
    return table


def _folder_hash(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(folder)} {fingerprint(file)}\n" for file in files]
    return blake3("".join(lines).encode()).hexdigest()
