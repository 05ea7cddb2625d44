"""Benchmarks: checkpoint + benchmark -> results JSON (`perta bench`); one of fictitious people.

General ability is measured by lm-evaluation-harness, which is optional (`pip install lm-eval`). Its
own tasks need the hub for their data; tasks of a local folder with local data work offline. Scores
come with the harness's standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perta.data.examples import rows_fingerprint
from perta.data.rows import jsonl, write_jsonl
from perta.errors import ConfigError, DataError, first_line
from perta.evidence.benchmark import Benchmark, Given, is_journal
from perta.evidence.people import generate_people, split_people
from perta.evidence.published.muse import Muse
from perta.evidence.published.tofu import People, Tofu
from perta.evidence.results import Results, read_results
from perta.evidence.settings import (
    AbilityConfig,
    BenchmarkConfig,
    MuseConfig,
    PeopleBenchConfig,
    TofuConfig,
)
from perta.models.load import load_model, load_tokenizer, picked
from perta.models.resolve import resolve_checkpoint
from perta.progress import say
from perta.stages.settings import PeopleConfig
from perta.stages.stage import evaluated, run_file_stage
from perta.store.atomic import atomic_folder, beside, recover
from perta.store.fingerprint import files_of, fingerprint
from perta.store.provenance import check_reference
from perta.store.record import check_output, make_manifest, settings_of, write_manifest


def bench_tofu(config: TofuConfig) -> Results:
    """`run_benchmark` with the TOFU metrics (`perta bench tofu`); see `run_tofu`."""
    return run_benchmark(Tofu(), config)


def bench_people(config: PeopleBenchConfig) -> Results:
    """`run_benchmark` with the TOFU metrics on fictitious people (`perta bench people`)."""
    return run_benchmark(People(), config)


def bench_muse(config: MuseConfig) -> Results:
    """`run_benchmark` with the MUSE metrics (`perta bench muse`); see `run_muse`."""
    return run_benchmark(Muse(), config)


def run_benchmark(benchmark: Benchmark[Any], config: BenchmarkConfig) -> Results:
    """Evaluate a checkpoint with a benchmark and write the results."""
    data = benchmark.folder(config)
    checkpoint = resolve_checkpoint(config.checkpoint)
    settings = {**settings_of(config), **picked(config.compute, checkpoint)}
    reference = read_results(config.reference) if config.reference else None

    def look() -> dict[str, str]:
        found = {**evaluated(config.checkpoint, checkpoint), "data": _data_fingerprint(data)}
        found |= benchmark.inputs(config)
        if source := benchmark.source():
            found["benchmark"] = source
        return {**found, "reference": fingerprint(config.reference)} if config.reference else found

    inputs = look()
    if config.reference:
        made = {"settings": settings, "inputs": inputs}
        if not check_reference(made, (reference or {}).get("perta", {}), str(config.reference)):
            say(f"Reference: {config.reference}, of the retrained model as stated by the user")
    # Outcomes are kept as they come, so that a run that was killed goes on where it stopped.
    given = Given(data, reference, beside(config.output, ".journal"))
    check_output(given.journal, overwrite=True, ours=is_journal)

    def make() -> Mapping[str, Any]:
        benchmark.check(config, given)
        tokenizer = load_tokenizer(checkpoint)
        return benchmark.run(load_model(checkpoint, config.compute), tokenizer, config, given)

    name, reads = f"bench {benchmark.name}", [data, checkpoint]
    results = run_file_stage(name, config, settings, inputs, make, look=look, reads=reads)
    given.journal.unlink(missing_ok=True)
    return results


def _data_fingerprint(data: Path) -> str:
    files = [data] if data.is_file() else sorted(data.glob("*.jsonl"))
    return rows_fingerprint([{"name": file.name, "content": fingerprint(file)} for file in files])


def bench_ability(config: AbilityConfig) -> Results:
    """Evaluate a checkpoint on tasks of lm-evaluation-harness (`perta bench ability`).

    Returns `TASK/METRIC` -> {"agg_value", "standard_error"}, and what made it under `perta`.
    ConfigError without the harness or such a task, DataError where a task's data cannot be loaded.
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
    where = picked(config.compute, checkpoint)
    settings = {**settings_of(config), **where, "lm_eval": lm_eval.__version__}

    def make() -> Results:
        try:
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(checkpoint), "dtype": where["dtype"]},
                tasks=list(config.tasks),
                task_manager=manager,
                device=where["device"],
                # The harness bounds no tokens, so a GPU gets no more rows.
                batch_size=config.compute.pass_batch_size or 16,
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

    def look() -> dict[str, str]:
        found = evaluated(config.checkpoint, checkpoint)
        path = config.include_path
        return {**found, "include_path": rows_fingerprint([files_of(path)])} if path else found

    return run_file_stage(
        "bench ability", config, settings, look(), make, look=look, reads=[checkpoint]
    )


def _tasks(config: AbilityConfig, manager: Any) -> Any:
    """The folder's tasks alone where they suffice: indexing the harness's own takes minutes."""
    folder = {} if config.include_path is None else {"include_path": str(config.include_path)}
    for given in ({**folder, "include_defaults": False}, folder) if folder else (folder,):
        tasks = manager(**given)
        unknown = [task for task in config.tasks if not tasks.match_tasks([task])]
        if not unknown:
            return tasks
    raise ConfigError(
        f"lm-evaluation-harness knows no task {', '.join(unknown)}. `lm-eval ls tasks` lists "
        "its own; --include-path adds a folder of task files."
    )


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


def divide_people(config: PeopleConfig) -> dict[str, list[dict[str, Any]]]:
    """Forget, retain and full rows, and of as many people as are to be forgotten held-out ones."""
    everybody = config.people + config.forget_people
    everything = generate_people(everybody, config.questions, config.people_seed)
    rows = everything[: config.people * config.questions]
    forget, retain = split_people(rows, forget_people=config.forget_people, seed=config.people_seed)
    return {"forget": forget, "retain": retain, "full": rows, "holdout": everything[len(rows) :]}


def write_people(config: PeopleConfig) -> list[Path]:
    """Write a benchmark of fictitious people (`perta people`).

    Returns `forget.jsonl`, `retain.jsonl`, `full.jsonl`, and `holdout.jsonl` with as many other
    people as are to be forgotten, whom no model is tuned on.
    """
    parts = divide_people(config)
    files = [config.output / f"{name}.jsonl" for name in parts]
    texts = dict(zip(files, map(jsonl, parts.values()), strict=True))
    recover(config.output)
    if all(file.exists() and file.read_text("utf-8") == texts[file] for file in files):
        return files
    check_output(config.output, overwrite=config.overwrite)
    with atomic_folder(config.output, overwrite=config.overwrite) as folder:
        for name, part in parts.items():
            write_jsonl(part, folder / f"{name}.jsonl")
        write_manifest(folder, make_manifest("people", settings_of(config), {}))
    return files
