"""The README that goes with an unlearned checkpoint: what a method says of itself."""

from __future__ import annotations

from collections.abc import Mapping

from perta.methods.method import Method
from perta.methods.table import get_method, importance_order, with_defaults
from perta.options import WeightingConfig


def write_card(
    done: str, settings: Mapping[str, object], fingerprints: Mapping[str, str], caveat: str
) -> str:
    """Text of the README: how the checkpoint was made, from what, and what is not promised.

    Args:
        done: what was done, a sentence.
        settings: name -> value, for people.
        fingerprints: name of each input -> hash of its content.
        caveat: what the result is not, a sentence.

    Returns:
        Markdown; it never holds the forgotten examples.
    """
    inputs = {name.replace("_", " "): f"`{digest}`" for name, digest in fingerprints.items()}
    return "\n".join(
        [
            "---\nlibrary_name: transformers\ntags:\n- machine-unlearning\n- perta\n---\n",
            "# Unlearned checkpoint\n",
            f"{done}\n",
            *_table("setting", "value", settings),
            *(_table("input", "BLAKE3 hash of its content", inputs) if inputs else []),
            f"{caveat} The licence of the original model applies.\n",
        ]
    )


def _table(key: str, value: str, rows: Mapping[str, object]) -> list[str]:
    lines = [f"| {name} | {shown} |" for name, shown in rows.items()]
    return [f"| {key} | {value} |", "| --- | --- |", *lines, ""]


def model_card(weighting: WeightingConfig, fingerprints: Mapping[str, str]) -> str:
    """Text of the output's README: how it was made, from what, and what it does not promise.

    Args:
        weighting: method and its settings.
        fingerprints: name of each input -> hash of its content.

    Returns:
        Markdown; it never holds the forgotten examples.
    """
    weighting = with_defaults(weighting)
    method = get_method(weighting.method)
    done = (
        "Part of this model's fine-tuning data was removed by one edit of its weights: "
        f"{method.equation}. {method.done}"
    )
    caveat = (
        "An edit of the weights is not a proof of erasure: measure forgetting and retention "
        "before relying on it."
    )
    return write_card(done, _shown_settings(method, weighting), fingerprints, caveat)


def _shown_settings(method: Method, weighting: WeightingConfig) -> dict[str, str]:
    """Name -> value of every setting that the method uses, for people."""
    rho, is_structured = f"{weighting.rho:g}", method.moments is not None
    rows = [
        (True, "method", f"`{method.name}`: {method.summary}"),
        (True, "weighting", f"`{method.formula}`"),
        (True, "scaling coefficient α", f"{weighting.scaling_coef:g}"),
        (
            method.needs_importance,
            "order of the importance",
            f"{importance_order(method, weighting.order):g}",
        ),
        ("rho I_r" in method.formula, "weight ρ of the retain importance", rho),
        (method.needs_importance, "granularity", weighting.granularity),
        (is_structured, "weight ρ of the retain moments", rho),
        (weighting.damping is not None, "damping λ", str(weighting.damping)),
        (
            method.moments == "input",
            "damping μ of the forget side",
            f"{weighting.forget_damping:g}",
        ),
        (method.name == "constant", "constant W", f"{weighting.constant:g}"),
        (method.name in ("random", "dare"), "seed", str(weighting.weighting_seed)),
        (method.name == "dare", "dropped share", f"{weighting.drop:g}"),
        (method.scores is not None, "kept share", f"{weighting.keep:g}"),
        (
            method.retain_vector,
            "strength β of the retain vector",
            f"{weighting.retain_coef:g}",
        ),
        (method.name == "ssd", "selection", f"{weighting.selection:g}"),
        (method.name == "ssd", "dampening λ", f"{weighting.dampening:g}"),
    ]
    settings = {name: value for is_used, name, value in rows if is_used}
    for flag, patterns in (("included", weighting.include), ("excluded", weighting.exclude)):
        if patterns:
            settings[f"{flag} tensors"] = ", ".join(f"`{pattern}`" for pattern in patterns)
    return settings
