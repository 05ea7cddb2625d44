"""Task vectors of LoRA: thin from the adapter to the edit, and nothing of full size in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import World
from helpers import weighting as chosen
from perta.engine.edit.memory import EditedModel
from perta.errors import CheckpointError, CheckpointMismatchError, CorruptCheckpointError
from perta.models.load import load_model, load_tokenizer
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig
from perta.stages.edit import edit_checkpoint, load_changes
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.settings import EditConfig, ImportanceConfig, MomentsConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.measured.moments import open_moments
from perta.store.measured.second_moment import matrix

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclass(frozen=True)
class Parts:
    """Folders of a base with the edit's other inputs; two adapters of it, and their steps."""

    base: Path
    full: Path
    adapters: tuple[Path, Path]
    steps: tuple[dict[str, Tensor], dict[str, Tensor]]  # stored name -> s · B A, float64
    measured: dict[str, Path]

    def edited(self, output: Path, method: str, *tuned: Path, **more: Any) -> dict[str, Tensor]:
        to = {"scaling_coef": 0.7, "layers": "all", **more.pop("to", {})}
        given: dict[str, Any] = {
            "full": str(self.full),
            "base": str(self.base),
            "forget_checkpoint": tuple(map(str, tuned)),
            "output": output,
            "weighting": chosen(method=method, **to),
            **(self.measured if "perta" in method else {}),
            **more,
        }
        return tensors(edit_checkpoint(EditConfig(**given)))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(entry) for name, entry in open_index(folder).tensors.items()}


def lora(base: Path, folder: Path, seed: int, **more: Any) -> dict[str, Tensor]:
    """Write an adapter with two random factors a layer; what PEFT adds, in float64, by name."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **more}
    given["fan_in_fan_out"] = isinstance(model, hf.GPT2LMHeadModel)
    torch.manual_seed(seed)
    adapted: Any = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.double()
    index, steps = open_index(base), {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and (entry := index.find(f"{name}.weight")):
            steps[entry.name] = module.get_delta_weight("default").detach()
    assert steps
    return steps


def make_parts(root: Path, world: World, kind: str) -> Parts:
    tokenizer = load_tokenizer(world.base)
    ends: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2}
    models: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(**ends, n_embd=24, n_layer=1, n_head=2, n_positions=128)
        ),
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **ends, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
            )
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = models[kind]()
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(root / "full")
    for name in ("base", "full"):
        tokenizer.save_pretrained(str(root / name))
    adapters = (root / "one", root / "two")
    first, second = (lora(root / "base", folder, i) for i, folder in enumerate(adapters))
    measured = {}
    for side, data in (("forget", world.forget), ("retain", world.retain)):
        common: Any = {"checkpoint": str(root / "base"), "data": str(data)}
        place = root / f"{side}_moments"
        measured[f"{side}_moments"] = compute_moments(
            MomentsConfig(**common, gradients=True, output=place)
        )
        place = root / f"{side}_importance"
        measured[f"{side}_importance"] = compute_importance(
            ImportanceConfig(**common, orders=(1.0,), output=place)
        )
    return Parts(root / "base", root / "full", adapters, (first, second), measured)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def parts(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"), world, request.param)


def direction(parts: Parts, method: str, name: str, tau: Tensor) -> Tensor:
    """Δ of a stored weight in float64, solved whole."""
    forget, retain = (open_moments(parts.measured[f"{s}_moments"]) for s in ("forget", "retain"))
    c_f, c_r = (matrix(folder.input_moment(name)) for folder in (forget, retain))
    delta: Tensor
    is_turned, eye = name in retain.facts["transposed"], torch.eye(len(c_r)).double()
    tau = tau.T if is_turned else tau
    if method == "perta-project":
        delta = tau @ torch.linalg.inv(eye + 3.0 * c_r / c_r.diagonal().mean())
    else:
        c_f = c_f + 0.4 * c_f.diagonal().mean() * eye
        total = c_f + 3.0 * c_r
        delta = tau @ c_f @ torch.linalg.inv(total + 0.05 * total.diagonal().mean() * eye)
    return delta.T if is_turned else delta


SETTINGS: dict[str, dict[str, float]] = {
    "tv": {},
    "perta-project": {"rho": 3.0},
    "perta-input": {"rho": 3.0, "damping": 0.05, "forget_damping": 0.4},
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", SETTINGS)
def test_the_edit_is_the_formula_in_float64(
    parts: Parts, cache: Path, tmp_path: Path, method: str, count: int
) -> None:
    tuned, steps = parts.adapters[:count], parts.steps[:count]
    found = parts.edited(tmp_path / "out", method, *tuned, to=SETTINGS[method])
    full, base = tensors(parts.full), tensors(parts.base)
    assert set(found) == set(full)
    for name, value in found.items():
        if name not in steps[0]:
            assert torch.equal(value, full[name])
            continue
        tau = torch.stack([step[name] for step in steps]).mean(0)
        delta = tau if method == "tv" else direction(parts, method, name, tau)
        wanted = full[name].double() - 0.7 * delta
        error = float((value.double() - wanted).norm() / wanted.norm())
        assert error < 1e-6, name
        assert float(delta.norm()) > 1e-3 * float(base[name].norm())
    assert not (cache / "merged").exists()


def test_a_direction_keeps_the_factors(parts: Parts, tmp_path: Path) -> None:
    parts.edited(tmp_path / "out", "perta-project", parts.adapters[0])
    stored = tensors(tmp_path / "out.direction")
    shapes = {name: tuple(step.shape) for name, step in parts.steps[0].items()}
    assert {n.rpartition(".")[0] for n in stored} == set(shapes)
    for name, (rows, columns) in shapes.items():
        assert stored[f"{name}.left"].shape == (rows, 3)
        assert stored[f"{name}.right"].shape == (3, columns)
    layers = json.loads((tmp_path / "out.direction" / "perta.json").read_text())["layers"]
    for name, step in parts.steps[0].items():
        assert layers[name]["task_vector_norm"] == pytest.approx(float(step.norm()), rel=1e-6)
        delta = stored[f"{name}.left"].double() @ stored[f"{name}.right"].double()
        assert layers[name]["direction_norm"] == pytest.approx(float(delta.norm()), rel=1e-6)


def test_a_thin_direction_is_tried_as_it_is_stored(parts: Parts, tmp_path: Path) -> None:
    """In memory at any strength, from factors: nothing of full size is held of Δ."""
    found = parts.edited(tmp_path / "out", "perta-project", parts.adapters[0])
    config = EditConfig(
        full=str(parts.full),
        base=str(parts.base),
        forget_checkpoint=str(parts.adapters[0]),
        retain_moments=parts.measured["retain_moments"],
        output=tmp_path / "out",
        weighting=chosen(method="perta-project", layers="all"),
    )
    changes = load_changes(config, ComputeConfig(device="cpu"))
    for name, step in parts.steps[0].items():
        assert vars(changes.tensors[name].delta)["left"].shape == (step.shape[0], 3)
    model = load_model(parts.full, ComputeConfig(device="cpu"), dtype=torch.float32)
    edited = EditedModel(model, changes)
    for strength in (2.0, 0.7):
        edited.move(strength)
    stored = model.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("method", "count"),
    [
        *(("perta-kron", 1), ("perta-grad", 1)),
        *(("ties", 2), ("dare", 2), ("negmerge", 2)),
    ],
)
def test_methods_that_need_all_of_a_task_vector_are_as_on_merged_adapters(
    parts: Parts, tmp_path: Path, method: str, count: int
) -> None:
    """Merged weights round τ to float32 neighbours of the base's, so a few signs may differ."""
    adapters = parts.adapters[:count]
    merged = [resolve_checkpoint(adapter, base=parts.base, exact=True) for adapter in adapters]
    thin = parts.edited(tmp_path / "thin", method, *adapters)
    whole = parts.edited(tmp_path / "whole", method, *merged)
    assert_close(parts, thin, whole)


def assert_close(parts: Parts, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    moved = 0.0
    for name, full in tensors(parts.full).items():
        one, other = (full.double() - edited[name].double() for edited in (found, wanted))
        assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-6, name
        moved += float(other.norm())
    assert moved > 0.1


def test_adapters_and_whole_checkpoints_go_together(parts: Parts, tmp_path: Path) -> None:
    one, two = parts.adapters
    few = tmp_path / "few"  # leaves most layers alone, which halves the mean there
    target = min(parts.steps[0]).removesuffix(".weight").rpartition(".")[2]
    lora(parts.base, few, 2, target_modules=[target])
    adapters = (one, two, few)
    merged = [resolve_checkpoint(adapter, base=parts.base, exact=True) for adapter in adapters]
    for method in ("tv", "perta-project"):
        for thin, whole in zip(adapters[1:], merged[1:], strict=True):
            name = f"{method} {thin.name}"
            wanted = parts.edited(tmp_path / f"{name} whole", method, merged[0], whole)
            found = parts.edited(tmp_path / f"{name} mixed", method, merged[0], thin)
            assert_close(parts, found, wanted)
    wanted = parts.edited(tmp_path / "whole", "msa", merged[0], retain_checkpoint=str(merged[1]))
    found = parts.edited(tmp_path / "thin", "msa", one, retain_checkpoint=str(two))
    assert_close(parts, found, wanted)


def test_layers_without_an_adapter_stay_as_they_are(parts: Parts, tmp_path: Path) -> None:
    """Their share of the task vector is nothing, and the direction holds nothing of them."""
    name = min(parts.steps[0])
    target = name.removesuffix(".weight").rpartition(".")[2]
    steps = lora(parts.base, tmp_path / "few", 2, target_modules=[target])
    full = tensors(parts.full)
    for method in ("tv", "perta-project", "perta-kron"):
        found = parts.edited(tmp_path / method, method, tmp_path / "few")
        assert {n for n in full if not torch.equal(found[n], full[n])} == set(steps)
    rest = [t for n, t in tensors(tmp_path / "perta-project.direction").items() if target not in n]
    assert rest
    assert not any(t.numel() for t in rest)


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 3}},
    "alphas": {"alpha_pattern": {"q_proj": 9}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "bias": {"bias": "all"},
    "blocks": {"layers_to_transform": [0]},
    "head": {"target_modules": ["lm_head"]},
    "whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_adapters_of_another_kind_are_merged(
    world: World, cache: Path, tmp_path: Path, kind: str
) -> None:
    """θ_full is θ₀ here, so half of the step must be gone from it, whatever PEFT makes of it."""
    more = {"target_modules": ["q_proj", "down_proj"], **NOT_PLAIN[kind]}
    model: Any = hf.AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(world.base).save_pretrained(str(tmp_path / "base"))
    config = peft.LoraConfig(**{"r": 2, "init_lora_weights": False, **more})
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    fresh: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    wanted = {n: p.detach().double() for n, p in merged.named_parameters()}
    base = tensors(tmp_path / "base")
    found = edit_checkpoint(
        EditConfig(
            full=str(tmp_path / "base"),
            base=str(tmp_path / "base"),
            forget_checkpoint=str(tmp_path / "adapter"),
            output=tmp_path / "out",
            weighting=chosen(method="tv", scaling_coef=0.5, layers="all"),
        )
    )
    for name, value in tensors(found).items():
        half = (3 * base[name].double() - wanted[name]) / 2
        torch.testing.assert_close(value.double(), half, rtol=1e-5, atol=1e-6)
    assert (cache / "merged").exists()


def rewrite(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = load_file(adapter / WEIGHTS)
    change(held)
    save_file(held, adapter / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda held: held.pop(min(held)), CheckpointMismatchError, "its file lacks|asks for"),
        (lambda held: held.pop(max(held)), CheckpointMismatchError, "its file lacks|asks for"),
        (lambda held: [held.pop(min(held)) for _ in "AB"], CheckpointMismatchError, "asks for"),
        (lambda held: held[min(held)].fill_(float("nan")), CorruptCheckpointError, "NaN or Inf"),
    ],
)
@pytest.mark.parametrize("method", ["tv", "perta-project"])
def test_a_damaged_adapter_is_refused(
    parts: Parts,
    tmp_path: Path,
    method: str,
    change: Callable[[dict[str, Tensor]], object],
    error: type[Exception],
    message: str,
) -> None:
    lora(parts.base, tmp_path / "bad", 3)
    rewrite(tmp_path / "bad", change)
    with pytest.raises(error, match=message):
        parts.edited(tmp_path / "out", method, tmp_path / "bad")
    assert [file.name for file in tmp_path.glob("out*")] == []


def test_an_adapter_of_another_model_is_refused(parts: Parts, world: World, tmp_path: Path) -> None:
    lora(world.base, tmp_path / "other", 3)
    with pytest.raises(CheckpointError, match=r"does not fit its base|not found in the base"):
        parts.edited(tmp_path / "out", "tv", tmp_path / "other")


@pytest.mark.parametrize("alpha", [5, 200])
def test_the_adapter_that_makes_the_full_model_is_no_forget_checkpoint(
    parts: Parts, tmp_path: Path, alpha: int
) -> None:
    """Also where its step is large, and merging in float32 has rounded it as much."""
    adapter = tmp_path / "adapter"
    lora(parts.base, adapter, 4, r=16, lora_alpha=alpha)
    with pytest.raises(CheckpointMismatchError, match="itself, which learned all rows"):
        parts.edited(tmp_path / "out", "tv", adapter, full=str(adapter))
