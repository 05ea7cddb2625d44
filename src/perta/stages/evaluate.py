"""Evaluate a checkpoint: checkpoint + sets -> results JSON."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from perta.data.examples import ExampleSet, load_examples
from perta.engine.shard import check_shard
from perta.evidence.quick import quick_evaluation
from perta.evidence.results import Results
from perta.models.facts import Fact, find_facts, is_told
from perta.models.load import batch_of, load_tokenizer, longest_input, picked
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, DataConfig
from perta.progress import track
from perta.stages.settings import EvaluateConfig
from perta.stages.stage import evaluated, loaded, run_file_stage
from perta.store.fingerprint import fingerprint
from perta.store.record import settings_of


def evaluate_checkpoint(config: EvaluateConfig) -> Results:
    """Evaluate a checkpoint and write the results, which are returned too (`perta evaluate`)."""
    check_shard(config.shard)
    folder = resolve_checkpoint(config.checkpoint)
    sources = {"forget": config.forget, "retain": config.retain, "holdout": config.holdout}
    sets = {
        name: load_examples(source, config.data_config)
        for name, source in sources.items()
        if source
    }
    settings = {**settings_of(config), **picked(config.compute, folder)}
    base = resolve_checkpoint(config.base) if config.base else None

    def look() -> dict[str, str]:
        found = evaluated(config.checkpoint, folder)
        found |= {name: examples.fingerprint for name, examples in sets.items()}
        return {**found, "base": fingerprint(base)} if base else found

    def make() -> Mapping[str, Any]:
        tokenizer = load_tokenizer(folder)
        longest = longest_input(folder)
        how = (config.data_config, config.compute, base, longest, config.shard)
        facts = find_in_sets(sets, tokenizer, *how)
        rows = sum(len(examples) for examples in sets.values())
        with (
            loaded(folder, config.compute, config.shard) as model,
            track("Evaluation", rows) as advance,
        ):
            return quick_evaluation(
                *(model, tokenizer, sets, config.scoring, config.data_config),
                lambda *_: advance(1),
                facts=facts,
                batch_size=batch_of(config.compute, 16),
            )

    reads = [folder, *([base] if base else [])]
    return run_file_stage("evaluate", config, settings, look(), make, look=look, reads=reads)


def find_in_sets(
    sets: Mapping[str, ExampleSet],
    tokenizer: PreTrainedTokenizerBase,
    data_config: DataConfig,
    compute: ComputeConfig,
    base: Path | None,
    longest: int | None,
    shard: bool | None = False,
) -> dict[str, tuple[Fact, ...]]:
    """Name -> facts; the base model is loaded where there is one and rows do not tell theirs."""
    asked = base and not all(is_told(examples, data_config) for examples in sets.values())
    with loaded(base, compute, shard) if base and asked else nullcontext() as model:
        return {
            name: find_facts(examples, tokenizer, data_config, base=model, longest=longest)
            for name, examples in sets.items()
        }
