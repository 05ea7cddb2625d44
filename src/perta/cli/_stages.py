"""Commands of one stage each."""

from __future__ import annotations

from pathlib import Path

from perta.cli._app import AsJson, app, note, tell, tell_edit
from perta.stages.settings import (
    EditConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    MergeMomentsConfig,
    MomentsConfig,
    PeopleConfig,
    TrainConfig,
)


@app.command
def finetune(config: FinetuneConfig, *, json: AsJson = False) -> None:
    """Tune a checkpoint on a data set; the loss is on answer tokens only."""
    from perta.stages.finetune import finetune_checkpoint

    output = finetune_checkpoint(config)
    tell(json, f"Tuned checkpoint: {output}", output=output)


@app.command
def importance(config: ImportanceConfig, *, json: AsJson = False) -> None:
    """Measure the importance of every weight for a data set."""
    from perta.stages.importance import compute_importance

    output = compute_importance(config)
    tell(json, f"Importance: {output}", output=output)


@app.command
def moments(config: MomentsConfig, *, json: AsJson = False) -> None:
    """Measure second moments of every linear layer's inputs, for the structured methods."""
    from perta.stages.moments import compute_moments

    output = compute_moments(config)
    tell(json, f"Moments: {output}", output=output)


@app.command(name="merge-moments")
def merge_moments(
    *folders: Path, output: Path, overwrite: bool = False, json: AsJson = False
) -> None:
    """Add moments of several sets, such as saved ones of a retain set that has grown.

    Args:
        folders: outputs of `perta moments` for sets that have no row in common.
        output: folder for the moments of all sets together.
        overwrite: replace an output that is there already.
        json: print where it is as a JSON object.
    """
    from perta.stages.moments import merge_moments

    made = merge_moments(MergeMomentsConfig(folders=folders, output=output, overwrite=overwrite))
    tell(json, f"Moments: {made}", output=made)


@app.command
def edit(config: EditConfig, *, json: AsJson = False) -> None:
    """Edit a checkpoint: full - alpha * W * (forget checkpoint - base), tensor by tensor."""
    from perta.stages.edit import direction_folder, edit_checkpoint

    tell_edit(json, "Unlearned", edit_checkpoint(config), direction_folder(config))


@app.command
def train(config: TrainConfig, *, json: AsJson = False) -> None:
    """Train the full model until it has forgotten: gradient ascent, NPO, RMU and others."""
    from perta.stages.train import train_checkpoint

    output = train_checkpoint(config)
    tell(json, f"Unlearned checkpoint: {output}", output=output)


@app.command
def evaluate(config: EvaluateConfig, *, json: AsJson = False) -> None:
    """Measure how well a checkpoint answers forget, retain and held-out examples."""
    from perta.stages.evaluate import evaluate_checkpoint
    from perta.terminal import print_comparison, print_json, print_samples, without_rows

    results = evaluate_checkpoint(config)
    if json:
        print_json(without_rows(results))
        return
    print_comparison({Path(config.checkpoint).name: results})
    print_samples({Path(config.checkpoint).name: results}, config.show_samples)
    note(f"Results: {config.output}")


@app.command
def people(config: PeopleConfig, *, json: AsJson = False) -> None:
    """Write question/answer pairs about fictitious people: forget, retain and all of them."""
    from perta.stages.bench import write_people

    files = write_people(config)
    tell(json, "\n".join(map(str, files)), files=list(files))
