"""What training from the full model minimises: one function and one class a method.

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

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor

from perta.data.batch import IGNORE
from perta.methods.method import Method, option
from perta.models.loss import AnswerLogits, mean_by_example, token_losses

Kept = Literal["nll", "kl", "js", "activations"]

_TOFU = "Maini et al., arXiv 2401.06121"
_NPO = "Zhang et al., arXiv 2404.05868"
LESS = "The model was trained further to make the answers of the removed examples less probable"
_FADING = LESS + " than before, with a force that fades as they are forgotten"
MORE = "those of the examples to keep more probable at the same time."
NO_PART = " The examples to keep took no part."


@dataclass(frozen=True)
class Scene:
    """What a forget term may look at: predictions of B forget examples, N labelled tokens."""

    answers: AnswerLogits  # predictions of the model in training
    examples: int  # B
    # (B,) log-probability of each whole answer under θ_full.
    reference_log_probs: Tensor | None = None
    reference_logits: Tensor | None = None  # (N, V) logits of θ_full
    # Predictions of the model in training for the same prompts with a refusal as the answer.
    refusals: AnswerLogits | None = None
    # (B,) log-probability of each refusal under θ_full.
    reference_refusal_log_probs: Tensor | None = None


class Training(Method):
    """A method that trains: a `forget` term, a retain term, or both."""

    # Kind of the retain term: `nll` the answer loss, `kl` the divergence from θ_full, `activations`
    # the distance from θ_full's activations, `js` the Jensen-Shannon divergence from θ_full.
    retain: ClassVar[Kept | None] = None
    # What of θ_full is needed on forget examples: `log_probs` of whole answers, measured once
    # before training, or `logits`, from a frozen model.
    reference: ClassVar[Literal["log_probs", "logits"] | None] = None
    # How refusals to the forget prompts take part: `beside` the forget answers, or `instead` of
    # them.
    refusals: ClassVar[Literal["beside", "instead"] | None] = None
    # Words whose tokens, over and over, are what the forget answers' tokens should become. They are
    # the labels of the answers then, in place of refusals.
    words: ClassVar[str | None] = None
    start: ClassVar[Literal["full", "base"]] = "full"  # the checkpoint training starts from
    # Passes over the forget set where the user gives none, over the retain set where there is no
    # forget term.
    epochs: ClassVar[int] = 10
    learning_rate: ClassVar[float] = 1e-5  # where the user gives none
    # Weights of the terms, and how many other answers θ_full draws to each forget prompt, in place
    # of refusals; methods have settings of these names.
    forget_weight = retain_weight = 1.0
    alternates = 0

    def forget(self, scene: Scene) -> Tensor:
        """The forget term, (B,)."""
        raise NotImplementedError

    @property
    def radius(self) -> float:
        """How far uphill from the weights the gradient of the forget term is taken."""
        return 0.0

    def next_retain_weight(self, weight: float, term: float, epoch: int) -> float:
        """Weight of the retain term after a step, in epoch 1 and on, that had this mean of it."""
        del term, epoch
        return weight

    @property
    def equation(self) -> str:
        """What is minimised."""
        return f"loss = {self.formula}"

    @property
    def protects(self) -> bool:
        """Whether the retain term is in nats, so that its rise can be judged."""
        return self.retain in ("nll", "kl")

    @property
    def sees_forget_set(self) -> bool:
        """Whether forget examples take part; otherwise an epoch is a pass over the retain set."""
        return type(self).forget is not Training.forget

    @property
    def keeps_frozen_model(self) -> bool:
        """Whether θ_full itself is needed beside the model in training."""
        return self.reference == "logits" or self.retain in ("kl", "js", "activations")


# --- terms: tensors in, tensors out -----------------------------------------------------------


def answer_log_probs(answers: AnswerLogits, examples: int) -> Tensor:
    """Log-probability of each example's whole answer, log π(y|x) = Σ_t log π(y_t|…), (B,)."""
    losses = token_losses(answers)
    sums = torch.zeros(examples, dtype=losses.dtype, device=losses.device)
    return -sums.index_add(0, answers.example, losses)


def answer_losses(answers: AnswerLogits, examples: int) -> Tensor:
    """Mean answer loss ℓ of each example, (B,) in nats per token."""
    return mean_by_example(token_losses(answers), answers.example, examples)


def divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(π_full || π_θ) of each token's prediction: (N, V), (N, V) -> (N,) in nats.

    Source: Maini et al., arXiv 2401.06121, KL minimization.
    """
    new, old = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


def jensen_shannon(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each token's predictions: (N, V), (N, V) -> (N,) in nats.

    Source: Singh et al., arXiv 2509.02820.
    """
    new, old = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    apart = (old - new).detach().clamp(-80, 80)
    # The logarithms of both over their mean. What depends on them adds nothing to the gradient, and
    # is left out: beside a small distance its rounding would be all that there is.
    ours, theirs = (-torch.log1p(torch.expm1(side) / 2) for side in (apart, -apart))
    return (new.exp() * ours + old.exp() * theirs).sum(-1) / 2


def distance(activations: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference over the D components: (N, D), (N, D) or (D,) -> (N,).

    Source: Li et al., arXiv 2403.03218, RMU; divided by D as in the authors' code.
    """
    return (activations - wanted).square().mean(-1)


def control_vector(size: int, steering_coef: float, seed: int) -> Tensor:
    """A random direction (D,), entries uniform in [0, 1), of length c; source as of `distance`."""
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
    assert value is not None, "the class does not declare what its term uses"
    return value


# --- the methods ----------------------------------------------------------------------------------


class Forgetting(Training):
    """Training whose forget term has a weight."""

    forget_weight: float = option(default=1.0, help="weight of the forget term", within="[0, inf)")


class Retaining(Training):
    """Training with a retain term and its weight."""

    retain: ClassVar[Kept] = "nll"
    retain_weight: float = option(default=1.0, help="weight of the retain term", within="[0, inf)")


class Ga(Forgetting):
    """Gradient ascent on the forget set; ruins the model if run long."""

    name = "ga"
    done = LESS + " (gradient ascent)." + NO_PART
    formula = "-l_f"
    source = f"Jang et al., arXiv 2210.01504; {_TOFU}"

    def forget(self, scene: Scene) -> Tensor:
        """-ℓ_f."""
        return -answer_losses(scene.answers, scene.examples)


class GradDiff(Retaining, Ga):
    """Gradient difference: ascent on the forget set, descent on the retain set."""

    name = "graddiff"
    done = LESS + " and, at the same time, those of the examples to keep more probable."
    formula = "-l_f + l_r"
    source = f"Liu et al., arXiv 2203.12817; {_TOFU}"


class Kl(Retaining, Ga):
    """Gradient ascent, predictions on the retain set held to the full model's."""

    name = "kl"
    done = LESS + (
        ", while its predictions on the examples to keep were held to those it made before."
    )
    formula = "-l_f + KL(full || model) on retain"
    source = _TOFU
    retain = "kl"


class Npo(Forgetting):
    """Negative preference optimisation: ascent that fades with what is forgotten."""

    name = "npo"
    done = _FADING + " (negative preference optimisation)." + NO_PART
    formula = "2/b log(1 + (p/p_full)^b), p of the whole answer"
    source = _NPO
    reference = "log_probs"
    beta: float = option(default=0.1, help="exponent b of the formula", within="(0, inf)")

    def forget(self, scene: Scene) -> Tensor:
        """(2/β) log(1 + r^β), r = π_θ(y|x) / π_full(y|x) of the whole answer: equation 3.

        At θ_full it is (2/β) log 2 and its gradient is that of gradient ascent on the summed loss;
        so it is in the limit β -> 0.
        """
        new = answer_log_probs(scene.answers, scene.examples)
        log_ratio = new - _present(scene.reference_log_probs)
        return 2 / self.beta * F.softplus(self.beta * log_ratio)


class NpoRetain(Retaining, Npo):
    """Negative preference optimisation with descent on the retain set."""

    name = "npo-retain"
    done = f"{_FADING}, and {MORE}"
    formula = "npo + l_r"
    source = f"{_NPO} (NPO+RT)"


class NpoSam(NpoRetain):
    """Negative preference optimisation whose gradient is taken where forgetting is least flat."""

    name = "npo-sam"
    done = (
        f"{_FADING}, also in the worst model near the one that is trained, so that a little "
        f"training does not bring them back; {MORE}"
    )
    formula = "max of npo within radius rho of the weights + l_r"
    source = "Fan et al., arXiv 2502.05374 (NPO+SAM)"
    rho: float = option(
        default=0.01,
        help="radius rho, the length of a step of all trained weights together",
        within="(0, inf)",
    )

    @property
    def radius(self) -> float:
        """ρ."""
        return self.rho


class SimNpo(Retaining, Forgetting):
    """Negative preference optimisation per token, without a reference model."""

    name = "simnpo"
    done = f"{LESS} per token, with a force that fades as they are forgotten, and {MORE}"
    formula = "-2/b log sigmoid(b l_f - margin) * 0.125 + l_r"
    source = "Fan et al., arXiv 2410.07163"
    forget_weight: float = option(
        default=0.125, help="weight of the forget term", within="[0, inf)"
    )
    beta: float = option(default=4.5, help="scale b of the formula", within="(0, inf)")
    margin: float = option(default=0.0, help="reward margin, in nats per token times b")

    def forget(self, scene: Scene) -> Tensor:
        """NPO without a reference model, per token: -(2/β) log σ(-(β/|y|) log π_θ(y|x) - γ)."""
        losses = answer_losses(scene.answers, scene.examples)
        return -2 / self.beta * F.logsigmoid(self.beta * losses - self.margin)


class Dpo(Retaining, Forgetting):
    """Direct preference optimisation: refusals over the forget answers."""

    name = "dpo"
    done = (
        "The model was trained further to prefer a refusal to the answers of the removed "
        f"examples, and to make {MORE}"
    )
    formula = "-2/b log sigmoid(b (log p/p_full of refusal - of answer)) + l_r"
    source = f"Rafailov et al., arXiv 2305.18290; {_TOFU}"
    reference = "log_probs"
    refusals = "beside"
    beta: float = option(default=0.1, help="scale b of the formula", within="(0, inf)")

    def forget(self, scene: Scene) -> Tensor:
        """-(2/β) log σ(β (preferred - rejected)): equation 7; (2/β) log 2 at θ_full.

        Both are log π_θ/π_full of an answer, summed over its tokens. As for NPO, the gradient keeps
        its size when β changes.
        """
        assert scene.refusals is not None
        rejected = answer_log_probs(scene.answers, scene.examples)
        preferred = answer_log_probs(scene.refusals, scene.examples)
        preferred = preferred - _present(scene.reference_refusal_log_probs)
        rejected = rejected - _present(scene.reference_log_probs)
        return 2 / self.beta * -F.logsigmoid(self.beta * (preferred - rejected))


class AltPo(Dpo):
    """Direct preference optimisation: the model's own other answers over the forget answers."""

    name = "altpo"
    done = (
        "The model made up other answers to the questions of the removed examples. It was trained "
        f"further to prefer those to the right ones, and to make {MORE}"
    )
    formula = "-2/b log sigmoid(b (log p/p_full of alternate - of answer)) + l_r"
    source = "Mekala et al., arXiv 2409.13474"
    epochs = 2
    learning_rate = 5e-5
    alternates: int = option(
        default=5, help="alternates to each forget answer, a pass each", within="[1, inf)"
    )


class Idkpo(Retaining, Forgetting):
    """Preference optimisation as in TOFU: learn refusals for the forget prompts."""

    name = "idkpo"
    done = (
        "The model was trained further to answer the questions of the removed examples with a "
        "refusal, and those of the examples to keep as they are."
    )
    formula = "l of refusal + l_r"
    source = _TOFU
    refusals = "instead"

    def forget(self, scene: Scene) -> Tensor:
        """ℓ of the refusal, which stands in place of the answer."""
        return answer_losses(scene.answers, scene.examples)


class Rmu(Retaining, Forgetting):
    """Steer a layer's activations on the forget set to a random vector."""

    name = "rmu"
    done = (
        "The model was trained further until one layer's activations on the removed examples "
        "pointed in a random direction, while those on the examples to keep were held to what "
        "they were before."
    )
    formula = "|h_f - c u|^2/D + 1200 |h_r - h_r of full|^2/D"
    source = "Li et al., arXiv 2403.03218"
    retain = "activations"
    learning_rate = 5e-5
    retain_weight: float = option(
        default=1200.0, help="weight of the retain term", within="[0, inf)"
    )
    steering_coef: float = option(
        default=6.5,
        help="length c of the random vector; it should exceed the layer's own activations",
        within="(0, inf)",
    )
    steering_layer: int = option(
        default=-1,
        help="layer, from 0, whose output is steered; it and the two below are trained; -1 is 7, "
        "or the middle one of a shallow model",
        within="[-1, inf)",
    )

    @property
    def sees_forget_set(self) -> bool:
        """Its activations."""
        return True


class Undial(Forgetting):
    """Self-distillation with the forget token's logit lowered."""

    name = "undial"
    done = (
        "The model was trained further to repeat its own predictions on the removed examples "
        "with the right token made less likely." + NO_PART
    )
    formula = "CE(softmax(z_full - b onehot(y)), model)"
    source = "Dong et al., arXiv 2402.10052"
    reference = "logits"
    learning_rate = 1e-4
    beta: float = option(default=10.0, help="b of the formula, in nats", within="(0, inf)")

    def forget(self, scene: Scene) -> Tensor:
        """Cross-entropy to θ_full's own prediction with the target's logit lowered by β nats."""
        answers, old = scene.answers, _present(scene.reference_logits)
        target = F.one_hot(answers.targets, old.shape[-1]).to(old.dtype)
        lowered = (old - self.beta * target).softmax(-1)
        terms = F.cross_entropy(answers.wide, lowered, reduction="none")
        return mean_by_example(terms, answers.example, scene.examples)


class Wga(Retaining, Forgetting):
    """Gradient ascent in which tokens already forgotten count less."""

    name = "wga"
    done = f"{LESS}, tokens that are forgotten already counting less, and {MORE}"
    formula = "mean of p^b log p + l_r, p^b constant"
    source = "Wang et al., arXiv 2502.19301"
    epochs = 5
    beta: float = option(default=1.0, help="exponent b of the formula", within="(0, inf)")

    def forget(self, scene: Scene) -> Tensor:
        """-w(p) · loss of each token, the weight w of its own probability p constant."""
        losses = token_losses(scene.answers)
        terms = -self._weights((-losses.detach()).exp()) * losses
        return mean_by_example(terms, scene.answers.example, scene.examples)

    def _weights(self, p: Tensor) -> Tensor:
        """p^β fades tokens that are forgotten already."""
        return p**self.beta


class SatImp(Wga):
    """Gradient ascent weighted by saturation and importance of each token."""

    name = "satimp"
    done = (
        f"{LESS}, tokens that are forgotten already or known for certain counting less, and {MORE}"
    )
    formula = "0.1 * mean of p^b (1-p)^b2 log p + l_r, weights constant"
    source = "Yang et al., arXiv 2505.11953"
    forget_weight: float = option(default=0.1, help="weight of the forget term", within="[0, inf)")
    beta: float = option(default=5.0, help="exponent b of the formula", within="(0, inf)")
    beta2: float = option(default=1.0, help="exponent b2 of the formula", within="[0, inf)")

    def _weights(self, p: Tensor) -> Tensor:
        """p^β (1 - p)^β₂ fades tokens that are predicted almost surely as well."""
        return p**self.beta * (1 - p) ** self.beta2


class RetainFinetune(Retaining):
    """Go on training the full model on the retain set alone."""

    name = "retain-finetune"
    done = (
        "The model was trained further on the examples to keep alone. The removed examples took "
        "no part, so they are forgotten only as far as other training overwrites them."
    )
    formula = "l_r, from the full model"
    source = f"baseline, {_TOFU}"
    epochs = 5


class Retrain(Retaining):
    """Train the base model on the retain set alone: the reference of all methods."""

    name = "retrain"
    done = (
        "The base model was trained anew on the examples to keep alone. This is what unlearning "
        "is measured against, at the price of the whole training."
    )
    formula = "l_r, from the base model"
    source = f"reference, {_TOFU}"
    start = "base"
    epochs = 5


class Influence(Training):
    """One damped Newton step that takes the forget set's influence off an adapter."""

    name = "influence"
    done = (
        "The weights of the adapter were moved by one step that takes off the influence of the "
        "removed examples, as far as the curvature of the loss foresees it. The rest of the model "
        "stayed as it was."
    )
    formula = "+1/n (H + lambda I)^-1 sum of gradients of l_f, on LoRA weights"
    source = "Ding et al., arXiv 2412.00383, LLMEraser"
    retain = "nll"
    damping: float = option(
        default=0.01, help="damping lambda, added to the Hessian's diagonal", within="[0, inf)"
    )
    tolerance: float = option(
        default=1e-3, help="relative residual at which the step counts as solved", within="(0, 1)"
    )
    iterations: int = option(
        default=100,
        help="most iterations, each a forward and a double backward pass over both sets",
        within="[1, inf)",
    )

    @property
    def equation(self) -> str:
        """What is added to the weights."""
        return f"step = {self.formula}"

    @property
    def sees_forget_set(self) -> bool:
        """Its gradient."""
        return True
