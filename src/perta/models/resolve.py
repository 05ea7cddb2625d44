"""From what the user names to a local checkpoint folder.

folder with safetensors ── as it is
LoRA adapter folder ────── merged into its base, kept in the cache
GGUF file ──────────────── dequantised to float32, kept in the cache
hub id ─────────────────── downloaded by huggingface_hub, into its own cache
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from perta.errors import CheckpointError, CheckpointNotFoundError, first_line
from perta.models.complete import check_checkpoint
from perta.models.load import load_model, load_tokenizer, plain_errors, save_model, stored_dtype
from perta.options import ComputeConfig
from perta.progress import say
from perta.store.atomic import atomic_folder
from perta.store.checkpoint import ADAPTER_CONFIG, copy_companions
from perta.store.fingerprint import fingerprint

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def cache_folder() -> Path:
    """Where converted and downloaded models are kept: `$PERTA_CACHE` or `~/.cache/perta`."""
    root = os.environ.get("PERTA_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "perta"
    )
    return Path(root).expanduser()


def resolve_checkpoint(
    reference: str | Path, *, base: str | Path | None = None, exact: bool = False
) -> Path:
    """The local safetensors folder a reference stands for.

    Args:
        reference: folder, LoRA adapter folder, GGUF file or hub id.
        base: model an adapter belongs to; by default the one its config names.
        exact: merge an adapter into float32 weights, whatever the type of its base: what it adds
            is a task vector, most of which the base's type may round away.

    Returns:
        A folder with config, tokenizer and safetensors files.

    Raises:
        CheckpointNotFoundError: nothing is there, or the hub cannot be reached.
        CheckpointError: an adapter that cannot be merged, a GGUF file that cannot be read, or a
            checkpoint that is quantised or of another model than its configuration.
    """
    text = str(reference)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _from_gguf(path)
        raise CheckpointError(
            f"{text} is a file. Give the folder of a Hugging Face checkpoint, or a .gguf file."
        )
    if path.is_dir():
        if (path / ADAPTER_CONFIG).exists():
            return _from_adapter(path, base, exact)
        return _whole(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or text.endswith(".gguf"):
        raise CheckpointNotFoundError(
            f"There is no checkpoint at {text}. Give a folder with config.json and safetensors "
            "files, a LoRA adapter folder, a .gguf file, or a hub id such as owner/name."
        )
    return _whole(_from_hub(text))


def _whole(folder: Path) -> Path:
    """The folder, compared with its configuration."""
    with plain_errors(folder):
        check_checkpoint(folder)
    return folder


def _from_gguf(path: Path) -> Path:
    target = cache_folder() / "gguf" / fingerprint(path)[:24]
    if target.is_dir():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"Converting {path.name} to safetensors (once)")
    place: dict[str, Any] = {"gguf_file": path.name}
    with plain_errors(path, "GGUF file"):
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **place)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
    # The weights are plain float32 now; a left-over quantisation record would make the saved
    # model unloadable.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model._weight_conversions = None  # type: ignore[assignment]  # GGUF tensor names are not the ones to save under
    with atomic_folder(target, overwrite=True) as partial:
        save_model(model, tokenizer, partial, None)
    return target


def _from_adapter(path: Path, base: str | Path | None, exact: bool) -> Path:
    settings = json.loads((path / ADAPTER_CONFIG).read_text("utf-8"))
    named = base or settings.get("base_model_name_or_path")
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} is a {settings.get('peft_type')} adapter; only LoRA adapters can be merged "
            "into weights."
        )
    if not (path / "adapter_model.safetensors").exists():
        raise CheckpointError(
            f"{path} has no adapter_model.safetensors. Pickle files are never loaded; save the "
            "adapter again with safe_serialization."
        )
    if not named:
        raise CheckpointError(f"{path} does not name its base model. Pass it with --base.")
    base_folder = resolve_checkpoint(named)
    dtype = torch.float32 if exact else stored_dtype(base_folder)
    kind = str(dtype).removeprefix("torch.")
    key = f"{fingerprint(base_folder)[:12]}{fingerprint(path)[:12]}-{kind}"
    target = cache_folder() / "merged" / key
    if not target.is_dir():
        _merge_adapter(path, base_folder, target, dtype)
    return target


def _merge_adapter(path: Path, base_folder: Path, target: Path, dtype: torch.dtype) -> None:
    from peft import PeftModel

    say(f"Merging adapter {path.name} into its base (once)")
    model = load_model(base_folder, ComputeConfig(device="cpu", dtype="float32"))
    with plain_errors(path, "adapter"):
        merged = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    # Added in float32, rounded once.
    merged.to(dtype)
    with atomic_folder(target, overwrite=True) as partial:
        save_model(merged, load_tokenizer(base_folder), partial, base_folder)
        # An adapter folder may bring its own tokenizer or chat template.
        copy_companions(path, partial)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(str(snapshot_download(name, allow_patterns=list(_HUB_FILES))))
    except Exception as error:  # the library raises a dozen unrelated classes here
        raise CheckpointNotFoundError(
            f"{name} is no folder here, and could not be fetched from the hub: {first_line(error)} "
            "Check the name and the network, or give a local folder."
        ) from error
