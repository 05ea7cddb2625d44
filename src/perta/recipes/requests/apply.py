"""Requests applied: all that waits, in one edit of the newest checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perta.data.examples import load_examples
from perta.data.rows import write_jsonl
from perta.engine.edit.direction import check_moments
from perta.errors import ConfigError, PertaError, nearest
from perta.evidence.audit.document import summary_of
from perta.methods.method import Edit, Method
from perta.methods.registry import parse
from perta.models.load import picked
from perta.models.resolve import resolve_checkpoint
from perta.options import DataConfig, MomentOptions
from perta.progress import say
from perta.recipes._request import hold_back, write_rows
from perta.recipes.requests.settings import RequestsApplyConfig
from perta.recipes.requests.state import Request, State, opened, signature_file
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.report.verdict.judge import require_verdict
from perta.stages.moments import check_less, compute_moments, holds, moments_without
from perta.stages.settings import LessMomentsConfig, MomentsConfig
from perta.stages.stage import changes
from perta.store.atomic import atomic_folder
from perta.store.fingerprint import content_of, files_of, fingerprint
from perta.store.ledger import Entry
from perta.store.measured.moments import key_rows
from perta.store.record import MANIFEST, read_manifest, settings_of, write_manifest
from perta.store.signing import model_key, sign_checkpoint


def apply_requests(config: RequestsApplyConfig) -> Entry:
    """Forget what waits, in one edit of the newest checkpoint (`perta requests apply`).

    PertaError where nothing waits, the checkpoint is not the ledger's, the run fails, or its
    verdict is worse than was asked for; nothing is written to the ledger then.
    """
    if config.model_key is not None:
        model_key(config.model_key)  # raises now what would stop it at the end
    with opened(config) as state:
        chosen = _chosen(state, config.again)
        current = state.newest()
        state.model("base")
        rows = state.rows(chosen, config.data_config)
        number = len(state.entries) + 1
        work = state.folder / "work" / str(number)
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        forget = write_jsonl(rows, work / "forget.jsonl")
        retain = _retained(state, work, config.data_config)
        settings = UnlearnConfig(
            base=state.start["base"]["path"],
            full=str(current),
            forget=str(forget),
            retain=str(retain),
            retain_moments=_kept_moments(config, state, work, retain),
            holdout=state.holdout(config.data_config),
            output=state.folder / "checkpoints" / str(number),
            work_dir=work / "run",
            # Of a run that the ledger does not know of: it failed, or was not good enough.
            overwrite=True,
            retain_budget=config.retain_budget,
            weighting=config.weighting,
            tune=config.tune,
            data_config=config.data_config,
            compute=config.compute,
        )
        made = unlearn(settings)
        require_verdict(config.fail_unless, made.verdict, f"The ledger in {state.folder}")
        asked, verdict = made.manifest["settings"], made.verdict
        facts = {
            "names": [request.name for request in chosen],
            "method": asked.get("method"),
            "scaling_coef": asked.get("scaling_coef"),
            "before": state.current[1],
            "after": fingerprint(made.folder),
            "record": fingerprint(made.folder / MANIFEST),
            "checkpoint": str(made.folder.relative_to(state.folder)),
            "verdict": verdict.line if verdict else None,
            "met": verdict is not None and verdict.forgetting.status == "met",
            "audit": made.audit and summary_of(made.audit),
        }
        if config.model_key is not None:
            signature = signature_file(made.folder)
            facts["signed"] = sign_checkpoint(made.folder, signature, config.model_key)
        return state.write("apply", config, facts)


def _chosen(state: State, again: Sequence[str]) -> list[Request]:
    """What waits, and what is to be forgotten once more."""
    known = {request.name: request for request in state.requests}
    for name in again:
        if name not in known:
            raise ConfigError(f"--again {name}: there is no such request.{nearest(name, known)}")
        if known[name].cleaned:
            raise ConfigError(f"--again {name}: its rows were cleaned. Add them by another name.")
    chosen = [r for r in state.requests if r.applied is None or r.name in again]
    if not chosen:
        raise ConfigError(
            f"No request waits in {state.folder}. Add one, or name one that is to be forgotten "
            "once more with --again."
        )
    return chosen


def _retained(state: State, work: Path, data_config: DataConfig) -> Path:
    """The retain set without the rows of any request so far."""
    kept = state.kept(data_config)
    if not kept.examples:
        raise ConfigError(f"{kept.source}: every row is part of a request; none is to be kept.")
    write_rows(work / "retain.jsonl", kept)
    return work / "retain.jsonl"


def _kept_moments(
    config: RequestsApplyConfig, state: State, work: Path, retain: Path
) -> Path | None:
    """Moments of retained rows: the last request's without the rows of this one, if they serve."""
    method = parse(config.weighting.method, Method)
    if not isinstance(method, Edit) or "retain" not in method.needs.moments:
        return None
    kept = state.folder / "moments"
    base = str(resolve_checkpoint(state.start["base"]["path"]))
    place: dict[str, Any] = {
        **{"output": work / "moments", "overwrite": True},
        **{"data_config": config.data_config, "compute": config.compute},
    }
    asked = load_examples(work / "forget.jsonl", config.data_config).examples
    try:
        facts = check_moments(kept, [Path(base)], method.needs.gradients).facts
        if other := changes(read_manifest(kept) or {}, settings_of(config.data_config), {}):
            raise ConfigError(f"They were measured with other {', '.join(other)}.")
        if facts["dtype"] != picked(config.compute, Path(base))["dtype"]:
            raise ConfigError(f"They were measured with --dtype {facts['dtype']}.")
        if facts.get("taken_out", 0) > facts["tokens"]:
            raise ConfigError("More than half of what was measured is gone by now.")
        if "rows_key" not in facts:  # or hashes that anybody can make get into a record
            _keep(kept, kept, state)
        if holds(kept, asked):
            made = moments_without(LessMomentsConfig(moments=kept, checkpoint=base, **place), asked)
            _keep(made, kept, state)
    except PertaError as error:
        if kept.exists():
            say(f"The moments that were kept are made again. {error}")
        made = compute_moments(
            MomentsConfig(
                checkpoint=base,
                data=str(retain),
                gradients=method.needs.gradients,
                options=MomentOptions(moment_samples="enough"),
                **place,
            )
        )
        _keep(made, kept, state)
    less = LessMomentsConfig(moments=kept, checkpoint=base, **place)
    return kept if _serve(less, retain) else None


def _serve(config: LessMomentsConfig, retain: Path) -> bool:
    """Whether the rows that retention is judged on can be taken out of kept moments."""
    rows = load_examples(retain, config.data_config)
    held = hold_back(rows, None, config.data_config.subject_column).held_back
    try:
        if held is not None and holds(config.moments, held.examples):
            check_less(config, held.examples)
    except ConfigError:
        say(
            "Few rows gave the moments that are kept, and retention is judged on most of them: "
            "this run measures its own."
        )
        return False
    return True


def _keep(made: Path, kept: Path, state: State) -> None:
    """Copy moments to their place in the ledger's folder, with keyed hashes."""
    with atomic_folder(kept, overwrite=True, private=True) as partial:
        shutil.copytree(made, partial, dirs_exist_ok=True)
        key_rows(partial, state.key())
        held = {"content": content_of(partial), "files": files_of(partial)}
        write_manifest(partial, {**(read_manifest(partial) or {}), **held})
