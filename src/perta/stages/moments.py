"""Second moments of every linear layer's inputs and output gradients: checkpoint + set -> files.

    C = sum over tokens of x xᵀ     x: the layer's input
    B = sum over tokens of g gᵀ     g: gradient of the example's loss by the layer's output

C comes from forward passes alone; B (`--gradients`) costs a backward pass as well. Both are sums
with counts beside them, so sets can be merged. Divided by the number of tokens, C is a mean over
tokens; B is divided by the number of examples. The loss of an example is the mean over its answer
tokens, as everywhere here, so that mean(B) ⊗ mean(C) has the scale of the Fisher information that
`perta importance --order 2` estimates, and ρ means the same.

The output head, embeddings, norms and biases have no moments: the structured methods leave them
as they are. An expert's moments are sums over the tokens routed to it, counted among all tokens:
an expert that a set seldom uses matters little to it. How many tokens each moment rests on stands
beside it: a layer whose weight the model uses without calling the layer, as `dt_proj` in Mamba, is
listened to in vain, and a sum of nothing must not be taken for "nothing to protect".

Matrix products are float32, their sum over batches float64, stored as float32. A layer whose
input has width d holds 8 d² bytes while it is measured (1.6 GB at d = 14,336) and 4 d² while it
is written; layers are taken in groups within `--moment-memory`, one pass over the set per group.
Of n tokens, at most d / 2, C is kept as its triangular factor: n d numbers in place of d².

Sources: RegMean, arXiv 2212.09849 (C), and K-FAC, arXiv 1503.05671 (B ⊗ C).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from perta.data.batch import Encoded
from perta.data.examples import Example, ExampleSet, load_examples, rows_fingerprint
from perta.data.rows import as_source
from perta.data.tokens import encode_examples, marks_of, row_mark
from perta.engine.edit.direction import check_moments
from perta.engine.moments import Seen, count_tokens, plan_moments, sample_for_moments, sum_moments
from perta.errors import CheckpointMismatchError, ConfigError, EmptyDatasetError
from perta.models.facts import find_facts, is_told, values_of
from perta.models.load import batch_of, load_tokenizer, longest_input, pad_id, picked
from perta.models.resolve import resolve_checkpoint
from perta.options import require
from perta.progress import say
from perta.stages.settings import LessMomentsConfig, MergeMomentsConfig, MomentsConfig
from perta.stages.stage import Subject, loaded, run_measurement, run_stage
from perta.store.costs import BACKWARD, FORWARD
from perta.store.fingerprint import fingerprint, own_key
from perta.store.measured.moments import (
    MomentFolder,
    keyed,
    open_moments,
    write_shards,
    write_sidecar,
)
from perta.store.measured.second_moment import added, divided, without
from perta.store.record import settings_of, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = ("examples", "examples_available")
_REPEATED = 0.25
"""Share of all tokens, at least, that repeated facts count for: docs/experiments/facts.md."""


def compute_moments(config: MomentsConfig) -> Path:
    """Measure moments on a data set, write them and return the folder (`perta moments`)."""

    def measure(model: PreTrainedModel, subject: Subject, folder: Path) -> Mapping[str, Any]:
        given, pad = subject.encoded.encoded, subject.pad
        plan = plan_moments(model, given, gradients=config.gradients, pad=pad)
        encoded = sample_for_moments(plan, given, config.options)
        seen: dict[str, Seen] = {}
        size = batch_of(config.compute, 8)
        sums = sum_moments(
            model, encoded, plan, config.options, pad=pad, batch_size=size, seen=seen
        )
        write_shards(folder, sums)
        tokens = count_tokens(encoded, config.options.tokens)
        if len(encoded) < len(given):
            say(
                f"moments: measured on {len(encoded)} of {len(given)} rows, {tokens} tokens; "
                "in `perta unlearn` --retain-samples all takes every row"
            )
        marks = marks_of(subject.examples.examples, encoded)
        if config.facts_by:  # a fact is short and soon guessed, and none is ever taken out again
            marks = [[keyed(mark, own_key()) for mark in row] for row in marks]
        facts = {
            "tokens": tokens,
            "examples": len(encoded),
            "examples_available": len(given),
            "token_choice": config.options.tokens,
            "loss": "mean negative log-likelihood of the answer tokens, nats per token",
            "inputs": plan.inputs,
            "outputs": plan.outputs,
            "seen": {name: asdict(count) for name, count in seen.items()},
            "transposed": [weight.name for weight in plan.weights if weight.transposed],
            "model_fingerprint": subject.inputs["checkpoint"],
            "data_fingerprints": [subject.examples.fingerprint],
            "rows": marks,
            **({"repeated": True} if config.facts_by else {}),
            "dtype": subject.settings["dtype"],
            "versions": versions(),
        }
        write_sidecar(folder, facts)
        return {
            "examples": len(encoded),
            "examples_available": len(given),
            "tokens_counted": tokens,
            "passes": (FORWARD + BACKWARD * config.gradients) * count_tokens(encoded, "all"),
        }

    def repeated(subject: Subject) -> Subject:
        return _repeated(subject, config, str(config.facts_by))

    prepare = repeated if config.facts_by else None
    return run_measurement("moments", config, measure, prepare=prepare)


def _repeated(subject: Subject, config: MomentsConfig, base: str) -> Subject:
    """In place of rows what their facts say, each the answer to itself, told once and twice."""
    data, tokenizer = config.data_config, subject.tokenizer
    of_text = any(example.kind == "text" for example in subject.examples.examples)
    require(not of_text, "facts-by", base, "left out for plain text, which has no facts")
    how: dict[str, Any] = {"longest": longest_input(subject.checkpoint)}
    read = (subject.examples, tokenizer, data)
    if is_told(subject.examples, data):
        facts = find_facts(*read, **how)
    else:
        with loaded(resolve_checkpoint(base), config.compute, config.shard) as model:
            facts = find_facts(*read, base=model, **how)
    prompts = {example.row: example.prompt for example in subject.examples.examples}
    said = [text for fact in facts for text in values_of(fact, prompts[fact.row], tokenizer)]
    if not said:
        raise EmptyDatasetError(
            f"{subject.examples.source}: the tokenizer has no words for any of the facts, so none "
            "can be repeated. Give rows in its words, or leave --facts-by out."
        )
    asking = [(prompt, text) for text in said for prompt in (text, f"{text} {text}")]
    rows = as_source([{"question": prompt, "answer": text} for prompt, text in asking], "facts")
    # One of a whole long answer may be longer than what is read of rows.
    usual = replace(data.with_usual_columns(), skip_bad_rows=True)
    examples = load_examples(rows, usual)
    encoded = encode_examples(examples, tokenizer, usual, **how)
    return replace(subject, examples=examples, encoded=encoded)


def merge_moments(config: MergeMomentsConfig) -> Path:
    """Add moment folders: the moments of the union of their sets (`perta merge-moments`).

    CheckpointMismatchError where they are of different models, layers or settings; ConfigError
    where a set is counted twice, or rows are recognised by two keys, or by one that is not there.
    Moments of facts (`facts_by`) beside those of rows count as `_REPEATED` of all tokens at least.
    """
    folders = [open_moments(folder) for folder in config.folders]
    _check_mergeable(folders)
    owner = next((f for f in folders if "rows_key" in f.facts), folders[0])
    rows = [
        marks if "rows_key" in f.facts else owner.stored(marks)
        for f in folders
        for marks in f.facts["rows"]
    ]

    def look() -> dict[str, str]:
        return {f"moments_{i}": fingerprint(f.folder) for i, f in enumerate(folders, start=1)}

    def make(folder: Path) -> Mapping[str, Any]:
        names = list(folders[0].index.tensors)
        weights, alike = _weights(folders), [1.0] * len(folders)
        inputs = {*owner.facts["inputs"].values()}  # outputs are means over examples, not tokens
        sums = ((n, _sum(folders, weights if n in inputs else alike, n)) for n in names)
        write_shards(folder, sums)
        counted = zip(folders, weights, strict=True)
        facts = {
            **owner.facts,
            "seen": _seen(folders),
            "tokens": round(sum(weight * f.facts["tokens"] for f, weight in counted)),
            **{key: sum(f.facts.get(key, f.facts["examples"]) for f in folders) for key in _ROWS},
            "repeated": all(f.facts.get("repeated") for f in folders),
            "data_fingerprints": [d for f in folders for d in f.facts["data_fingerprints"]],
            "rows": rows,
            "taken_out": sum(f.facts.get("taken_out", 0) for f in folders),
            "versions": versions(),
        }
        write_sidecar(folder, facts)
        return {"examples": facts["examples"], "tokens_counted": facts["tokens"]}

    run_stage("merge-moments", config, {}, look(), make, look=look, reads=config.folders)
    return config.output


def holds(moments: Path, rows: Iterable[Example]) -> bool:
    """Whether any of some rows is in a folder of moments, however it was tokenised."""
    opened = open_moments(moments)
    inside = {mark for mark, _ in opened.facts["rows"]}
    return not inside.isdisjoint(opened.stored(map(row_mark, rows)))


def check_less(config: LessMomentsConfig, rows: Sequence[Example]) -> None:
    """Stop before any work where `moments_without` would stop."""
    _leaving(config, open_moments(config.moments), rows)


def moments_without(config: LessMomentsConfig, rows: Sequence[Example]) -> Path:
    """Moments of a set without those of its rows that are among `rows`.

    Moments are sums over rows, so theirs are measured and subtracted: one pass over these rows in
    place of one over all that stay. Both are float32 to rounding, at most half of what is there may
    go at once, and a quarter of what was once measured must be left, so the result is that of the
    rows that stay to a few 2⁻²⁴ of a mean diagonal. ConfigError where more would go, or the rows
    were tokenised or measured otherwise; CheckpointMismatchError at moments of another model.
    """
    opened, checkpoint = open_moments(config.moments), resolve_checkpoint(config.checkpoint)
    facts, (encoded, marks) = opened.facts, _leaving(config, opened, rows)
    pad = pad_id(load_tokenizer(checkpoint))

    def look() -> dict[str, str]:
        return {
            "moments": fingerprint(config.moments),
            "checkpoint": fingerprint(checkpoint),
            "rows": rows_fingerprint([{"marks": marks}]),
        }

    def make(folder: Path) -> Mapping[str, Any]:
        options = replace(config.options, tokens=facts["token_choice"])
        less: dict[str, Seen] = {}
        with loaded(checkpoint, config.compute, config.shard) as model:
            plan = plan_moments(model, encoded, gradients=bool(facts["outputs"]), pad=pad)
            if (plan.inputs, plan.outputs) != (facts["inputs"], facts["outputs"]):
                raise _refused(config, "the rows reach other layers than those that stay")
            how: dict[str, Any] = {"pad": pad, "batch_size": batch_of(config.compute, 8)}
            sums = sum_moments(model, encoded, plan, options, **how, seen=less)
            write_shards(folder, _left(config, opened, sums))
        tokens, gone = count_tokens(encoded, facts["token_choice"]), {mark for mark, _ in marks}
        left = {
            **facts,
            "tokens": facts["tokens"] - tokens,
            **{key: facts[key] - len(encoded) for key in _ROWS},
            "taken_out": facts.get("taken_out", 0) + tokens,
            "seen": {
                name: {key: count[key] - asdict(less[name])[key] for key in count}
                for name, count in facts["seen"].items()
            },
            "data_fingerprints": [],  # no set as a whole is in it any more
            "rows": [of_row for of_row in facts["rows"] if of_row[0] not in gone],
            "versions": versions(),
        }
        write_sidecar(folder, left)
        passes = (FORWARD + BACKWARD * bool(facts["outputs"])) * count_tokens(encoded, "all")
        say(f"moments: {len(encoded)} rows, {tokens} tokens, were taken out of {config.moments}")
        return {"examples": left["examples"], "tokens_counted": left["tokens"], "passes": passes}

    settings = {**settings_of(config), **picked(config.compute, checkpoint)}
    reads = (config.moments, checkpoint)
    run_stage("moments-without", config, settings, look(), make, look=look, reads=reads)
    return config.output


def _leaving(
    config: LessMomentsConfig, opened: MomentFolder, rows: Sequence[Example]
) -> tuple[list[Encoded], list[list[str]]]:
    """The sequences in some moments that are of some rows, and their marks there."""
    facts, checkpoint = opened.facts, resolve_checkpoint(config.checkpoint)
    check_moments(config.moments, [checkpoint], gradients=False)
    if facts["dtype"] != picked(config.compute, checkpoint)["dtype"]:
        raise _refused(config, f"they were measured with --dtype {facts['dtype']}")
    wanted = opened.stored(map(row_mark, rows))
    inside = [marks for marks in facts["rows"] if marks[0] in set(wanted)]
    among = {mark for mark, _ in inside}
    own = [row for row, mark in zip(rows, wanted, strict=True) if mark in among]
    # Rows of several files may have the same number.
    examples = ExampleSet(
        "rows", tuple(replace(row, row=i) for i, row in enumerate(own)), (), opened.folder.name
    )
    encoded = encode_examples(
        examples,
        load_tokenizer(checkpoint),
        replace(config.data_config, skip_bad_rows=True),
        longest=longest_input(checkpoint),
    ).encoded
    found = {
        tuple(opened.stored(marks)): one
        for marks, one in zip(marks_of(examples.examples, encoded), encoded, strict=True)
    }
    if not all(tuple(marks) in found for marks in inside):
        raise _refused(config, "they were measured with another template or --max-length")
    sequences = [found[tuple(marks)] for marks in inside]
    going = count_tokens(sequences, facts["token_choice"])
    if 4 * (facts["tokens"] - going) < facts["tokens"] + facts.get("taken_out", 0):
        raise _refused(config, "less than a quarter of what was measured would be left")
    if 2 * going > facts["tokens"]:
        raise _refused(config, "more than half of what is there would go")
    return sequences, inside


def _left(
    config: LessMomentsConfig, opened: MomentFolder, sums: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    for name, part in sums:
        left = without(opened.read(name), part)
        if left is None:
            raise _refused(config, f"of {name} less would be left than rounding shows")
        yield name, left.float()


def _refused(config: LessMomentsConfig, why: str) -> ConfigError:
    return ConfigError(
        f"{config.moments} holds moments of rows that are not to be protected, and they cannot be "
        f"taken out: {why}. Make it again with `perta moments` from the rows to keep."
    )


def _weights(folders: Sequence[MomentFolder]) -> list[float]:
    """How often each set counts."""
    tokens = {True: 0, False: 0}
    for folder in folders:
        tokens[bool(folder.facts.get("repeated"))] += folder.facts["tokens"]
    more = _REPEATED / (1 - _REPEATED) * tokens[False] / (tokens[True] or 1)
    return [max(1.0, more) if folder.facts.get("repeated") else 1.0 for folder in folders]


def _sum(folders: Sequence[MomentFolder], weights: Sequence[float], name: str) -> Tensor:
    moments = [folder.read(name) for folder in folders]
    for folder, moment in zip(folders, moments, strict=True):
        if moment.shape[1] != moments[0].shape[1]:
            raise CheckpointMismatchError(
                f"{name} is {moments[0].shape[1]} wide in {folders[0].folder} and "
                f"{moment.shape[1]} in {folder.folder}. They are moments of different models."
            )
    return added([divided(m, 1 / w) for m, w in zip(moments, weights, strict=True)]).float()


def _seen(folders: Sequence[MomentFolder]) -> dict[str, dict[str, float]]:
    """What the moments of all sets together rest on."""
    return {
        name: {
            key: sum(folder.facts["seen"][name][key] for folder in folders)
            for key in ("tokens", "average")
        }
        for name in folders[0].index.tensors
    }


def _check_mergeable(folders: Sequence[MomentFolder]) -> None:
    first = folders[0]
    for other in folders[1:]:
        for key in ("model_fingerprint", "token_choice", "inputs", "outputs", "loss"):
            if first.facts.get(key) != other.facts.get(key):
                raise CheckpointMismatchError(
                    f"{first.folder} and {other.folder} cannot be added: {key} differs. Make both "
                    "with the same `perta moments` settings and checkpoint."
                )
    keyed = [folder for folder in folders if "rows_key" in folder.facts]
    if len({folder.facts["rows_key"] for folder in keyed}) > 1:
        names = " and ".join(str(folder.folder) for folder in keyed)
        raise ConfigError(
            f"{names} are of several ledgers, and no key recognises the rows of all of them. Leave "
            "all but one out, or measure with `perta moments`."
        )
    seen: dict[str, Path] = {}
    for folder in folders:
        for data in folder.facts["data_fingerprints"]:
            if data in seen:
                raise ConfigError(
                    f"{seen[data]} and {folder.folder} hold the same data set, which would count "
                    "twice. Leave one of them out."
                )
            seen[data] = folder.folder
