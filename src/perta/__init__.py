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
from typing import TYPE_CHECKING, Any

from perta.version import __version__ as __version__

if TYPE_CHECKING:
    from perta.data.examples import load_examples
    from perta.engine.train.unlearn import Trained, unlearn_by_training
    from perta.errors import PertaError
    from perta.evidence.people import generate_people
    from perta.evidence.settings import MuseConfig, TofuConfig
    from perta.options import (
        ComputeConfig,
        DataConfig,
        EstimatorConfig,
        MomentOptions,
        ScoringConfig,
        TrainSettings,
        TuneConfig,
        WeightingConfig,
    )
    from perta.recipes.compare.settings import CompareConfig
    from perta.recipes.compare.study import bench_compare
    from perta.recipes.settings import UnlearnConfig
    from perta.recipes.unlearn import Unlearned, unlearn
    from perta.report.settings import ReportConfig
    from perta.report.write import write_report
    from perta.stages.audit import audit_checkpoint
    from perta.stages.bench import bench_muse, bench_tofu
    from perta.stages.edit import edit_checkpoint
    from perta.stages.evaluate import evaluate_checkpoint
    from perta.stages.finetune import finetune_checkpoint
    from perta.stages.importance import compute_importance
    from perta.stages.moments import compute_moments, merge_moments
    from perta.stages.settings import (
        AuditConfig,
        EditConfig,
        EvaluateConfig,
        FinetuneConfig,
        ImportanceConfig,
        MergeMomentsConfig,
        MomentsConfig,
        PeopleConfig,
        TrainConfig,
    )
    from perta.stages.train import train_checkpoint

__all__ = [
    "AuditConfig",
    "CompareConfig",
    "ComputeConfig",
    "DataConfig",
    "EditConfig",
    "EstimatorConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "ImportanceConfig",
    "MergeMomentsConfig",
    "MomentOptions",
    "MomentsConfig",
    "MuseConfig",
    "PeopleConfig",
    "PertaError",
    "ReportConfig",
    "ScoringConfig",
    "TofuConfig",
    "TrainConfig",
    "TrainSettings",
    "Trained",
    "TuneConfig",
    "UnlearnConfig",
    "Unlearned",
    "WeightingConfig",
    "audit_checkpoint",
    "bench_compare",
    "bench_muse",
    "bench_tofu",
    "compute_importance",
    "compute_moments",
    "edit_checkpoint",
    "evaluate_checkpoint",
    "finetune_checkpoint",
    "generate_people",
    "load_examples",
    "merge_moments",
    "train_checkpoint",
    "unlearn",
    "unlearn_by_training",
    "write_report",
]

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
        "recipes.settings": "UnlearnConfig",
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


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, `perta --help` must not."""
    if name not in __all__:
        raise AttributeError(f"module 'perta' has no attribute {name!r}")
    return getattr(import_module(f"perta.{_HOME[name]}"), name)
