"""Per-parameter task arithmetic: remove fine-tuning data from a language model by one edit.

    base, full, forget set, retain set
      -> finetune_checkpoint(base, forget set)    forget checkpoint
      -> compute_importance(base, each set)       importance files
      -> edit_checkpoint(full, ...)               unlearned checkpoint
      -> evaluate_checkpoint(...)                 results

`unlearn` runs all of it. Every function takes one frozen configuration object, with the same
fields as the command line has flags (`unlearn` keywords as well), and returns the path of what it
wrote; `unlearn`, `evaluate_checkpoint` and the benchmarks return results.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from perta.version import __version__ as __version__

# Type checkers read the stub beside this file.
_HOME = {
    name: module
    for module, names in {
        "data.examples": "load_examples",
        "engine.train.unlearn": "Trained unlearn_by_training",
        "errors": "PertaError",
        "evidence.people": "generate_people",
        "evidence.settings": "MuseConfig TofuConfig",
        "options": "ComputeConfig DataConfig EstimatorConfig MomentOptions ScoringConfig "
        "TrainSettings TuneConfig WeightingConfig",
        "recipes.compare.settings": "CompareConfig",
        "recipes.compare.study": "bench_compare",
        "recipes.repair": "repair_checkpoint",
        "recipes.settings": "RepairConfig UnlearnConfig",
        "recipes.unlearn": "Unlearned unlearn",
        "report.settings": "ReportConfig",
        "report.write": "write_report",
        "stages.audit": "audit_checkpoint",
        "stages.bench": "bench_muse bench_tofu",
        "stages.edit": "edit_checkpoint",
        "stages.evaluate": "evaluate_checkpoint",
        "stages.finetune": "finetune_checkpoint",
        "stages.importance": "compute_importance",
        "stages.moments": "compute_moments merge_moments",
        "stages.settings": "AuditConfig EditConfig EvaluateConfig FinetuneConfig ImportanceConfig "
        "MergeMomentsConfig MomentsConfig PeopleConfig TrainConfig",
        "stages.train": "train_checkpoint",
    }.items()
    for name in names.split()
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, `perta --help` must not."""
    if name not in _HOME:
        raise AttributeError(f"module 'perta' has no attribute {name!r}")
    return getattr(import_module(f"perta.{_HOME[name]}"), name)
