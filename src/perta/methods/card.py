"""The README that goes with an unlearned checkpoint: what a method says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict

from perta.methods.method import Edit, Method
from perta.methods.objectives import Influence, Training
from perta.methods.registry import get_method
from perta.options import TrainSettings, WeightingConfig


def _write_card(
    done: str, settings: Mapping[str, object], fingerprints: Mapping[str, str], caveat: str
) -> str:
    """Markdown: how it was made, from what, and what is not promised; never what was forgotten."""
    inputs = {name.replace("_", " "): f"`{digest}`" for name, digest in fingerprints.items()}
    return "\n".join(
        [
            "---\nlibrary_name: transformers\ntags:\n- machine-unlearning\n- perta\n---\n",
            "# Unlearned checkpoint\n",
            f"{done}\n",
            *_table("setting", "value", settings),
            *(
                _table("input", "BLAKE3 hash of its content, of rows under a key", inputs)
                if inputs
                else []
            ),
            f"{caveat} The licence of the original model applies.\n",
        ]
    )


def _table(key: str, value: str, rows: Mapping[str, object]) -> list[str]:
    lines = [f"| {name} | {shown} |" for name, shown in rows.items()]
    return [f"| {key} | {value} |", "| --- | --- |", *lines, ""]


def model_card(weighting: WeightingConfig, fingerprints: Mapping[str, str]) -> str:
    """README of an edit, in Markdown, with the inputs' fingerprints and its defaults filled in."""
    method = get_method(weighting.method)
    done = (
        "Part of this model's fine-tuning data was removed by one edit of its weights: "
        f"{method.equation}. {method.done}"
    )
    caveat = (
        "An edit of the weights is not a proof of erasure: measure forgetting and retention "
        "before relying on it."
    )
    return _write_card(done, _shown_settings(method, weighting), fingerprints, caveat)


def _shown_settings(method: Edit, weighting: WeightingConfig) -> dict[str, str]:
    """Name -> value of every setting that the method uses, for people."""
    settings = {
        "method": f"`{method.name}`: {method.summary}",
        "weighting": f"`{method.formula}`",
        "scaling coefficient α": f"{weighting.scaling_coef:g}",
    }
    if method.needs.importance:
        settings["order of the importance"] = f"{method.order:g}"
        settings["granularity"] = weighting.granularity
    settings |= _own_settings(method)
    if method.draws:
        settings["seed"] = str(weighting.weighting_seed)
    for flag, patterns in (("included", weighting.include), ("excluded", weighting.exclude)):
        if patterns:
            settings[f"{flag} tensors"] = ", ".join(f"`{pattern}`" for pattern in patterns)
    return settings


def training_card(
    method: Training, settings: TrainSettings, fingerprints: Mapping[str, str]
) -> str:
    """README of a training; `settings` have the method's defaults filled in, where it has any."""
    run = {} if isinstance(method, Influence) else asdict(settings)
    shown = {
        "method": f"`{method.name}`: {method.summary}",
        "loss": f"`{method.formula}`",
        "source": method.source,
        **_own_settings(method),
        **{k.replace("_", " "): v for k, v in run.items() if v not in (None, ())},
    }
    done = (
        "Part of this model's fine-tuning data was removed by training it further."
        if method.start == "full"
        else "This model was trained without part of the fine-tuning data."
    )
    caveat = (
        "Training is not a proof of erasure: measure forgetting and retention before relying on it."
    )
    return _write_card(done, shown, fingerprints, caveat)


def _own_settings(method: Method) -> dict[str, str]:
    """Label -> value of every setting of a method, for people."""
    shown = {}
    for item in method.options():
        value = getattr(method, item.name)
        label = re.split("[,;:]", item.metadata["help"])[0]
        shown[label] = f"{value:g}" if isinstance(value, float) else str(value)
    return shown
