"""The command line: one subcommand per stage, each imported when it is called."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from traceback import format_exc, walk_tb
from types import FrameType
from typing import Annotated, Any, NamedTuple

import cyclopts
from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnknownOptionError

from perta.errors import ConfigError, PertaError, first_line, shortage
from perta.evidence.settings import BENCHMARKS, Offer
from perta.options import MAIN, Repeated
from perta.parallel import lead
from perta.progress import PlainConsole
from perta.recipes.compare.settings import CompareConfig
from perta.recipes.requests.settings import (
    LedgerConfig,
    RequestsAddConfig,
    RequestsApplyConfig,
    RequestsInitConfig,
    RequestsRecheckConfig,
)
from perta.recipes.settings import DemoConfig, RepairConfig, UnlearnConfig
from perta.report.settings import AuditPageConfig, ReportConfig, Wanted
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
from perta.store.parse import parse_yaml, read_bytes
from perta.version import __version__

app = App(
    name="perta",
    help="Remove fine-tuning data from a language model by one edit of its weights.",
    version=__version__,
    help_on_error=False,
    suppress_keyboard_interrupt=False,
)
app.meta.suppress_keyboard_interrupt = False
app.register_install_completion_command()
app.meta.group_parameters = cyclopts.Group("Session", sort_key=0)

_DryRun = Annotated[
    bool,
    Parameter(
        negative="",
        group=MAIN,
        help="print what would be done, what is reused, and about what it takes, and end.",
    ),
]
_AsJson = Annotated[
    bool,
    Parameter(negative="", group=MAIN, help="Print results as one JSON object in place of tables."),
]


@app.command
def unlearn(config: UnlearnConfig, *, dry_run: _DryRun = False, json: _AsJson = False) -> None:
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
    _tell_verdict(json, message, found, config.fail_unless)


@app.command
def finetune(config: FinetuneConfig, *, json: _AsJson = False) -> None:
    """Tune a checkpoint on a data set; the loss is on answer tokens only."""
    from perta.stages.finetune import finetune_checkpoint

    output = finetune_checkpoint(config)
    _tell(json, f"Tuned checkpoint: {output}", output=output)


@app.command
def importance(config: ImportanceConfig, *, json: _AsJson = False) -> None:
    """Measure the importance of every weight for a data set."""
    from perta.stages.importance import compute_importance

    output = compute_importance(config)
    _tell(json, f"Importance: {output}", output=output)


@app.command
def moments(config: MomentsConfig, *, json: _AsJson = False) -> None:
    """Measure second moments of every linear layer's inputs, for the structured methods."""
    from perta.stages.moments import compute_moments

    output = compute_moments(config)
    _tell(json, f"Moments: {output}", output=output)


@app.command(name="merge-moments")
def merge_moments(
    *folders: Path, output: Path, overwrite: bool = False, json: _AsJson = False
) -> None:
    """Add moments of several sets, such as saved ones of a retain set that has grown.

    Args:
        folders: outputs of `perta moments` for sets that have no row in common.
        output: folder for the moments of all sets together.
        overwrite: replace an output that is there already.
        json: print where it is as a JSON object.
    """
    from perta.stages.moments import merge_moments

    config = MergeMomentsConfig(folders=folders, output=output, overwrite=overwrite)
    made = merge_moments(config)
    _tell(json, f"Moments: {made}", output=made)


@app.command
def edit(config: EditConfig, *, json: _AsJson = False) -> None:
    """Edit a checkpoint: full - alpha * W * (forget checkpoint - base), tensor by tensor."""
    from perta.stages.edit import direction_folder, edit_checkpoint

    _tell_edit(json, "Unlearned", edit_checkpoint(config), direction_folder(config))


def _tell_edit(json: bool, what: str, output: Path, direction: Path | None) -> None:
    message = f"{what} checkpoint: {output}"
    if direction is not None:
        message += f"\nDirection: {direction} (holds what was removed; delete it when you are done)"
    _tell(json, message, output=output, direction=direction)


@app.command
def repair(config: RepairConfig, *, json: _AsJson = False) -> None:
    """Give back what an unlearning run by any method took from the examples to keep."""
    from perta.recipes.repair import repair_checkpoint
    from perta.store.atomic import beside

    output = repair_checkpoint(config)
    _tell_edit(json, "Repaired", output, beside(output, ".direction"))


@app.command
def train(config: TrainConfig, *, json: _AsJson = False) -> None:
    """Train the full model until it has forgotten: gradient ascent, NPO, RMU and others."""
    from perta.stages.train import train_checkpoint

    output = train_checkpoint(config)
    _tell(json, f"Unlearned checkpoint: {output}", output=output)


@app.command
def evaluate(config: EvaluateConfig, *, json: _AsJson = False) -> None:
    """Measure how well a checkpoint answers forget, retain and held-out examples."""
    from perta.stages.evaluate import evaluate_checkpoint
    from perta.terminal import print_comparison, print_json, print_samples, without_rows

    results = evaluate_checkpoint(config)
    if json:
        print_json(without_rows(results))
        return
    print_comparison({Path(config.checkpoint).name: results})
    print_samples({Path(config.checkpoint).name: results}, config.show_samples)
    _note(f"Results: {config.output}")


@app.command
def audit(
    config: AuditConfig, *, page: AuditPageConfig | None = None, json: _AsJson = False
) -> None:
    """Look for what was removed in many ways, and judge each against a model that never had it.

    Args:
        config: models, sets and output.
        page: what the page says beside, and where a bundle goes.
        json: print the verdicts as one JSON object in place of tables.
    """
    from perta.evidence.audit.document import without_scores
    from perta.report.audit import refuse_foreign, write_audit_page
    from perta.stages.audit import AUDIT, audit_checkpoint
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
    _note(f"Audit: {config.output / AUDIT}\nPage to sign: {written}")
    if told.bundle:
        _note(f"Bundle: {told.bundle}")


bench = App(
    name="bench",
    help="Evaluate a checkpoint on a benchmark: one of these, or a Python file that defines one.",
)
app.command(bench)


def _add_benchmark(
    name: str, summary: str, config: type[Any], run: Callable[[Any], Mapping[str, Any]]
) -> None:
    """Make `perta bench NAME` from what the registry or a file says."""

    def command(config: Any, *, json: bool = False) -> None:
        from perta.terminal import print_json, print_metrics, without_rows

        results = run(config)
        if json:
            print_json(without_rows(results))
            return
        print_metrics(results)
        _note(f"Results: {config.output}")

    command.__annotations__ = {"config": config, "json": _AsJson, "return": None}
    bench.command(command, name=name, help=summary)


def _run_offer(offer: Offer, config: Any) -> Mapping[str, Any]:
    module, _, function = offer.place.partition(":")
    results: Mapping[str, Any] = getattr(import_module(module), function)(config)
    return results


for _name, _offer in BENCHMARKS.items():
    _add_benchmark(_name, _offer.summary, _offer.config, partial(_run_offer, _offer))


def _add_own_benchmark(tokens: Sequence[str]) -> None:
    """Make a user's benchmark file, given in place of a name, known under its path."""
    file = next((b for a, b in pairwise(tokens) if a == "bench" and b.endswith(".py")), None)
    if file is None:
        return
    from perta.evidence.benchmark import load_benchmark
    from perta.stages.bench import run_benchmark

    own = load_benchmark(Path(file))
    if file in bench:
        del bench[file]
    _add_benchmark(file, own.summary, own.config, partial(run_benchmark, own))


@bench.command
def compare(config: CompareConfig, *, dry_run: _DryRun = False, json: _AsJson = False) -> None:
    """Methods side by side: tune, edit and evaluate over seeds, at equal forgetting too.

    Finished runs are reused, so a comparison can be stopped, continued and extended.
    """
    from perta.recipes.compare.study import bench_compare, plan_compare
    from perta.terminal import print_plan

    if dry_run:
        print_plan(plan_compare(config), json=json)
        return
    records = bench_compare(config, shows=not json)
    message = f"Tables, results and report.html: {config.output}"
    _tell(json, message, output=config.output, runs=records)


@app.command
def report(*results: str, config: ReportConfig | None = None, json: _AsJson = False) -> None:
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
    _tell_verdict(json, [f"Report: {page}"], found, chosen.fail_unless)


def _tell_verdict(
    json: bool, message: list[str], found: dict[str, Any], wanted: Wanted | None
) -> None:
    """Tell of a result, first of `found`, and its verdict, which is an error below `wanted`."""
    from perta.report.verdict.judge import as_record, require_verdict

    verdict = found["verdict"]
    told = {**found, "verdict": as_record(verdict) if verdict else None}
    _tell(json, "\n".join([*message, *([f"Verdict: {verdict.line}"] if verdict else [])]), **told)
    require_verdict(wanted, verdict, next(iter(found.values())))


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
        _note("\n".join([title, *(f"  {line}" for line in lines)]))


@app.command
def methods(name: str | None = None, *, json: _AsJson = False) -> None:
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


_requests = App(name="requests", help="Many erasure requests over time, in a ledger that tells.")
app.command(_requests)


@_requests.command(name="init")
def _init(config: RequestsInitConfig) -> None:
    """Begin a ledger for a model and its data."""
    from perta.recipes.requests.take import start_ledger

    _note(f"Ledger: {config.folder}; head {start_ledger(config).hash}")


@_requests.command(name="add")
def _add(config: RequestsAddConfig) -> None:
    """Take a request down: rows that have to go."""
    from perta.recipes.requests.take import add_request

    entry = add_request(config)
    _note(f"{config.name}: {entry.facts['rows']} rows; head {entry.hash}")


@_requests.command(name="apply")
def _apply(config: RequestsApplyConfig) -> None:
    """Forget all that waits, in one edit of the newest checkpoint."""
    from perta.recipes.requests.apply import apply_requests

    entry = apply_requests(config)
    facts = entry.facts
    _note(
        f"Applied: {', '.join(facts['names'])}\nVerdict: {facts['verdict']}\n"
        f"Checkpoint: {config.folder / facts['checkpoint']}\nHead: {entry.hash}"
    )


@_requests.command(name="status")
def _status(folder: Path, *, json: _AsJson = False) -> None:
    """List the requests and where each stands.

    Args:
        folder: of the ledger.
        json: print them as one JSON object.
    """
    from perta.recipes.requests.state import read_state
    from perta.terminal import print_json, print_requests

    state = read_state(folder)
    requests = [asdict(request) for request in state.requests]
    if json:
        print_json({"requests": requests})
    else:
        print_requests(requests)
        _note(f"Newest checkpoint: {state.current[0]}")


@_requests.command(name="recheck")
def _recheck(config: RequestsRecheckConfig) -> None:
    """Look for the facts of all earlier requests in the newest checkpoint."""
    from perta.evidence.audit.document import told_in_short
    from perta.recipes.requests.look import recheck_requests

    entry = recheck_requests(config)
    for name, rows in entry.facts["still_there"].items():
        numbers = f": rows {', '.join(map(str, rows))}" if rows else ""
        _note(f"{name}: {len(rows)} facts stand out{numbers}")
    for name, audit in entry.facts["audits"].items():
        _note(f"{name}: {told_in_short(audit)}")


@_requests.command(name="verify")
def _verify(
    folder: Path,
    *,
    head: str | None = None,
    public_key: Annotated[tuple[Path, ...], Repeated] = (),
) -> None:
    """Check the ledger, its signatures and every checkpoint it names.

    Args:
        folder: of the ledger.
        head: hash of an entry, noted elsewhere, that the ledger must hold.
        public_key: file of a public key (PEM): with an Ed25519 key every entry must be signed with
            one that is given, with a key of a curve every checkpoint that is there.
    """
    from perta.recipes.requests.look import verify_requests
    from perta.store.ledger import public_keys
    from perta.store.signing import short

    state = verify_requests(folder, head=head, public_keys=public_key)
    signed = sum(entry.signature is not None for entry in state.entries)
    _note(
        f"{len(state.entries)} entries fit, {signed} of them signed; head {state.entries[-1].hash}"
    )
    for key in public_keys(state.entries):
        _note(f"Signed with {key}")
    for entry in state.entries:
        if by := entry.facts.get("signed"):
            _note(f"{entry.facts['checkpoint']} was signed with {short(by['public_key'])}")


@_requests.command(name="clean")
def _clean(config: LedgerConfig) -> None:
    """Delete rows, work folders and older checkpoints of requests that were applied."""
    from perta.recipes.requests.clean import clean_requests
    from perta.recipes.requests.state import read_state

    _, gone = clean_requests(config)
    for place in gone:
        _note(f"Deleted: {place}")
    for request in read_state(config.folder).requests:
        if request.applied is not None and not request.cleaned:
            _note(f"Kept: rows of {request.name}, which is not forgotten yet by the last look")
    _note(
        "Base and full model, the data sets, copies and backups are not this command's to delete."
    )


@app.command
def people(config: PeopleConfig, *, json: _AsJson = False) -> None:
    """Write question/answer pairs about fictitious people: forget, retain and all of them."""
    from perta.stages.bench import write_people

    files = write_people(config)
    _tell(json, "\n".join(map(str, files)), files=list(files))


@app.command
def demo(
    config: DemoConfig | None = None, *, dry_run: _DryRun = False, json: _AsJson = False
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


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(name="--config")] = None,
    method_file: Annotated[tuple[Path, ...], Repeated] = (),
    quiet: bool | None = None,
    traceback: bool = False,
) -> None:
    """Run a subcommand.

    Args:
        tokens: the subcommand and its options.
        config: YAML file with options of the subcommand, named as on the command line; flags
            given as well take precedence.
        method_file: Python file that defines methods, which --method then takes as it takes ours.
        quiet: print results only, no progress [default: False].
        traceback: show the full traceback of an error.
    """
    del traceback  # looked at in `main`, before anything can fail
    source, session = (None, _Session()) if config is None else _yaml(config)
    if session.quiet if quiet is None else quiet:
        from perta.progress import set_quiet

        set_quiet(True)
    _quiet_libraries()
    for file in method_file or session.method_files:
        from perta.methods.registry import load_methods

        load_methods(file)
    app.config = (source,) if source else ()
    try:
        app(
            [_as_called_now(token) for token in tokens],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    finally:
        app.config = ()  # the next call in this process would read the file as well


def main() -> None:
    """Entry point: errors become one message and a status, never a traceback by default."""
    signal.signal(signal.SIGTERM, _stop)
    lead(partial(_run, sys.argv[1:]))


def _run(tokens: list[str]) -> None:
    try:
        _add_own_benchmark(tokens)
        app.meta(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except PertaError as error:
        _fail(shortage(error) or str(error), 1, tokens)
    except CycloptsError as error:
        _fail(_usage(error), 2, tokens)
    except KeyboardInterrupt:
        _fail("Interrupted; nothing was left half-written.", 130, tokens)
    except Exception as error:
        _fail(_unforeseen(error), 1, tokens)


class _Session(NamedTuple):
    """What a YAML file says of the session: it is read before the subcommand is."""

    quiet: bool = False
    method_files: tuple[Path, ...] = ()


def _yaml(file: Path) -> tuple[Any, _Session]:
    """A source of options from a YAML file, checked first so that its errors are plain."""
    from cyclopts.config import Yaml

    if not file.exists():
        raise ConfigError(f"--config {file}: there is no such file.")
    content = parse_yaml(read_bytes(file, ConfigError), f"--config {file}", ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file}: expected `option: value` lines.")
    for name in content.keys() & {"config", "traceback"}:
        raise ConfigError(f"--config {file}: --{name} is given on the command line alone.")
    quiet = content.get("quiet", False)
    if not isinstance(quiet, bool):
        raise ConfigError(f"--config {file}: quiet is true or false.")
    named = content.get("method-file", content.get("method_file", []))
    files = tuple(Path(str(name)) for name in (named if isinstance(named, list) else [named]))
    source = Yaml(file, use_commands_as_keys=False, search_parents=False, must_exist=True)
    return source, _Session(quiet, files)


_NOW_CALLED = {
    "--importance-batch-size": "--pass-batch-size",
    "--moment-batch-size": "--pass-batch-size",
    "--evaluation-batch-size": "--pass-batch-size",
    "--unlearn-seed": "--seed",
}


def _as_called_now(token: str) -> str:
    """An option by its present name; the old one still works, and a line says so."""
    flag, equals, value = token.partition("=")
    if flag not in _NOW_CALLED:
        return token
    from perta.progress import say

    say(f"{flag} is called {_NOW_CALLED[flag]} now.")
    return f"{_NOW_CALLED[flag]}{equals}{value}"


def _usage(error: CycloptsError) -> str:
    unknown = [error.token.keyword] if isinstance(error, UnknownOptionError) else []
    unknown += (token.partition("=")[0] for token in error.unused_tokens or ())
    if "--show-samples" in unknown:
        return "--show-samples is an option of `perta evaluate` alone: give it there."
    text = " ".join(str(error).split())
    if isinstance(error, MissingArgumentError) and error.keyword is None and error.argument:
        text = f"{error.argument.name} is missing."
        if error.unused_tokens:
            text += f" Not understood: {' '.join(error.unused_tokens)}."
    return f"{text} Run `perta --help`, or a subcommand with --help, for the options."


def _unforeseen(error: Exception) -> str:
    """What the computer ran out of or refused; of a defect, whose code it is in."""
    short = shortage(error)
    if short:
        return short
    # `run_file` leaves its mark in what is global to the code that it runs.
    steps = walk_tb(error.__traceback__)
    own = [(frame, line) for frame, line in steps if "loaded_from" in frame.f_globals]
    if own:
        frame, line = own[-1]
        what = f"{type(error).__name__}: {first_line(error)}"
        return f"{frame.f_code.co_filename}, line {line}: {what}. This is code of your own."
    if not isinstance(error, OSError):
        return f"This is a defect in perta.\n{format_exc()}"
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{place}. Check the path, its permissions and disk space."


def _fail(message: str, status: int, tokens: list[str]) -> None:
    if "--traceback" in tokens:
        message = format_exc()
    PlainConsole(stderr=True).print(f"error: {message}", markup=False, style="red", soft_wrap=True)
    sys.exit(status)


def _tell(json: bool, message: str, **found: Any) -> None:
    from perta.terminal import print_json

    if json:
        print_json(found)
    else:
        _note(message)


def _note(message: str) -> None:
    PlainConsole().print(message, markup=False, soft_wrap=True)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # Cleaning up partial output hangs on exceptions, and a plain SIGTERM raises none.
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """Progress bars and advice of libraries would drown ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
