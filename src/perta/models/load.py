"""Models and tokenizers: loaded, asked for their limits, saved."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, partialmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perta.data.batch import rows_per_pass
from perta.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    PertaError,
    first_line,
    shortage,
)
from perta.models.complete import check_checkpoint, check_loaded, described_model, loader_of
from perta.models.precision import product_type
from perta.models.trust import LOCAL, read_config
from perta.options import ComputeConfig, SaveType
from perta.parallel import everywhere
from perta.store.arithmetic import Place, round_as_stored
from perta.store.checkpoint import copy_companions, open_index
from perta.store.record import ADAPTER_CONFIG
from perta.temporary import temporarily

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    folder: Path,
    compute: ComputeConfig,
    *,
    dtype: torch.dtype | None = None,
    waits: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for computing, in evaluation mode; `dtype` outdoes `compute`'s.

    One that `waits` stays in the computer's memory, and is what `compute` says all the same.
    Weights stored in a wider type are rounded up or down at random, as those of an edit are.
    CheckpointError where it cannot be loaded, is damaged or not finite.
    """
    from transformers import AutoConfig

    index = open_index(folder)
    _require_config(folder)
    device = pick_device(compute)
    with plain_errors(folder):
        check_checkpoint(folder)
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        dtype = dtype or product_type(compute.dtype, device, _width(config.to_dict()))
        load = partial(
            loader_of(config).from_pretrained,
            folder,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **LOCAL,
        )
        loaded: Any = load(dtype=dtype)
        check_loaded(loaded[1], index)
        model: PreTrainedModel = loaded[0]
        if dtype == torch.bfloat16 != stored_dtype(folder):
            _round_again(model, load(dtype=torch.float32)[0])
    torch.nn.Module.to(model, "cpu" if waits else device)
    _require_finite(model, folder)
    model.eval()
    return model


def _round_again(model: PreTrainedModel, wide: PreTrainedModel) -> None:
    """Round stored weights as the edit does: to the nearest, a small step would be lost."""
    for (name, parameter), (_, exact) in zip(
        model.named_parameters(), wide.named_parameters(), strict=True
    ):
        parameter.data = round_as_stored(exact.data, parameter.dtype, Place(0, name))


_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; a CheckpointError where it holds none."""
    from transformers import AutoTokenizer

    try:
        with plain_errors(folder, "tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **LOCAL)
    except CheckpointError as error:
        pieces = [name for name in _PIECES if (folder / name).is_file()]
        if not pieces or (folder / "tokenizer.json").is_file() or find_spec("sentencepiece"):
            raise
        raise CheckpointError(
            f"{folder}: to read {pieces[0]} takes the packages sentencepiece and protobuf: "
            "`pip install sentencepiece protobuf`. Or save the tokenizer as tokenizer.json: "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` where they are."
        ) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"The tokenizer in {folder} has no end-of-sequence token. Set `eos_token` in its "
            "tokenizer_config.json."
        )
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token for padding: the tokenizer's own, else eos (masks come from true lengths)."""
    chosen = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if chosen is None else chosen)


def longest_input(model_or_folder: PreTrainedModel | Path) -> int | None:
    """Most tokens the model, or its language part, has positions for, if its config says."""
    if isinstance(model_or_folder, Path):
        settings = read_config(model_or_folder)
    else:
        settings = model_or_folder.config.to_dict()
    text = settings.get("text_config")
    parts = [settings, *([text] if isinstance(text, dict) else [])]
    names = ("max_position_embeddings", "n_positions")
    value = next((v for part in parts for n in names if (v := part.get(n)) is not None), None)
    if value is not None and (type(value) is not int or value < _LEAST_POSITIONS):
        raise CheckpointError(
            f"The model's config.json says max_position_embeddings = {value!r}; that many tokens "
            "hold no question and answer. Take config.json from where the checkpoint came from."
        )
    return value


_LEAST_POSITIONS = 2  # a token that is read, and one that is predicted from it


def pick_device(compute: ComputeConfig) -> torch.device:
    """The device `compute` asks for; a ConfigError where it is not there."""
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    name = compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    units: Any = {"cuda": torch.cuda, "mps": torch.backends.mps}
    if name != "cpu" and not units[name].is_available():
        raise ConfigError(f"--device {name}: torch sees no such device here. Use --device auto.")
    if name == "cuda":
        everywhere(_repeat_on_gpus)
    return torch.device(name)


def batch_of(compute: ComputeConfig, usual: int) -> int:
    """Rows of a pass in which nothing is trained: what was asked for, else by the device."""
    return compute.pass_batch_size or rows_per_pass(usual, pick_device(compute))


def _repeat_on_gpus() -> None:
    """Take the algorithms that give the same bits twice; torch warns of what has none."""
    from transformers import AttentionInterface

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing reads what it has not written, and filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Kernels of attention have such algorithms too, but take them only where torch does not warn.
    AttentionInterface.register("sdpa", _strict_attention)


def _strict_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """The library's attention, to which torch gives no other algorithms, forward and backward."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, *args, **named)
    query, key, value = _Switch.apply("warn", query, key, value)  # type: ignore[no-untyped-call]
    with temporarily(torch.set_deterministic_debug_mode, "error", "warn"):
        found, weights = sdpa_attention_forward(module, query, key, value, *args, **named)
    (found,) = _Switch.apply("error", found)  # type: ignore[no-untyped-call]
    return found, weights


class _Switch(torch.autograd.Function):
    """Tensors as they are; when their gradients come, torch warns of algorithms or takes none."""

    @staticmethod
    def forward(ctx: Any, mode: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.mode = mode
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        torch.set_deterministic_debug_mode(ctx.mode)
        return None, *gradients


def picked(compute: ComputeConfig, checkpoint: Path) -> dict[str, str]:
    """Device and type that a run of a model computes on and in, by name, for its record."""
    device = pick_device(compute)
    dtype = product_type(compute.dtype, device, _width(read_config(checkpoint)))
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}


def _width(settings: Mapping[str, Any]) -> int | None:
    """Hidden size of a model's language part, if its config names one."""
    text = settings.get("text_config")
    parts = [*([text] if isinstance(text, dict) else []), settings]
    names = ("hidden_size", "n_embd", "d_model")
    value = next((v for part in parts for n in names if (v := part.get(n)) is not None), None)
    return value if type(value) is int else None


def exact_on_cpu(compute: ComputeConfig) -> ComputeConfig:
    """The same for a measurement that bfloat16 on a CPU would make worse and hardly faster."""
    is_exact = compute.dtype == "auto" and pick_device(compute).type == "cpu"
    return replace(compute, dtype="float32") if is_exact else compute


def stored_dtype(folder: Path) -> torch.dtype:
    """Type in which a checkpoint stores most of its numbers."""
    bytes_of: Counter[torch.dtype] = Counter()
    for entry in open_index(folder).tensors.values():
        bytes_of[entry.dtype] += entry.nbytes
    return bytes_of.most_common(1)[0][0]


def transposed_weights(folder: Path) -> frozenset[str]:
    """Names of the weights that are stored as (in, out), as GPT-2's are, instead of (out, in)."""
    from transformers.pytorch_utils import Conv1D

    model = described_model(folder)
    if model is None:
        return frozenset()
    index = open_index(folder)
    names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)]
    return frozenset(entry.name for name in names if (entry := index.find(name)))


def save_type(wanted: SaveType, folder: Path) -> torch.dtype:
    """The type that `--save-dtype` stands for: a checkpoint's main one, or the one named."""
    named: torch.dtype = stored_dtype(folder) if wanted == "full" else getattr(torch, wanted)
    return named


def rename_type(config: dict[str, Any], name: str) -> None:
    """Write another type of the weights into a configuration, wherever it names one."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            config[key] = name
        elif isinstance(value, dict):
            rename_type(value, name)


def round_weights(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> None:
    """Turn a tuned float32 model, in place, into the type it is stored in, as the edit rounds."""
    for name, parameter in model.named_parameters():
        parameter.data = round_as_stored(parameter.data.float(), dtype, Place(seed, name))
    torch.nn.Module.to(model, dtype=dtype)


@contextmanager
def counting_tokens(model: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """How many tokens have gone through a model, called with `input_ids`, padding included."""
    count = 0

    def add(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal count
        ids = kwargs.get("input_ids", args[0] if args else None)
        count += 0 if ids is None else ids.numel()

    with model.register_forward_pre_hook(add, with_kwargs=True):
        yield lambda: count


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: Path | None
) -> None:
    """Write a model with tokenizer and companions as a plain safetensors checkpoint.

    Weights keep their type. Companion files of `source` (tokenizer, chat template, generation
    config) are carried over byte for byte; config.json is the model's own.
    """
    model.config.use_cache = True
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size="5GB")
    for file in folder.glob("*.safetensors"):
        # The library's are for the owner alone; they are as open as what is beside them.
        file.chmod((folder / "config.json").stat().st_mode)
    if source is None:
        tokenizer.save_pretrained(str(folder))
        return
    own_config = (folder / "config.json").read_bytes()
    copy_companions(source, folder)
    (folder / "config.json").write_bytes(own_config)


def _require_finite(model: PreTrainedModel, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        # One NaN or Inf makes the sum one; finite weights are far too small to overflow it.
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            raise CorruptCheckpointError(
                f"{folder}: {name} holds NaN or Inf. The checkpoint is damaged or its training "
                "diverged; use an earlier one."
            )


def generate(model: PreTrainedModel, prompt: Sequence[int], **settings: Any) -> Tensor:
    """New tokens behind a prompt, (answers, …), by the library's own loop and these settings."""
    from transformers import GenerationConfig

    ids = torch.tensor([list(prompt)], device=model.device)
    how = GenerationConfig(**settings)
    # Gaps would be filled from the model's own, such as a repetition penalty or a temperature.
    put = partial(setattr, model, "generation_config")
    with temporarily(put, GenerationConfig(), model.generation_config):
        # Of a model in parts `in_company` says who needs a pass, and the library is not to ask.
        found: Tensor = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=how, synced_gpus=False
        )
    return found[:, len(prompt) :]


def _require_config(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise CheckpointNotFoundError(
            f"{folder} has no config.json. Give the folder that `save_pretrained` wrote."
        )
    if (folder / ADAPTER_CONFIG).exists():
        # transformers would put it on the model unasked.
        raise CheckpointError(
            f"{folder} holds an adapter beside its base model. Move the adapter's files, "
            f"{ADAPTER_CONFIG} and adapter_model.safetensors, to a folder of their own."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' bars, some of tqdm itself, and reports out of the user's output."""
    with _ONE_AT_A_TIME:
        logger, tqdm = logging.getLogger("transformers"), import_module("tqdm").tqdm
        put, shown = partial(setattr, tqdm, "__init__"), tqdm.__init__
        level = temporarily(logger.setLevel, logging.ERROR, logger.level)
        with level, temporarily(put, partialmethod(shown, disable=True), shown):
            yield


_ONE_AT_A_TIME = RLock()
"""transformers changes torch and its own classes while it loads: two threads at once would leave
models without tied weights for the rest of the program."""


@contextmanager
def plain_errors(place: Path, what: str = "model") -> Iterator[None]:
    """Turn the libraries' many exceptions on loading into one that names the place, in silence."""
    try:
        with _quiet():
            yield
    except PertaError:
        raise
    except Exception as error:  # whatever a damaged file makes the libraries raise
        if shortage(error):
            raise
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{place}: the {what} comes with code of its own, which is never run. Convert it "
                "to an architecture of the transformers library on a machine you trust."
            ) from error
        raise CheckpointError(
            f"{place}: no {what} could be loaded from it: {first_line(error)}"
        ) from error
