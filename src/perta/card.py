"""The README that goes with an unlearned checkpoint."""

from __future__ import annotations

from collections.abc import Mapping


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
