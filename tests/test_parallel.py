"""Every computation on 2 and 4 processes over gloo against the same on one."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import World
from helpers import tiny_llama
from perta.cli import main
from perta.data.batch import IGNORE, Encoded
from perta.engine.gradients import engine
from perta.engine.moments import Seen, plan_moments, sum_moments
from perta.engine.shard import in_parts
from perta.engine.train.optimizer import Trainer
from perta.engine.train.tune import tune
from perta.engine.train.unlearn import unlearn_by_training
from perta.errors import EngineMismatchError
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import Item, ScoringOptions, run_items
from perta.models.facts import Fact, score_facts
from perta.models.load import load_model, pick_device
from perta.options import ComputeConfig, EstimatorConfig, MomentOptions, TrainSettings, TuneConfig
from perta.parallel import everywhere, helpers, lead
from perta.stages.importance import estimate
from perta.store.atomic import beside
from processes import finish, free_port, ran, start

VOCABULARY = 101


def examples(number: int, seed: int = 1) -> list[Encoded]:
    """Random sequences of different lengths whose last four tokens carry loss."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(number):
        ids = torch.randint(3, VOCABULARY, (7 + row % 4,), generator=generator).tolist()
        found.append(Encoded(tuple(ids), (*[IGNORE] * (len(ids) - 4), *ids[-4:]), row + 1))
    return found


ROWS, OTHERS = examples(11), examples(7, 2)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


class ByTurns(nn.Linear):
    """Multiplies in a way that is known for rows of odd length, and in another for the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] % 2 else x @ self.weight.t()


def by_turns() -> nn.Module:
    model = tiny_llama(vocab=VOCABULARY)
    model.model.layers[1].mlp.up_proj.__class__ = ByTurns
    return model


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    makes: dict[str, Callable[[], nn.Module]] = {
        "tied": lambda: tiny_llama(vocab=VOCABULARY),
        "untied": lambda: tiny_llama(vocab=VOCABULARY, tied=False, attention_bias=True),
        "by turns": by_turns,
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64)
        ),
        "mamba": lambda: hf.MambaForCausalLM(
            hf.MambaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                state_size=4,
                num_hidden_layers=2,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "gemma3": lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**SMALL, head_dim=4, sliding_window=8)
        ),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
        ),
        "gpt-oss": lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**SMALL, head_dim=4, num_local_experts=4, num_experts_per_tok=2)
        ),
    }
    return makes[kind]().eval()


# --- what is compared ---------------------------------------------------------------------------


def tuned(kind: str, **more: Any) -> dict[str, Any]:
    model, start = model_of(kind), model_of(kind)
    for each in (model, start):
        # As the eyes of a model that is given text: no row has a gradient of it.
        each.register_parameter("unused", nn.Parameter(torch.ones(2)))
    settings = TuneConfig(epochs=2, learning_rate=1e-2, batch_size=3, weight_decay=0.1, **more)
    done, facts = tune(model, ROWS, settings, pad=0, dtype="float32")
    change = torch.cat(
        [(a - b).flatten() for a, b in zip(done.parameters(), start.parameters(), strict=True)]
    )
    assert torch.equal(done.get_parameter("unused"), start.unused)
    # A trained model can be sent as well.
    after = score_facts(done, [Fact(e.row, e, (e,), "answer") for e in ROWS], pad=0)
    losses = [*facts.epoch_losses, *facts.final_losses, *(score.loss for score in after)]
    return {"change": change.detach(), "losses": losses}


SPARING: dict[str, Any] = {"gradient_checkpointing": True, "shard": True}
TRAINED = ("npo", "npo-sam", "dpo", "kl", "jensun", "pdu:fixed_epochs=0", "rmu", "retain-finetune")


def unlearned(method: str) -> dict[str, Any]:
    model, start = model_of("tied"), model_of("tied")
    settings = TrainSettings(epochs=2, learning_rate=1e-2, batch_size=3, accumulation=2)
    done, facts = unlearn_by_training(
        *(model, ROWS, OTHERS, settings),
        method=method,
        pad=0,
        refusals=examples(11, 3),
        dtype="float32",
    )
    change = torch.cat(
        [(a - b).flatten() for a, b in zip(done.parameters(), start.parameters(), strict=True)]
    )
    terms = [*facts.forget_terms, *facts.retain_terms, *facts.final_losses]
    return {"change": change.detach(), "losses": terms, "steps": facts.steps}


@contextmanager
def loaded(kind: str, shard: bool) -> Iterator[Any]:
    """A model, divided where there are processes to divide it among."""
    if not (shard and helpers()):
        yield model_of(kind)
        return
    with in_parts(lambda: model_of(kind), torch.device("cpu")) as model:
        yield model


def importance(
    kind: str, shard: bool = False, rows: int = 11, orders: Sequence[float] = (1, 2), **more: Any
) -> dict[str, Any]:
    settings = EstimatorConfig(
        **({"reduction": more.pop("reduction")} if "reduction" in more else {})
    )
    with loaded(kind, shard) as model:
        found = estimate(model, ROWS[:rows], orders, settings, pad=0, batch_size=3, **more)
    assert found.examples == rows
    tensors = {f"{o:g} {n}": t for o, named in found.by_order.items() for n, t in named.items()}
    return {**tensors, "slow": list(found.fallback)}


def moments(kind: str, rows: int, batch_size: int, shard: bool = False) -> dict[str, Any]:
    options, seen = MomentOptions(tokens="all"), dict[str, Seen]()
    with loaded(kind, shard) as model:
        plan = plan_moments(model, ROWS, gradients=True, pad=0)
        how: dict[str, Any] = {"pad": 0, "batch_size": batch_size, "seen": seen}
        found = dict(sum_moments(model, ROWS[:rows], plan, options, **how))
    # A factor's rows may come in any order and sign; what they stand for may not.
    whole = {n: t if t.shape[0] == t.shape[1] else t.t() @ t for n, t in found.items()}
    return {**whole, "seen": {name: (s.tokens, s.average) for name, s in seen.items()}}


def scored(kind: str = "tied", shard: bool = False) -> dict[str, Any]:
    with loaded(kind, shard) as model:
        return _scored(model)


def _scored(model: Any) -> dict[str, Any]:
    items = [Item((e,), e.input_ids[:-4], moments=True) for e in ROWS]
    done: list[int] = []
    options = ScoringOptions(Masking(0), frozenset({2}), 2, 12)
    found = run_items(model, items, options, lambda place, _: done.append(place))
    assert sorted(done) == list(range(11))
    facts = [Fact(e.row, e, (e,), "answer") for e in ROWS]
    return {
        "texts": [list(outcome.generated or ()) for outcome in found],
        "losses": [outcome.scores[0].loss for outcome in found],
        "losses of facts": [score.loss for score in score_facts(model, facts, pad=0)],
    }


def everything() -> dict[str, Any]:
    """Every computation there is, by name."""
    found: dict[str, Any] = {
        "tune tied": tuned("tied"),
        "tune untied": tuned("untied", accumulation=2, gradient_checkpointing=True),
        "tune lora": tuned("tied", lora_rank=2),
        "tune mixtral": tuned("mixtral"),
        "tune tied, sharded": tuned("tied", shard=True),
        "tune untied, sharded": tuned("untied", accumulation=2, **SPARING),
        "tune facts, sharded": tuned("tied", loss_on="facts", stop_loss=4.5, shard=True),
        "tune lora, sharded": tuned("tied", lora_rank=2, **SPARING),
        "tune gemma3, sharded": tuned("gemma3", shard=True),
        "tune mixtral, sharded": tuned("mixtral", shard=True),
        "score": scored(),
    }
    found |= {f"unlearn {m}": unlearned(m) for m in TRAINED}
    for kind in ("tied", "untied", "gpt2", "gemma3", "mixtral", "gpt-oss"):
        found[f"importance {kind}"] = importance(kind)
        found[f"importance {kind}, sharded"] = importance(kind, True)
    found["importance sparing, sharded"] = importance(
        "untied", True, gradient_checkpointing=True, accumulate_on="cpu"
    )
    found["score mamba, sharded"] = scored("mamba", True)
    found["importance by turns, sharded"] = importance("by turns", True)
    found["importance wide of one row, sharded"] = importance("gpt-oss", True, 1, (8.0,))
    found["importance of the mean"] = importance("untied", reduction="abs_of_mean")
    for kind in ("untied", "mixtral"):
        found[f"moments {kind}"] = moments(kind, 11, 2)
        found[f"moments {kind}, sharded"] = moments(kind, 11, 2, shard=True)
        found[f"score {kind}, sharded"] = scored(kind, True)
    found["moments few"] = moments("untied", 2, 1)
    found["moments few, sharded"] = moments("untied", 1, 1, shard=True)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return everything()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ran(request.param, everything, folder=tmp_path_factory.mktemp("processes"))


_ROUNDS = 1e-3
"""Of a whole run: every round tunes on from where rounding has left the one before."""


def _differences(one: Any, other: Any, at: str = "", least: float = 1e-5) -> Iterator[str]:
    """Where tensors differ by so much of the first one's norm, or anything else at all."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            yield from _differences(one[key], other[key], f"{at} {key}", least)
    elif isinstance(one, Tensor):
        error = float((one.double() - other.double()).norm() / one.double().norm())
        if not error < least:
            yield f"{at}: {error:.2g}"
    elif "losses" in at:
        yield from _differences(torch.tensor(one), torch.tensor(other), f"{at} as tensor")
    elif one != other:
        yield f"{at}: {one} and {other}"


def test_every_computation_is_that_of_one_process(
    alone: dict[str, Any], together: dict[str, Any]
) -> None:
    assert not [*_differences(alone, together)]


def test_a_process_steps_with_its_part_of_a_sharded_model(tmp_path: Path) -> None:
    def program() -> None:
        step = Trainer.step

        def told(self: Trainer) -> None:
            step(self)
            sums = [t for s in self.optimizer.state.values() for t in s.values() if t.ndim]
            held: list[Any] = [*self.model.parameters(), *sums]
            sys.stdout.write(f"held: {sum(t.to_local().numel() for t in held)}\n")

        Trainer.step = told  # type: ignore[method-assign]
        lead(lambda: tuned("tied", shard=True))

    assert finish(start(3, program, tmp_path)) == [0, 0, 0]
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(3)]
    held = [int(log.partition("held: ")[2].split()[0]) for log in logs]
    weights = sum(p.numel() for p in model_of("tied").parameters())
    # The sums of AdamW are of all but the tensor of 2 that no row has a gradient of.
    assert sum(held) == 3 * weights + 2
    assert max(held) < 3 * weights * 0.36


class Elsewhere(nn.Linear):
    """Reads a copy of its weight, whose gradient is put in place by hand."""

    def forward(self, x: Tensor) -> Tensor:
        copy = self.weight.detach().requires_grad_()
        copy.register_hook(lambda gradient: setattr(self.weight, "grad", gradient.clone()))
        return x @ copy.t()


def unseen(place: str) -> str:
    """What is said of a model in parts where one layer's gradient does not come by."""
    model = model_of("untied")
    layer = model.get_submodule(place)
    model.set_submodule(place, Elsewhere(layer.in_features, layer.out_features, False))
    try:
        with in_parts(lambda: model, torch.device("cpu")) as divided:
            estimate(divided, ROWS, (1.0,), EstimatorConfig(), pad=0, batch_size=3)
    except EngineMismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "lm_head"])
def test_a_gradient_of_a_model_in_parts_that_nobody_sees_is_not_taken_for_zero(
    tmp_path: Path, place: str
) -> None:
    assert f"{place}.weight was recorded" in ran(2, unseen, place, folder=tmp_path)


def living() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    parts = [getattr(t, "_local_tensor", t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in parts if s.device.type == "cpu"}.values())


def test_a_process_measures_with_its_part_of_a_model(tmp_path: Path) -> None:
    def program() -> None:
        total = engine._moments

        def told(means: Any, *more: Any) -> Any:
            sys.stdout.write(f"held: {living() - before}\n")
            return total(means, *more)

        engine.__dict__["_moments"], before = told, living()
        lead(lambda: importance("tied", True, orders=(2,)))

    assert finish(start(3, program, tmp_path)) == [0, 0, 0]
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(3)]
    held = [int(log.partition("held: ")[2].split()[0]) for log in logs]
    both = 2 * 4 * sum(p.numel() for p in model_of("tied").parameters())  # weights, and their means
    assert both <= sum(held) < 1.2 * both
    assert max(held) < 0.4 * both


def repeats() -> None:
    sys.stdout.write(f"repeats: {torch.is_deterministic_algorithms_warn_only_enabled()}\n")


@pytest.mark.parametrize("gpus", [["one", "one"], ["one", ""]])
def test_processes_without_a_gpu_each_meet_over_gloo(tmp_path: Path, gpus: list[str]) -> None:
    """NCCL refuses a GPU that another process has, and has nothing to say to one on a CPU."""

    def work() -> None:
        sys.stdout.write(torch.distributed.get_backend_config())
        pick_device(ComputeConfig(device="cuda"))
        everywhere(repeats)

    def program() -> None:
        gpu = gpus[int(os.environ["RANK"])]
        driver: Any = torch.cuda
        driver.is_available, driver.device_count = lambda: bool(gpu), lambda: 1
        driver.set_device = print
        driver.get_device_properties = lambda _: SimpleNamespace(uuid=gpu)
        lead(work)

    assert finish(start(2, program, tmp_path)) == [0, 0]
    told = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert "cuda:gloo" in told[0]
    assert "nccl" not in told[0]
    # Each takes the algorithms that give the same bits twice.
    assert ["repeats: True" in log for log in told] == [True, True]


# --- whole commands -------------------------------------------------------------------------------


def command(*tokens: object) -> Callable[[], None]:
    def program() -> None:
        sys.argv = ["perta", *map(str, tokens)]
        main()

    return program


def request(world: World, output: Path, *more: object) -> Callable[[], None]:
    sets = ("--forget", world.forget, "--retain", world.retain)
    tune = ("--epochs", 30, "--learning-rate", 5e-3, "--batch-size", 2)
    models = ("--base", world.base, "--full", world.full, "--dtype", "float32")
    return command("unlearn", *models, *sets, *tune, "--output", output, *more)


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same request on one and on two processes."""
    root = tmp_path_factory.mktemp("runs")
    for size, name in ((1, "one"), (2, "two")):
        statuses = finish(
            start(size, request(world, root / name / "out"), root / f"log {name}"), 120
        )
        assert statuses == [0] * size, (root / f"log {name}" / "0.log").read_text()
    return root / "one", root / "two"


def test_a_whole_run_is_that_of_one_process(runs: tuple[Path, Path]) -> None:
    one, two = ({p.relative_to(r): p for p in r.rglob("*") if p.is_file()} for r in runs)
    assert one.keys() == two.keys()
    for name, file in one.items():
        if name.suffix == ".safetensors":
            a, b = load_file(file), load_file(two[name])
            assert not [*_differences(a, b, least=_ROUNDS)]
    said = [(run.parent / f"log {run.name}" / "0.log").read_text() for run in runs]
    verdicts = [text.splitlines()[-1] for text in said]
    assert verdicts[0].startswith("Verdict:")
    assert verdicts[0] == verdicts[1]


def test_process_0_alone_speaks(runs: tuple[Path, Path]) -> None:
    log = runs[0].parent / "log two"
    assert (log / "1.log").read_text() == ""
    assert "Verdict" in (log / "0.log").read_text()


OWN_METHOD = """
import torch
from perta.methods.method import Weighting


class Odd(Weighting):
    name = "odd"
    formula = "W = 1 where τ < 0"
    source = "ours"
    summary = "a sign"
    done = "Weights that fell were moved back."

    def weigh(self, block):
        return (block.task_vector < 0).float()
"""


def test_edits_are_equal_to_the_byte(runs: tuple[Path, Path], world: World, tmp_path: Path) -> None:
    """Of weights that the same importance, moments and checkpoints give."""
    work = runs[0] / "out.work"
    models = ("--full", world.full, "--base", world.base)
    common = ("edit", *models, "--forget-checkpoint", work / "forget_checkpoint", "--alpha", 1)
    moments = ("--retain-moments", work / "retain_moments")
    methods: dict[str, tuple[object, ...]] = {
        "tv": ("--save-dtype", "bfloat16"),
        "ties": ("--forget-checkpoint", work / "forget_rounds"),
        "perta-project": moments,
        "odd": (),
    }
    file = tmp_path / "methods.py"
    file.write_text(OWN_METHOD)
    own = ("--method-file", file)
    for method, more in methods.items():
        for size in (1, 4):
            out = tmp_path / f"{method} {size}"
            program = command(*common, "--method", method, *more, "--output", out, *own)
            assert finish(start(size, program, tmp_path / "log")) == [0] * size, method
        one, four = (tmp_path / f"{method} {size}" / "model.safetensors" for size in (1, 4))
        assert one.read_bytes() == four.read_bytes(), method


def test_task_vectors_of_lora_are_those_of_one_process(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned, given, solved for and edited with; from the same adapter to the byte."""
    monkeypatch.setattr("perta.stages.finetune._FIT", 10.0)  # so few weights learn nothing here
    runs = ("--method", "perta-project", "--alpha", 1, "--no-evaluate")
    for size in (1, 2):
        lora = request(world, tmp_path / f"out {size}", *runs, "--lora-rank", 2)
        assert finish(start(size, lora, tmp_path / f"log {size}"), 120) == [0] * size
    works = [tmp_path / f"out {size}.work" for size in (1, 2)]
    first, second = (
        load_file(w / "forget_checkpoint" / "adapter_model.safetensors") for w in works
    )
    assert not [*_differences(first, second)]
    named = [token for name, place in vars(world).items() for token in (f"--{name}", place)]
    given = ("--forget-checkpoint", works[0] / "forget_checkpoint")
    for size in (1, 2):
        output = ("--output", tmp_path / f"given {size}")
        program = command("unlearn", *named, "--dtype", "float32", *runs, *given, *output)
        assert finish(start(size, program, tmp_path / f"log {size}"), 120) == [0] * size
    one, two = (tmp_path / f"given {size}" / "model.safetensors" for size in (1, 2))
    assert not [*_differences(load_file(one), load_file(two))]
    common = ("edit", "--full", world.full, "--base", world.base, *given, "--method", "tv")
    for size in (1, 4):
        program = command(*common, "--output", tmp_path / f"edit {size}")
        assert finish(start(size, program, tmp_path / f"log {size}")) == [0] * size
    one, four = (tmp_path / f"edit {size}" / "model.safetensors" for size in (1, 4))
    assert one.read_bytes() == four.read_bytes()


def test_shards_are_written_in_place_by_all_processes(
    runs: tuple[Path, Path], world: World, tmp_path: Path
) -> None:
    full, tuned = tmp_path / "full", runs[0] / "out.work" / "forget_checkpoint"
    shutil.copytree(world.full, full, ignore=lambda *_: ["model.safetensors", "perta.json"])
    load_model(world.full, ComputeConfig()).save_pretrained(full, max_shard_size="100KB")
    assert len([*full.glob("*.safetensors")]) >= 3
    models = ("--full", full, "--base", world.base, "--forget-checkpoint", tuned)
    written = []
    for size in (1, 2, 4):
        out = tmp_path / f"out {size}"
        program = command("edit", *models, "--method", "tv", "--output", out)
        assert finish(start(size, program, tmp_path / "log")) == [0] * size
        written.append({f.name: f.read_bytes() for f in out.glob("model*")})
    assert written[0].keys() == {f.name for f in full.glob("model*")}
    assert written[0] == written[1] == written[2]


FEW = ("--epochs", 2, "--learning-rate", 5e-3)


def measuring(world: World, stage: str, output: Path, *more: object) -> Callable[[], None]:
    rows = [json.loads(line) for line in world.forget.read_text().splitlines()]
    # Without what tells the facts, so that the base model is asked.
    told = [json.dumps({k: row[k] for k in ("question", "answer")}) for row in rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    (rows_to_forget := output.with_suffix(".jsonl")).write_text("\n".join(told))
    given: dict[str, tuple[object, ...]] = {
        "moments": ("--checkpoint", world.base, "--data", world.retain, "--gradients"),
        "importance": ("--checkpoint", world.base, "--data", world.retain, "--order", 1),
        "finetune": ("--base", world.base, "--data", rows_to_forget, "--loss-on", "facts", *FEW),
        "evaluate": ("--checkpoint", world.full, "--forget", rows_to_forget, "--base", world.base),
    }
    return command(stage, *given[stage], "--dtype", "float32", "--output", output, *more)


def measured(output: Path) -> dict[str, Any]:
    """What a stage wrote: tensors, or means of what was evaluated."""
    if output.is_file():
        values = {
            n: v["agg_value"] for n, v in json.loads(output.read_text()).items() if n != "perta"
        }
        return {"losses": [*values.values()], "names": [*values]}
    files = sorted(output.rglob("*.safetensors"))
    return {str(file.relative_to(output)): load_file(file) for file in files}


@pytest.mark.parametrize("stage", ["moments", "importance", "evaluate", "finetune"])
def test_what_was_made_with_a_model_in_parts_is_known_to_one_process(
    world: World, tmp_path: Path, stage: str
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert finish(start(1, measuring(world, stage, one), tmp_path / "log")) == [0]
    assert finish(start(2, measuring(world, stage, two, "--shard"), tmp_path / "log")) == [0, 0]
    assert (tmp_path / "log" / "1.log").read_text() == ""
    assert "works alone" not in (tmp_path / "log" / "0.log").read_text()
    found = measured(one)
    assert found
    assert not [*_differences(found, measured(two))]
    assert finish(start(1, measuring(world, stage, two), tmp_path / "log")) == [0]
    assert "is up to date, reused" in (tmp_path / "log" / "0.log").read_text()


# --- two machines ---------------------------------------------------------------------------------


def on_two_nodes(log: Path, *tokens: object) -> list[subprocess.Popen[bytes]]:
    """Begin a command under torchrun, as on two machines of two processes; output in LOG.N."""
    meet = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    groups = ("--nnodes", 2, "--nproc-per-node", 2, *meet)
    torchrun = (sys.executable, "-m", "torch.distributed.run", *groups)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = []
    for node in (0, 1):
        run = [*map(str, (*torchrun, "--node-rank", node, "-m", "perta", *tokens))]
        with log.with_suffix(f".{node}").open("wb") as file:
            agents.append(subprocess.Popen(run, stdout=file, stderr=file, env=environment))
    return agents


def cut_off(agent: subprocess.Popen[bytes]) -> None:
    """End what torchrun has started, as when its machine fails, and torchrun itself."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    started = children.read_text().split() if agent.poll() is None else []
    agent.kill()
    for child in map(int, started):
        os.kill(child, signal.SIGKILL)
    agent.wait()


@pytest.mark.slow
def test_two_nodes_are_one_run(world: World, tmp_path: Path) -> None:
    def tuning(output: Path, epochs: int) -> tuple[object, ...]:
        run = ("--epochs", epochs, "--learning-rate", 5e-3, "--batch-size", 4, "--stop-loss", 0)
        data = ("--base", world.base, "--data", world.retain, "--dtype", "float32")
        return ("finetune", *data, *run, "--save-every", 1, "--output", output)

    agents = on_two_nodes(tmp_path / "whole", *tuning(tmp_path / "two", 4))
    assert [agent.wait(300) for agent in agents] == [0, 0], (tmp_path / "whole.0").read_text()
    assert finish(start(1, command(*tuning(tmp_path / "one", 4)), tmp_path / "log")) == [0]
    base, *done = (
        load_file(tmp_path / f / "model.safetensors") for f in (world.base, "one", "two")
    )
    one, two = ({n: t - base[n] for n, t in tensors.items()} for tensors in done)
    assert not [*_differences(one, two)]

    lost = tmp_path / "lost" / "out"
    first, second = on_two_nodes(tmp_path / "broken", *tuning(lost, 2000))
    try:
        while not (beside(lost, ".resume") / "state.pt").exists():
            assert first.poll() is None, (tmp_path / "broken.0").read_text()
            time.sleep(0.1)
        cut_off(second)
        assert first.wait(120) != 0
    finally:
        for agent in (first, second):
            cut_off(agent)
    assert "A process of this run is gone" in (tmp_path / "broken.0").read_text()
    assert not lost.exists()
    assert not hidden(lost.parent)


# --- errors and kills -----------------------------------------------------------------------------


def broken(place: str, rank: int, times: int, act: Callable[[], None]) -> None:
    """Have one process do something else when it comes to a function for so many times."""
    if int(os.environ["RANK"]) != rank:
        return
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    original, left = getattr(owner, name), times

    def function(*args: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            act()
        return original(*args, **named)

    setattr(owner, name, function)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")


STEP = "perta.engine.train.optimizer:Trainer.step"
PLACES = {
    "tuning": (STEP, 7),
    "moments": ("perta.engine.moments:_Collector.run", 1),
    "direction": ("perta.engine.edit.direction:Solver._solved", 2),
    "edit": ("perta.engine.edit._stream:Editor.run", 3),
    "evaluation": ("perta.evidence.scoring.items:_Run.all", 2),
}


IN_PARTS = {
    "finetune": (STEP, 7),
    "moments": PLACES["moments"],
    "importance": ("perta.engine.gradients._recorder:Recorder.finish", 1),
    "evaluate": ("perta.evidence.scoring.items:_Run._begin", 1),
}


def hidden(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.name.startswith(".") or "partial" in p.name]


def broken_request(
    world: World, out: Path, where: str, rank: int, act: Callable[[], None]
) -> Callable[[], None]:
    def program() -> None:
        broken(*(PLACES[where][0], rank, PLACES[where][1], act))
        request(world, out)()

    return program


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_process_is_one_message(world: World, tmp_path: Path, rank: int) -> None:
    program = broken_request(world, tmp_path / "run" / "out", "tuning", rank, fail)
    began = time.monotonic()
    assert finish(start(2, program, tmp_path / "log"))[0] == 1
    assert time.monotonic() - began < 60
    log = (tmp_path / "log" / "0.log").read_text()
    assert log.count("error:") == 1
    assert "Out of memory. Lower --batch-size" in log
    assert "error" not in (tmp_path / "log" / "1.log").read_text()
    assert not (tmp_path / "run" / "out").exists()
    assert not hidden(tmp_path / "run")


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("edit", 1),
        pytest.param("tuning", 0, marks=pytest.mark.slow),
        *(pytest.param(p, 1, marks=pytest.mark.slow) for p in PLACES if p != "edit"),
    ],
)
def test_after_a_kill_the_same_command_finishes(
    world: World, runs: tuple[Path, Path], tmp_path: Path, where: str, rank: int
) -> None:
    out = tmp_path / "run" / "out"
    statuses = finish(start(2, broken_request(world, out, where, rank, kill), tmp_path / "log"))
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 1
    if rank:
        log = (tmp_path / "log" / "0.log").read_text()
        assert "A process of this run is gone" in log
        assert "Traceback" not in log
        assert not hidden(tmp_path / "run")
    size = 4 if where == "tuning" else 2
    assert finish(start(size, request(world, out), tmp_path / "again")) == [0] * size
    assert not hidden(tmp_path / "run")
    one, again = (load_file(f / "model.safetensors") for f in (runs[0] / "out", out))
    assert not [*_differences(one, again, least=_ROUNDS)]


@pytest.mark.parametrize("act", [kill, fail])
@pytest.mark.parametrize("stage", ["finetune", "moments", "importance", "evaluate"])
def test_a_sharded_model_ends_as_others_do(
    world: World, tmp_path: Path, stage: str, act: Callable[[], None]
) -> None:
    out = tmp_path / "run" / "out"
    data = ("--base", world.base, "--data", world.retain, "--dtype", "float32")
    tuning = ("finetune", *data, "--epochs", 40, "--learning-rate", 5e-3, "--stop-loss", 0)
    place, times = IN_PARTS[stage]

    def program() -> None:
        broken(place, 1, times, act)
        if stage == "finetune":
            command(*tuning, "--shard", "--output", out)()
        measuring(world, stage, out, "--shard")()

    began = time.monotonic()
    assert finish(start(2, program, tmp_path / "log"))[0] == 1
    assert time.monotonic() - began < 60
    log = (tmp_path / "log" / "0.log").read_text()
    assert log.count("error:") == 1
    said = "A process of this run is gone" if act is kill else "Out of memory. Lower --batch-size"
    assert said in log
    assert "Traceback" not in log
    assert not out.exists()
    assert not hidden(tmp_path / "run")


def test_tuning_goes_on_with_another_number_of_processes(world: World, tmp_path: Path) -> None:
    def tuning(name: str) -> Callable[[], None]:
        settings = ("--epochs", 8, "--learning-rate", 5e-3, "--batch-size", 2, "--save-every", 2)
        data = ("--base", world.base, "--data", world.retain, "--dtype", "float32")
        return command("finetune", *data, *settings, "--output", tmp_path / name)

    def killed() -> None:
        broken(STEP, 1, 17, kill)
        tuning("tuned")()

    assert finish(start(1, tuning("alone"), tmp_path / "log")) == [0]
    assert finish(start(2, killed, tmp_path / "log"))[1] == -signal.SIGKILL
    assert (tmp_path / "tuned.resume").is_dir()
    assert finish(start(4, tuning("tuned"), tmp_path / "log")) == [0] * 4
    assert "Going on after epoch" in (tmp_path / "log" / "0.log").read_text()
    base, *done = (
        load_file(f / "model.safetensors")
        for f in (world.base, tmp_path / "alone", tmp_path / "tuned")
    )
    one, again = ({n: t - base[n] for n, t in tensors.items()} for tensors in done)
    assert not [*_differences(one, again)]
