"""The streamed edit against the same edit in memory, and everything that must stop it."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from helpers import shared
from helpers import weighting as chosen
from perta.engine.edit._stream import Editor, _summaries
from perta.engine.edit.plan import EditInputs, Target
from perta.engine.edit.stored import Sums
from perta.engine.edit.write import EditSummary, write_edit
from perta.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    CorruptCheckpointError,
    DivergenceError,
    OutputExistsError,
    PertaError,
)
from perta.methods.diagonal import share
from perta.methods.method import block_seed
from perta.options import SaveType, WeightingConfig
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import EditConfig
from perta.store import arithmetic
from perta.store.arithmetic import Place
from perta.store.atomic import atomic_folder
from perta.store.checkpoint import TensorEntry, open_index, read_tensor, write_from, write_tensors
from perta.store.fingerprint import fingerprint
from perta.store.record import check_separate

EMBEDDING = "model.embed_tokens.weight"
SHAPES = {
    EMBEDDING: (10, 4),
    "model.layers.0.mlp.weight": (5, 7),
    "model.layers.0.norm.weight": (4,),
    "model.experts.weight": (2, 3, 4),
    "model.scale": (),
    "lm_head.weight": (10, 4),
}
SHARDS = {
    "model-00001-of-00002.safetensors": [EMBEDDING, "model.layers.0.norm.weight", "model.scale"],
    "model-00002-of-00002.safetensors": [
        "model.layers.0.mlp.weight",
        "model.experts.weight",
        "lm_head.weight",
    ],
}


class Inputs:
    """Small random checkpoints and importance in a folder, easy to damage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "out"
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for seed, role in enumerate(("full", "base", "forget", "I_f", "I_r")):
            generator = torch.Generator().manual_seed(seed)
            self.tensors[role] = {
                name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
            }
        for role in ("I_f", "I_r"):
            self.tensors[role] = {k: v.square() for k, v in self.tensors[role].items()}
        self.dtypes = dict.fromkeys(self.tensors, torch.float32)
        self.shards: Mapping[str, Sequence[str]] | None = None
        self.config: dict[str, Any] = {"tie_word_embeddings": False}
        self.sidecars: dict[str, dict[str, Any]] = {
            role: {"model_fingerprint": "abc", "reduction": "mean_of_power"}
            for role in ("I_f", "I_r")
        }

    def cast(self, **dtypes: torch.dtype) -> None:
        self.dtypes |= dtypes

    def write(self) -> None:
        for role, tensors in self.tensors.items():
            folder = self.root / role
            if role in self.sidecars:
                folder.mkdir(exist_ok=True)
                (folder / "importance.json").write_text(json.dumps(self.sidecars[role]))
                folder = folder / "order-1"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            stored = {
                name: tensor.to(self.dtypes[role]) if tensor.is_floating_point() else tensor
                for name, tensor in tensors.items()
            }
            write_tensors(folder, stored, self.shards)
            (folder / "config.json").write_text(json.dumps(self.config))

    def edit(self, write: bool = True, chunk: int = 16, threads: int = 2, **kw: Any) -> EditSummary:
        if write:
            self.write()
        names = ("overwrite", "fingerprints", "folders", "save_dtype")
        options = {name: kw.pop(name) for name in names if name in kw}
        folders = options.pop("folders", self.folders())
        weighting = shared(**kw)
        return edit_into(self.output, folders, weighting, chunk=chunk, threads=threads, **options)

    def folders(self) -> EditInputs:
        full, base, forget, *importance = (
            self.root / name for name in ("full", "base", "forget", "I_f", "I_r")
        )
        return EditInputs(full, base, (forget,), *importance)

    def result(self) -> dict[str, Tensor]:
        return load_all(self.output)

    def stored(self, role: str) -> dict[str, Tensor]:
        return {k: v.to(self.dtypes[role]) for k, v in self.tensors[role].items()}


def edit_into(
    output: Path,
    inputs: EditInputs,
    weighting: WeightingConfig,
    overwrite: bool = False,
    **options: Any,
) -> EditSummary:
    """Edit into a folder that appears only when it is complete, as the stage does."""
    given = (inputs.full, inputs.base, inputs.forget_importance or inputs.full)
    check_separate(output, given)
    with atomic_folder(output, overwrite=overwrite) as partial:
        return write_edit(partial, inputs, weighting, **options)


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(entry) for name, entry in open_index(folder).tensors.items()}


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


def assert_same_bytes(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    one = actual.contiguous().reshape(-1).view(torch.uint8)
    assert torch.equal(one, expected.contiguous().reshape(-1).view(torch.uint8))


# --- values


def rounded(values: Tensor, dtype: torch.dtype, name: str, seed: int = 0, start: int = 0) -> Tensor:
    """What is stored of float32 values, element by element, in float64 and whole numbers."""
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    bits, smallest = (7, -126) if dtype == torch.bfloat16 else (10, -14)
    found = []
    for place, value in enumerate(values.flatten().tolist(), start):
        x = (place + first) % 2**32
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32 ^ second
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        if not math.isfinite(value):
            found.append(value)
            continue
        exponent = math.frexp(value)[1] - 1 if value else smallest
        step = 2.0 ** (max(exponent, smallest) - bits)
        whole, rest = divmod(abs(value) / step, 1)
        up = int(rest * 2**16) + ((x ^ x >> 16) >> 16) >= 2**16
        found.append(math.copysign((whole + up) * step, value))
    return torch.tensor(found, dtype=torch.float64).to(dtype).view(values.shape)


def weighting_oracle(
    method: str, forget: NDArray[np.float64], retain: NDArray[np.float64], rho: float
) -> NDArray[np.float64]:
    if method == "tv":
        return np.ones_like(forget)
    if method == "constant":
        return np.full_like(forget, 0.3)
    if method.startswith("perta"):
        return forget / (forget + rho * retain)
    quotient = forget / (rho * retain)
    return np.minimum(quotient, 1) if method == "clipped-ratio" else quotient


def averaged(values: NDArray[np.float64], granularity: str) -> NDArray[np.float64]:
    if granularity == "tensor":
        return np.full_like(values, values.mean())
    if granularity == "row" and values.ndim > 1:
        means = values.mean(axis=tuple(range(1, values.ndim)), keepdims=True)
        return np.broadcast_to(means, values.shape)
    return values


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
@pytest.mark.parametrize("method", ["tv", "perta", "ratio", "clipped-ratio", "constant"])
def test_edit_equals_float64_oracle(inputs: Inputs, method: str, granularity: str) -> None:
    inputs.edit(method=method, granularity=granularity, rho=0.5, scaling_coef=0.7, constant=0.3)
    result = inputs.result()
    for name in SHAPES:
        full, base, forget, i_f, i_r = (
            inputs.tensors[role][name].double().numpy()
            for role in ("full", "base", "forget", "I_f", "I_r")
        )
        weighting = weighting_oracle(
            method, averaged(i_f, granularity), averaged(i_r, granularity), 0.5
        )
        expected = full - 0.7 * weighting * (forget - base)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
@pytest.mark.parametrize("shards", [None, SHARDS], ids=["one-file", "two-files"])
def test_streaming_equals_the_edit_in_memory(
    inputs: Inputs, chunk: int, shards: Mapping[str, Sequence[str]] | None
) -> None:
    inputs.shards = shards
    inputs.cast(full=torch.bfloat16, base=torch.bfloat16, forget=torch.bfloat16)
    inputs.edit(method="perta-grad", scaling_coef=1.3, chunk=chunk)
    full, base, forget, i_f, i_r = (
        {name: tensor.float() for name, tensor in inputs.stored(role).items()}
        for role in ("full", "base", "forget", "I_f", "I_r")
    )
    result = inputs.result()
    for name in SHAPES:
        delta = (forget[name] - base[name]) * share(i_f[name], i_r[name], 1.0) * 1.3
        assert_same_bytes(result[name], rounded(full[name] - delta, torch.bfloat16, name))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_averages_do_not_depend_on_chunks(inputs: Inputs, granularity: str) -> None:
    inputs.edit(method="perta-grad", granularity=granularity, chunk=1)
    expected = inputs.result()
    for chunk in (2, 5, 16, 1000):
        inputs.edit(method="perta-grad", granularity=granularity, chunk=chunk, overwrite=True)
        for name, tensor in inputs.result().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)


def shuffle(values: Tensor, seed: int) -> Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


def test_random_shuffles_the_share_within_chunks(inputs: Inputs) -> None:
    inputs.edit(method="random", weighting_seed=5, chunk=16)
    result = inputs.result()
    for name, full in inputs.tensors["full"].items():
        tau = (inputs.tensors["forget"][name] - inputs.tensors["base"][name]).flatten()
        parts = share(inputs.tensors["I_f"][name], inputs.tensors["I_r"][name], 1.0).flatten()
        weighting = torch.cat(
            [shuffle(part, block_seed(5, name, 16 * i)) for i, part in enumerate(parts.split(16))]
        )
        torch.testing.assert_close(result[name].flatten(), full.flatten() - weighting * tau)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shards", [None, SHARDS], ids=["one-file", "two-files"])
def test_alpha_zero_reproduces_every_value(
    inputs: Inputs, dtype: torch.dtype, shards: Mapping[str, Sequence[str]] | None
) -> None:
    inputs.shards = shards
    inputs.cast(full=dtype)
    for name in SHAPES:
        inputs.tensors["full"][name].reshape(-1)[::2] = -0.0
    for method in ("tv", "perta-grad"):
        inputs.edit(method=method, scaling_coef=0.0, overwrite=True)
        for name, tensor in inputs.stored("full").items():
            assert_same_bytes(inputs.result()[name], tensor)
        for file in open_index(inputs.output).shards:
            assert (inputs.output / file).read_bytes() == (inputs.root / "full" / file).read_bytes()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4),
    chunk=st.integers(1, 40),
    coefficient=st.sampled_from([-1.5, 0.0, 0.3, 1.0, 2.0]),
    dtypes=st.tuples(*[st.sampled_from([torch.bfloat16, torch.float16, torch.float32])] * 3),
)
def test_any_shapes_chunks_and_types(
    tmp_path: Path,
    shapes: list[list[int]],
    chunk: int,
    coefficient: float,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    inputs = Inputs(tmp_path)
    for seed, role in enumerate(inputs.tensors):
        generator = torch.Generator().manual_seed(seed)
        inputs.tensors[role] = {
            f"t{i}": torch.randn(shape, generator=generator).abs() for i, shape in enumerate(shapes)
        } | {"always": torch.rand(3, generator=generator)}
    inputs.cast(**dict(zip(("full", "base", "forget"), dtypes, strict=True)))
    inputs.edit(method="perta-grad", scaling_coef=coefficient, chunk=chunk, overwrite=True)
    stored = {role: inputs.stored(role) for role in inputs.tensors}
    for name, actual in inputs.result().items():
        delta = stored["forget"][name].float() - stored["base"][name].float()
        delta = delta * share(stored["I_f"][name], stored["I_r"][name], 1.0)
        if coefficient != 0:
            expected = stored["full"][name].float() - delta * coefficient
            assert_same_bytes(actual, rounded(expected, actual.dtype, name))
        else:
            assert_same_bytes(actual, stored["full"][name])


def test_bytes_do_not_depend_on_threads(inputs: Inputs) -> None:
    inputs.shards = SHARDS
    inputs.cast(full=torch.bfloat16)
    summaries, digests = [], []
    for threads in (1, 2, 5):
        summaries.append(inputs.edit(method="random", threads=threads, chunk=2, overwrite=True))
        digests.append([(inputs.output / file).read_bytes() for file in sorted(SHARDS)])
    assert digests[0] == digests[1] == digests[2]
    assert summaries[0].tensors == summaries[1].tensors == summaries[2].tensors


def test_statistics_are_added_in_the_order_of_the_file(tmp_path: Path) -> None:
    entry = TensorEntry("a", torch.float32, (3,), tmp_path, 0, 12)
    parts = [Sums(1e16, 1.0, 1.0), Sums(-1e16, 1.0, 1.0), Sums(1.0, 1.0, 1.0)]
    for order in itertools.permutations(range(3)):
        done = {(0, part): parts[part] for part in order}
        (summary,) = _summaries([Target(entry, {"base checkpoint": entry})], done)
        assert summary.mean_weighting == 1 / 3


FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["compiled", "operations"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two routes of the edit's arithmetic, which must give the same bytes."""
    if request.param == "operations":
        monkeypatch.setattr(arithmetic, "_compiled", None)
    elif vars(arithmetic)["_compiled"] is None:
        pytest.skip("perta was installed without a C compiler")
    return str(request.param)


def awkward(count: int, seed: int) -> Tensor:
    """Random bits: float32 of every size, with subnormal numbers, both zeros, Inf and NaN."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    # Every second lies exactly between two bfloat16 numbers, some of them beside zero or infinity.
    bits[::2] = bits[::2] & 0xFFFF0000 | 0x8000
    special = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x7F7F8000, 0x8000, 1]
    bits[: len(special)] = special[:count]
    return torch.from_numpy(bits.view(np.float32).copy())


@pytest.mark.parametrize("count", [1, 15, 4096, 70000])
@pytest.mark.parametrize("base_type", FLOAT_TYPES)
@pytest.mark.parametrize("values_type", FLOAT_TYPES)
def test_difference_of_stored_values(
    route: str, values_type: torch.dtype, base_type: torch.dtype, count: int
) -> None:
    values, base = awkward(count, 1).to(values_type), awkward(count, 2).to(base_type)
    expected = values.float() - base.float()
    assert_same(arithmetic.difference(values, base, torch.empty(count)), expected)
    if values_type == torch.float32:
        assert arithmetic.difference(values, base, values) is values
        assert_same(values, expected)


@pytest.mark.parametrize("count", [1, 15, 4096, 70000])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_subtraction_from_stored_values(route: str, dtype: torch.dtype, count: int) -> None:
    stored, delta = awkward(count, 3).to(dtype), awkward(count, 4)
    stored[: count // 2] = 0  # so that the difference is `delta`, and lies where it was put
    place = Place(7, "a.weight", 2**32 - 9)
    wanted = stored.float() - delta
    expected = rounded(wanted, dtype, "a.weight", 7, place.start)
    squares = arithmetic.subtract(stored, delta, place).squares
    assert_same(stored, expected)
    assert not math.isfinite(squares) or bool(wanted.isfinite().all())
    assert_same(arithmetic.round_as_stored(wanted, dtype, place), expected)


@pytest.mark.parametrize("count", [1, 15, 4096, 70000])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_sums_of_a_subtraction(route: str, dtype: torch.dtype, count: int) -> None:
    before = torch.randn(count, generator=torch.Generator().manual_seed(5)).to(dtype)
    delta, after = torch.linspace(-0.01, 0.02, count), before.clone()
    step = arithmetic.subtract(after, delta, Place(0, "a"))
    wanted = delta.double()
    error = before.double() - after.double() - wanted
    results = (before.double() - wanted).square().sum()
    assert step.squares == pytest.approx(float(results), rel=1e-4)
    assert step.along == pytest.approx(float(error @ wanted), rel=1e-4, abs=1e-9)
    assert step.error == pytest.approx(float(error @ error), rel=1e-4, abs=1e-9)
    assert step.changed == int((after != before).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_keeps_the_mean_and_takes_neighbours_alone(dtype: torch.dtype) -> None:
    for value in (1 + 2**-12, -(0.75 + 2**-13), 3e-6, 0.3):
        exact = torch.tensor(value, dtype=torch.float32)
        stored = arithmetic.round_as_stored(exact.expand(40000), dtype, Place(3, "a"))
        low, high = stored.double().min(), stored.double().max()
        assert low < value < high
        assert len(stored.unique()) == 2
        mean = (stored.double().mean() - low) / (high - low)
        # Five standard deviations of a share of 40,000 draws.
        assert float(mean) == pytest.approx(
            float((exact.double() - low) / (high - low)), abs=0.0125
        )
    other = arithmetic.round_as_stored(exact.expand(40000), dtype, Place(3, "b"))
    assert 0.2 < float((other != stored).double().mean()) < 0.6


def test_a_part_in_memory_is_rounded_as_the_file(inputs: Inputs) -> None:
    inputs.cast(full=torch.bfloat16)
    inputs.edit(method="perta-grad", scaling_coef=1.7, weighting_seed=4)
    name, start = "model.layers.0.mlp.weight", 9
    full, base, forget, i_f, i_r = (
        inputs.stored(role)[name].float().flatten()[start:]
        for role in ("full", "base", "forget", "I_f", "I_r")
    )
    values = full - (forget - base) * share(i_f, i_r, 1.0) * 1.7
    part = arithmetic.round_as_stored(values, torch.bfloat16, Place(4, name, start))
    assert_same_bytes(part, inputs.result()[name].flatten()[start:])


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to the sign of zero; NaN where NaN is expected."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    kept = ~expected.isnan()
    assert torch.equal(actual[kept].signbit(), expected[kept].signbit())


def test_both_routes_write_the_same_bytes(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs.cast(full=torch.bfloat16, base=torch.bfloat16, forget=torch.float32)
    inputs.edit(method="perta-grad", scaling_coef=1.3)
    first = inputs.result()
    monkeypatch.setattr(arithmetic, "_compiled", None)
    shutil.rmtree(inputs.output)
    inputs.edit(method="perta-grad", scaling_coef=1.3)
    second = inputs.result()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_mixed_types_are_upcast_before_the_difference(inputs: Inputs) -> None:
    inputs.cast(full=torch.float16, base=torch.bfloat16, forget=torch.float32)
    inputs.edit(method="tv")
    full, base, forget = (
        {k: v.float() for k, v in inputs.stored(role).items()}
        for role in ("full", "base", "forget")
    )
    for name, tensor in inputs.result().items():
        wanted = full[name] - (forget[name] - base[name])
        assert_same_bytes(tensor, rounded(wanted, torch.float16, name))


def test_layout_of_the_full_checkpoint_is_kept(inputs: Inputs) -> None:
    inputs.shards = SHARDS
    inputs.write()
    for role in ("base", "forget"):
        tensors = load_all(inputs.root / role)
        shutil.rmtree(inputs.root / role)
        (inputs.root / role).mkdir()
        save_file(tensors, inputs.root / role / "model.safetensors")
    inputs.edit(write=False, method="tv")
    full, output = open_index(inputs.root / "full"), open_index(inputs.output)
    assert output.shards == full.shards
    for name, entry in full.tensors.items():
        assert output.tensors[name].offset == entry.offset


def test_summary(inputs: Inputs) -> None:
    summary = inputs.edit(method="perta-grad", scaling_coef=2.0, exclude=("lm_head*",))
    assert {tensor.name for tensor in summary.tensors} == set(SHAPES) - {"lm_head.weight"}
    assert summary.edited == sum(math.prod(shape) for shape in SHAPES.values()) - 40
    assert summary.copied == 40
    for tensor in summary.tensors:
        base, forget, i_f, i_r = (
            inputs.tensors[role][tensor.name].double() for role in ("base", "forget", "I_f", "I_r")
        )
        weighting = i_f / (i_f + i_r)
        assert tensor.elements == base.numel()
        assert tensor.mean_weighting == pytest.approx(float(weighting.mean()), rel=1e-5)
        assert tensor.task_vector_norm == pytest.approx(float((forget - base).norm()), rel=1e-5)
        delta = 2 * weighting * (forget - base)
        assert tensor.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
    constant = inputs.edit(
        method="constant", constant=0.25, scaling_coef=-2.0, overwrite=True
    ).tensors[0]
    assert constant.mean_weighting == 0.25
    assert constant.delta_norm == pytest.approx(constant.task_vector_norm / 2)


# --- what is stored


def flat_step(inputs: Inputs, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The wanted and the stored step of the whole model, float64."""
    wanted, stored = [], []
    for name, after in inputs.result().items():
        full, base, forget = (inputs.stored(role)[name] for role in ("full", "base", "forget"))
        wanted.append(alpha * (forget.double() - base.double()).flatten().numpy())
        stored.append((full.double() - after.double()).flatten().numpy())
    return np.concatenate(wanted), np.concatenate(stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_record_is_of_what_was_stored(inputs: Inputs, route: str, dtype: torch.dtype) -> None:
    inputs.cast(full=dtype)
    for name, base in inputs.tensors["base"].items():
        inputs.tensors["forget"][name] = base + 0.001 * inputs.tensors["I_f"][name]
    summary = inputs.edit(method="tv", scaling_coef=0.7)
    wanted, stored = flat_step(inputs, 0.7)
    share = stored @ wanted / (wanted @ wanted)
    noise = np.linalg.norm(stored - share * wanted) / np.linalg.norm(wanted)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-4
    assert summary.stored.stored_share == pytest.approx(share, rel=tolerance)
    assert summary.stored.noise == pytest.approx(noise, rel=tolerance, abs=1e-4)
    assert summary.stored.delta_norm == pytest.approx(np.linalg.norm(stored), rel=1e-5)
    assert summary.stored.wanted_norm == pytest.approx(np.linalg.norm(wanted), rel=1e-5)
    assert summary.stored.changed == pytest.approx((stored != 0).mean())
    if dtype != torch.float32:
        assert noise > 0.05
    for tensor in summary.tensors:
        before, after = inputs.stored("full")[tensor.name], inputs.result()[tensor.name]
        step = before.double() - after.double()
        assert tensor.delta_norm == pytest.approx(float(step.norm()), rel=1e-5, abs=1e-6)
        assert tensor.changed == pytest.approx(float((step != 0).double().mean()))


def test_steps_far_below_the_distance_of_stored_numbers_are_stored(tmp_path: Path) -> None:
    """Rounding to the nearest would store nothing of steps that are a tenth of half a distance."""
    inputs = Inputs(tmp_path)
    names = {"model.layers.0.mlp.weight": (200, 200)}
    step = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) * 2**-11
    base = torch.zeros(200, 200)
    inputs.tensors = {
        role: dict.fromkeys(names, tensor)
        for role, tensor in (("full", base + 1), ("base", base), ("forget", -step))
    } | {role: dict.fromkeys(names, base + 1) for role in ("I_f", "I_r")}
    inputs.cast(full=torch.bfloat16)
    summary = inputs.edit(method="tv", scaling_coef=1.0, chunk=1 << 14)
    # The mean of 40,000 draws; above 1 the distance is 2^-7.
    moved = inputs.result()["model.layers.0.mlp.weight"].double() - 1
    assert set(moved.unique().tolist()) == {0.0, 2.0**-7}
    assert float(moved.mean()) == pytest.approx(float(step.double().mean()), rel=0.1)
    assert summary.stored.stored_share == pytest.approx(1, abs=0.1)
    assert summary.stored.changed == pytest.approx(2**-12 / 2**-7, rel=0.1)


def test_a_step_that_no_type_can_hold_stops(inputs: Inputs) -> None:
    for name, base in inputs.tensors["base"].items():
        inputs.tensors["base"][name] = torch.zeros_like(base)
        inputs.tensors["full"][name] = torch.ones_like(base)
        inputs.tensors["forget"][name] = torch.full_like(base, 1e-9)
    with pytest.raises(CheckpointError, match=r"0\.0% would be stored.*--save-dtype"):
        inputs.edit(method="tv")
    assert not inputs.output.exists()


@pytest.mark.parametrize("save", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shards", [None, SHARDS], ids=["one-file", "two-files"])
def test_the_output_in_another_type(
    inputs: Inputs, dtype: torch.dtype, save: SaveType, shards: Mapping[str, Sequence[str]] | None
) -> None:
    inputs.shards = shards
    inputs.config |= {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}}
    inputs.cast(full=dtype)
    wanted = getattr(torch, save)
    for alpha in (0.0, 0.7):
        inputs.edit(method="tv", scaling_coef=alpha, save_dtype=save, overwrite=True, chunk=7)
        result = inputs.result()
        for name, full in inputs.stored("full").items():
            start = full.to(wanted)
            delta = alpha * (inputs.tensors["forget"][name] - inputs.tensors["base"][name])
            expected = rounded(start.float() - delta, wanted, name) if alpha else start
            assert_same_bytes(result[name], expected)
        config = json.loads((inputs.output / "config.json").read_text())
        types = {config["dtype"], config["text_config"]["torch_dtype"]}
        assert types == ({save} if wanted != dtype else {save, "bfloat16"} & types)
    if shards is not None:
        index = json.loads((inputs.output / "model.safetensors.index.json").read_text())
        total = sum(tensor.numel() * tensor.itemsize for tensor in result.values())
        assert index["metadata"]["total_size"] == total


def test_another_type_leaves_tensors_of_a_type_of_their_own(inputs: Inputs) -> None:
    inputs.cast(full=torch.bfloat16)
    inputs.tensors["full"]["counts"] = torch.arange(3)
    inputs.edit(method="tv", include=("*mlp*",), save_dtype="float32")
    assert inputs.result()["counts"].dtype == torch.int64
    assert_same_bytes(inputs.result()[EMBEDDING], inputs.stored("full")[EMBEDDING].float())


def test_numbers_that_another_type_cannot_hold_stop(inputs: Inputs) -> None:
    inputs.tensors["full"][EMBEDDING][2, 1] = 1e6
    for exclude in ((), ("*embed*",)):
        with pytest.raises(DivergenceError, match="range of float16"):
            inputs.edit(method="tv", exclude=exclude, save_dtype="float16")
    assert not inputs.output.exists()


# --- which tensors


def test_include_and_exclude(inputs: Inputs) -> None:
    inputs.edit(method="tv", include=("model.layers.*", "*embed*"), exclude=("*norm*",))
    changed = {
        name
        for name, tensor in inputs.result().items()
        if not torch.equal(tensor, inputs.tensors["full"][name])
    }
    assert changed == {EMBEDDING, "model.layers.0.mlp.weight"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"include": ("*.mpl.*",)}, r"--include \*\.mpl\.\* matches no tensor"),
        ({"exclude": ("head",)}, "--exclude head matches no tensor"),
        ({"exclude": ("*",)}, "leave no tensor"),
    ],
)
def test_patterns_that_cannot_be_meant(
    inputs: Inputs, patterns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        inputs.edit(method="tv", **patterns)
    assert not inputs.output.exists()


def test_buffers_and_integers_are_copied_and_may_be_missing(inputs: Inputs) -> None:
    buffers = {
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        "model.rotary_emb.inv_freq": torch.rand(4),
        "model.position_ids": torch.arange(20).reshape(1, 20),
        "model.mask": torch.tensor([True, False]),
    }
    inputs.tensors["full"] |= buffers
    inputs.tensors["base"]["model.layers.1.attn.bias"] = torch.ones(1, 1, 4, 4)
    inputs.tensors["forget"] |= {k: v.clone() * 3 for k, v in buffers.items() if v.ndim < 3}
    inputs.edit(method="perta-grad", chunk=3)
    result = inputs.result()
    for name, tensor in buffers.items():
        assert_same_bytes(result[name], tensor)
    assert not torch.equal(result[EMBEDDING], inputs.tensors["full"][EMBEDDING])


def test_prefix_of_the_base_model_is_looked_through(inputs: Inputs) -> None:
    inputs.edit(method="perta-grad")
    expected = inputs.result()
    for role in ("base", "I_f"):
        inputs.tensors[role] = {
            name.removeprefix("model."): tensor for name, tensor in inputs.tensors[role].items()
        }
    inputs.edit(method="perta-grad", overwrite=True)
    for name, tensor in inputs.result().items():
        assert_same_bytes(tensor, expected[name])


STORAGE = ("embedding", "head", "both")


def store_tied(tensors: dict[str, Tensor], way: str) -> dict[str, Tensor]:
    rest = {k: v for k, v in tensors.items() if k not in {EMBEDDING, "lm_head.weight"}}
    shared = tensors[EMBEDDING]
    names = {"embedding": [EMBEDDING], "head": ["lm_head.weight"]}
    return rest | {n: shared.clone() for n in names.get(way, [EMBEDDING, "lm_head.weight"])}


@pytest.mark.parametrize("others", STORAGE)
@pytest.mark.parametrize("full", STORAGE)
@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}, {"text_config": {}}])
def test_tied_weights_are_one_parameter_however_stored(
    inputs: Inputs, full: str, others: str, config: dict[str, Any]
) -> None:
    inputs.config = config
    i_f, i_r = (inputs.tensors[role][EMBEDDING] for role in ("I_f", "I_r"))
    tau = inputs.tensors["forget"][EMBEDDING] - inputs.tensors["base"][EMBEDDING]
    expected = inputs.tensors["full"][EMBEDDING] - share(i_f, i_r, 1.0) * tau
    for role in inputs.tensors:
        way = {"full": full, "base": others, "I_f": "embedding", "I_r": others}.get(role, "both")
        inputs.tensors[role] = store_tied(inputs.tensors[role], way)
    summary = inputs.edit(method="perta-grad")
    result = inputs.result()
    assert set(result) == set(inputs.tensors["full"])
    for name in {EMBEDDING, "lm_head.weight"} & set(result):
        assert_same_bytes(result[name], expected)
    assert sum(tensor.elements == 40 for tensor in summary.tensors) == 1


@pytest.mark.parametrize("pattern", [EMBEDDING, "lm_head.weight"])
def test_excluding_one_name_of_a_tied_parameter_excludes_both(inputs: Inputs, pattern: str) -> None:
    inputs.config = {"tie_word_embeddings": True}
    for role in inputs.tensors:
        inputs.tensors[role] = store_tied(inputs.tensors[role], "both")
    inputs.edit(method="tv", exclude=(pattern,))
    for name in (EMBEDDING, "lm_head.weight"):
        assert_same_bytes(inputs.result()[name], inputs.tensors["full"][name])


def test_copies_that_differ_are_two_parameters(inputs: Inputs) -> None:
    inputs.config = {"tie_word_embeddings": True}
    inputs.edit(method="tv")
    for name, tensor in inputs.result().items():
        roles = ("full", "forget", "base")
        full, forget, base = (inputs.tensors[role][name] for role in roles)
        assert_same_bytes(tensor, full - (forget - base))
    del inputs.tensors["base"]["lm_head.weight"]
    with pytest.raises(CheckpointMismatchError, match=r"lm_head\.weight is in"):
        inputs.edit(method="tv", overwrite=True)


def test_untied_configuration_needs_both(inputs: Inputs) -> None:
    for role in ("full", "base", "forget"):
        inputs.tensors[role] = store_tied(inputs.tensors[role], "both")
    del inputs.tensors["forget"]["lm_head.weight"]
    with pytest.raises(CheckpointMismatchError, match=r"lm_head\.weight is in .*full but not in"):
        inputs.edit(method="tv")


def test_a_buffer_that_importance_does_not_know_is_copied(
    inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp.e_score_correction_bias"
    for role in ("full", "base", "forget"):
        inputs.tensors[role][name] = torch.arange(4.0) + len(role)
    inputs.edit(method="perta-grad")
    assert_same_bytes(inputs.result()[name], inputs.tensors["full"][name])
    assert name in capsys.readouterr().err
    weighting = share(inputs.tensors["I_f"][EMBEDDING], inputs.tensors["I_r"][EMBEDDING], 1.0)
    tau = inputs.tensors["forget"][EMBEDDING] - inputs.tensors["base"][EMBEDDING]
    expected = inputs.tensors["full"][EMBEDDING] - weighting * tau
    torch.testing.assert_close(inputs.result()[EMBEDDING], expected)
    # Known on one side alone it is a mistake.
    inputs.tensors["I_f"][name] = torch.ones(4)
    with pytest.raises(CheckpointMismatchError, match=r"e_score_correction_bias is in .*I_r"):
        inputs.edit(method="perta-grad", overwrite=True)


@pytest.mark.parametrize("chunk", [4, 7, 64, 1000])
def test_rows_are_output_units_also_where_weights_are_stored_transposed(
    inputs: Inputs, chunk: int
) -> None:
    """GPT-2 stores (in, out): one share a column."""
    name, plain = "transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"
    inputs.config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 6, "n_inner": 10, "n_head": 1}
    generator = torch.Generator().manual_seed(0)
    inputs.tensors = {
        role: {
            name: torch.rand(6, 10, generator=generator),
            plain: torch.rand(5, 6, generator=generator),
        }
        for role in inputs.tensors
    }
    inputs.edit(method="perta-grad", granularity="row", chunk=chunk)
    for tensor, inner in ((name, 0), (plain, 1)):
        full, base, forget, i_f, i_r = (
            inputs.tensors[role][tensor].double().numpy()
            for role in ("full", "base", "forget", "I_f", "I_r")
        )
        i_f, i_r = (x.mean(axis=inner, keepdims=True) for x in (i_f, i_r))
        expected = full - i_f / (i_f + i_r) * (forget - base)
        np.testing.assert_allclose(inputs.result()[tensor].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
def test_importance_beyond_float32_keeps_its_proportions(inputs: Inputs, granularity: str) -> None:
    inputs.cast(I_f=torch.float64, I_r=torch.float64)
    for role in ("I_f", "I_r"):
        inputs.tensors[role] = {k: v.double() * 1e-60 for k, v in inputs.tensors[role].items()}
    inputs.edit(method="perta-grad", granularity=granularity)
    for name in SHAPES:
        full, base, forget, i_f, i_r = (
            inputs.tensors[role][name].double().numpy()
            for role in ("full", "base", "forget", "I_f", "I_r")
        )
        i_f, i_r = averaged(i_f, granularity), averaged(i_r, granularity)
        expected = full - i_f / (i_f + i_r) * (forget - base)
        np.testing.assert_allclose(inputs.result()[name].numpy(), expected, rtol=2e-6, atol=1e-6)


# --- what the inputs' records say


class Recorded:
    """The inputs of an edit with records that fit together."""

    def __init__(self, inputs: Inputs) -> None:
        inputs.write()
        root = self.root = inputs.root
        self.prints = {name: fingerprint(root / name) for name in ("base", "full")}
        self.start = {"forget": self.prints["base"]}
        self.rows = {"forget": "rows f", "I_f": "rows f", "I_r": "rows r"}
        self.model = dict.fromkeys(("I_f", "I_r"), self.prints["base"])

    def edit(self, **kw: Any) -> Path:
        for name in ("I_f", "I_r"):
            facts = {
                "reduction": "mean_of_power",
                "model_fingerprint": self.model[name],
                "data_fingerprint": self.rows[name],
                "examples_available": 5,
            }
            (self.root / name / "importance.json").write_text(json.dumps(facts))
        record = {
            "stage": "finetune",
            "inputs": {"base": self.start["forget"], "data": self.rows["forget"]},
        }
        (self.root / "forget" / "perta.json").write_text(json.dumps(record))
        if "full" in self.rows:
            of_full = {"base": self.prints["base"], "data": self.rows["full"]}
            text = json.dumps({"stage": "finetune", "inputs": of_full})
            (self.root / "full" / "perta.json").write_text(text)
        return edit_checkpoint(
            EditConfig(
                full=str(self.root / "full"),
                base=str(self.root / "base"),
                forget_checkpoint=str(self.root / "forget"),
                forget_importance=self.root / "I_f",
                retain_importance=self.root / "I_r",
                output=self.root / "out",
                overwrite=True,
                weighting=chosen(**{"method": "perta-grad", **kw}),
            )
        )


def test_a_step_that_is_stored_in_part_is_warned_of(
    inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    """Just below 1 float32 has steps of 2^-24: one step is one of them, the others a third."""
    for name, base in inputs.tensors["base"].items():
        step = torch.full_like(base, 2**-24 if name == EMBEDDING else 2**-24 / 3)
        inputs.tensors["full"][name] = torch.ones_like(base)
        inputs.tensors["base"][name], inputs.tensors["forget"][name] = torch.zeros_like(base), step
    Recorded(inputs).edit(method="tv")
    whole, parts = 40, sum(math.prod(shape) for shape in SHAPES.values()) - 40
    share = whole / (whole + parts / 9)
    said = capsys.readouterr().err
    assert f"edit: {share:.1%} of the step is stored" in said
    assert f"{40 / (40 + parts):.1%} of the edited weights changed" in said
    assert f"lack {1 - share:.0%} of the step. Store a wider type (--save-dtype float32)" in said
    manifest = json.loads((inputs.root / "out" / "perta.json").read_text())
    assert manifest["edit"]["stored"]["stored_share"] == pytest.approx(share, rel=1e-5)


def test_inputs_whose_records_fit_are_taken(inputs: Inputs) -> None:
    for at in ("base", "full"):
        recorded = Recorded(inputs)
        recorded.model = dict.fromkeys(recorded.model, recorded.prints[at])
        assert recorded.edit().is_dir()
    # What has no record is taken as stated.
    recorded.rows = dict.fromkeys(recorded.rows)  # type: ignore[assignment]
    recorded.model = dict.fromkeys(recorded.model)  # type: ignore[assignment]
    assert recorded.edit().is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"I_f": "third", "I_r": "third"}}, "another model than .*base or .*full"),
        ({"rows": {"I_f": "rows r", "I_r": "rows f"}}, "same rows"),
        ({"rows": {"I_f": "rows r"}}, "same rows"),
        ({"rows": {"I_r": "rows f"}}, "same rows"),
        ({"rows": {"forget": "rows r"}}, "same rows"),
        ({"start": {"forget": "full"}}, "tuned from the base"),
        ({"start": {"forget": "third"}}, "tuned from another model than .*base"),
        ({"rows": {"forget": "all", "full": "all"}}, "on all rows that .*full was"),
    ],
)
def test_inputs_that_their_records_show_to_be_wrong_stop(
    inputs: Inputs, change: dict[str, dict[str, str]], message: str
) -> None:
    recorded = Recorded(inputs)
    for name, values in change.items():
        getattr(recorded, name).update({k: recorded.prints.get(v, v) for k, v in values.items()})
    with pytest.raises(CheckpointMismatchError, match=message):
        recorded.edit()
    assert not (inputs.root / "out").exists()


@pytest.mark.parametrize("copy", ["itself", "values", "wide"])
def test_the_full_checkpoint_is_no_forget_checkpoint(inputs: Inputs, copy: str) -> None:
    """By its values, in whatever type: all that was learned would go, and nothing say so."""
    full = inputs.tensors["full"]
    if copy == "wide":
        full = inputs.tensors["full"] = {name: t.bfloat16() for name, t in full.items()}
    if copy == "wide":
        inputs.cast(full=torch.bfloat16)
    # As an adapter is: its exact weights, which the type of its base rounds.
    factor = 1 + 2**-12 if copy == "wide" else 1
    wide = {name: t.float() * factor for name, t in full.items()}
    inputs.tensors["forget"] = wide
    recorded = Recorded(inputs)
    recorded.start["forget"] = recorded.rows["forget"] = None  # type: ignore[assignment]
    if copy == "itself":
        shutil.rmtree(inputs.root / "forget")
        shutil.copytree(inputs.root / "full", inputs.root / "forget")
    with pytest.raises(CheckpointMismatchError, match=r"forget is .*full itself"):
        recorded.edit(method="tv")
    # One weight that differs makes it another model.
    name = max(SHAPES)
    inputs.tensors["forget"] = {**wide, name: wide[name] + 1}
    recorded = Recorded(inputs)
    recorded.start["forget"] = recorded.rows["forget"] = None  # type: ignore[assignment]
    assert recorded.edit(method="tv").is_dir()


def test_dampening_takes_importance_at_the_full_checkpoint(inputs: Inputs) -> None:
    recorded = Recorded(inputs)
    for name in ("I_f", "I_r"):
        (inputs.root / name / "order-1").rename(inputs.root / name / "order-2")
    with pytest.raises(CheckpointMismatchError, match=r"another model than .*full, where `ssd`"):
        recorded.edit(method="ssd", selection=0.1)
    recorded.model = dict.fromkeys(recorded.model, recorded.prints["full"])
    assert recorded.edit(method="ssd", selection=0.1).is_dir()


# --- what must stop the edit


def refused(inputs: Inputs, error: type[PertaError], message: str, **kw: Any) -> None:
    """The edit stops with this message, leaves nothing, and does not touch its inputs."""
    if kw.get("write", True):
        inputs.write()
    names = ("full", "base", "forget", "I_f", "I_r")
    before = {name: fingerprint(inputs.root / name) for name in names}
    listed = sorted(inputs.root.iterdir())
    kw = {"method": "perta-grad", **kw, "write": False}
    with pytest.raises(error, match=message):
        inputs.edit(**kw)
    assert sorted(inputs.root.iterdir()) == listed
    assert before == {name: fingerprint(inputs.root / name) for name in names}


@pytest.mark.parametrize("role", ["base", "forget", "I_f", "I_r"])
def test_missing_tensor(inputs: Inputs, role: str) -> None:
    del inputs.tensors[role]["model.layers.0.mlp.weight"]
    message = rf"model\.layers\.0\.mlp\.weight is in .*full but not in .*{role}"
    refused(inputs, CheckpointMismatchError, message)


@pytest.mark.parametrize("role", ["base", "forget", "I_f", "I_r"])
def test_extra_tensor(inputs: Inputs, role: str) -> None:
    inputs.tensors[role]["model.layers.1.mlp.weight"] = torch.ones(2)
    message = rf"model\.layers\.1\.mlp\.weight is in .*{role}.* but not in .*full"
    refused(inputs, CheckpointMismatchError, message)


def test_tensor_missing_in_an_excluded_part_does_not_matter(inputs: Inputs) -> None:
    del inputs.tensors["base"]["lm_head.weight"]
    inputs.tensors["I_f"]["lm_head.more"] = torch.ones(2)
    inputs.tensors["forget"]["lm_head.weight"] = torch.ones(3, 4)
    inputs.edit(method="perta-grad", exclude=("lm_head.*",))
    assert_same_bytes(inputs.result()["lm_head.weight"], inputs.tensors["full"]["lm_head.weight"])


@pytest.mark.parametrize("role", ["base", "forget", "I_f", "I_r"])
def test_other_shape(inputs: Inputs, role: str) -> None:
    inputs.tensors[role]["model.layers.0.mlp.weight"] = torch.ones(7, 5)
    message = rf"mlp\.weight is \(5, 7\) in .*full but \(7, 5\) in .*{role}.*one base model"
    refused(inputs, CheckpointMismatchError, message)


@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
def test_enlarged_vocabulary_has_its_own_message(inputs: Inputs, name: str) -> None:
    inputs.tensors["base"][name] = torch.ones(8, 4)
    message = r"\(10, 4\).*\(8, 4\).*enlarged or padded vocabulary.*resize_token_embeddings\(10\)"
    refused(inputs, CheckpointMismatchError, message)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["full", "base", "forget", "I_f", "I_r"])
def test_not_finite(inputs: Inputs, role: str, bad: float) -> None:
    inputs.shards = SHARDS
    inputs.tensors[role]["model.layers.0.mlp.weight"][4, 3] = bad
    message = "holds a negative value" if role.startswith("I") and bad < 0 else "holds NaN or Inf"
    message = rf"{role}.*00002-of-00002\.safetensors: model\.layers\.0\.mlp\.weight {message}"
    refused(inputs, CorruptCheckpointError, message)
    refused(inputs, CorruptCheckpointError, message, granularity="row", overwrite=True)
    if not role.startswith("I"):
        refused(inputs, CorruptCheckpointError, message, method="tv", scaling_coef=0.0)


def test_not_finite_where_both_importances_are_zero(inputs: Inputs) -> None:
    for role in ("I_f", "I_r"):
        inputs.tensors[role][EMBEDDING][3, 2] = 0
    inputs.tensors["forget"][EMBEDDING][3, 2] = math.nan
    refused(inputs, CorruptCheckpointError, "forget.*embed_tokens.weight holds NaN")


def test_not_finite_in_a_copied_tensor(inputs: Inputs) -> None:
    inputs.tensors["full"]["lm_head.weight"][9, 3] = math.nan
    message = "lm_head.weight holds NaN"
    refused(inputs, CorruptCheckpointError, message, exclude=("lm_head*",))


def test_values_too_large_for_the_output_type(inputs: Inputs) -> None:
    inputs.cast(full=torch.float16)
    inputs.tensors["full"][EMBEDDING][0, 0] = 60000
    inputs.tensors["base"][EMBEDDING][0, 0] = 9000
    refused(
        inputs, DivergenceError, r"embed_tokens\.weight leaves the range of float16", method="tv"
    )
    inputs.tensors["base"][EMBEDDING][0, 0] = 900
    inputs.edit(method="tv")
    assert inputs.result()[EMBEDDING][0, 0] > 60000


def test_large_values_that_fit_are_kept(inputs: Inputs) -> None:
    inputs.tensors["full"][EMBEDDING][:] = 3e38
    inputs.tensors["forget"][EMBEDDING][:] = 1e25
    summary = inputs.edit(method="tv", chunk=16)
    base = inputs.tensors["base"][EMBEDDING]
    tau = inputs.tensors["forget"][EMBEDDING] - base
    assert_same_bytes(inputs.result()[EMBEDDING], inputs.tensors["full"][EMBEDDING] - tau)
    norm = next(t for t in summary.tensors if t.name == EMBEDDING).task_vector_norm
    assert norm == pytest.approx(1e25 * math.sqrt(40), rel=1e-5)


def test_full_disk_is_found_before_any_work(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(Editor, "run", lambda *_: pytest.fail("the edit began"))
    with pytest.raises(OSError, match=r"No space left.*\.safetensors"):
        inputs.edit(method="tv")
    assert not inputs.output.exists()


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_disk_that_cannot_reserve(
    inputs: Inputs, error: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs.edit(method="tv")
    expected = inputs.result()

    def refuse(*_: object) -> None:
        assert error is not None
        raise OSError(error, os.strerror(error))

    if error is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    inputs.edit(method="tv", overwrite=True)
    for name, value in inputs.result().items():
        assert_same_bytes(value, expected[name])


@pytest.mark.parametrize("role", ["full", "base", "forget", "I_f", "I_r"])
def test_truncated_file(inputs: Inputs, role: str) -> None:
    inputs.write()
    file = next((inputs.root / role).rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    refused(inputs, CorruptCheckpointError, f"{role}.*is truncated", write=False)


def test_pickle(inputs: Inputs) -> None:
    inputs.write()
    (inputs.root / "base" / "model.safetensors").rename(inputs.root / "base" / "model.bin")
    with pytest.raises(CorruptCheckpointError, match="never loaded"):
        inputs.edit(write=False, method="tv")
    assert not inputs.output.exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.weight", torch.ones(5, 7, dtype=torch.int8)),
        ("model.layers.0.mlp.qweight", torch.ones(5, 7, dtype=torch.int32)),
        ("model.layers.0.mlp.weight", torch.ones(5, 7).to(torch.float8_e4m3fn)),
    ],
    ids=["int8", "int32", "float8"],
)
def test_quantised(inputs: Inputs, name: str, tensor: Tensor) -> None:
    inputs.write()
    folder = inputs.root / "base"
    write_tensors(folder, inputs.tensors["base"] | {name: tensor})
    refused(inputs, CheckpointError, rf"base.*{name} is quantised", write=False)


def test_output_that_exists_or_overlaps_an_input(inputs: Inputs) -> None:
    inputs.output.mkdir()
    refused(inputs, OutputExistsError, "out is there already")
    for place in ("full", "base/deep", "I_f/order-1", "."):
        inputs.output = inputs.root / place
        refused(inputs, ConfigError, "overlaps the input", overwrite=True)


def test_importance_that_is_missing_or_does_not_fit(inputs: Inputs) -> None:
    message = r"no importance of order 2; it has 1.*perta importance --order 2"
    refused(inputs, ConfigError, message, method="perta-fisher")
    refused(inputs, ConfigError, "no importance of order 0.5", method="perta", order=0.5)
    for key in ("model_fingerprint", "reduction"):
        other = Inputs(inputs.root)
        other.sidecars["I_r"][key] = "other"
        refused(other, CheckpointMismatchError, f"{key} is .* and other")
    for side in ("retain", "forget"):
        nothing: dict[str, Any] = {f"{side}_importance": None}
        lacking = replace(inputs.folders(), **nothing)
        message = rf"needs --{side}-importance.*{side.upper()}_SET --order 1"
        refused(inputs, ConfigError, message, folders=lacking)


def test_an_edit_that_would_forget_nothing(inputs: Inputs) -> None:
    inputs.tensors["forget"] = inputs.tensors["base"]
    refused(inputs, CheckpointError, "equals .* in every tensor", method="tv")
    folders = inputs.folders()
    same = replace(folders, forget_checkpoints=(folders.base,))
    refused(inputs, ConfigError, "both as base and as forget", method="tv", folders=same)


def test_unknown_method(inputs: Inputs) -> None:
    refused(inputs, ConfigError, "Did you mean `perta-grad`", method="perta-gard")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("threads", [1, 3])
def test_interrupted_edit_leaves_no_output(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], threads: int
) -> None:
    for role in inputs.tensors:
        inputs.tensors[role]["model.long.weight"] = inputs.tensors[role][EMBEDDING].repeat(100, 1)
    inputs.write()
    calls = []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        # Not in the thread that is waited for first: the others must hear of it all the same.
        if len(calls) >= 7 and (threads == 1 or threading.current_thread().name != "edit_0"):
            raise error
        write_from(*arguments)

    monkeypatch.setattr("perta.engine.edit.write.write_from", failing)
    before = fingerprint(inputs.root / "full")
    listed = sorted(inputs.root.iterdir())
    with pytest.raises(error):
        inputs.edit(write=False, method="tv", chunk=2, threads=threads)
    assert sorted(inputs.root.iterdir()) == listed
    assert fingerprint(inputs.root / "full") == before
    # Of 2073 chunks; every thread finishes at most the piece at hand.
    assert len(calls) < 1000
    monkeypatch.undo()
    inputs.edit(write=False, method="tv")
    assert set(inputs.result()) == set(inputs.tensors["full"])


def test_threads_of_torch_are_as_before(inputs: Inputs) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inputs.edit(method="tv")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_overwriting_leaves_no_stale_shard(inputs: Inputs) -> None:
    inputs.shards = SHARDS
    inputs.edit(method="tv")
    inputs.shards = None
    inputs.edit(method="tv", overwrite=True)
    assert [path.name for path in inputs.output.glob("*.safetensors*")] == ["model.safetensors"]


# --- what else the output holds


def test_model_card(inputs: Inputs) -> None:
    prints = {"full": "f" * 64, "forget_importance": "e" * 64}
    inputs.edit(
        method="perta-grad", rho=3.0, scaling_coef=1.5, exclude=("*norm*",), fingerprints=prints
    )
    card = (inputs.output / "README.md").read_text()
    for text in ("`perta-grad`", "| 1.5 |", "| 3 |", "`*norm*`", "f" * 64, "forget importance"):
        assert text in card
    assert "not a proof of erasure" in card
    assert str(inputs.root) not in card


Make = Callable[[], PreTrainedConfig]
SMALL: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaConfig(**SMALL, **LLAMA, tie_word_embeddings=True),
        lambda: LlamaConfig(**SMALL, **LLAMA, tie_word_embeddings=False),
        lambda: GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        lambda: Qwen2Config(**SMALL, **LLAMA, tie_word_embeddings=True),
    ],
    ids=["llama-tied", "llama", "gpt2", "qwen2"],
)
def test_output_loads_with_transformers(tmp_path: Path, make: Make, shard_size: str) -> None:
    states = []
    for seed, role in enumerate(("full", "base", "forget")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make(), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / role, max_shard_size=shard_size)
        states.append(model.state_dict())
    write_tokenizer(tmp_path / "full")
    folders = EditInputs(tmp_path / "full", tmp_path / "base", (tmp_path / "forget",))
    edit_into(tmp_path / "out", folders, chosen(method="tv", scaling_coef=0.5))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, problems = loaded
    assert not any(problems.values())
    assert model.dtype == torch.bfloat16
    full, base, forget = states
    for name in open_index(tmp_path / "out").tensors:
        delta = 0.5 * (forget[name].float() - base[name].float())
        expected = rounded(full[name].float() - delta, torch.bfloat16, name)
        assert_same_bytes(model.state_dict()[name], expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "user: a b"
    assert model.generation_config.eos_token_id == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<s>", "</s>", "[UNK]", "a", "b"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def test_write_edit_fills_a_folder_of_the_caller(inputs: Inputs) -> None:
    inputs.write()
    inputs.output.mkdir()
    write_edit(inputs.output, inputs.folders(), chosen(method="tv"))
    assert set(load_file(inputs.output / "model.safetensors")) == set(SHAPES)
