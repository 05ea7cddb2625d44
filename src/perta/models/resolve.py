"""From what the user names to a local checkpoint folder.

folder with safetensors ── as it is
adapter folder ─────────── merged into its base, kept in the cache; a task vector of LoRA is not
quantised folder ───────── dequantised, kept in the cache
GGUF file ──────────────── dequantised to float32, kept in the cache
hub id ─────────────────── downloaded by huggingface_hub, into its own cache
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from blake3 import blake3

from perta.errors import CheckpointError, CheckpointNotFoundError, ConfigError, first_line
from perta.models.complete import check_checkpoint
from perta.models.formats.adapters import adapter_settings, merge_adapter
from perta.models.formats.gguf import read_gguf
from perta.models.formats.low_rank import is_adapter, steps_of
from perta.models.formats.quantised import WRITTEN, dequantise, stored_format
from perta.models.load import plain_errors, save_model
from perta.options import at_home
from perta.progress import say
from perta.store.atomic import atomic_folder, recover
from perta.store.checkpoint import GGUF, open_index
from perta.store.fingerprint import content_of, files_of, fingerprint, is_as_written
from perta.store.record import ADAPTER_CONFIG, make_manifest, write_manifest
from perta.version import __version__

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def cache_folder() -> Path:
    """Where converted and downloaded models are kept: `$PERTA_CACHE` or `~/.cache/perta`."""
    root = os.environ.get("PERTA_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "perta"
    )
    if (folder := at_home(root)).parts[0] == "~":
        raise ConfigError("This user has no home folder. Let PERTA_CACHE name one for the cache.")
    return folder


def resolve_checkpoint(
    reference: str | Path, *, base: str | Path | None = None, exact: bool = False
) -> Path:
    """The local safetensors folder, with config and tokenizer, that a reference stands for.

    It may be a folder, a PEFT adapter folder (of `base`, or the model it names), a GGUF file or a
    hub id. With `exact` an adapter is merged into float32 weights, whatever the type of its base:
    what it adds is a task vector, most of which that type may round away. CheckpointNotFoundError
    where nothing is there, CheckpointError where it cannot be read or is of another model than it
    says.
    """
    if base is not None and at_home(base).resolve() == at_home(reference).resolve():
        base = None  # an adapter that is the base model is not its own base
    return _resolve(reference, base=base, exact=exact)


def resolve_tuned(reference: str | Path, base: Path) -> Path:
    """The same for a checkpoint tuned from a resolved base, exact; errors as there.

    An adapter of plain LoRA stays as it is: its task vector is two thin factors.
    """
    path = at_home(reference)
    if is_adapter(path) and steps_of(path, open_index(base)) is not None:
        return path
    return resolve_checkpoint(reference, base=base, exact=True)


def quantised_checkpoint(reference: str | Path) -> Path | None:
    """The folder that a reference names as it is stored, where that is in FP8 or MXFP4."""
    folder, kind = _stored_as(reference)
    return folder if kind in WRITTEN else None


def tell_plain(reference: str | Path) -> None:
    """Say where a result is stored in plain numbers, because its model's format is not written."""
    if (kind := _stored_as(reference)[1]) and kind not in WRITTEN:
        say(
            f"{reference} is quantised by {kind}, which is not written: the result is stored in "
            "plain numbers. Quantise it again where you load it, or edit an adapter of it."
        )


def _stored_as(reference: str | Path) -> tuple[Path, str | None]:
    """The folder or file that a reference names, and the format it is quantised in, if it is."""
    path = at_home(reference)
    if not path.exists():
        path = _from_hub(str(reference), None)
    is_plain = path.is_file() or (path / ADAPTER_CONFIG).exists()
    return path, None if is_plain else stored_format(path)


def _resolve(
    reference: str | Path,
    above: tuple[Path, ...] = (),
    *,
    base: str | Path | None = None,
    exact: bool = False,
    revision: str | None = None,
) -> Path:
    text = str(reference)
    path = at_home(text)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _from_gguf(path)
        raise CheckpointError(
            f"{text} is a file. Give the folder of a Hugging Face checkpoint, or a .gguf file."
        )
    if path.is_dir():
        if (path / ADAPTER_CONFIG).exists():
            return _from_adapter(path, base, exact, above)
        if (path / GGUF).is_file() and not any(path.glob("*.safetensors")):
            return _from_gguf(path / GGUF)
        return _whole(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or text.endswith(".gguf"):
        raise CheckpointNotFoundError(
            f"There is no checkpoint at {text}. Give a folder with config.json and safetensors "
            "files, a PEFT adapter folder, a .gguf file, or a hub id such as owner/name."
        )
    return _whole(_from_hub(text, revision))


def _whole(folder: Path) -> Path:
    """The folder, or what is made of it where it is quantised, compared with its configuration."""
    if stored_format(folder):
        made_by = f"{fingerprint(folder)} {__version__}"
        make = partial(dequantise, folder)
        folder = _cached("plain", made_by, f"Dequantising {folder.name}", make)
    with plain_errors(folder):
        check_checkpoint(folder)
    return folder


def _from_gguf(path: Path) -> Path:
    made_by = f"{fingerprint(path)} {__version__} {version('transformers')} {version('gguf')}"
    title = f"Converting {path.name} to safetensors"
    return _cached("gguf", made_by, title, lambda new: save_model(*read_gguf(path), new, None))


def _cached(kind: str, made_by: str, title: str, make: Callable[[Path], object]) -> Path:
    """A folder of the cache that is still as it was written; otherwise it is made now."""
    target = cache_folder() / kind / blake3(made_by.encode()).hexdigest()[:24]
    recover(target)
    if not is_as_written(target):
        if target.is_dir():
            say(f"{target} is not as it was written; it is made again")
        say(f"{title} (once)")
        with atomic_folder(target, overwrite=True, private=True) as new:
            make(new)
            content, files = content_of(new), files_of(new)
            write_manifest(new, make_manifest("convert", {}, {}, content=content, files=files))
    return target


def _from_adapter(
    path: Path, base: str | Path | None, exact: bool, above: tuple[Path, ...] = ()
) -> Path:
    base_folder = base_of_adapter(path, base, above)
    # All that the result depends on: both inputs, the type it is stored in, and what merges.
    makers = f"{__version__} {version('peft')} {version('transformers')}"
    parts = (fingerprint(base_folder), fingerprint(path), "float32" if exact else "", makers)
    merge = partial(merge_adapter, path, base_folder, exact=exact)
    title = f"Merging adapter {path.name} into its base"
    return _cached("merged", "\n".join(parts), title, merge)


def base_of_adapter(
    adapter: Path, given: str | Path | None = None, above: tuple[Path, ...] = ()
) -> Path:
    """The local folder of the model that an adapter belongs to; it may be the adapter's own.

    `given` stands in place of the one that the adapter names; `above` are adapters that wait for
    it. CheckpointNotFoundError where there is none, CheckpointError where adapters name each other.
    """
    settings = adapter_settings(adapter)
    named = given or settings.get("base_model_name_or_path")
    cure = (
        f"Set base_model_name_or_path in {adapter / ADAPTER_CONFIG} to the folder or hub id of the "
        "model that it was tuned on."
    )
    if not named:
        raise CheckpointNotFoundError(f"The adapter {adapter} does not name its base model. {cure}")
    folder = at_home(str(named))
    if folder.is_dir() and folder.resolve() == adapter.resolve():
        return _whole(folder)
    waiting = (*above, adapter.resolve())
    if folder.resolve() in waiting:
        raise CheckpointError(
            f"The adapters {adapter} and {folder} name each other as base. {cure}"
        )
    try:
        return _resolve(str(named), waiting, revision=None if given else settings.get("revision"))
    except CheckpointNotFoundError as error:
        if given:
            raise
        raise CheckpointNotFoundError(
            f"The base model {named} that the adapter {adapter} names is not there: {error} {cure}"
        ) from error


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = list(_HUB_FILES)
        return Path(str(snapshot_download(name, revision=revision, allow_patterns=patterns)))
    except Exception as error:  # the library raises a dozen unrelated classes here
        raise CheckpointNotFoundError(
            f"{name} is no folder here, and could not be fetched from the hub: {first_line(error)} "
            "Check the name and the network, or give a local folder."
        ) from error
