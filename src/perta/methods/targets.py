"""Training that gives the predictions of forget answers another shape to become."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor

from perta.methods.method import option
from perta.methods.objectives import LESS, NO_PART, Forgetting, Retaining, Scene
from perta.models.loss import mean_by_example, token_losses


class CeU(Forgetting):
    """Self-distillation with the forget token left out."""

    name = "ce-u"
    done = (
        "The model was trained further to repeat its own predictions on the removed examples "
        f"without the right token.{NO_PART}"
    )
    formula = "CE(softmax(z without y), model), target constant"
    source = "Yang, arXiv 2503.01224, as in its author's code"
    skipped: int = option(
        default=1,
        help="first tokens of an answer that have no part, as long as one is left",
        within="[0, inf)",
    )

    def forget(self, scene: Scene) -> Tensor:
        """Cross-entropy to the model's own prediction with the target's logit at -inf."""
        answers, logits = scene.answers, scene.answers.wide
        without = logits.detach().scatter(1, answers.targets.unsqueeze(1), -torch.inf)
        terms = F.cross_entropy(logits, without.softmax(-1), reduction="none")
        lengths = torch.bincount(answers.example, minlength=scene.examples)
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(len(terms), device=terms.device) - starts[answers.example]
        seen = place >= (lengths - 1).clamp(max=self.skipped)[answers.example]
        return mean_by_example(terms[seen], answers.example[seen], scene.examples)


class JensUn(Retaining, Forgetting):
    """Predictions drawn to "No idea" on the forget set and held on the retain set, boundedly."""

    name = "jensun"
    done = (
        "The model was trained further to predict the words `No idea`, over and over, at the "
        "answers of the removed examples, while its predictions on the examples to keep were held "
        "to those it made before."
    )
    formula = "JS(onehot(word), model) + JS(full, model) on retain"
    source = "Singh et al., arXiv 2509.02820"
    retain = "js"
    refusals = "instead"
    words = " No idea"
    learning_rate = 8e-6

    def forget(self, scene: Scene) -> Tensor:
        """Jensen-Shannon divergence of a prediction with all weight on the label, in nats.

        With p the label's probability, (2 log 2 + p log p - (1 + p) log(1 + p)) / 2.
        """
        losses = token_losses(scene.answers)
        p = (-losses).exp()
        terms = math.log(2) - (p * losses + (1 + p) * p.log1p()) / 2
        return mean_by_example(terms, scene.answers.example, scene.examples)


class Pdu(Retaining, Forgetting):
    """Flat logits on the forget set, the retain loss held below a limit by its own weight."""

    name = "pdu"
    done = (
        f"{LESS.replace('to make', 'to flatten its predictions and so make')}, while the loss on "
        "the examples to keep was held below a limit."
    )
    formula = "mean of (max z - mean z)^2 + w l_r, w -> max(0, w + step (l_r - limit))"
    source = "Entesari et al., arXiv 2506.05314, as in its authors' code"
    retain_weight: float = option(
        default=100.0, help="weight w of the retain term at first", within="[0, inf)"
    )
    limit: float = option(
        default=0.3, help="retain loss that is allowed, in nats per token", within="[0, inf)"
    )
    dual_step: float = option(
        default=5.0, help="how fast the weight follows the retain loss", within="[0, inf)"
    )
    fixed_epochs: int = option(
        default=5, help="epochs in which the weight stays as it is", within="[0, inf)"
    )

    def forget(self, scene: Scene) -> Tensor:
        """Square of the largest logit's distance from the mean of all, at each answer token."""
        logits = scene.answers.wide
        terms = (logits.amax(-1) - logits.mean(-1)).square()
        return mean_by_example(terms, scene.answers.example, scene.examples)

    def next_retain_weight(self, weight: float, term: float, epoch: int) -> float:
        """A step of the dual variable, once the first epochs are over."""
        if epoch <= self.fixed_epochs:
            return weight
        return max(0.0, weight + self.dual_step * (term - self.limit))
