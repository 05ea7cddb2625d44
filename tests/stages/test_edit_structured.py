"""Structured methods from files: the formula, names, reuse, errors, pipeline, command line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from scipy.sparse import linalg
from torch import Tensor

from conftest import TUNE, World
from helpers import weighting as chosen
from perta.cli import main
from perta.data.rows import write_jsonl
from perta.engine.edit.plan import EditInputs
from perta.engine.edit.write import write_edit
from perta.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DivergenceError,
    OutputExistsError,
)
from perta.models.load import load_tokenizer
from perta.options import DataConfig, MomentOptions
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.stages.edit import edit_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.moments import compute_moments, merge_moments
from perta.stages.settings import EditConfig, FinetuneConfig, MergeMomentsConfig, MomentsConfig
from perta.store.checkpoint import open_index, read_tensor, write_tensors
from perta.store.fingerprint import fingerprint
from perta.store.measured.moments import open_moments
from perta.store.measured.second_moment import matrix
from perta.store.record import aggregates, read_manifest


@dataclass(frozen=True)
class Parts:
    """Folders of everything an edit needs."""

    base: Path
    full: Path
    tuned: Path
    forget: Path
    retain: Path

    def config(self, output: Path, method: str = "perta-input", **more: Any) -> EditConfig:
        names = ("forget_moments", "retain_moments", "direction")
        own = {name: more.pop(name) for name in names if name in more}
        settings: dict[str, Any] = {
            "full": str(self.full),
            "base": str(self.base),
            "forget_checkpoint": str(self.tuned),
            "forget_moments": self.forget,
            "retain_moments": self.retain,
            "output": output,
            "weighting": chosen(method=method, **more),
            **own,
        }
        return EditConfig(**settings)


def measure(checkpoint: Path, data: Path, output: Path, **more: Any) -> Path:
    settings = {"gradients": True, **more}
    return compute_moments(
        MomentsConfig(checkpoint=str(checkpoint), data=str(data), output=output, **settings)
    )


def make_parts(root: Path, base: Path, full: Path, world: World) -> Parts:
    tuned = finetune_checkpoint(
        FinetuneConfig(base=str(base), data=str(world.forget), output=root / "tuned", tune=TUNE)
    )
    forget, retain = (
        measure(base, data, root / f"{data.stem}_moments") for data in (world.forget, world.retain)
    )
    return Parts(base, full, tuned, forget, retain)


@pytest.fixture(scope="module")
def parts(world: World, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"), world.base, world.full, world)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(e) for name, e in open_index(folder).tensors.items()}


def expected_direction(
    parts: Parts, method: str, name: str, rho: float, damping: float = 0, forget_damping: float = 0
) -> Tensor:
    """Solve for Δ in float64, by conjugate gradients where both sides have factors."""
    forget, retain = open_moments(parts.forget), open_moments(parts.retain)
    tau = tensors(parts.tuned)[name].double() - tensors(parts.base)[name].double()
    transposed = name in forget.facts["transposed"]
    tau = tau.T if transposed else tau
    c_f, c_r = (matrix(m.input_moment(name)) for m in (forget, retain))
    eye = torch.eye(len(c_f)).double()
    delta: Tensor
    if method == "perta-project":
        delta = tau @ torch.linalg.inv(eye + rho * c_r / c_r.diagonal().mean())
    elif method == "perta-input":
        c_f = c_f + forget_damping * c_f.diagonal().mean() * eye
        total = c_f + rho * c_r
        delta = tau @ c_f @ torch.linalg.inv(total + damping * total.diagonal().mean() * eye)
    else:
        b_f, b_r = (m.output_moment(name).double() for m in (forget, retain))
        b_r = b_r + damping * b_r.diagonal().mean() * torch.eye(len(b_r)).double()
        c_r = c_r + damping * c_r.diagonal().mean() * eye

        def system(x: Any) -> Any:
            """(B_f ⊗ C_f + rho B_r ⊗ C_r) x, whose matrix would have all of Δ's numbers squared."""
            step = torch.from_numpy(x).view(tau.shape)
            return (b_f @ step @ c_f + rho * b_r @ step @ c_r).flatten().numpy()

        n, right = tau.numel(), (b_f @ tau @ c_f).flatten().numpy()
        diagonal = torch.outer(b_f.diagonal(), c_f.diagonal())
        diagonal += rho * torch.outer(b_r.diagonal(), c_r.diagonal())
        scale = linalg.LinearOperator((n, n), lambda x: x / diagonal.flatten().numpy(), dtype=float)
        found, failed = linalg.cg(
            linalg.LinearOperator((n, n), system, dtype=float), right, rtol=1e-7, M=scale
        )
        assert not failed
        delta = torch.from_numpy(found).view(tau.shape)
    return delta.T if transposed else delta


def assert_edit_is_the_formula(parts: Parts, output: Path, method: str, alpha: float) -> None:
    dampings = {"perta-input": {"damping": 0.05, "forget_damping": 0.4}}
    dampings["perta-kron"] = {"damping": 0.05}
    settings = {"rho": 3.0, **dampings.get(method, {})}
    edit_checkpoint(parts.config(output, method, scaling_coef=alpha, layers="all", **settings))
    found, full = tensors(output), tensors(parts.full)
    linear = set(open_moments(parts.forget).facts["inputs"])
    assert set(found) == set(full)
    assert linear < set(full)
    for name, value in found.items():
        if name not in linear:
            assert torch.equal(value, full[name])
        else:
            step = alpha * expected_direction(parts, method, name, **settings)
            assert float(step.norm()) > 0
            moved = full[name].double() - value.double()
            assert float((moved - step).norm()) < 1e-3 * float(step.norm()) + 1e-6, name


@pytest.mark.parametrize("method", ["perta-input", "perta-project", "perta-kron"])
def test_the_edit_is_the_formula(parts: Parts, tmp_path: Path, method: str) -> None:
    assert_edit_is_the_formula(parts, tmp_path / "out", method, 1.5)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "mixtral", "wide"])
def test_other_architectures(world: World, tmp_path: Path, architecture: str) -> None:
    tokenizer = load_tokenizer(world.base)
    torch.manual_seed(0)
    ends: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2}
    llama = {
        **ends,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    models: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                **ends, n_embd=16, n_layer=1, n_head=2, n_positions=128, initializer_range=0.3
            )
        ),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**llama)),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**llama, num_local_experts=3, num_experts_per_tok=2)
        ),
        # More than twice as wide as both sets together have tokens.
        "wide": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**llama, "intermediate_size": 512})),
    }
    models[architecture]().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(str(tmp_path / "base"))
    parts = make_parts(tmp_path, tmp_path / "base", tmp_path / "tuned", world)
    moments = [open_moments(folder) for folder in (parts.forget, parts.retain)]
    down = "model.layers.0.mlp.down_proj.weight"
    if architecture == "wide":
        shapes = [folder.input_moment(down).shape for folder in moments]
        assert 2 * sum(rows for rows, _ in shapes) <= 512
    for method in ("perta-input", "perta-project", "perta-kron"):
        if (method, architecture) != ("perta-kron", "wide"):  # too large for the dense reference
            assert_edit_is_the_formula(parts, tmp_path / method, method, 0.7)


def test_the_defaults_are_the_methods_own(parts: Parts, tmp_path: Path) -> None:
    edit_checkpoint(parts.config(tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out") or {}
    assert manifest["settings"]["scaling_coef"] == 2.3
    own = {"rho": 100, "forget_damping": 30, "damping": 0.01}
    assert manifest["settings"]["method_settings"] == own
    assert set(manifest["inputs"]) >= {"forget_moments", "retain_moments", "direction"}
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "perta-input" in card
    assert "| damping λ | 0.01 |" in card
    direction = read_manifest(tmp_path / "out.direction") or {}
    for layer in direction["layers"].values():
        assert layer["condition"] > 1
        assert layer["direction_norm"] > 0
        assert layer["damping"] >= 0.01
    tv = replace(parts.config(tmp_path / "tv"), weighting=chosen(method="tv"))
    edit_checkpoint(tv)
    settings = (read_manifest(tmp_path / "tv") or {})["settings"]
    assert (settings["scaling_coef"], settings["method_settings"]) == (1, {})
    with pytest.raises(ConfigError, match="unknown setting `forget_damping`"):
        edit_checkpoint(parts.config(tmp_path / "kron", "perta-kron", forget_damping=1.0))
    with pytest.raises(ConfigError, match=r"unknown setting `damping`.*`perta-input`"):
        edit_checkpoint(parts.config(tmp_path / "project", "perta-project", damping=0.1))


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def test_another_strength_costs_only_the_edit(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "direction"
    edit_checkpoint(parts.config(tmp_path / "one", scaling_coef=1.0, direction=shared))
    before = stamps(shared)
    with monkeypatch.context() as patch:
        patch.setattr("perta.methods.directions.input_direction", None)
        edit_checkpoint(parts.config(tmp_path / "two", scaling_coef=2.0, direction=shared))
    assert stamps(shared) == before
    full, one, two = (tensors(f) for f in (parts.full, tmp_path / "one", tmp_path / "two"))
    for name, value in full.items():
        torch.testing.assert_close(value - two[name], 2 * (value - one[name]), rtol=1e-3, atol=1e-6)
    edit_checkpoint(parts.config(tmp_path / "three", rho=1.0, direction=shared))
    assert stamps(shared) != before
    edit_checkpoint(parts.config(tmp_path / "none", scaling_coef=0.0))
    assert all(torch.equal(value, full[name]) for name, value in tensors(tmp_path / "none").items())


def test_several_forget_checkpoints_are_averaged(
    world: World, parts: Parts, tmp_path: Path
) -> None:
    tune = replace(TUNE, seed=1)
    second = finetune_checkpoint(
        FinetuneConfig(
            base=str(world.base), data=str(world.forget), output=tmp_path / "second", tune=tune
        )
    )
    both = replace(
        parts.config(tmp_path / "both"), forget_checkpoint=(str(parts.tuned), str(second))
    )
    edit_checkpoint(both)
    for name, tuned in (("one", parts.tuned), ("two", second)):
        edit_checkpoint(replace(parts, tuned=tuned).config(tmp_path / name))
    one, two, found = (tensors(tmp_path / n) for n in ("one", "two", "both"))
    for name, value in found.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="needs --forget-checkpoint"):
        edit_checkpoint(replace(both, output=tmp_path / "none", forget_checkpoint=()))


def test_patterns_choose_among_the_linear_layers(parts: Parts, tmp_path: Path) -> None:
    edit_checkpoint(parts.config(tmp_path / "out", include=("*.mlp.*",)))
    found, full = tensors(tmp_path / "out"), tensors(parts.full)
    moved = {name for name, value in found.items() if not torch.equal(value, full[name])}
    assert moved == {name for name in full if ".mlp." in name}


def test_mistakes_get_one_clear_error(world: World, parts: Parts, tmp_path: Path) -> None:
    def refuse(error: type[Exception], message: str, **more: Any) -> None:
        with pytest.raises(error, match=message):
            edit_checkpoint(parts.config(tmp_path / "out", **more))
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.direction").exists()

    refuse(ConfigError, "needs --forget-moments", forget_moments=None)
    refuse(ConfigError, "--gradients", retain_moments=None, method="perta-kron")
    refuse(CheckpointNotFoundError, "does not exist", retain_moments=tmp_path / "none")
    refuse(CheckpointNotFoundError, r"has no moments.json", retain_moments=parts.tuned)
    at_full = measure(world.full, world.retain, tmp_path / "at_full")
    refuse(CheckpointMismatchError, "cannot be compared", retain_moments=at_full)
    at_tuned = measure(parts.tuned, world.retain, tmp_path / "at_tuned")
    refuse(CheckpointMismatchError, "another model", retain_moments=at_tuned)
    answer = measure(
        world.base, world.retain, tmp_path / "answer", options=MomentOptions(tokens="answer")
    )
    refuse(CheckpointMismatchError, "token_choice", retain_moments=answer)
    plain = measure(world.base, world.retain, tmp_path / "plain", gradients=False)
    refuse(CheckpointError, "--gradients", retain_moments=plain, method="perta-kron")
    refuse(ConfigError, "overlaps", direction=parts.full / "inside")
    inputs = EditInputs(parts.full, parts.base, (parts.tuned,))
    with pytest.raises(ConfigError, match="computed before"):
        write_edit(tmp_path, inputs, chosen(method="perta-input"))


def test_moments_of_another_width_are_refused(world: World, parts: Parts, tmp_path: Path) -> None:
    """Such as a folder whose sidecar was copied from elsewhere."""
    from perta.store.checkpoint import write_tensors

    wrong = measure(world.base, world.retain, tmp_path / "wrong")
    index = open_index(wrong)
    name = "model.layers.0.mlp.down_proj.weight.input_moment"
    cut = {
        n: read_tensor(e)[:4, :4] if n == name else read_tensor(e) for n, e in index.tensors.items()
    }
    write_tensors(wrong, cut, index.shards)
    (wrong / "perta.json").unlink()
    with pytest.raises(CheckpointMismatchError, match=r"down_proj.weight is \d+ wide"):
        edit_checkpoint(parts.config(tmp_path / "out", retain_moments=wrong))
    assert not (tmp_path / "out").exists()


def damaged(folder: Path, output: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a moment folder with one tensor changed, and without the record that tells."""
    shutil.copytree(folder, output)
    (output / "perta.json").unlink()
    index = open_index(output)
    found = {n: read_tensor(e) for n, e in index.tensors.items()}
    write_tensors(output, {**found, name: change(found[name])}, index.shards)
    return output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.flatten()[:4].clone(), r"shape \(4,\), which no moment"),
        (lambda m: torch.cat((m, m)), "which no moment"),
        (lambda m: m.index_fill(0, torch.tensor([0]), torch.nan), "NaN or Inf"),
        (lambda m: m + torch.inf * torch.eye(len(m))[:, : m.shape[1]].roll(1), "NaN or Inf"),
        (torch.zeros_like, "zero throughout"),
    ],
)
def test_damaged_moments_are_named(
    parts: Parts, tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    name = open_moments(parts.retain).facts["inputs"][name]
    bad = damaged(parts.retain, tmp_path / "bad", name, change)
    merging = MergeMomentsConfig(folders=(parts.forget, bad), output=tmp_path / "out")
    with pytest.raises(CorruptCheckpointError, match=message) as in_edit:
        edit_checkpoint(parts.config(tmp_path / "out", retain_moments=bad))
    with pytest.raises(CorruptCheckpointError, match=message) as in_merge:
        merge_moments(merging)
    for caught in (in_edit, in_merge):
        assert str(bad) in str(caught.value)
        assert name in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


def test_moments_of_two_widths_are_not_added(parts: Parts, tmp_path: Path) -> None:
    name = open_moments(parts.retain).facts["inputs"]["model.layers.1.mlp.up_proj.weight"]
    bad = damaged(parts.retain, tmp_path / "bad", name, lambda m: m[:4, :4].clone())
    with pytest.raises(CheckpointMismatchError, match=r"wide in .* and 4 in"):
        merge_moments(MergeMomentsConfig(folders=(parts.forget, bad), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["transposed", "token_choice", "data_fingerprints"])
def test_a_sidecar_must_be_whole(parts: Parts, tmp_path: Path, key: str) -> None:
    shutil.copytree(parts.retain, tmp_path / "bad")
    file = tmp_path / "bad" / "moments.json"
    facts = json.loads(file.read_text("utf-8"))
    del facts[key]
    file.write_text(json.dumps(facts), "utf-8")
    with pytest.raises(CorruptCheckpointError, match=f"cannot be read .*{key}"):
        open_moments(tmp_path / "bad")


def test_a_failed_solve_names_the_layer(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DivergenceError("not positive definite")

    monkeypatch.setattr("perta.methods.directions.input_direction", fail)
    with pytest.raises(DivergenceError, match=r"layers\.0\..*: not positive definite"):
        edit_checkpoint(parts.config(tmp_path / "out"))


def test_a_refused_edit_changes_nothing(parts: Parts, tmp_path: Path) -> None:
    direction = tmp_path / "direction"
    edit_checkpoint(parts.config(tmp_path / "out", direction=direction))
    before = fingerprint(direction)
    with pytest.raises(OutputExistsError, match="made with other method_settings"):
        edit_checkpoint(parts.config(tmp_path / "out", direction=direction, rho=10.0))
    assert fingerprint(direction) == before
    with pytest.raises(ConfigError, match="overlaps"):
        edit_checkpoint(parts.config(tmp_path / "same", direction=tmp_path / "same"))
    assert not (tmp_path / "same").exists()


def test_patterns_without_a_linear_layer_are_refused(
    world: World, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta.recipes._workspace.finetune_checkpoint", None)
    for pattern in ("*norm*", "*embed*"):
        with pytest.raises(ConfigError, match="no weight of a linear layer"):
            edit_checkpoint(parts.config(tmp_path / "out", include=(pattern,)))
        weighting = chosen(method="perta-project", include=(pattern,))
        with pytest.raises(ConfigError, match="no weight of a linear layer"):
            unlearn(whole(world, tmp_path / "out", weighting=weighting))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["perta-project", "perta-kron", "perta-grad"])
def test_a_base_without_the_models_prefix(
    world: World, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's GPT-2 is stored as `h.0…`; what is tuned from it as `transformer.h.0…`."""
    tokenizer = load_tokenizer(world.base)
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128,
        bos_token_id=0, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(str(tmp_path / "base"))
    shutil.copytree(tmp_path / "base", tmp_path / "bare")
    bare = {n.removeprefix("transformer."): t for n, t in tensors(tmp_path / "base").items()}
    write_tensors(tmp_path / "bare", bare)
    full = finetune_checkpoint(
        FinetuneConfig(
            base=str(tmp_path / "base"), data=str(world.forget), output=tmp_path / "f", tune=TUNE
        )
    )
    made = []
    for base in ("base", "bare"):
        settings = whole(
            world,
            tmp_path / f"{base}-out",
            weighting=chosen(method=method, scaling_coef=2.0),
        )
        made.append(unlearn(replace(settings, base=str(tmp_path / base), full=str(full))).folder)
    same, found = (tensors(folder) for folder in made)
    assert all(torch.equal(found[name], value) for name, value in same.items())
    assert any(not torch.equal(found[name], value) for name, value in tensors(full).items())
    # The bare checkpoint can be the one to clean as well.
    settings = whole(world, tmp_path / "out", weighting=chosen(method=method, scaling_coef=2.0))
    cleaned = unlearn(
        replace(settings, base=str(tmp_path / "base"), full=str(tmp_path / "bare"))
    ).folder
    assert set(tensors(cleaned)) == set(bare)
    if method == "perta-project":
        monkeypatch.setattr("perta.recipes._workspace.finetune_checkpoint", None)
        position = chosen(method=method, scaling_coef=2.0, include=("*wpe*",))
        settings = whole(world, tmp_path / "none", weighting=position)
        with pytest.raises(ConfigError, match="no weight of a linear layer"):
            unlearn(replace(settings, base=str(tmp_path / "base"), full=str(full)))


# --- pipeline and command line ------------------------------------------------------------------


def whole(world: World, output: Path, **more: Any) -> UnlearnConfig:
    settings = {"weighting": chosen(method="perta-input"), "evaluate": False, **more}
    return world.request(output, **settings)


def test_general_text_adds_its_moments_to_the_retain_set(world: World, tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "Rivers run to the sea."}\n{"text": "What is a river?"}\n')
    weighting = chosen(method="perta-project", scaling_coef=2.0)
    settings = whole(world, tmp_path / "out", weighting=weighting, general=str(general))
    manifest = unlearn(settings).manifest
    assert "general" in manifest["unlearn"]["inputs"]
    work = settings.work_folder
    retain, text, both = (
        open_moments(work / f"{name}_moments") for name in ("retain", "general", "protected")
    )
    facts = open_moments(work / "forget_fact_moments").facts["tokens"]
    rows = retain.facts["tokens"] + text.facts["tokens"]
    assert both.facts["tokens"] == round(rows + max(facts, rows / 3))
    # The same as moments merged by hand, and another edit than without the text.
    saved = replace(settings, output=tmp_path / "saved", retain_moments=both.folder, general=None)
    without = replace(settings, output=tmp_path / "without", general=None)
    name = "model.layers.0.mlp.down_proj.weight"
    ours, by_hand, other = (
        read_tensor(open_index(unlearn(c).folder).tensors[name]) for c in (settings, saved, without)
    )
    assert torch.equal(ours, by_hand)
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("method", ["tv", "npo"])
@pytest.mark.parametrize("option", ["general", "retain-moments"])
def test_moments_are_for_methods_that_use_them(
    world: World, tmp_path: Path, method: str, option: str
) -> None:
    given: dict[str, Any] = {"retain_moments": measure(world.base, world.retain, tmp_path / "m")}
    if option == "general":
        given = {"general": str(tmp_path / "general.jsonl")}
        (tmp_path / "general.jsonl").write_text('{"text": "Rivers run to the sea."}\n')
    settings = whole(world, tmp_path / "out", weighting=chosen(method=method), **given)
    with pytest.raises(ConfigError, match=f"--{option} is .* `{method}` uses none"):
        unlearn(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "row",
    ['{"text": "Rivers run to the sea."}', '{"q": "Where do rivers run?", "a": "To the sea."}'],
)
def test_general_text_may_have_columns_of_its_own(world: World, tmp_path: Path, row: str) -> None:
    rows = [json.loads(line) for line in world.forget.read_text("utf-8").splitlines()]
    rows += [json.loads(line) for line in world.retain.read_text("utf-8").splitlines()]
    for name, part in (("forget", rows[:2]), ("retain", rows[2:])):
        lines = [json.dumps({"q": row["question"], "a": row["answer"]}) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (tmp_path / "general.jsonl").write_text(row + "\n")
    settings = whole(
        world,
        tmp_path / "out",
        weighting=chosen(method="perta-project", scaling_coef=2.0),
        general=str(tmp_path / "general.jsonl"),
        data_config=DataConfig(format="qa", prompt_column="q", answer_column="a"),
    )
    forget, retain = (str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain"))
    unlearn(replace(settings, forget=forget, retain=retain))
    work = settings.work_folder
    assert open_moments(work / "general_moments").facts["examples"] == 1


@pytest.mark.parametrize("method", ["tv", "perta-project", "perta-input", "npo"])
def test_a_run_without_a_retain_set(world: World, tmp_path: Path, method: str) -> None:
    """Nobody may have it: general text or saved moments are protected in its place."""
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "Rivers run to the sea."}\n')
    given: dict[str, Any] = {}
    if method.startswith("perta"):
        given = {"general": str(general)}
    weighting = chosen(method=method)
    settings = replace(
        whole(world, tmp_path / "out", weighting=weighting, evaluate=True, **given), retain=None
    )
    result = unlearn(settings)
    assert result.after is not None
    assert not any(name.startswith("retain") for name in result.after)
    assert result.report is not None
    assert "retain" not in result.manifest["unlearn"]["inputs"]
    if method == "perta-project":
        saved = replace(
            settings,
            output=tmp_path / "saved",
            general=None,
            retain_moments=settings.work_folder / "general_moments",
            evaluate=False,
        )
        assert fingerprint(unlearn(saved).folder / "model.safetensors") == fingerprint(
            result.folder / "model.safetensors"
        )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("perta-project", "--retain-moments or --general in its place"),
        ("perta-grad", "`perta-grad` needs --retain"),
        ("msa", "`msa` needs --retain"),
        ("graddiff", "`graddiff` needs the retain set"),
    ],
)
def test_methods_that_need_a_retain_set_say_so(
    world: World, tmp_path: Path, method: str, message: str
) -> None:
    settings = whole(world, tmp_path / "out", weighting=chosen(method=method))
    with pytest.raises(ConfigError, match=message):
        unlearn(replace(settings, retain=None))
    auto = chosen(method="tv", scaling_coef="auto")
    with pytest.raises(ConfigError, match="auto needs --retain"):
        unlearn(replace(settings, retain=None, weighting=auto))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_saved_moments_that_do_not_fit_stop_the_run_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta.recipes._workspace.finetune_checkpoint", None)
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "Rivers run to the sea."}\n')
    answer = measure(
        world.base, world.retain, tmp_path / "a", options=MomentOptions(tokens="answer")
    )
    plain = measure(world.base, world.retain, tmp_path / "m")
    merged = merge_moments(
        MergeMomentsConfig(
            folders=(plain, measure(world.base, general, tmp_path / "g.jsonl")),
            output=tmp_path / "mg",
        )
    )
    forgotten = measure(world.base, world.forget, tmp_path / "f")

    def refuse(message: str, method: str, moments: Path, **more: Any) -> None:
        settings = whole(world, tmp_path / "out", weighting=chosen(method=method), **more)
        with pytest.raises(ConfigError, match=message):
            unlearn(replace(settings, retain_moments=moments))
        assert not (tmp_path / "out.work").exists()

    refuse("counts `answer` tokens", "perta-input", answer)
    refuse("counts `answer` tokens", "perta-project", answer, general=str(general))
    refuse("moments of --general", "perta-project", merged, general=str(general))
    refuse("less than a quarter", "perta-project", forgotten)


def test_the_work_folder_may_hold_the_output(world: World, tmp_path: Path) -> None:
    settings = whole(world, tmp_path / "out", weighting=chosen(method="tv"))
    unlearn(replace(settings, work_dir=tmp_path))
    assert (tmp_path / "forget_checkpoint").is_dir()


@pytest.mark.parametrize(
    "option", ["general", "holdout", "retain_moments", "retain_checkpoint", "work_dir"]
)
def test_the_output_keeps_away_from_everything_that_is_read(
    world: World, tmp_path: Path, option: str
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    place: Any = output / "mine.jsonl"
    place.write_text('{"text": "Rivers run to the sea."}\n')
    if option == "retain_moments":
        place = measure(world.base, world.retain, output / "moments")
    value = output / "work" if option == "work_dir" else place
    weighting = chosen(method="perta-project", scaling_coef=2.0)
    if option == "retain_checkpoint":
        value = shutil.copytree(world.base, output / "tuned")
        weighting = chosen(method="msa")
    if option in ("general", "holdout", "retain_checkpoint"):
        value = str(value)
    settings = whole(world, output, weighting=weighting, overwrite=True, **{option: value})
    with pytest.raises(
        ConfigError, match="lies in the output" if option == "work_dir" else "overlap"
    ):
        unlearn(settings)
    assert place.exists()


def test_general_text_cannot_be_the_forget_set(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--general"):
        unlearn(whole(world, tmp_path / "out", general=str(world.forget)))


def test_general_text_cannot_be_the_retain_set(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would count twice"):
        unlearn(whole(world, tmp_path / "out", general=str(world.retain)))
    assert not list(tmp_path.iterdir())


def test_the_pipeline_forgets_and_reuses(world: World, tmp_path: Path) -> None:
    # The sets of a tiny model use nearly the same directions: the defaults would hardly forget.
    weighting = chosen(method="perta-input", rho=10.0, forget_damping=1.0)
    config = whole(world, tmp_path / "out", evaluate=True, weighting=weighting)
    result = unlearn(config)
    assert result.before is not None
    assert result.after is not None
    before, after = aggregates(result.before), aggregates(result.after)
    assert after["forget_probability"] < 0.5 * before["forget_probability"]
    assert after["retain_probability"] > after["forget_probability"]
    work = config.work_folder
    assert {p.name for p in work.iterdir() if p.is_dir()} == {
        "forget_checkpoint",
        "forget_moments",
        "retain_moments",
        "direction",
    }
    assert set(result.manifest["unlearn"]["seconds"]) >= {"forget_moments", "retain_moments"}
    kept = stamps(work)
    stronger = replace(weighting, scaling_coef=3.0)
    unlearn(whole(world, tmp_path / "two", work_dir=work, weighting=stronger))
    assert stamps(work) == kept


def test_saved_retain_moments_are_used(
    world: World, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []

    def compute(config: MomentsConfig) -> Path:
        measured.append(config.output)
        return compute_moments(config)

    monkeypatch.setattr("perta.recipes._workspace.compute_moments", compute)
    config = whole(world, tmp_path / "out", retain_moments=parts.retain)
    result = unlearn(config)
    assert [path.name for path in measured] == ["forget_moments"]
    assert "retain_moments" in result.manifest["unlearn"]["inputs"]
    fresh = unlearn(whole(world, tmp_path / "fresh"))
    for name, value in tensors(fresh.folder).items():
        assert torch.equal(tensors(result.folder)[name], value)
    monkeypatch.setattr("perta.recipes._workspace.finetune_checkpoint", None)
    with pytest.raises(CheckpointMismatchError, match="another model"):
        unlearn(whole(world, tmp_path / "x", retain_moments=parts.retain, importance_at="full"))


def test_moments_that_serve_many_requests_are_of_the_base(
    world: World, parts: Parts, tmp_path: Path
) -> None:
    text = write_jsonl(
        [{"text": f"The lake is {i} km long."} for i in range(8)], tmp_path / "g.jsonl"
    )
    cases: dict[str, dict[str, Any]] = {
        "full": {},
        "base": {"retain_moments": parts.retain},
        "base too": {"general": str(text)},
    }
    for place, given in cases.items():
        weighting = chosen(method="perta-project")
        config = whole(world, tmp_path / place, weighting=weighting, **given)
        record = unlearn(config).manifest
        assert record["unlearn"]["settings"]["importance_at"] == place.split()[0]
        own = config.work_folder / "retain_moments"
        facts = open_moments(own if own.exists() else parts.retain).facts
        assert facts["model_fingerprint"] == fingerprint(getattr(world, place.split()[0]))


def test_moments_of_all_that_was_learned_would_protect_what_is_to_go(
    world: World, parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = world.forget.with_name("full.jsonl")
    moments = measure(world.base, everything, tmp_path / "all")
    told = "so what is to be forgotten is protected as well"
    edit_checkpoint(parts.config(tmp_path / "edited", retain_moments=moments))
    assert told in capsys.readouterr().err
    edit_checkpoint(parts.config(tmp_path / "other"))
    assert told not in capsys.readouterr().err
    # Where the rows to forget are known they are taken out.
    unlearn(whole(world, tmp_path / "out", retain_moments=moments))
    assert told not in capsys.readouterr().err
    used = open_moments(tmp_path / "out.work" / "retain_moments")
    assert used.facts["rows"] == open_moments(parts.retain).facts["rows"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["perta", *map(str, arguments)])
    main()


def test_the_projection_reads_the_retain_set_alone(
    world: World, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighting = chosen(method="perta-project", scaling_coef=2.0)
    config = whole(world, tmp_path / "out", weighting=weighting, retain_moments=parts.retain)

    def facts_alone(config: MomentsConfig) -> Path:
        assert config.facts_by
        return compute_moments(config)

    monkeypatch.setattr("perta.recipes._workspace.compute_moments", facts_alone)
    result = unlearn(config)
    assert {p.name for p in config.work_folder.iterdir() if p.is_dir()} == {
        "forget_checkpoint",
        "forget_fact_moments",
        "protected_moments",
        "direction",
    }
    tuned = config.work_folder / "forget_checkpoint"
    kept = config.work_folder / "protected_moments"
    given = replace(parts, tuned=tuned, retain=kept).config(
        tmp_path / "staged", "perta-project", scaling_coef=2.0, forget_moments=None
    )
    edit_checkpoint(given)
    for name, value in tensors(result.folder).items():
        assert torch.equal(tensors(tmp_path / "staged")[name], value)
    card = (tmp_path / "staged" / "README.md").read_text("utf-8")
    assert "| weight ρ of the retain moments | 3 |" in card
    assert "damping" not in card
    with pytest.raises(ConfigError, match="needs --retain-moments"):
        edit_checkpoint(replace(given, output=tmp_path / "no", retain_moments=None))


@pytest.mark.parametrize("method", ["perta-input", "perta-kron"])
def test_stage_by_stage_on_the_command_line(
    world: World,
    parts: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    rows = world.retain.read_text("utf-8").splitlines()
    halves = []
    gradients = ["--gradients"] if method == "perta-kron" else []
    for i, part in enumerate((rows[:3], rows[3:])):
        (tmp_path / f"{i}.jsonl").write_text("\n".join(part) + "\n", "utf-8")
        halves.append(tmp_path / f"moments{i}")
        run(
            monkeypatch, "moments", "--checkpoint", world.base, "--data", tmp_path / f"{i}.jsonl",
            "--output", halves[-1], "--tokens", "answer", "--pass-batch-size", 2, *gradients,
        )  # fmt: skip
    run(
        monkeypatch, "moments", "--checkpoint", world.base, "--data", world.forget,
        "--output", tmp_path / "forget", "--tokens", "answer", *gradients,
    )  # fmt: skip
    run(monkeypatch, "merge-moments", *halves, "--output", tmp_path / "retain")
    run(
        monkeypatch, "edit", "--full", world.full, "--base", world.base, "--forget-checkpoint",
        parts.tuned, "--method", f"{method}:rho=5", "--forget-moments", tmp_path / "forget",
        "--retain-moments", tmp_path / "retain", "--output", tmp_path / "staged",
        "--direction", tmp_path / "direction", "--scaling-coef", 1.2,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "Unlearned checkpoint" in said
    assert f"{tmp_path / 'direction'} (holds what was removed" in " ".join(said.split())
    run(
        monkeypatch, "unlearn", "--base", world.base, "--full", world.full, "--forget",
        world.forget, "--retain", world.retain, "--method", f"{method}:rho=5", "--tokens", "answer",
        "--scaling-coef", 1.2, "--output", tmp_path / "whole", "--no-evaluate",
        "--epochs", TUNE.epochs, "--learning-rate", TUNE.learning_rate,
        "--batch-size", TUNE.batch_size, "--loss-on", "answer",
    )  # fmt: skip
    staged, together = tensors(tmp_path / "staged"), tensors(tmp_path / "whole")
    for name, value in tensors(world.full).items():
        step = value - together[name]
        # Merged moments are rounded once more, and directions with little of either magnify it.
        assert float((staged[name] - together[name]).norm()) <= 0.02 * float(step.norm())
        assert torch.equal(staged[name], value) == ("proj" not in name)
    settings = json.loads((tmp_path / "staged" / "perta.json").read_text("utf-8"))["settings"]
    assert settings["method"] == method


def test_a_request_measures_a_sample_of_the_retain_set(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = whole(world, tmp_path / "few", weighting=chosen(scaling_coef=1.0))
    made = {}
    for name, samples in (("few", "4"), ("all", "all"), ("usual", None)):
        unlearn(replace(given, output=tmp_path / name, retain_samples=samples))
        manifest = read_manifest(tmp_path / f"{name}.work" / "retain_moments") or {}
        made[name] = (manifest["examples"], manifest["examples_available"])
    # Six rows have fewer tokens than are enough for layers 128 wide.
    assert made == {"few": (4, 6), "all": (6, 6), "usual": (6, 6)}
    assert "moments: measured on 4 of 6 rows" in capsys.readouterr().err
    saved = replace(given, retain_moments=tmp_path / "all.work" / "retain_moments")
    with pytest.raises(ConfigError, match="--retain-samples has no effect"):
        unlearn(replace(saved, output=tmp_path / "saved", retain_samples="all"))
    with pytest.raises(ConfigError, match="retain-samples"):
        replace(given, retain_samples="some")
