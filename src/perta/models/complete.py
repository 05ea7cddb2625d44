"""Whether a checkpoint holds the model that its configuration describes, no more and no less.

    config.json ── settings that cannot be ── model without values ── what the files hold

transformers fills a tensor that no file holds with random numbers, and leaves out one it has no
place for. Here both stop the run, before any value is read. What may be missing is what the
library itself lets go: tied weights and buffers it computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perta.errors import CheckpointError, CorruptCheckpointError, some
from perta.models.trust import LOCAL, NO_CODE, read_config, settings_in
from perta.store.checkpoint import (
    INDEX,
    CheckpointIndex,
    TensorEntry,
    is_constant,
    is_float,
    open_index,
)
from perta.store.fingerprint import states_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYERS = re.compile(r"^(num|n|encoder|decoder)_([a-z]+_)*(layers?|blocks?)$|^(depth|block_count)$")
"""Settings that say how many layers there are, each of which holds a tensor."""

_PARTS = re.compile(r"^(num|n)_([a-z]+_)*(experts?|heads?|labels|groups?)$|^(head|expert)_count")
"""Settings that say how many parts a layer has, which may be rows of one tensor."""

_SIZES = re.compile(r"position|ctx|context|length|size|dim")
_LARGEST_SIZE = 1 << 31
"""No model has so wide a tensor, or so many positions; what computes tables may take it whole."""

_BUFFER_SHARE, _BUFFER_BYTES = 4, 1 << 30
"""Room for what a model computes itself, as a multiple of its files and in bytes."""

_LOOKED_AT = ("*.safetensors", INDEX, "config.json")
_passed: set[object] = set()
"""States of the files of checkpoints that were found whole in this process."""

_PACKED = ("weight", "_blocks", "_scales", "qzeros")
_SCALES = re.compile(
    r"(weight_scale(_inv|_2)?|weight_zero_point|absmax|quant_map|SCB|input_scale)$"
)


def check_checkpoint(folder: Path) -> None:
    """Stop at a checkpoint that is quantised, lacks tensors, or holds some of another model.

    Only headers are read, and config.json, once as long as no file changes. A folder without one,
    or with a kind of model that transformers does not know, is compared with nothing.
    """
    files = (file for name in _LOOKED_AT for file in sorted(folder.glob(name)))
    states = states_of(file for file in files if file.is_file())
    if states in _passed:
        return
    _check(folder)
    if states:
        _passed.add(states)


def _check(folder: Path) -> None:
    index = open_index(folder)
    _check_settings(index)
    model = described_model(folder)
    if model is None:
        return
    held = sum(entry.nbytes for entry in index.tensors.values())
    made = sum(buffer.nbytes for buffer in model.buffers())
    if made > _BUFFER_SHARE * held + _BUFFER_BYTES:
        raise CheckpointError(
            f"{folder}: the model of config.json needs {made:,} bytes of tables that it computes "
            f"itself, and its files have {held:,}. A setting such as max_position_embeddings is "
            "far too large; take config.json from where the checkpoint came from."
        )
    values = {
        entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for entry in index.tensors.values()
    }
    loaded: Any = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=values,
        device_map={"": "meta"},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_loaded(loaded[1], index)


def described_model(folder: Path) -> PreTrainedModel | None:
    """The model of a folder's config.json, without values, on `meta`; None if it tells of none."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if read_config(folder).get("model_type") not in CONFIG_MAPPING:
        return None
    config = AutoConfig.from_pretrained(folder, **LOCAL)
    loader = loader_of(config)
    if type(config) not in loader._model_mapping:
        return None
    with torch.device("meta"):
        model: PreTrainedModel = loader.from_config(config, **NO_CODE)
    return model


def loader_of(config: PreTrainedConfig) -> Any:
    """The class that loads all of a model: with what reads images, where it does."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # Some kinds have a class for the language part alone too, which would lose the rest.
    reads_images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def check_loaded(info: Mapping[str, Any], place: CheckpointIndex | Path) -> None:
    """Stop where `from_pretrained` tells of weights missing, left over or of another shape."""
    index = place if isinstance(place, CheckpointIndex) else None
    where = index.folder if index else place
    cure = (
        "The files are not all there, or config.json is of another model (its number of layers, "
        "tie_word_embeddings); copy or download the checkpoint again."
    )
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    unknown = [n for n in unknown if not (index and (e := index.find(n)) and is_constant(e))]
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise CorruptCheckpointError(
            f"{where}: {name} is {tuple(stored)} in the files, but {tuple(wanted)} in the "
            f"model that config.json describes. {cure}"
        )
    if missing:
        raise CorruptCheckpointError(
            f"{where}: no file holds {some(missing)}, which the model of config.json "
            f"needs and would run without, on random numbers. {cure}"
        )
    if unknown:
        raise CorruptCheckpointError(
            f"{where}: the model of config.json has no place for {some(unknown)}, which "
            f"the files hold, and would run without. {cure}"
        )


def _check_settings(index: CheckpointIndex) -> None:
    """Stop at what config.json alone shows to be wrong, before anything is built from it."""
    folder, settings = index.folder, read_config(index.folder)
    refuse_quantised(index)
    shards = sorted(path.name for path in folder.glob("shard-*-model-*-of-*.safetensors"))
    if other := settings.get("transformers_weights") or next(iter(shards), None):
        raise CheckpointError(
            f"{folder}: transformers would read {other} in place of the files that are checked "
            "here. Save the model with `model.save_pretrained(folder)`."
        )
    check_counts(folder, settings, [entry.shape for entry in index.tensors.values()])


def check_counts(
    place: Path, settings: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]
) -> None:
    """Stop with a CheckpointError at a setting that counts more parts than files can hold."""
    widest = max((size for shape in shapes for size in shape), default=0)
    limits = {_LAYERS: len(shapes), _PARTS: max(widest, len(shapes)), _SIZES: _LARGEST_SIZE}
    for setting, value in settings_in(settings):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        last = setting.rpartition(".")[2]
        if any(value > limit and name.search(last) for name, limit in limits.items()):
            raise CheckpointError(
                f"{place}: its configuration says {setting} = {value:,}, but the files have "
                f"{len(shapes)} tensors, the widest of {widest:,}. Take the configuration from "
                "where the checkpoint came from."
            )


def refuse_quantised(index: CheckpointIndex) -> None:
    """Stop with a CheckpointError at a checkpoint whose configuration or tensors are quantised."""
    settings = read_config(index.folder)
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    found = (part.get(name) for part in parts for name in _QUANTISED)
    if record := next(filter(None, found), None):
        method = record.get("quant_method") if isinstance(record, dict) else None
        raise CheckpointError(
            f"{index.folder} is quantised ({method or 'unknown'}, says its config.json). {_WAY_OUT}"
        )
    for entry in index.tensors.values():
        if _is_packed(entry):
            kind = str(entry.dtype).removeprefix("torch.")
            raise CheckpointError(f"{entry.file}: {entry.name} is quantised ({kind}). {_WAY_OUT}")


_QUANTISED = ("quantization_config", "compression_config")
_WAY_OUT = (
    "Use the bfloat16, float16 or float32 checkpoint that it was made from, or load it with "
    "transformers, `dequantize` it and save that; edit there, and quantise the result."
)


def _is_packed(entry: TensorEntry) -> bool:
    last = entry.name.rpartition(".")[2]
    if entry.dtype.is_floating_point:
        return not is_float(entry) or bool(_SCALES.search(last))
    return any(part in last for part in _PACKED)
