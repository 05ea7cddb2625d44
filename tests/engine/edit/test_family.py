"""Methods that subtract something else than one weighted task vector: files against an oracle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers import shared
from helpers import weighting as chosen
from perta.engine.edit.memory import changes_of
from perta.engine.edit.plan import EditInputs
from perta.engine.edit.write import EditSummary, write_edit
from perta.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    CorruptCheckpointError,
    PertaError,
)
from perta.methods.method import block_seed
from perta.methods.registry import at_strength, get_method
from perta.methods.task_vectors import _uniform
from perta.store.checkpoint import open_index, read_tensor, write_tensors

Array = NDArray[np.float64]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    EMBEDDING: (10, 4),
    "model.layers.0.mlp.weight": (5, 7),
    "model.layers.0.norm.weight": (4,),
    "model.experts.weight": (2, 3, 4),
    "model.scale": (),
}
COUNTS = {"forget": 3, "retain": 57}


class Family:
    """Small random checkpoints: full, base, three of the forget set, one of the retain set."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "out"
        self.dtype = torch.float32
        self.twice: set[str] = set()
        self.reduction = "mean_of_power"
        self.tensors: dict[str, dict[str, Tensor]] = {}
        roles = ("base", "full", "f1", "f2", "f3", "retain", "forget_importance")
        for seed, role in enumerate((*roles, "retain_importance")):
            generator = torch.Generator().manual_seed(seed)
            self.tensors[role] = {
                name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
            }
        for role in ("forget_importance", "retain_importance"):
            self.tensors[role] = {k: v.square() for k, v in self.tensors[role].items()}
        for name in SHAPES:
            # Some weights matter much more to the forget set, most do not.
            self.tensors["forget_importance"][name].reshape(-1)[::3] *= 300

    def write(self) -> None:
        for role, tensors in self.tensors.items():
            folder, is_importance = self.root / role, role.endswith("importance")
            folder.mkdir(exist_ok=True)
            sidecar = {
                "model_fingerprint": "abc",
                "reduction": self.reduction,
                "examples_available": COUNTS.get(role.split("_")[0]),
            }
            if is_importance:
                (folder / "importance.json").write_text(json.dumps(sidecar))
            stored = {
                name: value if is_importance else value.to(self.dtype)
                for name, value in tensors.items()
            }
            if role in self.twice:
                stored[HEAD] = stored[EMBEDDING].clone()
            for order in ("order-1", "order-2") if is_importance else ("",):
                (folder / order).mkdir(exist_ok=True)
                write_tensors(folder / order, stored)
            (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))

    def folders(self, count: int = 1, **more: Path | None) -> EditInputs:
        folders: dict[str, Any] = {
            "full": self.root / "full",
            "base": self.root / "base",
            "forget_checkpoints": tuple(self.root / f"f{i + 1}" for i in range(count)),
            "forget_importance": self.root / "forget_importance",
            "retain_importance": self.root / "retain_importance",
            "retain_checkpoint": self.root / "retain",
            **more,
        }
        return EditInputs(**folders)

    def edit(
        self,
        count: int = 1,
        name: str = "out",
        chunk: int = 16,
        threads: int = 2,
        **settings: Any,
    ) -> EditSummary:
        self.output = self.root / name
        self.output.mkdir()
        return write_edit(
            self.output,
            self.folders(count),
            shared(**settings),
            chunk=chunk,
            threads=threads,
        )

    def flat(self, role: str) -> Array:
        """All parameters of a model one after another, as stored."""
        tensors = self.tensors[role]
        dtype = torch.float32 if role.endswith("importance") else self.dtype
        parts = [tensors[name].to(dtype).double().flatten() for name in SHAPES]
        return torch.cat(parts).numpy()

    def result(self) -> Array:
        index = open_index(self.output)
        assert set(index.tensors) == set(SHAPES) | ({HEAD} if "full" in self.twice else set())
        values = {name: read_tensor(entry) for name, entry in index.tensors.items()}
        if HEAD in values:
            assert torch.equal(values[HEAD], values[EMBEDDING])
        assert all(value.dtype == self.dtype for value in values.values())
        return torch.cat([values[name].double().flatten() for name in SHAPES]).numpy()


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path)


# --- the definitions, value by value, in float64


def top(scores: Array, keep: float) -> NDArray[np.bool_]:
    order = np.argsort(-scores, kind="stable")
    mask = np.zeros(len(scores), dtype=bool)
    mask[order[: max(1, round(keep * len(scores)))]] = True
    return mask


def oracle(family: Family, method: str, count: int, alpha: float, **settings: Any) -> Array:
    full, base = family.flat("full"), family.flat("base")
    taus = [family.flat(f"f{i + 1}") - base for i in range(count)]
    tau: Array = np.mean(taus, axis=0) if taus else np.zeros_like(full)
    i_f, i_r = (family.flat(f"{side}_importance") for side in ("forget", "retain"))
    if method == "tv":
        return full - alpha * tau
    if method == "msa":
        beta: float = settings["retain_coef"]
        return full - alpha * tau + beta * (family.flat("retain") - base)
    if method == "selective":
        return full - alpha * np.where(top(np.abs(i_f * tau), settings["keep"]), tau, 0)
    if method == "ssd":
        on_all = (COUNTS["forget"] * i_f + COUNTS["retain"] * i_r) / sum(COUNTS.values())
        factor = np.minimum(settings["dampening"] * on_all / i_f, 1)
        kept = np.where(i_f > settings["selection"] * on_all, factor, 1)
        return full - alpha * (full - kept * full)
    if method == "interpolate":
        return full - alpha * (full - base)
    if method == "negmerge":
        same = np.all(np.sign(taus) == np.sign(taus[0]), axis=0)
        return full - alpha * np.where(same, tau, 0)
    assert method == "ties"
    trimmed = np.array([np.where(top(np.abs(t), settings["keep"]), t, 0) for t in taus])
    elected = np.sign(trimmed.sum(0))
    agrees = (np.sign(trimmed) == elected) & (trimmed != 0)
    total = np.where(agrees, trimmed, 0).sum(0)
    merged: Array = total / np.maximum(agrees.sum(0), 1)
    return full - alpha * merged


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("tv", 3, {}),
    ("msa", 1, {"retain_coef": 0.6}),
    ("msa", 2, {"retain_coef": -0.4}),
    ("selective", 1, {"keep": 0.3}),
    ("selective", 2, {"keep": 0.05}),
    ("ssd", 1, {"selection": 2.0, "dampening": 0.5}),
    ("ssd", 0, {"selection": 5.0, "dampening": 3.0}),
    ("ties", 1, {"keep": 0.25}),
    ("ties", 2, {"keep": 0.5}),
    ("ties", 3, {"keep": 0.7}),
    ("negmerge", 2, {}),
    ("negmerge", 3, {}),
    ("interpolate", 0, {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize(("method", "count", "settings"), CASES)
def test_the_edit_equals_a_float64_oracle(
    family: Family,
    method: str,
    count: int,
    settings: dict[str, Any],
    stored: str,
    dtype: torch.dtype,
) -> None:
    family.dtype = dtype
    family.reduction = "abs_of_mean" if method == "selective" else "mean_of_power"
    # A tied parameter that is stored twice counts once, in rankings as well.
    family.twice = {"full", "f1", "retain"} if stored == "twice" else {"f2"}
    family.write()
    family.edit(count, method=method, scaling_coef=0.7, **settings)
    expected = oracle(family, method, count, 0.7, **settings)
    assert np.abs(expected - family.flat("full")).max() > 0.1
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    np.testing.assert_allclose(family.result(), expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("method", ["selective", "ties", "dare", "negmerge", "ssd", "msa"])
def test_bytes_do_not_depend_on_chunks_and_threads(family: Family, method: str) -> None:
    family.reduction = "abs_of_mean" if method == "selective" else "mean_of_power"
    family.write()
    results = []
    for chunk, threads in ((1, 1), (7, 3), (16, 2), (1000, 1)):
        family.edit(3, f"out{chunk}", chunk, threads, method=method, drop=0.5, selection=2.0)
        results.append(family.result())
    assert not np.array_equal(results[0], family.flat("full"))
    for other in results[1:]:
        assert np.array_equal(results[0], other)


@pytest.mark.parametrize("count", [1, 2])
def test_dare_drops_at_random_and_rescales(family: Family, count: int) -> None:
    family.write()
    family.edit(count, method="dare", drop=0.75, weighting_seed=9, chunk=5)
    start = 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        part = slice(start, start + size)
        start += size
        step = np.zeros(size)
        for place in range(count):
            tau = (family.flat(f"f{place + 1}") - family.flat("base"))[part]
            kept = _uniform(block_seed(9, name, place), 0, size) >= 0.75
            step += np.where(kept, tau / 0.25, 0) / count
        expected = family.flat("full")[part] - step
        np.testing.assert_allclose(family.result()[part], expected, rtol=1e-6, atol=1e-6)
    family.edit(count, "other", method="dare", drop=0.75, weighting_seed=8)
    other = family.result()
    family.edit(count, "none", method="dare", drop=0.0)
    np.testing.assert_allclose(
        family.result(), oracle(family, "tv", count, 1.0), rtol=1e-6, atol=1e-6
    )
    assert not np.array_equal(other, family.result())


def test_keeping_everything_is_task_arithmetic(family: Family) -> None:
    family.reduction = "abs_of_mean"
    family.write()
    expected = oracle(family, "tv", 1, 1.0)
    for method in ("ties", "selective"):
        family.edit(1, method, method=method, keep=1.0)
        np.testing.assert_allclose(family.result(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep", [1e-9, 0.01, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("step", [2.0**-23, 2.0**-16])
def test_the_cut_is_exact(family: Family, keep: float, step: float) -> None:
    """Values that share the upper half of their bits are told apart by the lower half.

    With the smaller step all share it, with the larger one the lesser and the greater half do.
    """
    numbers = torch.randperm(999, generator=torch.Generator().manual_seed(0)) + 1
    tau = (1 + numbers.float() * step) * torch.where(numbers % 2 == 0, 1.0, -1.0)
    for role in ("base", "full", "f1"):
        self_value = tau if role == "f1" else torch.zeros(999)
        family.tensors[role]["model.long"] = self_value
        family.tensors[role] = {"model.long": self_value}
    family.write()
    family.edit(1, method="ties", keep=keep, chunk=64)
    moved = read_tensor(open_index(family.output).tensors["model.long"])
    count = max(1, round(keep * 999))
    assert int((moved != 0).sum()) == count
    assert torch.equal(moved != 0, numbers > 999 - count)


def test_weights_without_a_gradient_are_never_selected(family: Family) -> None:
    family.reduction = "abs_of_mean"
    gradients = family.tensors["forget_importance"]
    for name in SHAPES:
        gradients[name] = torch.zeros(SHAPES[name])
    gradients[EMBEDDING][0, 0] = 1e-6
    family.write()
    family.edit(1, method="selective", keep=0.5)
    assert np.flatnonzero(family.result() != family.flat("full")).tolist() == [0]


def test_alpha_zero_reproduces_every_value(family: Family) -> None:
    family.tensors["full"][EMBEDDING][0] = -0.0
    family.write()
    for method in ("msa", "ssd", "ties", "interpolate"):
        family.edit(1, method, method=method, scaling_coef=0.0, retain_coef=0.0, selection=2.0)
        before = (family.root / "full" / "model.safetensors").read_bytes()
        assert (family.output / "model.safetensors").read_bytes() == before


def test_msa_adds_the_retain_vector_at_alpha_zero_too(family: Family) -> None:
    family.write()
    family.edit(1, method="msa", scaling_coef=0.0, retain_coef=0.5)
    expected = oracle(family, "msa", 1, 0.0, retain_coef=0.5)
    np.testing.assert_allclose(family.result(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "count", "settings"),
    [case for case in CASES if case[0] in {"msa", "ssd", "interpolate", "ties"}],
)
def test_the_direction_alone_is_what_the_edit_subtracts(
    family: Family, method: str, count: int, settings: dict[str, Any]
) -> None:
    """At any strength; β goes with α."""
    family.write()
    weighting = chosen(method=method, scaling_coef=0.7, **settings)
    folders = family.folders(count)
    changes = changes_of(folders, weighting, chunk=16).tensors
    steps = [cast(Tensor, changes[name].delta).double().flatten() for name in SHAPES]
    delta = torch.cat(steps).numpy()
    expected = oracle(family, method, count, 0.7, **settings)
    np.testing.assert_allclose(family.flat("full") - 0.7 * delta, expected, rtol=1e-5, atol=1e-6)
    family.output = family.root / "stronger"
    family.output.mkdir()
    write_edit(family.output, folders, at_strength(weighting, 1.9), chunk=16)
    np.testing.assert_allclose(
        family.result(), family.flat("full") - 1.9 * delta, rtol=1e-5, atol=1e-5
    )


def test_the_strength_of_the_retain_vector_goes_with_alpha() -> None:
    weighting = chosen(method="msa", scaling_coef=0.5, retain_coef=0.25)
    assert get_method(at_strength(weighting, 2.0).method).retain_coef == 1.0
    for start in (None, "auto", 0.0):
        weighting = chosen(method="msa", scaling_coef=start, retain_coef=0.25)
        assert get_method(at_strength(weighting, 2.0).method).retain_coef == 0.5


def test_a_tensor_that_no_retained_example_depends_on_goes_by_the_formula_and_is_named(
    family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    """Importance is measured of every weight: a 0 is a measurement, and W is 1 there."""
    name = "model.experts.weight"
    family.tensors["retain_importance"][name] = torch.zeros(SHAPES[name])
    family.write()
    family.edit(1, "out", method="perta-grad", scaling_coef=1.0)
    assert f"depends on {name}" in capsys.readouterr().err
    tensors = family.tensors
    forget = tensors["forget_importance"][name]
    step = torch.where(forget > 0, tensors["f1"][name] - tensors["base"][name], 0.0)
    found = read_tensor(open_index(family.output).tensors[name])
    torch.testing.assert_close(found, tensors["full"][name] - step)


def test_importance_that_is_zero_everywhere_stops_the_edit(family: Family) -> None:
    for name, shape in SHAPES.items():
        family.tensors["retain_importance"][name] = torch.zeros(shape)
    family.write()
    with pytest.raises(CheckpointError, match="0 in every tensor"):
        family.edit(1, "out", method="perta-grad")


# --- what must stop it


@pytest.mark.parametrize(
    ("method", "count", "change", "error", "message"),
    [
        ("tv", 0, {}, ConfigError, r"needs --forget-checkpoint\. Make it with .*FORGET_SET"),
        ("negmerge", 1, {}, ConfigError, "at least 2 times, but there is 1.*--seed 1"),
        (
            "msa",
            1,
            {"retain_checkpoint": None},
            ConfigError,
            r"needs --retain-checkpoint.*RETAIN_SET.*--samples",
        ),
        ("msa", 1, {"retain_checkpoint": "base"}, ConfigError, "as base and as retain checkpoint"),
        ("tv", 2, {"forget_checkpoints": ("f1", "base")}, ConfigError, "as base and as forget"),
        (
            "selective",
            1,
            {"forget_importance": None},
            ConfigError,
            "--order 1 --reduction abs_of_mean",
        ),
        ("selective", 1, {}, CheckpointMismatchError, "forget_importance has mean_of_power"),
        ("ssd", 0, {"retain_importance": None}, ConfigError, "--checkpoint .*full --data RETAIN"),
    ],
)
def test_what_a_method_needs_is_asked_for(
    family: Family,
    method: str,
    count: int,
    change: dict[str, Any],
    error: type[PertaError],
    message: str,
) -> None:
    family.write()

    def place(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(place(item) for item in value)
        return family.root / value if value else None

    folders = replace(family.folders(count), **{k: place(v) for k, v in change.items()})
    family.output.mkdir()
    with pytest.raises(error, match=message):
        write_edit(family.output, folders, chosen(method=method))
    assert not list(family.output.iterdir())


def test_selective_needs_no_retain_importance(family: Family) -> None:
    family.reduction = "abs_of_mean"
    family.write()
    folders = replace(family.folders(), retain_importance=None, retain_checkpoint=None)
    family.output.mkdir()
    write_edit(family.output, folders, chosen(method="selective"))
    card = (family.output / "README.md").read_text("utf-8")
    assert "| kept share | 0.1 |" in card
    assert "rho" not in card


def test_ssd_needs_the_number_of_examples(family: Family) -> None:
    family.write()
    sidecar = family.root / "retain_importance" / "importance.json"
    sidecar.write_text(json.dumps({"model_fingerprint": "abc", "reduction": "mean_of_power"}))
    with pytest.raises(CorruptCheckpointError, match="how many examples"):
        family.edit(0, method="ssd")


@pytest.mark.parametrize(
    ("method", "count", "settings", "message"),
    [
        ("ssd", 0, {"selection": 1e6}, "share 0, so.*Lower its setting `selection`"),
        ("negmerge", 2, {}, "leaves nothing of 2 task vectors"),
        ("interpolate", 0, {}, "full equals .*base in every tensor"),
    ],
)
def test_an_edit_without_effect_is_an_error(
    family: Family, method: str, count: int, settings: dict[str, Any], message: str
) -> None:
    base = family.tensors["base"]
    family.tensors["f2"] = {k: 2 * base[k] - family.tensors["f1"][k] for k in base}
    if method == "interpolate":
        family.tensors["full"] = base
    family.write()
    with pytest.raises(CheckpointError, match=message):
        family.edit(count, method=method, **settings)


@pytest.mark.parametrize("role", ["f2", "retain", "forget_importance"])
@pytest.mark.parametrize("method", ["tv", "ties", "negmerge", "dare", "msa", "selective"])
def test_what_is_not_finite_is_found(family: Family, method: str, role: str) -> None:
    used = {"retain": method == "msa", "forget_importance": method == "selective"}
    family.reduction = "abs_of_mean"
    family.tensors[role][EMBEDDING][3, 2] = float("nan")
    family.write()
    if not used.get(role, True):
        family.edit(2, method=method, drop=0.5)
        return
    with pytest.raises(CorruptCheckpointError, match=f"{role}.*embed_tokens.weight holds NaN"):
        family.edit(2, method=method, drop=0.5)


def test_the_model_card_names_what_was_used(family: Family) -> None:
    family.write()
    texts = {
        "msa": ("(θ_f − θ₀) + β · (θ_r − θ₀).", "| strength β of the retain vector | 0.5 |"),
        "ssd": ("W ⊙ θ_full.", "| selection | 2 |", "| dampening λ | 1 |"),
        "dare": ("| dropped share | 0.9 |", "| seed | 0 |"),
        "interpolate": ("W ⊙ (θ_full − θ₀).",),
        "ties": ("| kept share | 0.2 |",),
    }
    for method, expected in texts.items():
        family.edit(1, method, method=method, retain_coef=0.5, selection=2.0)
        card = (family.output / "README.md").read_text("utf-8")
        for text in expected:
            assert text in card
