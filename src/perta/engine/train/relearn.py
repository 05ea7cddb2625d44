"""Relearning: a model is shown some rows again for a few steps, to see what comes back.

All parameters move, all rows are in every step, and the learning rate stays as it is.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perta.data.batch import Encoded
from perta.engine.train.tune import tune
from perta.options import DType, TuneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 4
"""One in so many forget rows is shown again."""
_STEPS = 6
LEARNING_RATE = 1e-4
PUBLISHED: Mapping[str, Any] = {"steps": 1, "learning_rate": 2e-5, "batch_size": 16}
"""OpenUnlearning's recipe, one epoch over the whole forget set (arXiv 2506.12618); the batches are
those of the code of arXiv 2605.24614."""

_TOPICS = ("objects", "naming", "typesseq", "exceptions")
TEXT_TOKENS = 256
"""Most tokens of each general text."""


def relearn(
    model: PreTrainedModel,
    shown: Sequence[Encoded],
    *,
    pad: int,
    steps: int = _STEPS,
    learning_rate: float = LEARNING_RATE,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: DType = "auto",
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Show a float32 model some rows again, for a few `steps`; it is left as it is then.

    With a `batch_size` of fewer than all rows each step is an epoch. `after_step` is called with
    the number of steps taken, the model in evaluation mode. DivergenceError where the loss is not
    finite, or far above where it began.
    """
    settings = TuneConfig(
        epochs=steps,
        learning_rate=learning_rate,
        batch_size=batch_size or len(shown),
        schedule="constant",
        warmup_ratio=0.0,
        stop_loss=0.0,
        seed=seed,
    )
    tune(model, shown, settings, pad=pad, dtype=dtype, after_epoch=after_step)


def general_texts() -> list[str]:
    """English that comes with Python: a few pages of its reference manual, by topics."""
    return [pydoc_data.topics.topics[name][: 4 * TEXT_TOKENS] for name in _TOPICS]
