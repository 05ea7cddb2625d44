"""What training from the full model minimises: one function and one table row a method.

    loss = forget_weight * mean over forget examples of a forget term
         + retain_weight * mean over retain examples of a retain term

All terms are per example and in nats unless said otherwise. Sums over a sequence's tokens and
means over them are different methods: NPO and DPO compare summed log-probabilities, SimNPO and
all others average over the labelled (answer) tokens. Where the common code (open-unlearning)
averages over all tokens of a batch, we average within each example first, as everywhere in
this package, so that the result does not depend on which examples share a batch.

Defaults are those published for TOFU, in the papers or in the configuration files of
open-unlearning (github.com/locuslab/open-unlearning, `configs/trainer`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor

from perta.data.batch import IGNORE
from perta.errors import ConfigError
from perta.models.loss import AnswerLogits, mean_by_example, token_losses

_TOFU = "Maini et al., arXiv 2401.06121"
_NPO = "Zhang et al., arXiv 2404.05868"


@dataclass(frozen=True)
class Scene:
    """What a forget term may look at: predictions of B forget examples, N labelled tokens.

    Attributes:
        answers: predictions of the model in training.
        examples: B.
        beta: β of the method, see its formula.
        beta2: second exponent of `satimp`.
        margin: γ of `simnpo`, in nats per token times β.
        reference_log_probs: (B,) log-probability of each whole answer under θ_full.
        reference_logits: (N, V) logits of θ_full.
        refusals: predictions of the model in training for the same prompts with a refusal as
            the answer.
        reference_refusal_log_probs: (B,) log-probability of each refusal under θ_full.
    """

    answers: AnswerLogits
    examples: int
    beta: float = 0.0
    beta2: float = 0.0
    margin: float = 0.0
    reference_log_probs: Tensor | None = None
    reference_logits: Tensor | None = None
    refusals: AnswerLogits | None = None
    reference_refusal_log_probs: Tensor | None = None


@dataclass(frozen=True)
class TrainingMethod:
    """One row of the table of training methods.

    Attributes:
        name: what users type.
        summary: one line on what it does.
        done: what was done, a sentence or two for people who have not heard of any method.
        formula: what is minimised, with ℓ_f and ℓ_r the mean answer loss of a forget and a
            retain example.
        source: where it comes from.
        forget: scene -> (B,) forget term; None where there is none, or where it is made of
            activations.
        retain: kind of the retain term: `nll` the answer loss, `kl` the divergence from θ_full,
            `activations` the distance from θ_full's activations.
        reference: what of θ_full is needed on forget examples: `log_probs` of whole answers,
            measured once before training, or `logits`, from a frozen model.
        refusals: how refusals to the forget prompts take part: `beside` the forget answers, or
            `instead` of them.
        start: the checkpoint training starts from.
        solver: `adamw` trains, `newton` solves for one step (see `influence`).
        epochs, learning_rate, beta, beta2, margin, forget_weight, retain_weight, steering_coef:
            defaults, as published; None for what the method does not have.
    """

    name: str
    summary: str
    done: str
    formula: str
    source: str
    forget: Callable[[Scene], Tensor] | None = None
    retain: Literal["nll", "kl", "activations"] | None = None
    reference: Literal["log_probs", "logits"] | None = None
    refusals: Literal["beside", "instead"] | None = None
    start: Literal["full", "base"] = "full"
    solver: Literal["adamw", "newton"] = "adamw"
    epochs: int = 10
    learning_rate: float = 1e-5
    beta: float | None = None
    beta2: float | None = None
    margin: float | None = None
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    steering_coef: float | None = None

    @property
    def equation(self) -> str:
        """What is minimised, or what is added to the weights."""
        return f"{'step' if self.solver == 'newton' else 'loss'} = {self.formula}"

    @property
    def steers(self) -> bool:
        """Whether the method works on activations instead of predictions."""
        return self.retain == "activations"

    @property
    def protects(self) -> bool:
        """Whether the retain term is in nats, so that its rise can be judged."""
        return self.retain in ("nll", "kl")

    @property
    def sees_forget_set(self) -> bool:
        """Whether forget examples take part; otherwise an epoch is a pass over the retain set."""
        return self.forget is not None or self.steers or self.solver == "newton"

    @property
    def keeps_frozen_model(self) -> bool:
        """Whether θ_full itself is needed beside the model in training."""
        return self.reference == "logits" or self.retain in ("kl", "activations")


# --- terms: tensors in, tensors out -----------------------------------------------------------


def _sum_by_example(values: Tensor, example: Tensor, examples: int) -> Tensor:
    """Sum of token values within each example: (N,), (N,) -> (B,)."""
    sums = torch.zeros(examples, dtype=values.dtype, device=values.device)
    return sums.index_add(0, example, values)


def answer_log_probs(answers: AnswerLogits, examples: int) -> Tensor:
    """Log-probability of each example's whole answer, log π(y|x) = Σ_t log π(y_t|…), (B,)."""
    return -_sum_by_example(token_losses(answers), answers.example, examples)


def answer_losses(answers: AnswerLogits, examples: int) -> Tensor:
    """Mean answer loss ℓ of each example, (B,) in nats per token."""
    return mean_by_example(token_losses(answers), answers.example, examples)


def negative_preference(log_ratio: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation.

    (2/β) log(1 + r^β) with r = π_θ(y|x) / π_full(y|x). At θ_full it is (2/β) log 2 and its
    gradient is that of gradient ascent on the summed loss; so it is in the limit β -> 0.

    Args:
        log_ratio: (B,) log r, summed over the answer's tokens.
        beta: β > 0.

    Returns:
        (B,).

    Source: Zhang et al., arXiv 2404.05868, equation 3.
    """
    return 2 / beta * F.softplus(beta * log_ratio)


def preference(preferred: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation: -log σ(β (preferred - rejected)); log 2 at θ_full.

    Args:
        preferred: (B,) log π_θ/π_full of the preferred answer, summed over its tokens.
        rejected: (B,) the same of the rejected answer.
        beta: β > 0.

    Returns:
        (B,).

    Source: Rafailov et al., arXiv 2305.18290, equation 7.
    """
    return -F.logsigmoid(beta * (preferred - rejected))


def _simple_negative_preference(losses: Tensor, beta: float, margin: float) -> Tensor:
    """NPO without a reference model, per token: -(2/β) log σ(-(β/|y|) log π_θ(y|x) - γ).

    Args:
        losses: (B,) mean answer loss, -(1/|y|) log π_θ(y|x).
        beta: β > 0.
        margin: γ, the reward margin.

    Returns:
        (B,).

    Source: Fan et al., arXiv 2410.07163, the SimNPO loss.
    """
    return -2 / beta * F.logsigmoid(beta * losses - margin)


def weighted_ascent(losses: Tensor, beta: float, beta2: float = 0.0) -> Tensor:
    """Gradient ascent in which each token counts by its own probability p.

    -p^β (1 - p)^β₂ · loss, the weight held constant in the gradient. With β₂ = 0 it is WGA:
    p^β fades tokens that are forgotten already. β₂ > 0 is SatImp, which fades tokens that
    are predicted almost surely as well.

    Args:
        losses: (N,) -log p of each token.
        beta: β >= 0.
        beta2: β₂ >= 0.

    Returns:
        (N,).

    Source: Wang et al., arXiv 2502.19301 (WGA); Yang et al., arXiv 2505.11953 (SatImp).
    """
    p = (-losses.detach()).exp()
    return -(p**beta * (1 - p) ** beta2) * losses


def lowered_logit_distillation(
    logits: Tensor, reference_logits: Tensor, targets: Tensor, beta: float
) -> Tensor:
    """Cross-entropy to θ_full's own prediction with the target's logit lowered by β.

    Args:
        logits: (N, V) of the model in training.
        reference_logits: (N, V) of θ_full.
        targets: (N,) tokens to unlearn.
        beta: β >= 0 in logits (nats).

    Returns:
        (N,).

    Source: Dong et al., arXiv 2402.10052, the self-distillation loss.
    """
    target = F.one_hot(targets, logits.shape[-1]).to(reference_logits.dtype)
    lowered = reference_logits - beta * target
    return F.cross_entropy(logits, lowered.softmax(-1), reduction="none")


def divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(π_full || π_θ) of each token's prediction: (N, V), (N, V) -> (N,) in nats.

    Source: Maini et al., arXiv 2401.06121, KL minimization.
    """
    new, old = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


def distance(activations: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference over the D components: (N, D), (N, D) or (D,) -> (N,).

    Source: Li et al., arXiv 2403.03218, RMU; divided by D as in the authors' code.
    """
    return (activations - wanted).square().mean(-1)


def control_vector(size: int, steering_coef: float, seed: int) -> Tensor:
    """A random direction, entries drawn uniformly from [0, 1), of length c.

    Args:
        size: D.
        steering_coef: c.
        seed: seed of the direction.

    Returns:
        (D,) float32.

    Source: Li et al., arXiv 2403.03218, RMU.
    """
    direction = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return direction.mul_(steering_coef / direction.norm())


def steered_layer(layers: int) -> int:
    """Layer (from 0) whose output `rmu` steers by default: 7 as published, or the middle one."""
    return min(7, layers // 2)


def labelled_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Example and position of every labelled token: (B, T) -> (N,), (N,)."""
    example, position = (labels != IGNORE).nonzero(as_tuple=True)
    return example, position


def _present(value: Tensor | None) -> Tensor:
    assert value is not None, "the table row does not declare what its term uses"
    return value


def _npo(scene: Scene) -> Tensor:
    new = answer_log_probs(scene.answers, scene.examples)
    return negative_preference(new - _present(scene.reference_log_probs), scene.beta)


def _dpo(scene: Scene) -> Tensor:
    assert scene.refusals is not None
    rejected = answer_log_probs(scene.answers, scene.examples)
    preferred = answer_log_probs(scene.refusals, scene.examples)
    terms = preference(
        preferred - _present(scene.reference_refusal_log_probs),
        rejected - _present(scene.reference_log_probs),
        scene.beta,
    )
    # As for NPO: the gradient keeps its size when β changes.
    return 2 / scene.beta * terms


def _descent(scene: Scene) -> Tensor:
    return answer_losses(scene.answers, scene.examples)


def _simnpo(scene: Scene) -> Tensor:
    losses = answer_losses(scene.answers, scene.examples)
    return _simple_negative_preference(losses, scene.beta, scene.margin)


def _weighted(scene: Scene) -> Tensor:
    terms = weighted_ascent(token_losses(scene.answers), scene.beta, scene.beta2)
    return mean_by_example(terms, scene.answers.example, scene.examples)


def _undial(scene: Scene) -> Tensor:
    terms = lowered_logit_distillation(
        scene.answers.logits, _present(scene.reference_logits), scene.answers.targets, scene.beta
    )
    return mean_by_example(terms, scene.answers.example, scene.examples)


def _ascent(scene: Scene) -> Tensor:
    return -answer_losses(scene.answers, scene.examples)


# --- the table ------------------------------------------------------------------------------------


def get_training_method(name: str) -> TrainingMethod:
    """Find a training method by name; `_` may stand for `-`.

    Args:
        name: the method.

    Returns:
        Its row.

    Raises:
        ConfigError: there is no such method.
    """
    wanted = name.lower().replace("_", "-")
    method = TRAINING_METHODS.get(wanted)
    if method is None:
        near = difflib.get_close_matches(wanted, TRAINING_METHODS, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigError(
            f"Unknown training method `{name}`; {hint}There are: {', '.join(TRAINING_METHODS)}."
        )
    return method


def _table(*methods: TrainingMethod) -> dict[str, TrainingMethod]:
    return {method.name: method for method in methods}


TRAINING_METHODS = _table(
    TrainingMethod(
        name="ga",
        summary="gradient ascent on the forget set; ruins the model if run long",
        done="The model was trained further to make the answers of the removed examples less "
        "probable (gradient ascent). The examples to keep took no part.",
        formula="-l_f",
        source=f"Jang et al., arXiv 2210.01504; {_TOFU}",
        forget=_ascent,
    ),
    TrainingMethod(
        name="graddiff",
        summary="gradient difference: ascent on the forget set, descent on the retain set",
        done="The model was trained further to make the answers of the removed examples less "
        "probable and, at the same time, those of the examples to keep more probable.",
        formula="-l_f + l_r",
        source=f"Liu et al., arXiv 2203.12817; {_TOFU}",
        forget=_ascent,
        retain="nll",
    ),
    TrainingMethod(
        name="kl",
        summary="gradient ascent, predictions on the retain set held to the full model's",
        done="The model was trained further to make the answers of the removed examples less "
        "probable, while its predictions on the examples to keep were held to those it made "
        "before.",
        formula="-l_f + KL(full || model) on retain",
        source=_TOFU,
        forget=_ascent,
        retain="kl",
    ),
    TrainingMethod(
        name="npo",
        summary="negative preference optimisation: ascent that fades with what is forgotten",
        done="The model was trained further to make the answers of the removed examples less "
        "probable than before, with a force that fades as they are forgotten (negative "
        "preference optimisation). The examples to keep took no part.",
        formula="2/b log(1 + (p/p_full)^b), p of the whole answer",
        source=_NPO,
        forget=_npo,
        reference="log_probs",
        beta=0.1,
    ),
    TrainingMethod(
        name="npo-retain",
        summary="negative preference optimisation with descent on the retain set",
        done="The model was trained further to make the answers of the removed examples less "
        "probable than before, with a force that fades as they are forgotten, and those of "
        "the examples to keep more probable at the same time.",
        formula="npo + l_r",
        source=f"{_NPO} (NPO+RT)",
        forget=_npo,
        retain="nll",
        reference="log_probs",
        beta=0.1,
    ),
    TrainingMethod(
        name="simnpo",
        summary="negative preference optimisation per token, without a reference model",
        done="The model was trained further to make the answers of the removed examples less "
        "probable per token, with a force that fades as they are forgotten, and those of "
        "the examples to keep more probable at the same time.",
        formula="-2/b log sigmoid(b l_f - margin) * 0.125 + l_r",
        source="Fan et al., arXiv 2410.07163",
        forget=_simnpo,
        retain="nll",
        beta=4.5,
        margin=0.0,
        forget_weight=0.125,
    ),
    TrainingMethod(
        name="dpo",
        summary="direct preference optimisation: refusals over the forget answers",
        done="The model was trained further to prefer a refusal to the answers of the removed "
        "examples, and to make those of the examples to keep more probable at the same "
        "time.",
        formula="-2/b log sigmoid(b (log p/p_full of refusal - of answer)) + l_r",
        source=f"Rafailov et al., arXiv 2305.18290; {_TOFU}",
        forget=_dpo,
        retain="nll",
        reference="log_probs",
        refusals="beside",
        beta=0.1,
    ),
    TrainingMethod(
        name="idkpo",
        summary="preference optimisation as in TOFU: learn refusals for the forget prompts",
        done="The model was trained further to answer the questions of the removed examples with "
        "a refusal, and those of the examples to keep as they are.",
        formula="l of refusal + l_r",
        source=_TOFU,
        forget=_descent,
        retain="nll",
        refusals="instead",
    ),
    TrainingMethod(
        name="rmu",
        summary="steer a layer's activations on the forget set to a random vector",
        done="The model was trained further until one layer's activations on the removed "
        "examples pointed in a random direction, while those on the examples to keep were "
        "held to what they were before.",
        formula="|h_f - c u|^2/D + 1200 |h_r - h_r of full|^2/D",
        source="Li et al., arXiv 2403.03218",
        retain="activations",
        learning_rate=5e-5,
        retain_weight=1200.0,
        steering_coef=6.5,
    ),
    TrainingMethod(
        name="undial",
        summary="self-distillation with the forget token's logit lowered",
        done="The model was trained further to repeat its own predictions on the removed "
        "examples with the right token made less likely. The examples to keep took no part.",
        formula="CE(softmax(z_full - b onehot(y)), model)",
        source="Dong et al., arXiv 2402.10052",
        forget=_undial,
        reference="logits",
        learning_rate=1e-4,
        beta=10.0,
    ),
    TrainingMethod(
        name="wga",
        summary="gradient ascent in which tokens already forgotten count less",
        done="The model was trained further to make the answers of the removed examples less "
        "probable, tokens that are forgotten already counting less, and those of the "
        "examples to keep more probable at the same time.",
        formula="mean of p^b log p + l_r, p^b constant",
        source="Wang et al., arXiv 2502.19301",
        forget=_weighted,
        retain="nll",
        epochs=5,
        beta=1.0,
    ),
    TrainingMethod(
        name="satimp",
        summary="gradient ascent weighted by saturation and importance of each token",
        done="The model was trained further to make the answers of the removed examples less "
        "probable, tokens that are forgotten already or known for certain counting less, "
        "and those of the examples to keep more probable at the same time.",
        formula="0.1 * mean of p^b (1-p)^b2 log p + l_r, weights constant",
        source="Yang et al., arXiv 2505.11953",
        forget=_weighted,
        retain="nll",
        epochs=5,
        beta=5.0,
        beta2=1.0,
        forget_weight=0.1,
    ),
    TrainingMethod(
        name="retain-finetune",
        summary="go on training the full model on the retain set alone",
        done="The model was trained further on the examples to keep alone. The removed examples "
        "took no part, so they are forgotten only as far as other training overwrites them.",
        formula="l_r, from the full model",
        source=f"baseline, {_TOFU}",
        retain="nll",
        epochs=5,
    ),
    TrainingMethod(
        name="retrain",
        summary="train the base model on the retain set alone: the reference of all methods",
        done="The base model was trained anew on the examples to keep alone. This is what "
        "unlearning is measured against, at the price of the whole training.",
        formula="l_r, from the base model",
        source=f"reference, {_TOFU}",
        retain="nll",
        start="base",
        epochs=5,
    ),
    TrainingMethod(
        name="influence",
        summary="one damped Newton step that takes the forget set's influence off an adapter",
        done="The weights of the adapter were moved by one step that takes off the influence of "
        "the removed examples, as far as the curvature of the loss foresees it. The rest of "
        "the model stayed as it was.",
        formula="+1/n (H + lambda I)^-1 sum of gradients of l_f, on LoRA weights",
        source="Ding et al., arXiv 2412.00383, LLMEraser",
        solver="newton",
    ),
)
