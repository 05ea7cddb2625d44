"""Moment folders: what `perta moments` writes and the structured methods read.

    MOMENTS/moments.json                       what was measured, on what, how
    MOMENTS/model-00001.safetensors, …         float32 sums
    MOMENTS/model.safetensors.index.json

A weight `layers.0.up_proj.weight` of the checkpoint has the sum over tokens of x xᵀ under
`layers.0.up_proj.weight.input_moment` and, if asked for, that of g gᵀ under
`layers.0.up_proj.weight.output_moment`. Weights that read the same input share one tensor under
the first one's name; `inputs` in the sidecar says which. Sums and counts are stored, not means,
so folders can be merged. An input moment of at most half as many tokens as the layer is wide is
stored as its triangular factor, see `store.measured.second_moment`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from perta.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from perta.store.atomic import write_text
from perta.store.checkpoint import (
    MOMENTS_SIDECAR,
    CheckpointIndex,
    open_index,
    read_tensor,
    write_tensors,
    write_weight_map,
)
from perta.store.measured.second_moment import divided
from perta.store.parse import NUMBERS, fits, read_json

KEY = "key"
"""File beside a moment folder whose hashes of rows are keyed."""
INPUT, OUTPUT = "input_moment", "output_moment"
_FORM = {
    "inputs": {str: str},
    "outputs": {str: str},
    "tokens": NUMBERS,
    "examples": NUMBERS,
    "model_fingerprint": str,
    "token_choice": str,
    "transposed": [str],
    "data_fingerprints": [str],
    "rows": [[str]],
    "rows_key?": str,
    "repeated?": bool,
    "dtype": str,
    "seen": {str: {"tokens": NUMBERS, "average": NUMBERS}},
}
_SHARD_BYTES = 2 << 30
"""Size at which a file of sums or of a direction is written and the next one begun."""
_EXPECTED = 10  # tokens of an average expert from which one without any counts as not used


@dataclass(frozen=True)
class MomentFolder:
    """An opened moment folder.

    `facts` is the sidecar: `inputs` and `outputs` (weight -> name of its moment), `transposed`
    (weights stored as in x out), `tokens`, `examples`, `token_choice`, `model_fingerprint`,
    `data_fingerprints`, `rows` (of each sequence a hash of its row's messages and of its tokens, as
    `stored` has them), `rows_key` where these are keyed, `repeated` (whether it is of facts) and
    `seen` (moment -> the tokens it rests on, see `is_measured`).
    """

    folder: Path
    index: CheckpointIndex
    facts: dict[str, Any]

    def input_moment(self, weight: str) -> Tensor:
        """C: mean of x xᵀ over tokens of a weight's inputs, float32 (in, in), or factor (n, in)."""
        return divided(self.read(self.facts["inputs"][weight]), self.facts["tokens"])

    def output_moment(self, weight: str) -> Tensor:
        """B: mean over examples of the sum over tokens of g gᵀ, (out, out) float32."""
        return divided(self.read(self.facts["outputs"][weight]), self.facts["examples"])

    def stored(self, hashes: Iterable[str]) -> list[str]:
        """Hashes of rows as they stand in `rows`; ConfigError where their key is not to be had."""
        if (wanted := self.facts.get("rows_key")) is None:
            return list(hashes)
        file = self.folder.absolute().parent / KEY
        if not file.is_file() or _name_of(key := file.read_bytes()) != wanted:
            raise ConfigError(
                f"{self.folder}: rows are recognised by a key alone, and {file} is not there, or "
                "another. Use the moments in the ledger's folder, or measure with `perta moments`."
            )
        return [keyed(one, key) for one in hashes]

    def is_measured(self, weight: str) -> bool:
        """Whether the moments of a weight say how the set uses it.

        Those of a layer that was never called do not. Those of an expert that no token was routed
        to do if one of its layer's experts read _EXPECTED tokens on average: then the set does not
        use it.
        """
        names = [part[weight] for part in (self.facts["inputs"], self.facts["outputs"]) if part]
        seen = [self.facts["seen"][name] for name in names]
        return all(count["tokens"] > 0 or count["average"] >= _EXPECTED for count in seen)

    def read(self, name: str) -> Tensor:
        """A stored sum, as in the file: finite, and not all 0 where tokens were counted."""
        entry = self.index.tensors[name]
        if len(entry.shape) != 2 or entry.shape[0] > entry.shape[1]:
            wrong = f"has the shape {tuple(entry.shape)}, which no moment has"
        else:
            moment = read_tensor(entry)
            measured = bool(moment.any()) or not self.facts["seen"][name]["tokens"]
            if moment.isfinite().all() and measured:
                return moment
            wrong = "holds NaN or Inf" if measured else "is zero throughout: nothing was measured"
        raise CorruptCheckpointError(
            f"{entry.file}: {name} {wrong}. Make the folder again with `perta moments`."
        )


def open_moments(folder: Path) -> MomentFolder:
    """Open an output of `perta moments` and check that it holds what its sidecar says."""
    file = folder / MOMENTS_SIDECAR
    if not file.is_file():
        what = f"has no {MOMENTS_SIDECAR}" if folder.is_dir() else "does not exist"
        raise CheckpointNotFoundError(
            f"The moment folder {folder} {what}. Make it with `perta moments --output {folder} "
            "...`."
        )
    index = open_index(folder)
    facts = read_json(file, CorruptCheckpointError)
    if not fits(facts, _FORM):
        missing = ", ".join(k for k in _FORM if not k.endswith("?") and k not in facts)
        raise CorruptCheckpointError(
            f"{file} cannot be read as a sidecar: it lacks {missing or 'none'}, or "
            "has entries of another kind. Make the folder again with `perta moments`."
        )
    named = {*facts["inputs"].values(), *facts["outputs"].values()}
    counted = facts["tokens"] > 0 and facts["examples"] > 0 and set(facts["seen"]) == named
    listed = len(facts["rows"]) == facts["examples"] and {*map(len, facts["rows"])} == {2}
    if not counted or not listed or named != set(index.tensors):
        raise CorruptCheckpointError(
            f"{folder}: {MOMENTS_SIDECAR} and the tensors beside it do not belong together. Make "
            "the folder again with `perta moments`."
        )
    return MomentFolder(folder, index, facts)


def key_rows(folder: Path, key: bytes) -> None:
    """Put keyed hashes in the place of plain ones, so that nobody can confirm a guessed row."""
    facts = open_moments(folder).facts
    if "rows_key" not in facts:
        rows = [[keyed(one, key) for one in hashes] for hashes in facts["rows"]]
        write_sidecar(folder, {**facts, "rows": rows, "rows_key": _name_of(key)})


def keyed(text: str, key: bytes) -> str:
    """A hash that says nothing to whoever lacks the key, 32 hexadecimal digits."""
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:32]


def _name_of(key: bytes) -> str:
    return keyed("moments", key)


def write_sidecar(folder: Path, facts: dict[str, Any]) -> None:
    """Write what a moment folder says about itself."""
    write_text(folder / MOMENTS_SIDECAR, json.dumps(facts, indent=2) + "\n")


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as they come, never holding much more than a shard of them."""
    weight_map: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if waiting:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            write_tensors(folder, waiting, {file: list(waiting)})
            weight_map.update(dict.fromkeys(waiting, file))
            waiting.clear()

    for name, tensor in tensors:
        waiting[name] = tensor
        total += tensor.numel() * tensor.dtype.itemsize
        if sum(t.numel() * t.dtype.itemsize for t in waiting.values()) >= _SHARD_BYTES:
            flush()
    flush()
    # Over the index that each shard's own write left.
    write_weight_map(folder, weight_map, total)
