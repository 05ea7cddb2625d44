"""Commands that run several stages, and those that tell of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perta.cli._app import AsJson, DryRun, app, note, tell_edit, tell_verdict
from perta.recipes.settings import DemoConfig, RepairConfig, UnlearnConfig
from perta.report.settings import AuditPageConfig, ReportConfig
from perta.stages.settings import AuditConfig


@app.command
def unlearn(config: UnlearnConfig, *, dry_run: DryRun = False, json: AsJson = False) -> None:
    """Remove a forget set: fine-tune, importance, edit (or training) and evaluation in one run.

    Finished stages are reused when their inputs and settings are unchanged.
    """
    from perta.recipes.unlearn import plan_unlearn, unlearn
    from perta.store.costs import costs_of, details, duration
    from perta.terminal import print_comparison, print_plan, without_rows

    if dry_run:
        print_plan(plan_unlearn(config), json=json)
        return
    result = unlearn(config)
    work, spent = config.work_folder, costs_of(result.manifest, {})
    models = {"full": result.before, "unlearned": result.after}
    evaluated = {name: found for name, found in models.items() if found}
    if len(evaluated) > 1 and not json:
        print_comparison(evaluated)
    message = [f"Unlearned checkpoint: {result.folder}"]
    message += [f"Report: {result.report}"] if result.report else []
    message += [f"Took {duration(spent.total)}: {details(spent.stages)}"]
    message += [f"Intermediate results: {work}"]
    if [*work.glob("forget_checkpoint*"), *work.glob("forget_rounds")]:
        cure = f"`perta clean {result.folder}` deletes it"
        message[-1] += f" (holds a model tuned on the forget set; {cure})"
    found = {
        "output": result.folder,
        "report": result.report,
        "work": work,
        "verdict": result.verdict,
        "seconds": spent.stages,
        "evaluation": {name: without_rows(results) for name, results in evaluated.items()},
    }
    tell_verdict(json, message, found, config.fail_unless)


@app.command
def repair(config: RepairConfig, *, json: AsJson = False) -> None:
    """Give back what an unlearning run by any method took from the examples to keep."""
    from perta.recipes.repair import repair_checkpoint
    from perta.store.atomic import beside

    output = repair_checkpoint(config)
    tell_edit(json, "Repaired", output, beside(output, ".direction"))


@app.command
def demo(
    config: DemoConfig | None = None, *, dry_run: DryRun = False, json: AsJson = False
) -> None:
    """Show the whole method on a real 135M-parameter model, from nothing, in minutes."""
    from perta.recipes.demo import plan_demo, run_demo
    from perta.terminal import print_json, print_plan, without_rows

    config = config or DemoConfig()
    if dry_run:
        print_plan(plan_demo(config), json=json)
        return
    results = run_demo(config, shows=not json)
    if json:
        models = {name: without_rows(found) for name, found in results.items()}
        print_json({"output": config.output, "evaluation": models})


@app.command
def audit(
    config: AuditConfig, *, page: AuditPageConfig | None = None, json: AsJson = False
) -> None:
    """Look for what was removed in many ways, and judge each against a model that never had it.

    Args:
        config: models, sets and output.
        page: what the page says beside, and where a bundle goes.
        json: print the verdicts as one JSON object in place of tables.
    """
    from perta.evidence.audit.document import AUDIT, without_scores
    from perta.report.audit import refuse_foreign, write_audit_page
    from perta.stages.audit import audit_checkpoint
    from perta.store.record import settings_of
    from perta.terminal import print_audit, print_json

    told = page or AuditPageConfig()
    refuse_foreign(config.output, told, settings_of(config))
    results = audit_checkpoint(config)
    written = write_audit_page(config.output, told)
    if json:
        print_json(without_scores(results))
        return
    print_audit(results)
    note(f"Audit: {config.output / AUDIT}\nPage to sign: {written}")
    if told.bundle:
        note(f"Bundle: {told.bundle}")


@app.command
def report(*results: str, config: ReportConfig | None = None, json: AsJson = False) -> None:
    """Write one self-contained HTML page about what was forgotten and what was kept.

    Args:
        results: results files, unlearned checkpoints, outputs of `perta unlearn`, or folders of
            results, each optionally named as in `full=results/full.json`.
        config: output, title and what to show.
        json: print page and verdict as one JSON object, the verdict in the form of `verdict.json`.
    """
    from perta.report.write import judged, write_report

    chosen = config or ReportConfig()
    chosen = replace(chosen, results=(*results, *chosen.results))
    page = write_report(chosen)
    found = {"page": page, "verdict": next(iter(judged(chosen)), None)}
    tell_verdict(json, [f"Report: {page}"], found, chosen.fail_unless)


@app.command
def clean(run: Path, *, dry_run: bool = False) -> None:
    """Delete what a run left that still knows what was removed.

    Moments and importance of retained rows stay, for the next run.

    Args:
        run: output of `perta unlearn`, `perta edit` or `perta train`.
        dry_run: delete nothing, and list what would be deleted.
    """
    from perta.recipes.clean import clean

    done = clean(run, dry_run=dry_run)
    parts: dict[str, Sequence[object]] = {
        "Would be deleted:" if dry_run else "Deleted:": done.deleted or ("nothing",),
        "Kept, without anything of the forget set:": done.kept or ("nothing",),
        "Not deleted, or not known of:": done.left,
    }
    for title, lines in parts.items():
        note("\n".join([title, *(f"  {line}" for line in lines)]))


@app.command
def methods(name: str | None = None, *, json: AsJson = False) -> None:
    """List the methods with their formulas, or show one with its settings.

    Args:
        name: a method.
        json: print everything as one JSON object.
    """
    from perta.methods.method import Method
    from perta.methods.registry import find, split
    from perta.terminal import method_cards, print_json, print_method, print_methods

    cards = method_cards()
    card = None if name is None else cards[find(split(name)[0], Method).name]
    if json:
        print_json(cards if card is None else card)
    elif card is None:
        print_methods()
    else:
        print_method(card)
