"""Imports point one way: stages stand on mathematics and edges, never on each other."""

from __future__ import annotations

import ast
from pathlib import Path

import perta

PACKAGE = Path(perta.__file__).parent

STAGES = {"finetune", "importance", "moments", "edit", "train", "evaluate", "report", "people"}
MATHEMATICS = {
    "weighting",
    "objectives",
    "metrics",
    "per_example",
    "batch",
    "structured",
    "second_moment",
    "task_vectors",
    "unlearning_objectives",
    "influence",
    "per_example_capture",
    "per_example_recorder",
    "per_example_powers",
    "edit_arithmetic",
    "words",
}
COMPILED = {"_powers", "_stored"}
EDGES = {
    "errors",
    "config",
    "config_bench",
    "progress",
    "manifest",
    "checkpoint",
    "data",
    "rows",
    "model",
    "stage",
    "measurement",
    "moment_files",
    "optimize",
    "training",
    "steering",
    "refusals",
}


def imported(module: str) -> set[str]:
    """Modules of this package that a module imports anywhere, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("perta"):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names - {"__version__"}


def test_stages_do_not_import_each_other() -> None:
    for stage in STAGES:
        if (PACKAGE / f"{stage}.py").exists():
            assert not imported(stage) & (STAGES - {stage}), stage
            assert not imported(stage) & {"pipeline", "demo", "cli"}, stage


def test_mathematics_knows_no_files_and_no_settings() -> None:
    for module in MATHEMATICS:
        assert imported(module) <= MATHEMATICS | COMPILED | {"errors"}, module


def test_the_edit_flows_one_way() -> None:
    names = ("arithmetic", "plan", "chunks", "passes", "output", "stream")
    steps = [*(f"edit_{name}" for name in names), "edit"]
    for place, step in enumerate(steps):
        assert not imported(step) & set(steps[place + 1 :]), step
        assert not imported(step) & (STAGES - {"edit"} | {"pipeline", "demo", "cli"}), step


def test_edges_know_no_stage() -> None:
    for module in EDGES:
        assert not imported(module) & (STAGES | {"pipeline", "demo", "cli"}), module


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    import subprocess
    import sys

    code = (
        "import sys, perta.cli; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
