"""PEFT adapters merged into the weights of their base, one layer at a time, in float32.

    base: config ── model of placeholders ─┐
    adapter ─────── PEFT builds and loads ─┴─ layer by layer: base values in, merged, written

PEFT does the mathematics. A placeholder is one zero in the shape of a weight: it takes no memory
until its layer's turn comes, when the base's values are read from its files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from perta.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    CorruptCheckpointError,
    some,
)
from perta.models.complete import loader_of
from perta.models.load import load_model, plain_errors, rename_type
from perta.models.trust import LOCAL, NO_CODE, read_config, without_patterns, write_config
from perta.options import ComputeConfig, at_home
from perta.progress import say
from perta.store.checkpoint import (
    CheckpointIndex,
    TensorEntry,
    copy_companions,
    open_index,
    read_header,
    read_tensor,
    stream_tensors,
)
from perta.store.parse import NUMBERS, fits, read_json
from perta.store.record import ADAPTER_CONFIG

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_NAME = "default"

_ADDS_INPUT = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
)
"""Types that put trained vectors before the inputs of the model or of its attention."""
_BLIND = (
    "ADALORA",
    "BOFT",
    "C3A",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "TRAINABLE_TOKENS",
    "VBLORA",
    "VERA",
)
"""Types whose layers are built without a look at the base's values."""
BLIND_STARTS = (True, False, "gaussian", "eva")
"""Initial values of LoRA for which the same holds; `pissa` and others start from the base's."""


_FORM: Mapping[str, Any] = {
    **dict.fromkeys(("r", "alpha", "lora_alpha"), NUMBERS),
    **dict.fromkeys(("init_weights", "init_lora_weights"), (bool, str)),
    **{key: {str: NUMBERS} for key in ("rank_pattern", "alpha_pattern")},
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), bool),
}
"""What settings of adapters hold, where they are there; PEFT takes all else for something."""
_PRUNED: Mapping[str, Any] = {"rank_pattern": {str: [bool]}}
"""What those of AdaLoRA hold in its place: which ranks training left."""


def adapter_settings(adapter: Path) -> dict[str, Any]:
    """The settings of an adapter folder whose weights can be merged, as far as settings tell."""
    file = adapter / ADAPTER_CONFIG
    settings = read_json(file, CorruptCheckpointError, nan=True)
    kind = settings.get("peft_type")
    if not isinstance(kind, str):
        raise CorruptCheckpointError(
            f"{file} is no adapter's configuration: it names no peft_type. Copy the adapter "
            "again, or save it again with `save_pretrained`."
        )
    given = {name: value for name, value in settings.items() if value is not None}
    forms = {**_FORM, **(_PRUNED if kind == "ADALORA" else {})}
    if wrong := [name for name, form in forms.items() if not fits(given, {f"{name}?": form})]:
        names = ", ".join(wrong)
        raise CorruptCheckpointError(
            f"{file}: {names} is not of the kind that PEFT writes. Copy the adapter again, or save "
            "it again with `save_pretrained`."
        )
    if settings.get("megatron_config"):
        raise CheckpointError(
            f"{file}: megatron_config makes PEFT import the module that the file names, which is "
            "never done. Remove the entry."
        )
    if kind in _ADDS_INPUT:
        raise CheckpointError(
            f"{adapter} is a {kind} adapter: it puts trained vectors before the inputs and changes "
            "no weight, so there is nothing to merge or to edit. Tune with LoRA or another type "
            "that changes weights."
        )
    if not (adapter / WEIGHTS).is_file():
        raise CheckpointError(
            f"{adapter} has no {WEIGHTS}. Pickle files are never loaded; save the adapter again "
            "with safe_serialization."
        )
    return settings


def lasting_name(reference: str) -> str:
    """How an adapter names its base, wherever it is read: a whole path, or a hub id as it is."""
    place = at_home(reference)
    return str(place.resolve()) if place.exists() else reference


def merge_adapter(adapter: Path, base: Path, folder: Path, *, exact: bool) -> None:
    """Merge an adapter into the weights of its base and write the result, tensor by tensor.

    Where the adapter changes one use of a tied weight alone, the result stores both uses. With
    `exact` it is float32 in place of the base's narrower types. CheckpointError where adapter and
    base do not fit, or PEFT cannot merge it.
    """
    with plain_errors(adapter, "adapter"), warnings.catch_warnings():
        # What PEFT warns of is looked at here, and stops.
        warnings.simplefilter("ignore")
        merge = _Merge.of(adapter, open_index(base))
        merge.write(folder, exact)
    copy_companions(base, folder)
    # An adapter folder may bring its own tokenizer or chat template.
    copy_companions(adapter, folder)
    config = read_config(base)
    merge.change(config)
    if exact:
        rename_type(config, "float32")
    write_config(folder, config)


@dataclass(frozen=True)
class _Change:
    """The part of the model that makes a stored tensor anew; its shape, and one like it."""

    maker: str
    shape: tuple[int, ...]
    like: TensorEntry


@dataclass
class _Merge:
    """A base model with an adapter on it, and what becomes of the stored tensors."""

    index: CheckpointIndex  # the base's tensors
    model: Any  # the base model, PEFT's layers in it
    # Parameter of the base -> all its names in the model.
    names: Mapping[nn.Parameter, Sequence[str]]
    # Parameters of the base that the adapter's file holds whole, such as biases.
    given: set[nn.Parameter]
    parts: Mapping[str, Any]  # name -> layer that the adapter works on or replaces
    streams: bool  # whether the base's other parameters are placeholders
    changes: dict[str, _Change] = field(default_factory=dict)  # stored name -> what becomes of it
    # Stored name -> new values, until they are written.
    made: dict[str, Tensor] = field(default_factory=dict)
    is_untied: bool = False  # whether the uses of a tied weight differ now
    _entries: dict[nn.Parameter, TensorEntry | None] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Path, index: CheckpointIndex) -> _Merge:
        """Build the model, load the adapter into it, and see what it changes."""
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(str(adapter))
        start = getattr(config, "init_lora_weights", True)
        if config.peft_type in _BLIND and start in BLIND_STARTS:
            model: Any = _placeholders(adapter, index.folder)
            merge = _load(adapter, config, index, model, streams=True)
            if merge.plan() is None:
                merge.refuse_half_resized(adapter)
                return merge
        say(f"{adapter.name} needs all weights of its base at once, in float32")
        config = PeftConfig.from_pretrained(str(adapter))
        model = load_model(index.folder, ComputeConfig(device="cpu", dtype="float32"))
        merge = _load(adapter, config, index, model, streams=False)
        if strange := merge.plan():
            raise CheckpointMismatchError(
                f"{adapter} makes {strange}, which its base {index.folder} has not, so it cannot "
                "be merged. Give the model that it was tuned on as its base."
            )
        return merge

    def plan(self) -> str | None:
        """Find what changes; the name of something that has no place in the base, if any has."""
        changed: dict[str, tuple[str, nn.Parameter]] = {}
        for key, part in self.parts.items():
            for name, parameter in _base_of(part).named_parameters():
                changed[f"{key}.{name}"] = (key, parameter)
            for parameter in self._waiting(part):
                entry = self._entry(parameter)
                if entry is None or entry.shape != parameter.shape:
                    return key
        for parameter in self.given:
            for name in self.names[parameter]:
                changed.setdefault(name, (name, parameter))
        for name, (maker, parameter) in changed.items():
            for stored, tensor in self._saved({name: parameter}, meta=True).items():
                like = self.index.tensors.get(stored) or (
                    self._entry(parameter) if parameter in self.names else None
                )
                if like is None:
                    return name
                self.changes[stored] = _Change(maker, tuple(tensor.shape), like)
        return None

    def refuse_half_resized(self, adapter: Path) -> None:
        """Stop where the adapter brings the embedding of another vocabulary, but not the head."""
        for use in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            weight: Any = getattr(use, "weight", None)
            for name in self.names.get(weight, ()):
                (stored,) = self._saved({name: weight}, meta=True)
                entry = self._entry(weight)
                if stored not in self.changes and entry and entry.shape != weight.shape:
                    raise CheckpointMismatchError(
                        f"{adapter} was tuned on a vocabulary of {len(weight)} tokens, its base "
                        f"{self.index.folder} has {entry.shape[0]}, and the rows of {name} for the "
                        "further ones are not in the adapter. Resize the base as it was for "
                        "tuning, save it, and give that as the base."
                    )

    def _waiting(self, part: Any) -> list[nn.Parameter]:
        """Placeholders that need their values before a part can be merged."""
        if not self.streams or hasattr(part, "modules_to_save"):
            return []
        return [p for p in _base_of(part).parameters() if p in self.names and p not in self.given]

    def _entry(self, parameter: nn.Parameter) -> TensorEntry | None:
        """Where the base stores a parameter, under whichever of its names, if it does as it is."""
        if parameter not in self._entries:
            saved = [list(self._saved({n: parameter}, meta=True)) for n in self.names[parameter]]
            alone = [names[0] for names in saved if len(names) == 1]
            found = [self.index.tensors[name] for name in alone if name in self.index.tensors]
            self._entries[parameter] = found[0] if found else None
        return self._entries[parameter]

    def _saved(self, tensors: Mapping[str, Tensor], meta: bool = False) -> dict[str, Tensor]:
        """Tensors of the model under the names that the base has for them, or would have."""
        from transformers.core_model_loading import revert_weight_conversion

        if meta:
            tensors = {n: torch.empty(t.shape, device="meta") for n, t in tensors.items()}
        saved = revert_weight_conversion(self.model, dict(tensors))
        found = {name: self.index.find(name) for name in saved}
        return {(e.name if (e := found[name]) else name): t for name, t in saved.items()}

    def write(self, folder: Path, exact: bool) -> None:
        """Write the base's files with the new tensors, and with those that a tied weight became."""
        further = [name for p, names in self.names.items() for name in self._untie(p, names)]
        shards = {shard: list(names) for shard, names in self.index.shards.items()}
        next(reversed(shards.values())).extend(further)

        def place(name: str) -> tuple[torch.dtype, tuple[int, ...]]:
            change = self.changes.get(name)
            entry = change.like if change else self.index.tensors[name]
            is_narrow = entry.dtype.is_floating_point and entry.dtype.itemsize < 4
            dtype = torch.float32 if exact and is_narrow else entry.dtype
            return dtype, change.shape if change else entry.shape

        def value(name: str) -> Tensor:
            stored = self._value(name).to(place(name)[0])
            if name in self.changes and not bool(torch.isfinite(stored).all()):
                raise CorruptCheckpointError(
                    f"Merged, {name} holds NaN, Inf or numbers outside the range of "
                    f"{stored.dtype}: the adapter is damaged, or its training diverged."
                )
            return stored

        places = {shard: {name: place(name) for name in names} for shard, names in shards.items()}
        stream_tensors(folder, places, value, self.index.metadata)

    def _untie(self, parameter: nn.Parameter, names: Sequence[str]) -> list[str]:
        """Make a changed weight that has several uses; names that must be stored from now on."""
        uses = [next(iter(self._saved({n: parameter}, meta=True))) for n in names if len(names) > 1]
        entry = self._entry(parameter)
        if entry is None or not self.changes.keys() & set(uses):
            return []
        values = {
            use: self._value(use) if use in self.changes else read_tensor(entry) for use in uses
        }
        further = [use for use in uses if use not in self.index.tensors]
        first, *others = (value.float() for value in values.values())
        if all(torch.equal(first, other) for other in others):
            for use in further:
                del values[use]
                self.changes.pop(use, None)
            further = []
        else:
            self.is_untied = True
            shape = tuple(first.shape)
            self.changes |= {use: _Change("", shape, entry) for use in further}
        self.made |= values
        return further

    def _value(self, name: str) -> Tensor:
        if name not in self.made and name in self.changes:
            self._make(self.changes[name].maker)
        return self.made.pop(name) if name in self.made else read_tensor(self.index.tensors[name])

    @torch.no_grad()
    def _make(self, maker: str) -> None:
        """Make all tensors of one part, in float32."""
        part = self.parts.get(maker)
        if part is None:
            self.made |= self._saved({maker: self.model.get_parameter(maker).detach()})
            return
        before = {p: p.data for p in _base_of(part).parameters()}
        for parameter in self._waiting(part):
            parameter.data = read_tensor(cast(TensorEntry, self._entry(parameter))).float()
        for parameter in self.given.intersection(before):
            parameter.data = parameter.data.clone()
        module = _merged(part)
        made = {f"{maker}.{name}": p.detach().float() for name, p in module.named_parameters()}
        self.made |= self._saved(made)
        for parameter, values in before.items():
            parameter.data = values

    def change(self, config: dict[str, Any]) -> None:
        """Bring a configuration of the base up to date."""
        text = config.get("text_config", config)
        if self.is_untied:
            config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
        if "vocab_size" in text:
            text["vocab_size"] = self.model.config.get_text_config().vocab_size


def _placeholders(adapter: Path, base: Path) -> PreTrainedModel:
    """The base's model with placeholders for weights, and with the adapter's vocabulary."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, **LOCAL)

    def build() -> PreTrainedModel:
        with torch.device("meta"):
            built: PreTrainedModel = loader_of(config).from_config(
                config, dtype=torch.float32, **NO_CODE
            )
        return built

    model = build()
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    wholes = {f"{PREFIX}{name}.{end}" for end in ("weight", "base_layer.weight")}
    rows = [e.shape[0] for e in read_header(adapter / WEIGHTS)[0] if e.name in wholes]
    if rows and rows[0] != config.get_text_config().vocab_size:
        config.get_text_config().vocab_size = rows[0]
        model = build()
    held: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in held:
                zeros = torch.zeros(()).expand(parameter.shape)
                held[parameter] = nn.Parameter(zeros, requires_grad=False)
            module.register_parameter(name, held[parameter])
    return model


def _load(
    adapter: Path, config: PeftConfig, index: CheckpointIndex, model: Any, *, streams: bool
) -> _Merge:
    """Put an adapter on its base's model and load its values."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    without_patterns(config, model, adapter)
    adapted = PeftModel(model, config, _NAME)
    inside = dict(adapted.named_parameters(remove_duplicate=False))
    stored = read_header(adapter / WEIGHTS)[0]
    given = {inside[entry.name] for entry in stored if entry.name in inside}.intersection(names)
    for parameter in given:
        parameter.data = torch.empty(parameter.shape)
    _load_values(adapted, adapter, index.folder)
    parts: dict[str, Any] = {}
    last = None
    for name, module in model.named_modules():
        is_part = isinstance(module, BaseTunerLayer) or hasattr(module, _UNLOAD)
        if is_part and not (last and name.startswith(f"{last}.")):
            parts[name], last = module, name
    return _Merge(index, model, names, given, parts, streams)


def put_on(model: PreTrainedModel, adapter: Path, base: Path) -> Any:
    """A PEFT model, whose adapter can be trained, of its base in memory, changed in place."""
    from peft import PeftConfig, PeftModel

    with plain_errors(adapter, "adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = False
        without_patterns(config, model, adapter)
        adapted = PeftModel(model, config, _NAME)
        _load_values(adapted, adapter, base, is_trainable=True)
    refuse_tied(adapted)
    return adapted


def refuse_tied(adapted: Any) -> None:
    """Stop at an adapter on one use of a tied weight: merged in memory it would change both."""
    model = adapted.get_base_model()
    uses = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [getattr(use, "weight", None) for use in uses]
    if weights[0] is weights[1] and any(hasattr(use, "base_layer") for use in uses):
        raise ConfigError(
            "The adapter is on the output head or the embedding, and this model uses one weight "
            "for both. Train other layers (--lora-targets), or untie the model first: load it with "
            "`tie_word_embeddings=False`, copy the embedding into the head, and save it."
        )


def _load_values(adapted: Any, adapter: Path, base: Path, *, is_trainable: bool = False) -> None:
    """Load an adapter's file and compare, both ways, what it holds with what the model has."""
    misfit = f"{adapter} does not fit its base {base}"
    cure = "Give the model that it was tuned on as its base."
    try:
        found = adapted.load_adapter(
            str(adapter), _NAME, is_trainable=is_trainable, torch_device="cpu"
        )
    except KeyError as error:
        raise CheckpointMismatchError(f"{misfit}: its file lacks {error}. {cure}") from error
    except RuntimeError as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise CheckpointMismatchError(
            f"{misfit}: {what} It was tuned on another model, or on this one after "
            "`resize_token_embeddings`. " + cure
        ) from error
    if found.unexpected_keys:
        raise CheckpointMismatchError(
            f"{misfit}: it holds {_shown(found.unexpected_keys)}, for which the model and "
            f"{ADAPTER_CONFIG} have no place. {cure}"
        )
    state = adapted.state_dict(keep_vars=True)
    loaded = {id(tensor) for name, tensor in state.items() if name not in found.missing_keys}
    missing = [name for name in found.missing_keys if id(state.get(name)) not in loaded]
    if missing:
        raise CheckpointMismatchError(
            f"{misfit}: {ADAPTER_CONFIG} asks for {_shown(missing)}, which its file does not hold, "
            f"so initial values would be merged. {cure}"
        )


def _shown(names: Sequence[str]) -> str:
    return some(sorted(name.removeprefix(PREFIX) for name in names))


_UNLOAD = "unload_and_optionally_merge_module"
"""Method of PEFT's layers that wrap another in a way of their own."""


def _base_of(part: Any) -> nn.Module:
    """The base's layer within one of PEFT's."""
    if hasattr(part, "token_adapter"):
        part = part.token_adapter
    found: nn.Module = (
        part.get_base_layer() if hasattr(part, "get_base_layer") else part.original_module
    )
    return found


def _merged(part: Any) -> nn.Module:
    """The plain layer that one of PEFT's becomes."""
    if hasattr(part, _UNLOAD):
        module: nn.Module = part.unload_and_optionally_merge_module(True, False, None)
        return module
    part.merge()
    return _base_of(part)
