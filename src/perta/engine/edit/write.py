"""The edit: θ_u = θ_full − α · W ⊙ direction [+ β · (θ_r − θ₀)], streamed from files to a file.

The direction is θ_f − θ₀ for most methods; `perta methods` says which takes what.

    plan    headers of every input: what belongs together; stops if anything is wrong
    passes  what no single chunk can know: averages over rows, the smallest value kept
    stream  chunk by chunk: read, edit, write
    write   all of it, into a folder, with the model card

The output has θ_full's files, header bytes and tensor places.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perta.engine.edit._chunks import CHUNK, Blocks
from perta.engine.edit._output import create_files, write_config
from perta.engine.edit._passes import average_importance, find_cuts, find_unused
from perta.engine.edit.plan import EditInputs, Target, open_sources, plan_edit, share_of_examples
from perta.engine.edit.stream import Editor, Stored, TensorSummary, edit_all, stored_of
from perta.errors import CheckpointError, some
from perta.methods.card import model_card
from perta.methods.method import Edit
from perta.methods.registry import get_method, refuse_auto, with_defaults
from perta.models.load import transposed_weights
from perta.options import SaveType, WeightingConfig
from perta.progress import track, warn
from perta.store.checkpoint import copy_companions, open_index

_LEAST_STORED = 0.1
"""Share of the wanted step below which an edit stops: it would report forgetting that is not in
the files."""

CURE = (
    "Store a wider type (--save-dtype float32), tune the forget checkpoint with a higher learning "
    "rate, or raise --scaling-coef."
)


@dataclass(frozen=True)
class EditSummary:
    """What the edit did."""

    stored: Stored  # what rounding left of the step, over all edited tensors
    # Every edited tensor, in the order of θ_full's files; a tied output head is part of its
    # embedding.
    tensors: tuple[TensorSummary, ...]
    edited: int  # number of weights edited
    copied: int  # number of values copied from θ_full as they are
    seconds: float  # duration of the edit


def write_edit(
    folder: Path,
    inputs: EditInputs,
    weighting: WeightingConfig,
    *,
    onto: Path | None = None,
    save_dtype: SaveType = "full",
    wide: Collection[str] = (),
    threads: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
    chunk: int = CHUNK,
) -> EditSummary:
    """Write weights, companion files and model card into an existing empty folder.

    Args:
        folder: such as one from `atomic_folder`.
        inputs: local folders to read.
        weighting: method and its settings.
        onto: checkpoint that is copied and subtracted from, in place of θ_full; what is
            subtracted stays the same.
        save_dtype: type of the output. θ_full is cast to it, to the nearest, and then edited.
        wide: tensors that are stored in float32 all the same.
        threads: threads that read, compute and write [default: all cores, at most 8].
        fingerprints: name of each input -> hash of its content, for the model card.
        chunk: elements worked on at once; it also bounds the reach of the method `random`.

    Raises:
        ConfigError: unknown method, missing importance, or a pattern that matches nothing.
        CheckpointMismatchError: the inputs differ in tensors or shapes.
        CorruptCheckpointError: an input is damaged or holds NaN or Inf.
        CheckpointError: an input is quantised, the forget checkpoint equals the base, W is 0
            everywhere, or rounding loses nearly all of the step.
        DivergenceError: the result does not fit the type of the output.
    """
    started = time.perf_counter()
    weighting = with_defaults(weighting)
    refuse_auto(weighting)
    method, onto = get_method(weighting.method), onto or inputs.full
    source = open_index(onto)
    targets = plan_edit(source, open_sources(method, inputs), weighting)
    worker_count = threads or min(8, os.cpu_count() or 1)
    if method.weighs_retain:
        _tell_unused(targets, find_unused(targets, chunk, worker_count))
    transposed = transposed_weights(onto) if weighting.granularity == "row" else frozenset()
    averages = average_importance(targets, weighting, transposed, chunk, worker_count)
    blocks = Blocks(method, weighting, chunk, averages, _forget_share(method, inputs))
    cuts = find_cuts(targets, blocks, worker_count)
    outputs = create_files(source, folder, save_dtype, wide).tensors
    with track("edit", len(targets)) as advance:
        summaries = edit_all(targets, Editor(outputs, blocks, cuts), worker_count, advance)
    _check_effect(summaries, method, inputs)
    stored = stored_of(summaries)
    check_stored(stored)
    copy_companions(onto, folder)
    write_config(onto, folder, save_dtype)
    (folder / "README.md").write_text(model_card(weighting, fingerprints or {}), "utf-8")
    open_index(folder)
    edited = sum(target.full.numel for target in targets if target.sources)
    copied = sum(target.full.numel for target in targets if not target.sources)
    return EditSummary(stored, summaries, edited, copied, time.perf_counter() - started)


def _tell_unused(targets: Sequence[Target], unused: Collection[str]) -> None:
    """Name what is subtracted whole because retention does not depend on it; stop if all is."""
    names = [target.full.name for target in targets if target.sources and not target.alias_of]
    left = [name for name in names if name in unused]
    if left and len(left) == len(names):
        raise CheckpointError(
            "The importance on the retain set is 0 in every tensor to edit, so nothing says what "
            "must be kept. Measure it again on examples that the model can be wrong about."
        )
    if left:
        warn(
            f"No retained example depends on {some(left)}: the importance on the retain set is 0 "
            "throughout, as with experts that none of its tokens reached. What the forget set "
            f"changed there goes by the method's formula; to keep it, --exclude '{left[0]}'."
        )


def _forget_share(method: Edit, inputs: EditInputs) -> float:
    forget, retain = inputs.forget_importance, inputs.retain_importance
    if not method.needs.set_sizes or forget is None or retain is None:
        return 0.5
    return share_of_examples(forget, retain)


def _check_effect(summaries: Sequence[TensorSummary], method: Edit, inputs: EditInputs) -> None:
    """Stop at an edit that would report forgetting where none happened."""
    if not any(summary.task_vector_norm for summary in summaries):
        raise _no_direction(method, inputs)
    if method.needs.importance and not any(summary.mean_weighting for summary in summaries):
        cure = " Lower its setting `selection`." if method.direction == "full" else ""
        raise CheckpointError(
            f"`{method.name}` gives every weight the share 0, so the edit would forget nothing; "
            f"{inputs.forget_importance} shows no weight that matters to the forget set.{cure}"
        )


def check_stored(stored: Stored) -> None:
    """Stop where next to nothing of the wanted step is in the files."""
    if stored.stored_share is not None and abs(stored.stored_share) < _LEAST_STORED:
        raise CheckpointError(
            f"Of the step that the edit takes {stored.stored_share:.1%} would be stored: it is too "
            "small beside the weights for the type of the output. "
            f"{CURE} Nothing was written."
        )


def _no_direction(method: Edit, inputs: EditInputs) -> CheckpointError:
    if method.direction != "forget - base":
        return CheckpointError(
            f"{inputs.full} equals {inputs.base} in every tensor to edit, so the edit would change "
            "nothing. Give the model before it saw the data as --base."
        )
    if len(inputs.forget_checkpoints) > 1:
        return CheckpointError(
            f"`{method.name}` leaves nothing of {len(inputs.forget_checkpoints)} task vectors: the "
            "forget checkpoints equal the base, or agree nowhere. Tune them with a higher learning "
            "rate, or give fewer."
        )
    return CheckpointError(
        f"{inputs.forget_checkpoints[0]} equals {inputs.base} in every tensor to edit, so the edit "
        "would forget nothing. Tune the base on the forget set with `perta finetune`, with a "
        "learning rate high enough to change the stored values."
    )
