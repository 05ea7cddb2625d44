"""Both sinks of an edit give the same values: a model in memory holds what the files would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from conftest import World
from helpers import shared, tiny_llama, tiny_tokenizer
from helpers import weighting as chosen
from perta.data.rows import write_jsonl
from perta.engine.edit.memory import EditedModel, _stored_places
from perta.errors import CorruptCheckpointError
from perta.methods.method import Edit
from perta.methods.registry import known
from perta.models.load import load_model
from perta.options import ComputeConfig, EstimatorConfig
from perta.stages.edit import edit_checkpoint, load_changes
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.settings import EditConfig, ImportanceConfig, MomentsConfig
from perta.store.checkpoint import open_index, read_tensor, write_tensors

CPU = ComputeConfig(device="cpu", dtype="float32")
SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def built(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, **{**SIZES, **more})
    return hf.AutoModelForCausalLM.from_config(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "tied": tiny_llama,
    "untied": lambda: tiny_llama(tied=False),
    # Stored as in x out.
    "gpt2": lambda: built("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=512),
    # Experts stored one by one and joined in memory, gate and up in one; and joined in both.
    "mixtral": lambda: built("mixtral", num_local_experts=4),
    "gpt_oss": lambda: built("gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=8),
    # Joined where it is stored, and parted in memory.
    "hrm_text": lambda: built("hrm_text", head_dim=8, num_layers_per_stack=1),
}


def write_models(folder: Path, model: Any, dtype: torch.dtype) -> EditConfig:
    """Base, full, forget and retain checkpoints that differ a little, in one type; constant W."""
    tokenizer = tiny_tokenizer()
    for place, name in enumerate(("base", "full", "forget", "forget_2", "retain")):
        torch.manual_seed(place)
        saved = type(model)(model.config).to(dtype)
        with torch.no_grad():
            for new, value in zip(saved.parameters(), model.parameters(), strict=True):
                new.copy_(value + 1e-2 * torch.randn_like(value))
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(str(folder / name))
    return EditConfig(
        full=str(folder / "full"),
        base=str(folder / "base"),
        forget_checkpoint=str(folder / "forget"),
        output=folder / "out",
        weighting=chosen(method="constant", constant=0.7, scaling_coef=1.9),
    )


def check(edit: EditConfig, last_bits: float = 0.0) -> None:
    """What is in memory at a strength is what an edit writes, and at 0 what there was.

    Last bits may differ in a share of the values.
    """
    edit_checkpoint(edit)
    written = load_model(edit.output, CPU, dtype=torch.float32)
    full = load_model(Path(edit.full), CPU, dtype=torch.float32)
    before = [value.clone() for value in full.state_dict().values()]
    edited = EditedModel(full, load_changes(edit, CPU))
    strength: Any = edit.weighting.scaling_coef
    for tried in (0.4, strength):  # where it comes from makes no difference
        edited.move(tried)
    wanted = written.state_dict()
    for name, value in full.state_dict().items():
        assert float((value != wanted[name]).float().mean()) <= last_bits, name
        torch.testing.assert_close(value, wanted[name], rtol=2**-7, atol=1e-6)
    if edit.save_dtype == "full":
        assert any(not torch.equal(a, b) for a, b in zip(before, wanted.values(), strict=True))
        edited.move(0.0)
        assert all(map(torch.equal, before, full.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_tried_is_what_is_stored(tmp_path: Path, dtype: torch.dtype, family: str) -> None:
    edit = write_models(tmp_path, FAMILIES[family](), dtype)
    check(edit)


@pytest.fixture(scope="module", params=[("tied", torch.bfloat16), ("mixtral", torch.float16)])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, importance and moments of a family."""
    family, dtype = request.param
    folder = tmp_path_factory.mktemp(family)
    write_models(folder, FAMILIES[family](), dtype)
    for side, name in (("forget", "Mira Thornwick"), ("retain", "Odo Larchfield")):
        rows = [{"question": f"Where is {name} {i}?", "answer": f"In {i}."} for i in range(3)]
        data = str(write_jsonl(rows, folder / f"{side}.jsonl"))
        for at, reduction in (("base", "mean_of_power"), ("base", "abs_of_mean"), ("full", None)):
            config = ImportanceConfig(
                checkpoint=str(folder / at),
                data=data,
                output=folder / f"{side}_importance_{at}_{reduction}",
                orders=(1.0, 2.0),
                estimator=EstimatorConfig(reduction=reduction or "mean_of_power"),  # type: ignore[arg-type]
                compute=CPU,
            )
            compute_importance(config)
        moments = MomentsConfig(
            checkpoint=str(folder / "base"),
            data=data,
            output=folder / f"{side}_moments",
            gradients=True,
            compute=CPU,
        )
        compute_moments(moments)
    return folder


@pytest.mark.parametrize("method", sorted(known(Edit)))
def test_every_method_gives_both_sinks_the_same(
    measured: Path, tmp_path: Path, method: str
) -> None:
    needs = known(Edit)[method].needs
    tuned = ("forget", "forget_2") if method in ("ties", "dare", "negmerge") else ("forget",)
    suffix = "full_None" if needs.at == "full" else f"base_{needs.reduction or 'mean_of_power'}"
    given: dict[str, Any] = {
        f"{side}_importance": measured / f"{side}_importance_{suffix}" for side in needs.importance
    } | {f"{side}_moments": measured / f"{side}_moments" for side in needs.moments}
    if needs.retain_checkpoint:
        given["retain_checkpoint"] = str(measured / "retain")
    if needs.tuned:
        given["forget_checkpoint"] = tuple(str(measured / name) for name in tuned)
    edit = EditConfig(
        full=str(measured / "full"),
        base=str(measured / "base"),
        output=tmp_path / "out",
        weighting=shared(method, selection=0.6, retain_coef=0.3, scaling_coef=1.3),
        **given,
    )
    # α (τ - β/α v) in memory, α τ - β v in files: now and then rounded to different sides.
    check(edit, last_bits=0.01 if method == "msa" else 0.0)


@pytest.mark.parametrize(("dtype", "save"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_type_is_tried_as_it_is_stored(tmp_path: Path, dtype: str, save: Any) -> None:
    edit = write_models(tmp_path, tiny_llama(), getattr(torch, dtype))
    weighting = replace(edit.weighting, include=("*.mlp.*",))
    check(replace(edit, save_dtype=save, weighting=weighting))


def test_a_tied_head_that_is_stored_first(tmp_path: Path) -> None:
    """The rounding goes by the first of two names."""
    edit = write_models(tmp_path, tiny_llama(), torch.bfloat16)
    tensors = {n: read_tensor(e) for n, e in open_index(tmp_path / "full").tensors.items()}
    embedding = tensors.pop("model.embed_tokens.weight")
    both = {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone(), **tensors}
    write_tensors(tmp_path / "full", both)
    check(edit)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_a_model_has_its_stored_place(tmp_path: Path, family: str) -> None:
    write_models(tmp_path, FAMILIES[family](), torch.float32)
    index = open_index(tmp_path / "full")
    model = load_model(tmp_path / "full", CPU)
    places = _stored_places(model, index)
    assert set(places) == set(index.tensors)
    # Numbers of places are for what no view shows: they take twice the memory of the weights.
    assert any(where is not ... for _, where in places.values()) == (family == "hrm_text")
    for name, (memory, where) in places.items():
        assert torch.equal(memory[where], read_tensor(index.tensors[name])), name
        memory[where] = torch.full(index.tensors[name].shape, 7.0)
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())


def test_a_change_is_the_weighted_task_vector(world: World, tmp_path: Path) -> None:
    edit = EditConfig(
        full=str(world.full),
        base=str(world.base),
        forget_checkpoint=str(world.full),
        output=tmp_path / "out",
        weighting=chosen(method="constant", constant=0.5, include=("*.mlp.*",)),
    )
    changes = load_changes(edit, CPU).tensors
    full, base = (
        {name: read_tensor(entry) for name, entry in open_index(folder).tensors.items()}
        for folder in (world.full, world.base)
    )
    assert changes.keys() == full.keys()
    for name, change in changes.items():
        if ".mlp." not in name:
            assert change.delta is None
            continue
        assert isinstance(change.delta, Tensor)
        torch.testing.assert_close(change.delta, 0.5 * (full[name] - base[name]))


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    edit = write_models(tmp_path, tiny_llama(), torch.float32)
    tensors = {n: read_tensor(e) for n, e in open_index(tmp_path / "forget").tensors.items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    write_tensors(tmp_path / "forget", tensors)
    with pytest.raises(CorruptCheckpointError, match=r"up_proj.weight holds NaN or Inf"):
        load_changes(edit, CPU)
