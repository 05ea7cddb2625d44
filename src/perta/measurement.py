"""Run a stage that measures one checkpoint on one data set: importance or moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta.checkpoint import fingerprint
from perta.config_stages import ImportanceConfig, MomentsConfig
from perta.data import EncodedSet, encode_examples, load_examples
from perta.manifest import settings_of
from perta.model import (
    load_model,
    load_tokenizer,
    longest_input,
    pad_id,
    pick_device,
    pick_dtype,
    resolve_checkpoint,
)
from perta.stage import run_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """What is measured on what.

    Attributes:
        checkpoint: folder of the model.
        encoded: token sequences of the set.
        pad: padding token.
        settings: resolved settings of the stage, with the device and type that were picked.
        inputs: fingerprints of `checkpoint` and `data`.
    """

    checkpoint: Path
    encoded: EncodedSet
    pad: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]


def run_measurement(
    stage: str,
    config: ImportanceConfig | MomentsConfig,
    measure: Callable[[PreTrainedModel, Subject, Path], Mapping[str, Any]],
) -> Path:
    """Check all input, then measure into a new folder or reuse the finished one.

    Args:
        stage: name of the stage.
        config: its inputs, output and settings.
        measure: writes what it measures into the folder it is given; returns results worth
            recording. The model is loaded for it alone: a reused output costs no model.

    Returns:
        The output folder.

    Raises:
        PertaError: input that cannot be used.
    """
    checkpoint = resolve_checkpoint(config.checkpoint)
    examples = load_examples(config.data, config.data_config)
    tokenizer = load_tokenizer(checkpoint)
    longest = longest_input(checkpoint)
    encoded = encode_examples(examples, tokenizer, config.data_config, longest=longest)
    settings = {
        **settings_of(config),
        "device": pick_device(config.compute).type,
        "dtype": str(pick_dtype(config.compute)).removeprefix("torch."),
    }
    inputs = {"checkpoint": fingerprint(checkpoint), "data": examples.fingerprint}
    subject = Subject(checkpoint, encoded, pad_id(tokenizer), settings, inputs)

    def make(folder: Path) -> Mapping[str, Any]:
        results = measure(load_model(checkpoint, config.compute), subject, folder)
        return {**results, "skipped_rows": list(encoded.skipped)}

    run_stage(
        stage,
        config.output,
        settings,
        inputs,
        make,
        reads=[checkpoint, examples.source],
        overwrite=config.overwrite,
    )
    return config.output
