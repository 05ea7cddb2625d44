"""Unlearning by training in memory: every method, its terms, resuming and divergence."""

from __future__ import annotations

import copy
import ctypes
import math
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import IGNORE, Encoded, bucketed
from perta.data.examples import load_examples
from perta.engine.train.optimizer import Resume
from perta.engine.train.refusals import with_refusals
from perta.engine.train.tune import tune
from perta.engine.train.unlearn import (
    Trained,
    _retain_place,
    unlearn_by_training,
    with_method_defaults,
)
from perta.errors import ConfigError, DivergenceError, EmptyDatasetError
from perta.methods.objectives import GradDiff, Training, control_vector
from perta.methods.registry import known, parse
from perta.models.loss import example_losses, losses_of
from perta.models.precision import products_in
from perta.options import DataConfig, DType, TrainSettings, TuneConfig

TRAINED = [name for name in known(Training) if name != "influence"]  # it solves
QUICK = TrainSettings(epochs=2, learning_rate=1e-3, batch_size=3, accumulation=1)


def examples(number: int, seed: int, length: int = 9) -> tuple[Encoded, ...]:
    """Random sequences of different lengths whose last five tokens carry loss."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(number):
        size = length + row % 3
        ids = torch.randint(3, 60, (size,), generator=generator).tolist()
        found.append(Encoded(tuple(ids), (*[IGNORE] * (size - 5), *ids[-5:]), row + 1))
    return tuple(found)


FORGET, RETAIN, REFUSED = examples(5, 1), examples(7, 2), examples(5, 3)


def model_of(seed: int = 0) -> Any:
    return tiny_llama(vocab=64, seed=seed)


def run(
    model: Any, method: str, settings: TrainSettings = QUICK, **more: Any
) -> tuple[Any, Trained]:
    return unlearn_by_training(
        model, FORGET, RETAIN, settings, method=method, pad=0, refusals=REFUSED, **more
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_fine_tuning_and_training_anew_are_one_loop() -> None:
    more: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-3, "batch_size": 2, "accumulation": 2}
    tuned, _ = tune(model_of(), RETAIN, TuneConfig(stop_loss=0, **more), pad=0)
    settings = TrainSettings(weight_decay=0, **more)
    anew, _ = unlearn_by_training(model_of(), (), RETAIN, settings, method="retrain", pad=0)
    assert not same(weights(tuned), weights(model_of()))
    assert same(weights(tuned), weights(anew))


# --- in memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rank"), [*((name, 0) for name in TRAINED), ("dpo", 2), ("undial", 2), ("rmu", 2)]
)
def test_every_method_trains_and_counts(method: str, rank: int) -> None:
    model = model_of()
    before = weights(model)
    row = parse(method, Training)
    done, trained = run(model, method, replace(QUICK, lora_rank=rank))
    assert not done.training
    assert not same(before, weights(done))
    sees = row.sees_forget_set
    assert trained.steps == 2 * math.ceil((5 if sees else 7) / 3)
    assert len(trained.forget_terms) == (2 if sees else 0)
    assert len(trained.retain_terms) == (2 if row.retain else 0)
    assert len(trained.final_losses) == (5 if sees else 7)
    shown = REFUSED if row.refusals == "instead" else FORGET
    passes = 4 if method == "npo-sam" else 2  # uphill as well
    wanted = passes * sum(len(e.input_ids) for e in shown) if sees else 0
    if row.refusals == "beside":
        wanted += 2 * sum(len(e.input_ids) for e in REFUSED)
    assert trained.forget_tokens == wanted
    assert (trained.retain_tokens > 0) == bool(row.retain)
    assert all(p.requires_grad for p in done.parameters())


@pytest.fixture(scope="module")
def tuned() -> Any:
    """A model that knows all examples."""
    settings = replace(QUICK, epochs=15, learning_rate=1e-2, batch_size=6)
    everything = (*FORGET, *RETAIN)
    return unlearn_by_training(model_of(), (), everything, settings, method="retrain", pad=0)[0]


@pytest.mark.parametrize("method", [m for m in TRAINED if parse(m, Training).sees_forget_set])
def test_the_forget_answers_become_less_likely(method: str, tuned: Any) -> None:
    settings = replace(QUICK, epochs=6, learning_rate=1e-2, batch_size=5)
    if method == "rmu":  # the vector must stand out from this model's activations
        method += ":steering_coef=60,retain_weight=0.1"
        settings = replace(settings, learning_rate=5e-2)
    before = losses_of(tuned, FORGET, batch_size=8, pad=0)
    done, trained = run(copy.deepcopy(tuned), method, settings)
    assert trained.final_loss > sum(before) / 5 + 0.1
    assert list(trained.final_losses) == pytest.approx(
        losses_of(done, FORGET, batch_size=1, pad=3), rel=1e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_learned_is_asked_in_the_products_that_tuned(dtype: DType) -> None:
    settings = TuneConfig(epochs=1, batch_size=2, learning_rate=1e-3)
    done, tuned = tune(model_of(), RETAIN, settings, pad=0, dtype=dtype)
    products = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found = {}
    for name, kind in products.items():
        with products_in(kind, torch.device("cpu")):
            found[name] = losses_of(done, RETAIN, batch_size=len(RETAIN), pad=0)
    assert found["float32"] != found["bfloat16"]
    assert list(tuned.final_losses) == found[dtype]


def loss_by_hand(model: Any, example: Encoded) -> Tensor:
    log_probs = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    return -torch.stack(
        [log_probs[t - 1, label] for t, label in enumerate(example.labels) if label != IGNORE]
    ).mean()


def test_one_step_has_the_gradient_of_the_written_loss() -> None:
    """GradDiff with weights, on one example each, against a loop of plain operations."""
    settings = TrainSettings(
        epochs=1, learning_rate=1e-2, batch_size=1,
        accumulation=1, weight_decay=0, warmup_ratio=0, max_grad_norm=0,
    )  # fmt: skip
    method = GradDiff(forget_weight=0.5, retain_weight=3.0)
    done, _ = unlearn_by_training(
        model_of(), FORGET[:1], RETAIN[:1], settings, method=method, pad=0
    )
    plain = model_of()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    loss = -0.5 * loss_by_hand(plain, FORGET[0]) + 3.0 * loss_by_hand(plain, RETAIN[0])
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in plain.named_parameters()}
    optimizer.step()
    found, moved = weights(done), weights(plain)
    # AdamW's first step is the gradient's sign: compare where the gradient is not rounding.
    for name, gradient in wanted.items():
        clear = gradient.abs() > 1e-4
        assert clear.any()
        torch.testing.assert_close(found[name][clear], moved[name][clear], rtol=0, atol=1e-4)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_the_gradient_of_forgetting_is_taken_uphill_and_that_of_the_rest_is_not() -> None:
    """NPO+SAM on one example each, against a loop of plain operations in float64."""
    settings = replace(
        QUICK, epochs=1, batch_size=1, weight_decay=0, warmup_ratio=0, max_grad_norm=0
    )
    method, start = parse("npo-sam:rho=0.5,beta=0.3", Training), model_of().double()
    with torch.no_grad():
        full = -5 * loss_by_hand(start, FORGET[0])

    def forget(model: Any) -> Tensor:
        ratio = -5 * loss_by_hand(model, FORGET[0]) - full
        return 2 / 0.3 * torch.log1p((0.3 * ratio).exp())

    worst = copy.deepcopy(start)
    forget(worst).backward()
    uphill = gradients(worst)
    norm = math.sqrt(sum(float(g.square().sum()) for g in uphill.values()))
    with torch.no_grad():
        for name, parameter in worst.named_parameters():
            parameter.add_(0.5 / norm * uphill[name])
    worst.zero_grad()
    forget(worst).backward()
    loss_by_hand(start, RETAIN[0]).backward()
    wanted = {name: g + gradients(start)[name] for name, g in gradients(worst).items()}
    plain = {name: g + gradients(start)[name] for name, g in uphill.items()}
    done, trained = unlearn_by_training(
        model_of(), FORGET[:1], RETAIN[:1], settings, method=method, pad=0
    )
    kept = loss_by_hand(start, RETAIN[0]).item()
    assert trained.retain_terms[0] == pytest.approx(kept, rel=1e-5)
    apart = 0
    # AdamW's first step is the gradient's sign: compare where the gradient is not rounding.
    for name, moved in weights(done).items():
        step = start.get_parameter(name) - moved
        clear = wanted[name].abs() > 1e-3
        assert torch.equal(step[clear].sign(), wanted[name][clear].sign())
        apart += int((clear & (plain[name].sign() != wanted[name].sign())).sum())
    assert apart > 10  # the gradient at the weights themselves would have been told apart


def test_the_weight_of_the_retain_term_follows_it_from_step_to_step() -> None:
    """PDU on one example each, against a loop of plain operations in float64."""
    settings = replace(
        QUICK, epochs=5, batch_size=1, weight_decay=0, schedule="constant", warmup_ratio=0
    )
    method = "pdu:retain_weight=2,limit=3,dual_step=2,fixed_epochs=1"
    _, trained = unlearn_by_training(
        model_of(),
        FORGET[:1],
        RETAIN[:1],
        replace(settings, max_grad_norm=0),
        method=method,
        pad=0,
    )
    plain, weight = model_of().double(), 2.0
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0)
    places = torch.tensor([i - 1 for i, label in enumerate(FORGET[0].labels) if label != IGNORE])
    terms, weights_seen = [], []
    for epoch in range(1, 6):
        logits = plain(input_ids=torch.tensor([FORGET[0].input_ids])).logits[0, places]
        flat = (logits.max(-1).values - logits.mean(-1)).pow(2).mean()
        kept = loss_by_hand(plain, RETAIN[0])
        optimizer.zero_grad()
        (flat + weight * kept).backward()
        optimizer.step()
        terms.append(kept.item())
        weights_seen.append(weight)
        if epoch > 1:
            weight = max(0.0, weight + 2 * (kept.item() - 3))
    assert list(trained.retain_terms) == pytest.approx(terms, rel=2e-4)
    assert len(set(weights_seen)) == 4


def test_words_take_the_place_of_the_answers_tokens() -> None:
    tokenizer = tiny_tokenizer()
    words: list[int] = tokenizer(" No idea", add_special_tokens=False)["input_ids"]
    asked = load_examples([{"question": "Who?", "answer": "a"}])
    encoded = (*FORGET, replace(FORGET[0], labels=(IGNORE,) * 9))
    given = (asked, encoded, tiny_llama(), tokenizer, DataConfig(), 0)
    kept, found = with_refusals(parse("jensun", Training), *given)
    assert kept == encoded
    for old, new in zip(encoded, found, strict=True):
        places = [i for i, label in enumerate(old.labels) if label != IGNORE]
        wanted = [IGNORE] * len(old.labels)
        for turn, i in enumerate(places):
            wanted[i] = words[turn % len(words)]
        assert new == replace(old, labels=tuple(wanted))
    assert with_refusals(parse("npo", Training), *given) == (encoded, ())


def test_accumulation_equals_one_large_batch() -> None:
    large = replace(QUICK, batch_size=6, epochs=1)
    small = replace(QUICK, batch_size=1, accumulation=6, epochs=1)
    for method in ("npo-retain", "kl", "undial", "rmu"):
        one, other = (weights(run(model_of(), method, s)[0]) for s in (large, small))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)


def test_terms_at_the_full_model_are_the_known_values() -> None:
    """One step over everything: the recorded terms are those of the untouched model."""
    settings = replace(QUICK, batch_size=5, epochs=1, learning_rate=1e-4)
    _, npo = run(model_of(), "npo", settings)
    assert npo.forget_terms[0] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)
    for method in ("dpo", "altpo"):
        _, preferred = run(model_of(), method, settings)
        assert preferred.forget_terms[0] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)
    for method in ("kl", "jensun"):
        _, kept = run(model_of(), method, settings)
        assert kept.retain_terms[0] == pytest.approx(0, abs=1e-6)
    _, rmu = run(model_of(), "rmu", settings)
    assert rmu.retain_terms[0] == pytest.approx(0, abs=1e-9)
    _, ga = run(model_of(), "ga", settings)
    assert ga.forget_terms[0] == pytest.approx(
        -sum(losses_of(model_of(), FORGET, batch_size=1, pad=0)) / 5, rel=1e-5
    )


def test_with_lora_the_reference_is_the_model_without_its_adapter() -> None:
    """The KL term is 0 before the first step and above it after, in both kinds of training."""
    settings = replace(QUICK, batch_size=5, epochs=3, learning_rate=1e-2)
    for rank in (0, 4):
        _, trained = run(model_of(), "kl", replace(settings, lora_rank=rank))
        assert trained.retain_terms[0] == pytest.approx(0, abs=1e-6)
        assert trained.retain_terms[2] > 1e-4


@pytest.mark.parametrize("rank", [0, 2])
def test_rmu_trains_down_projections_up_to_its_layer(rank: int) -> None:
    model = model_of()
    before = weights(model)
    done, _ = run(model, "rmu:steering_layer=0", replace(QUICK, lora_rank=rank))
    after = weights(done)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]


def along_vector(model: Any, layer: int) -> float:
    """Mean component, along `rmu`'s vector, of a layer's output at forget answers."""
    vector = control_vector(32, 1.0, QUICK.seed)
    found = []
    for example in FORGET:
        ids = torch.tensor([example.input_ids])
        output = model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1][0]
        kept = [i for i, label in enumerate(example.labels) if label != IGNORE]
        found += (output[kept] @ vector).tolist()
    return sum(found) / len(found)


def test_a_vector_shorter_than_the_activations_is_warned_about(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(model_of(), "rmu:steering_coef=0.1", replace(QUICK, epochs=1))
    assert "shortened rather than steered" in capsys.readouterr().err
    run(model_of(), "rmu:steering_coef=1e3", replace(QUICK, epochs=1))
    assert "shortened" not in capsys.readouterr().err


def test_rmu_moves_activations_towards_its_vector() -> None:
    settings = replace(QUICK, epochs=8, batch_size=5, learning_rate=3e-2)
    method = "rmu:retain_weight=0,steering_coef=30,steering_layer=0"
    before = along_vector(model_of(), 0)
    done, trained = run(model_of(), method, settings)
    assert trained.forget_terms[-1] < 0.9 * trained.forget_terms[0]
    assert before + 3 < along_vector(done, 0) < 31


def test_padding_and_refusals_follow_their_examples() -> None:
    """With one example a batch nothing is padded; larger batches give the same terms."""
    for method in ("dpo", "npo-retain"):
        terms = []
        for size in (1, 5):
            settings = replace(
                QUICK, batch_size=size, epochs=2, learning_rate=1e-2,
                accumulation=5 // size,
            )  # fmt: skip
            terms.append(run(model_of(), method, settings)[1].forget_terms[1])
        assert terms[0] == pytest.approx(terms[1], rel=1e-2)


def test_retain_examples_come_in_turn() -> None:
    first, second = ([_retain_place(start + i, 5, seed=3) for i in range(5)] for start in (0, 5))
    assert sorted(first) == sorted(second) == list(range(5))
    assert first != second
    one, other = ([_retain_place(i, 50, seed) for i in range(50)] for seed in (4, 5))
    assert one != other


def test_epochs_go_on_through_the_retain_set() -> None:
    settings = replace(QUICK, epochs=7, learning_rate=1e-5)
    _, trained = run(model_of(), "graddiff", settings)
    # Seven epochs of five forget examples take each of the seven retain examples five times.
    assert trained.retain_tokens == 5 * sum(len(e.input_ids) for e in RETAIN)


def test_after_each_epoch_the_model_can_be_measured_and_stopped() -> None:
    # Dropout draws from the generator that a measurement might use as well.
    model = tiny_llama(vocab=64, attention_dropout=0.3)
    seen: list[tuple[int, bool, float]] = []

    def after(epoch: int) -> bool:
        torch.rand(7)  # must not change what is trained
        seen.append((epoch, model.training, losses_of(model, FORGET, batch_size=8, pad=0)[0]))
        return epoch == 3

    settings = replace(QUICK, epochs=9)
    done, trained = run(model, "npo-retain", settings, after_epoch=after)
    assert [(epoch, training) for epoch, training, _ in seen] == [
        (1, False),
        (2, False),
        (3, False),
    ]
    assert len(trained.forget_terms) == 3
    assert losses_of(done, FORGET, batch_size=8, pad=0)[0] == seen[-1][2]
    other = tiny_llama(vocab=64, attention_dropout=0.3)
    again, _ = run(other, "npo-retain", settings, after_epoch=lambda epoch: epoch == 3)
    assert same(weights(done), weights(again))


def test_with_lora_a_measurement_sees_the_adapter() -> None:
    model = model_of()
    seen: list[float] = []

    def after(_epoch: int) -> bool:
        seen.append(losses_of(model, FORGET, batch_size=8, pad=0)[0])
        return False

    settings = replace(QUICK, lora_rank=2, learning_rate=1e-2)
    done, _ = run(model, "ga", settings, after_epoch=after)
    assert seen[0] != seen[1]
    assert losses_of(done, FORGET, batch_size=8, pad=0)[0] == pytest.approx(seen[1], rel=1e-4)


def test_defaults_are_the_methods_and_choices_win() -> None:
    method = parse("satimp:beta=2", Training)
    assert method.settings == {
        "forget_weight": 0.1, "retain_weight": 1.0, "beta": 2.0, "beta2": 1.0,
    }  # fmt: skip
    filled = with_method_defaults(method, TrainSettings(learning_rate=3.0))
    assert (filled.learning_rate, filled.epochs) == (3.0, 5)


@pytest.mark.parametrize(
    ("method", "change", "error", "message"),
    [
        ("npo", {"forget": ()}, EmptyDatasetError, "needs forget examples"),
        ("graddiff", {"retain": ()}, EmptyDatasetError, "needs retain examples"),
        ("dpo", {"refusals": REFUSED[:2]}, ConfigError, "there are 2"),
        ("idkpo", {"refusals": None}, ConfigError, "one refusal for each"),
        ("influence", {}, ConfigError, "does not train"),
        ("ga:beta=0.1", {}, ConfigError, "unknown setting `beta`"),
        ("npo:beta=0", {}, ConfigError, r"beta is 0.*\(0, inf\)"),
        ("rmu:steering_layer=2", {}, ConfigError, "has 2 layers"),
    ],
)
def test_what_is_missing_is_named(
    method: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "config": QUICK, **change}
    with pytest.raises(error, match=message):
        unlearn_by_training(model_of(), **given, method=method, pad=0)


def test_divergence_names_the_epoch_and_the_cure(tuned: Any) -> None:
    wild = replace(QUICK, epochs=40, learning_rate=1e-2)
    rise = r"epoch \d+: the retain term rose from 0\.\d+ to \d{1,2}\.\d+ nats.*retain_weight"
    with pytest.raises(DivergenceError, match=rise):
        run(copy.deepcopy(tuned), "graddiff:retain_weight=1e-6", wild)
    broken = model_of()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    with pytest.raises(DivergenceError, match="epoch 1: the forget and retain terms became"):
        run(broken, "ga")


def test_a_ruined_model_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    wild = replace(QUICK, epochs=20, learning_rate=3e-2)
    run(model_of(), "ga", wild)
    assert "more than guessing at random" in capsys.readouterr().err


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rank"), [("npo-retain", 0), ("kl", 2), ("pdu:fixed_epochs=0", 0)]
)
def test_a_killed_run_goes_on_to_the_same_weights(method: str, rank: int, tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=4, lora_rank=rank)
    whole, told = run(model_of(), method, settings)
    resume = Resume(tmp_path / "out.resume", "key", 1)

    def kill(epoch: int) -> bool:
        if epoch == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run(model_of(), method, settings, resume=resume, after_epoch=kill)
    seen: list[int] = []

    def note(epoch: int) -> bool:
        seen.append(epoch)
        return False

    done, retold = run(model_of(), method, settings, resume=resume, after_epoch=note)
    assert seen == [3, 4]
    assert same(weights(whole), weights(done))
    assert retold == told


def test_a_state_of_another_run_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(QUICK, epochs=3)
    run(model_of(), "ga", settings, resume=Resume(tmp_path / "r", "other", 1))
    fresh, _ = run(model_of(), "ga", settings)
    done, _ = run(model_of(), "ga", settings, resume=Resume(tmp_path / "r", "key", 0))
    assert "other inputs or settings" in capsys.readouterr().err
    assert same(weights(fresh), weights(done))
    (tmp_path / "r" / "state.pt").write_bytes(b"not a state")
    run(model_of(), "ga", settings, resume=Resume(tmp_path / "r", "key", 0))
    assert "is damaged or" in capsys.readouterr().err


def test_only_every_nth_state_is_kept(tmp_path: Path) -> None:
    resume = Resume(tmp_path / "r", "key", 2)
    states: list[bool] = []

    def after(_epoch: int) -> bool:
        states.append(resume.file.exists())
        return False

    run(model_of(), "ga", replace(QUICK, epochs=4), resume=resume, after_epoch=after)
    assert states == [False, False, True, True]


# --- what a step costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_gradients_are_scaled_down_where_they_are_long_and_left_alone_elsewhere(
    most: float,
) -> None:
    config = TuneConfig(
        epochs=1, learning_rate=0.1, batch_size=5, stop_loss=0, warmup_ratio=0.0, max_grad_norm=most
    )
    tuned, _ = tune(model_of(), FORGET, config, pad=0)
    own = model_of()
    step = torch.optim.AdamW(own.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    for batch in bucketed(FORGET, 5, 0, torch.Generator().manual_seed(0)):
        (example_losses(own, batch).sum() / len(FORGET)).backward()
    torch.nn.utils.clip_grad_norm_(own.parameters(), most)
    step.step()
    for ours, theirs in zip(tuned.parameters(), own.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_freed_memory_is_kept_while_training_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []
    library = SimpleNamespace(
        mallopt=lambda *given: calls.append(given), malloc_trim=lambda pad: calls.append((pad,))
    )
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    config = TuneConfig(epochs=2, learning_rate=1e-3, stop_loss=0)

    def after(epoch: int) -> None:
        calls.append((epoch, 0, 0))
        if epoch == 2:
            raise DivergenceError("no more")

    with pytest.raises(DivergenceError):
        tune(model_of(), FORGET, config, pad=0, after_epoch=after)
    first, second = calls.index((1, 0, 0)), calls.index((2, 0, 0))
    assert (-4, 0) in calls[:first]  # no block is a mapping of its own
    assert second == first + 1
    assert (-4, 65536) in calls[second:]
    assert calls[-1] == (0,)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    calls.clear()
    tune(model_of(), FORGET, config, pad=0)
    assert not calls
