"""Results in the form of the TOFU community's published logs, as strict JSON.

    {"forget_Q_A_Prob": {"agg_value": 0.9, "value_by_index": {"0": {"prob": 0.87, ...}, ...}}}

Every metric has a mean (or other aggregate) and, where it has them, the values of its examples
under their 0-based row. A metric that could not be computed has the aggregate None and says why
under "missing".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from perta.data.batch import IGNORE, Encoded
from perta.errors import DataError, DivergenceError
from perta.evidence import metrics
from perta.evidence.scoring.answers import Score
from perta.store.parse import read_json
from perta.store.record import refuse_changed

Results = dict[str, Any]


def table(
    rows: Sequence[Mapping[str, Any] | None], key: str, weights: Sequence[float] | None = None
) -> Results:
    """A metric in the form of published logs: the mean of `key`, and every row by index.

    Rows without a value (None) keep their index and stay out of the mean, which is weighted where
    rows are windows of a text.
    """
    values = [
        (metrics.mean(value) if isinstance(value := row[key], list) else value, weight)
        for row, weight in zip(rows, weights or [1.0] * len(rows), strict=True)
        if row is not None and row[key] is not None
    ]
    total = math.fsum(weight for _, weight in values)
    mean = math.fsum(value * weight for value, weight in values) / total if values else None
    return {"agg_value": mean, "value_by_index": {str(i): row for i, row in enumerate(rows)}}


def rouge_row(
    reference: str, generation: str, prompt: str, *, any_script: bool = False
) -> dict[str, Any]:
    """Scores of one generated answer, with its texts; `any_script` as for `rouge`."""
    scores = metrics.rouge(reference, generation, any_script=any_script)
    return {**scores, "input": prompt, "ground_truth": reference, "generation": generation}


def require_finite(score: Score, what: str) -> None:
    """Stop at a loss that is NaN or infinite: no metric of such a model means anything."""
    if not math.isfinite(score.loss):
        raise DivergenceError(
            f"The model's loss on {what} is {score.loss}: its weights are damaged. With an "
            "unlearned model, lower --scaling-coef; else check the checkpoint."
        )


def results_json(results: Mapping[str, Any]) -> str:
    """Results as strict JSON; NaN and infinity are refused."""
    return json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_results(path: str | Path) -> Results:
    """Read a results file or a published log; DataError if it is missing, damaged or changed."""
    results = read_json(Path(path), DataError, nan=True)
    refuse_changed(results, path)
    return results


def missing(reason: str) -> Results:
    """Entry of a metric that could not be computed, saying why."""
    return {"agg_value": None, "missing": reason}


def labelled_text(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the tokens that carry a label, without special ones."""
    labelled = [label for label in encoded.labels if label != IGNORE]
    return str(tokenizer.decode(labelled, skip_special_tokens=True))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Text of tokens, without special tokens and surrounding space."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
