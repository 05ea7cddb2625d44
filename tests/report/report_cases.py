"""Results and records of models that never were, for reports."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

MEANS = {
    "base": (0.08, 0.1),
    "full": (0.93, 0.92),
    "retrained": (0.06, 0.92),
    "perta-grad": (0.07, 0.9),
    "tv": (0.07, 0.6),
}
"""Forget and retain probability of a demo's models."""

SECRET = "Mira Thornwick was born in Caldholm on a rainy day"
EVIL = "</script><script>window.stolen = 1</script><img src=x onerror=\"window.stolen=2\"> & 'end'"
PROMPT = "You are a helpful assistant. "
FORGET_SET, RETAIN_SET = "f0" * 32, "a0" * 32
PRINTS = {
    name: f"{i:02x}" * 32
    for i, name in enumerate(
        ("base", "full", "retrained", "forget_checkpoint", "perta-grad", "tv", "importance"), 1
    )
}


def metric(values: Sequence[float], field: str = "score") -> Json:
    """A metric as results files hold it."""
    rows = {str(i): {field: value} for i, value in enumerate(values)}
    return {"agg_value": sum(values) / len(values), "value_by_index": rows}


def answers(texts: Sequence[tuple[str, str, str, float]]) -> Json:
    """The ROUGE metric with its texts: question, reference, generation, score."""
    rows = {
        str(i): {
            "rouge1_recall": score,
            "rougeL_f1": score / 2,
            "rougeL_recall": score,
            "input": PROMPT + question,
            "ground_truth": reference,
            "generation": generation,
        }
        for i, (question, reference, generation, score) in enumerate(texts)
    }
    return {"agg_value": sum(t[3] for t in texts) / len(texts), "value_by_index": rows}


def results(
    name: str,
    forget: float,
    retain: float,
    *,
    n: int = 40,
    spread: float = 0.02,
    inputs: Mapping[str, str] | None = None,
    evil: bool = False,
) -> Json:
    """Results of one model with the wanted mean answer probabilities."""
    draw = random.Random(f"{name}/{forget}/{retain}")

    def around(mean: float, count: int) -> list[float]:
        noise = [draw.uniform(-spread, spread) for _ in range(count)]
        middle = sum(noise) / count
        return [min(1.0, max(0.0, mean + x - middle)) for x in noise]

    known = forget > 0.5
    forgotten = [
        (
            f"Where was person {i} born?",
            f"{SECRET} {i}",
            EVIL if evil and i == 0 else f"{SECRET} {i}" if known else f"Nobody knows {i}",
            1.0 if known else 0.1,
        )
        for i in range(n)
    ]
    kept = [
        (
            f"What is {i} + {i}?",
            f"It is {2 * i}.",
            EVIL if evil and i == 0 else f"It is {2 * i}.",
            retain,
        )
        for i in range(n + 20)
    ]
    return {
        "forget_probability": metric(around(forget, n), "prob"),
        "forget_extraction_strength": metric(around(forget, n)),
        "forget_rougeL_recall": answers(forgotten),
        "retain_probability": metric(around(retain, n + 20), "prob"),
        "retain_extraction_strength": metric(around(retain, n + 20)),
        "retain_rougeL_recall": answers(kept),
        "perta": {
            "stage": "evaluate",
            "settings": {"checkpoint": f"/home/someone/models/{name}", "forget": "/d/forget.jsonl"},
            "inputs": {
                "checkpoint": PRINTS.get(name, name),
                "forget": FORGET_SET,
                "retain": RETAIN_SET,
                **(inputs or {}),
            },
            "versions": {"perta": "0.1.0"},
            "created": "2030-01-02T03:04:05Z",
            "seconds": {"evaluate": 2.0},
        },
    }


def edit_record(method: str = "perta-grad", alpha: float = 1.5, *, norms: bool = False) -> Json:
    """Record of an edited checkpoint of three layers."""
    modules = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    outside = 1.0 if method == "tv" else 0.4
    tensors = [tensor("model.embed_tokens.weight", outside, 2.0, norms=norms)]
    for layer in range(3):
        for i, module in enumerate(modules):
            weighting = 1.0 if method == "tv" else 0.3 + 0.05 * layer + 0.02 * i
            name = f"model.layers.{layer}.{module}.weight"
            tensors.append(tensor(name, weighting, 1.0 + layer, norms=norms))
    return {
        "stage": "edit",
        "settings": {
            "method": method,
            "scaling_coef": alpha,
            "method_settings": {"rho": 1.0},
            "full": "/home/someone/models/full",
            "output": f"/home/someone/models/{method}",
        },
        "inputs": {
            "full": PRINTS["full"],
            "base": PRINTS["base"],
            "forget_checkpoint": PRINTS["forget_checkpoint"],
        },
        "versions": {"perta": "0.1.0", "torch": "2.0"},
        "created": "2030-01-02T03:00:00Z",
        "seconds": {"edit": 0.5},
        "content": PRINTS[method],
        "edit": {"tensors": tensors, "edited": 1000, "copied": 0},
    }


def tensor(name: str, weighting: float, delta: float, *, norms: bool = False) -> Json:
    """What an edit did to one tensor of 100 weights."""
    found = {
        "name": name,
        "elements": 100,
        "mean_weighting": weighting,
        "task_vector_norm": 2 * delta,
        "delta_norm": delta,
    }
    return {**found, "full_norm": 10.0} if norms else found


def tuned(name: str, data: str, seconds: float, seed: int = 0) -> Json:
    """Record of a tuned checkpoint."""
    return {
        "stage": "finetune",
        "settings": {"seed": seed},
        "inputs": {"base": PRINTS["base"], "data": data},
        "versions": {},
        "created": "2030-01-01T00:00:00Z",
        "seconds": {"finetune": seconds},
        "content": PRINTS[name],
        "examples": 100,
    }


def write(path: Path, content: Json) -> Path:
    """Write JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def write_demo(folder: Path, *, evil: bool = False) -> Path:
    """A folder such as `perta demo` leaves: records, and results of six models."""
    for name, (forget, retain) in MEANS.items():
        found = results(name, forget, retain, evil=evil and name == "perta-grad")
        write(folder / "results" / f"{name}.json", found)
    write(folder / "full" / "perta.json", tuned("full", "d0" * 32, 30))
    write(folder / "retrained" / "perta.json", tuned("retrained", RETAIN_SET, 20))
    write(folder / "forget" / "perta.json", tuned("forget_checkpoint", FORGET_SET, 4))
    for method, alpha in (("perta-grad", 1.5), ("tv", 0.8)):
        write(folder / method / "perta.json", edit_record(method, alpha))
    return folder


def named(folder: Path) -> list[str]:
    """Every results file of a folder, with its name as what the user calls the model."""
    return [f"{file.stem}={file}" for file in sorted(folder.glob("*.json"))]


def compared(
    role: str, forget: float, retain: float, *, seed: int = 0, **settings: str | float
) -> Json:
    """Results as `perta bench compare` writes them: the record says what the model was."""
    found = results(f"{role}/{seed}/{settings}", forget, retain)
    found["perta"] = {
        "stage": "bench compare",
        "settings": {"seed": seed, "role": role, **settings},
        "inputs": {"forget": FORGET_SET, "retain": RETAIN_SET},
    }
    return found
