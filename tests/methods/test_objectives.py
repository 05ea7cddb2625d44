"""Every unlearning objective against its formula, worked token by token in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from perta.errors import ConfigError
from perta.methods.objectives import (
    Scene,
    Training,
    answer_log_probs,
    control_vector,
    distance,
    divergence,
    jensen_shannon,
    labelled_positions,
    steered_layer,
)
from perta.methods.registry import known, parse
from perta.models.loss import AnswerLogits, mean_by_example

# Two forget examples, of three and two labelled tokens, over a vocabulary of four.
LOGITS = [
    [2.0, -1.0, 0.5, 0.0],
    [0.3, 0.2, -0.7, 1.9],
    [-0.4, 1.1, 0.0, 0.6],
    [1.5, 1.4, -2.0, 0.1],
    [0.0, -0.3, 0.8, -1.2],
]
REFERENCE = [
    [1.0, 0.0, 0.2, -0.5],
    [0.1, 0.9, -0.1, 0.4],
    [0.6, -0.2, 0.3, 0.0],
    [-0.7, 0.5, 0.5, 1.0],
    [0.2, 0.2, 1.7, -0.6],
]
TARGETS = [0, 3, 1, 1, 2]
EXAMPLE = [0, 0, 0, 1, 1]
REFUSAL_LOGITS = [[0.2, 0.1, 0.9, -1.0], [1.0, 0.4, 0.0, 0.7], [-0.5, 0.5, 0.2, 0.3]]
REFUSAL_TARGETS = [2, 0, 3]
REFUSAL_EXAMPLE = [0, 1, 1]
REFUSAL_REFERENCE = [[0.0, 0.3, 0.4, 0.1], [0.2, 0.2, 0.2, 0.9], [0.7, -0.1, 0.0, 0.4]]


def softmax(logits: Sequence[float]) -> list[float]:
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def token_log_probs(
    logits: Sequence[Sequence[float]], targets: Sequence[int], example: Sequence[int], which: int
) -> list[float]:
    return [
        math.log(softmax(row)[target])
        for row, target, of in zip(logits, targets, example, strict=True)
        if of == which
    ]


def forget_tokens(which: int, logits: Sequence[Sequence[float]] = LOGITS) -> list[float]:
    return token_log_probs(logits, TARGETS, EXAMPLE, which)


def refusal_tokens(which: int, logits: Sequence[Sequence[float]] = REFUSAL_LOGITS) -> list[float]:
    return token_log_probs(logits, REFUSAL_TARGETS, REFUSAL_EXAMPLE, which)


def answers(
    logits: Sequence[Sequence[float]], targets: Sequence[int], example: Sequence[int]
) -> AnswerLogits:
    values = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    return AnswerLogits(values, torch.tensor(targets), torch.tensor(example))


def scene() -> Scene:
    return Scene(
        answers(LOGITS, TARGETS, EXAMPLE),
        2,
        reference_log_probs=torch.tensor(
            [sum(forget_tokens(i, REFERENCE)) for i in range(2)], dtype=torch.float64
        ),
        reference_logits=torch.tensor(REFERENCE, dtype=torch.float64),
        refusals=answers(REFUSAL_LOGITS, REFUSAL_TARGETS, REFUSAL_EXAMPLE),
        reference_refusal_log_probs=torch.tensor(
            [sum(refusal_tokens(i, REFUSAL_REFERENCE)) for i in range(2)], dtype=torch.float64
        ),
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def by_hand_ga(i: int) -> float:
    return mean(forget_tokens(i))


def by_hand_npo(i: int) -> float:
    ratio = math.exp(sum(forget_tokens(i)) - sum(forget_tokens(i, REFERENCE)))
    return 2 / 0.3 * math.log(1 + ratio**0.3)


def by_hand_simnpo(i: int) -> float:
    log_prob, length = sum(forget_tokens(i)), len(forget_tokens(i))
    return -2 / 0.3 * math.log(sigmoid(-0.3 / length * log_prob - 0.2))


def by_hand_dpo(i: int) -> float:
    preferred = sum(refusal_tokens(i)) - sum(refusal_tokens(i, REFUSAL_REFERENCE))
    rejected = sum(forget_tokens(i)) - sum(forget_tokens(i, REFERENCE))
    return -2 / 0.3 * math.log(sigmoid(0.3 * (preferred - rejected)))


def by_hand_wga(i: int) -> float:
    return mean([math.exp(lp) ** 0.3 * lp for lp in forget_tokens(i)])


def by_hand_satimp(i: int) -> float:
    return mean([math.exp(lp) ** 0.3 * (1 - math.exp(lp)) ** 0.7 * lp for lp in forget_tokens(i)])


def by_hand_ce_u(i: int) -> float:
    terms = []
    for row, target, of in zip(LOGITS, TARGETS, EXAMPLE, strict=True):
        others = softmax([-math.inf if k == target else v for k, v in enumerate(row)])
        if of == i:
            terms.append(-sum(q * math.log(p) for q, p in zip(others, softmax(row), strict=True)))
    return mean(terms[1:])


def js_by_hand(p: Sequence[float], q: Sequence[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    pairs = [*zip(p, middle, strict=True), *zip(q, middle, strict=True)]
    return sum(a * math.log(a / m) for a, m in pairs if a) / 2


def by_hand_jensun(i: int) -> float:
    return mean(
        [
            js_by_hand(softmax(row), [float(k == target) for k in range(4)])
            for row, target, of in zip(LOGITS, TARGETS, EXAMPLE, strict=True)
            if of == i
        ]
    )


def by_hand_pdu(i: int) -> float:
    rows = [row for row, of in zip(LOGITS, EXAMPLE, strict=True) if of == i]
    return mean([(max(row) - mean(row)) ** 2 for row in rows])


def by_hand_undial(i: int) -> float:
    terms = []
    for new, old, target, of in zip(LOGITS, REFERENCE, TARGETS, EXAMPLE, strict=True):
        lowered = [v - (0.3 if k == target else 0.0) for k, v in enumerate(old)]
        soft = softmax(lowered)
        if of == i:
            terms.append(-sum(q * math.log(p) for q, p in zip(soft, softmax(new), strict=True)))
    return mean(terms)


BY_HAND: dict[str, Callable[[int], float]] = {
    "ga": by_hand_ga,
    "graddiff": by_hand_ga,
    "kl": by_hand_ga,
    "npo:beta=0.3": by_hand_npo,
    "npo-retain:beta=0.3": by_hand_npo,
    "simnpo:beta=0.3,margin=0.2": by_hand_simnpo,
    "dpo:beta=0.3": by_hand_dpo,
    "altpo:beta=0.3": by_hand_dpo,
    "idkpo": lambda i: -mean(forget_tokens(i)),
    "wga:beta=0.3": by_hand_wga,
    "satimp:beta=0.3,beta2=0.7": by_hand_satimp,
    "undial:beta=0.3": by_hand_undial,
    "npo-sam:beta=0.3": by_hand_npo,
    "ce-u": by_hand_ce_u,
    "jensun": by_hand_jensun,
    "pdu": by_hand_pdu,
}


@pytest.mark.parametrize("method", BY_HAND)
def test_the_forget_term_is_the_formula(method: str) -> None:
    formula, term = BY_HAND[method], parse(method, Training).forget
    assert term(scene()).tolist() == pytest.approx([formula(0), formula(1)], rel=1e-12)


def test_every_method_with_a_forget_term_is_worked_by_hand() -> None:
    worked = {parse(method, Training).name for method in BY_HAND}
    assert worked == {n for n, cls in known(Training).items() if cls.forget != Training.forget}


def test_the_divergence_is_of_the_new_prediction_from_the_old() -> None:
    found = divergence(
        torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(REFERENCE, dtype=torch.float64)
    )
    for value, new, old in zip(found.tolist(), LOGITS, REFERENCE, strict=True):
        p, q = softmax(old), softmax(new)
        assert value == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def test_the_middle_of_two_predictions_is_as_far_from_both() -> None:
    new, old = (torch.tensor(rows, dtype=torch.float64) for rows in (LOGITS, REFERENCE))
    pairs = zip(LOGITS, REFERENCE, strict=True)
    wanted = [js_by_hand(softmax(a), softmax(b)) for a, b in pairs]
    assert jensen_shannon(new, old).tolist() == pytest.approx(wanted, rel=1e-12)
    assert jensen_shannon(old, new).tolist() == pytest.approx(wanted, rel=1e-12)
    assert jensen_shannon(new, new).tolist() == pytest.approx([0.0] * 5, abs=1e-15)


@pytest.mark.parametrize("step", [0.0, 1e-4, 1e-2, 1.0, 100.0])
def test_the_jensen_shannon_divergence_is_exact_where_it_is_small(step: float) -> None:
    """In float32, against the definition in float64; its gradient at no distance is 0 itself."""
    torch.manual_seed(0)
    old = 2 * torch.randn(20, 101)
    new = (old + step * torch.randn(20, 101)).requires_grad_()
    found = jensen_shannon(new, old)
    (gradient,) = torch.autograd.grad(found.sum(), new)
    wide = new.detach().double().requires_grad_()
    p, q = wide.softmax(-1), old.double().softmax(-1)
    parts = [torch.xlogy(side, side) - torch.xlogy(side, (p + q) / 2) for side in (p, q)]
    wanted = (parts[0] + parts[1]).sum(-1) / 2
    (exact,) = torch.autograd.grad(wanted.sum(), wide)
    if step == 0.0:
        assert not found.any()
        assert not gradient.any()
    else:
        torch.testing.assert_close(found.double(), wanted, rtol=5e-3, atol=0)
        assert float((gradient.double() - exact).norm() / exact.norm()) < 2e-3


def test_the_distance_is_the_mean_square_over_components() -> None:
    found = distance(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([3.0, 2.0]))
    assert found.tolist() == [2.0, 9.0]


def gradient(
    method: str, logits: Sequence[Sequence[float]] = LOGITS, reference: Tensor | None = None
) -> Tensor:
    """Of a method's forget term, by the logits; `reference` are log-probabilities of θ_full."""
    given = scene()
    given = replace(
        given,
        answers=answers(logits, TARGETS, EXAMPLE),
        reference_log_probs=given.reference_log_probs if reference is None else reference,
    )
    term = parse(method, Training).forget(given).sum()
    (found,) = torch.autograd.grad(term, given.answers.logits)
    return found


def log_probs(logits: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([sum(forget_tokens(i, logits)) for i in range(2)], dtype=torch.float64)


def ascent() -> Tensor:
    """Gradient of the log-probabilities of the answers."""
    given = answers(LOGITS, TARGETS, EXAMPLE)
    (found,) = torch.autograd.grad(answer_log_probs(given, 2).sum(), given.logits)
    return found


def test_npo_at_the_full_model_is_ascent_whatever_beta() -> None:
    for beta in (0.05, 0.1, 1.0, 4.0):
        given = replace(scene(), reference_log_probs=log_probs(LOGITS))
        terms = parse(f"npo:beta={beta}", Training).forget(given)
        assert terms.tolist() == pytest.approx([2 / beta * math.log(2)] * 2)
        found = gradient(f"npo:beta={beta}", reference=log_probs(LOGITS))
        torch.testing.assert_close(found, ascent())


def test_npo_tends_to_ascent_for_small_beta_and_fades_for_large() -> None:
    torch.testing.assert_close(gradient("npo:beta=1e-6"), ascent(), rtol=1e-5, atol=1e-8)
    forgotten = log_probs(REFERENCE) + 50  # far less likely than under the full model
    assert gradient("npo:beta=1", reference=forgotten).abs().max() < 1e-9


def test_weights_of_tokens_are_constant_in_the_gradient() -> None:
    """The gradient of a token's loss is its weight times that of its log-probability."""
    found = gradient("satimp:beta=2,beta2=1")
    for i, (row, target, of) in enumerate(zip(LOGITS, TARGETS, EXAMPLE, strict=True)):
        p = softmax(row)
        weight = p[target] ** 2 * (1 - p[target]) / EXAMPLE.count(of)
        wanted = [weight * ((k == target) - q) for k, q in enumerate(p)]
        assert found[i].tolist() == pytest.approx(wanted, rel=1e-12)


def test_distillation_with_nothing_lowered_asks_for_nothing() -> None:
    assert gradient("undial:beta=1e-13", REFERENCE).abs().max() < 1e-12
    pulled = gradient("undial:beta=3", REFERENCE)
    assert all(pulled[i, target] > 0 for i, target in enumerate(TARGETS))


def test_a_target_without_the_forget_token_is_constant() -> None:
    """The gradient is the prediction less its target; the first token of an answer has none."""
    found = gradient("ce-u")
    assert found[0].tolist() == found[3].tolist() == [0.0] * 4
    for i in (1, 2, 4):
        others = softmax([-math.inf if k == TARGETS[i] else v for k, v in enumerate(LOGITS[i])])
        share = 1 / (EXAMPLE.count(EXAMPLE[i]) - 1)
        wanted = [share * (p - q) for p, q in zip(softmax(LOGITS[i]), others, strict=True)]
        assert found[i].tolist() == pytest.approx(wanted, rel=1e-12)
    # An answer as short as what is skipped has its last token left.
    short = parse("ce-u:skipped=2", Training).forget(scene())
    assert short[1].item() == pytest.approx(by_hand_ce_u(1), rel=1e-12)
    assert gradient("ce-u:skipped=0")[0].abs().max() > 0


def test_a_sure_prediction_of_the_label_is_no_divergence() -> None:
    sure = [[800.0 if k == target else 0.0 for k in range(4)] for target in TARGETS]
    wrong = [[0.0 if k == target else 800.0 for k in range(4)] for target in TARGETS]
    for logits, value in ((sure, 0.0), (wrong, math.log(2))):
        given = replace(scene(), answers=answers(logits, TARGETS, EXAMPLE))
        found = parse("jensun", Training).forget(given).tolist()
        assert found == pytest.approx([value] * 2, abs=1e-12)
        assert gradient("jensun", logits).isfinite().all()


def test_a_retain_weight_follows_the_retain_loss() -> None:
    method = parse("pdu:retain_weight=2,limit=0.5,dual_step=4,fixed_epochs=1", Training)
    assert method.next_retain_weight(2.0, 3.0, 1) == 2.0
    assert method.next_retain_weight(2.0, 0.75, 2) == 3.0
    assert method.next_retain_weight(2.0, 0.25, 2) == 1.0
    assert method.next_retain_weight(1.0, 0.0, 3) == 0.0
    assert parse("graddiff", Training).next_retain_weight(2.0, 9.0, 9) == 2.0


def test_the_control_vector_is_a_seeded_direction_of_the_given_length() -> None:
    vector = control_vector(64, 6.5, 3)
    assert vector.norm().item() == pytest.approx(6.5, rel=1e-6)
    assert bool((vector >= 0).all())
    assert torch.equal(vector, control_vector(64, 6.5, 3))
    assert not torch.equal(vector, control_vector(64, 6.5, 4))


def test_small_parts() -> None:
    assert [steered_layer(n) for n in (2, 16, 30)] == [1, 7, 7]
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    example, position = labelled_positions(labels)
    assert (example.tolist(), position.tolist()) == ([0, 0, 1], [1, 2, 2])
    means = mean_by_example(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [2.0, 5.0]


def test_an_unknown_method_gets_the_nearest_name() -> None:
    assert parse("NPO_retain", Training).name == "npo-retain"
    with pytest.raises(ConfigError, match="Did you mean `simnpo`"):
        parse("simpno", Training)
