"""MUSE: knowledge and verbatim memorization of news or books, and privacy leakage.

Files are CORPUS_SUBSET_SPLIT.jsonl, such as news_knowmem_forget_qa.jsonl with its ten
in-context pairs in news_knowmem_forget_qa_icl.jsonl, news_verbmem_forget.jsonl (columns prompt
and gt) and news_privleak_forget.jsonl and news_privleak_holdout.jsonl (column text).

`compat` differs from the default in three places: attention does not see padding tokens inside
a prompt, a knowmem prompt is cut at 512 tokens (by default such a prompt is refused, because
what is cut is the question), and plain text ends without eos.

Source: Shi et al., arXiv 2407.06460; common evaluation open-unlearning, commit d3d7cf9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.batch import IGNORE, Encoded
from perta.data.examples import Example, ExampleSet
from perta.data.tokens import text_ids
from perta.errors import DataError
from perta.evidence.benchmark import (
    Benchmark,
    Given,
    Journal,
    Reference,
    open_journal,
    run_with_journal,
)
from perta.evidence.published._shared import (
    QA,
    attack_entry,
    hub_files,
    load_file,
    privleak_entry,
    published_options,
)
from perta.evidence.results import Results, decode, missing, rouge_row, table
from perta.evidence.scoring.items import Item, Outcome, ScoringOptions
from perta.evidence.settings import MuseConfig
from perta.models.load import batch_of, longest_input
from perta.options import DataConfig

_SUBSETS = {
    "knowmem": ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"),
    "verbmem": ("forget",),
    "privleak": ("forget", "holdout", "retain"),
}
_KNOWMEM_TOKENS = 32
_VERBMEM_TOKENS = 128
_PROMPT_LENGTH = 512  # tokens a knowmem prompt may have
_TEXT_LENGTH = 2048  # tokens of a privleak text that are looked at
_STOPS = ("\n\n", "\nQuestion", "Question:")  # a knowmem answer ends before the first of these

_VERBATIM = DataConfig(format="completion", prompt_column="prompt", answer_column="gt")
_TEXT = DataConfig(format="text", text_column="text")


@dataclass(frozen=True)
class _Subset:
    """One metric's items, or why there are none; `name` begins its rows in the journal."""

    name: str
    items: tuple[Item, ...] = ()
    references: tuple[str, ...] = field(default=(), repr=False)
    reason: str | None = None


class Muse(Benchmark[MuseConfig]):
    """`perta bench muse`."""

    name = "muse"
    config = MuseConfig

    def folder(self, config: MuseConfig) -> Path:
        """The files of every corpus and subset."""
        place = f"{config.data}/MUSE-{config.corpus.capitalize()}"
        parts: dict[Path | str, tuple[str, str, str]] = {
            f"{config.corpus}_{subset}_{split}.jsonl": (place, subset, split)
            for subset, splits in _SUBSETS.items()
            for split in splits
        }
        return hub_files(config.data, "muse", parts)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: MuseConfig,
        given: Given,
    ) -> Results:
        """forget_knowmem_ROUGE, retain_knowmem_ROUGE, forget_verbmem_ROUGE, mia_min_k, privleak.

        ROUGE is ROUGE-L F1. What lacks its file is None, with the reason under "missing". DataError
        where no file is there, DivergenceError where the loss is not finite.
        """
        files = _Files(given.data, tokenizer, longest_input(model), config)
        subsets = {
            "forget_knowmem_ROUGE": files.knowmem("forget"),
            "retain_knowmem_ROUGE": files.knowmem("retain"),
            "forget_verbmem_ROUGE": files.verbmem(),
            "forget": files.texts("forget"),
            "holdout": files.texts("holdout"),
        }
        if all(subset.reason for subset in subsets.values()):
            reasons = "; ".join(str(subset.reason) for subset in subsets.values())
            raise DataError(f"No MUSE metric can be computed from {given.data}: {reasons}.")
        depends_on = {
            "benchmark": "muse",
            "items": [
                (s.name, [(item.answers[0].input_ids, item.prompt) for item in s.items])
                for s in subsets.values()
            ],
            "settings": (config.compat, str(model.dtype)),
        }
        batch_size = batch_of(config.compute, 16)
        options = published_options(model, tokenizer, batch_size, compat=config.compat)
        with open_journal(given.journal, depends_on, {"model": model}) as journal:
            outcomes = {
                name: _run(model, tokenizer, subset, options, journal)
                for name, subset in subsets.items()
            }
        return _muse_results(subsets, outcomes, tokenizer, given.reference)


def _muse_results(
    subsets: Mapping[str, _Subset],
    outcomes: Mapping[str, Sequence[Outcome]],
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference | None,
) -> Results:
    """Every metric, from what was measured."""
    results: Results = {}
    for key, subset in subsets.items():
        if key.endswith("_ROUGE"):
            results[key] = _rouge(subset, outcomes[key], tokenizer)
    reasons = [str(subsets[n].reason) for n in ("forget", "holdout") if subsets[n].reason]
    if reasons:
        absent = missing("; ".join(reasons))
        return results | {"mia_min_k": absent, "privleak": absent}
    sides = {n: [o.scores[0].min_k for o in outcomes[n]] for n in ("forget", "holdout")}
    results["mia_min_k"] = attack_entry(sides["forget"], sides["holdout"])
    results["privleak"] = privleak_entry(results["mia_min_k"], reference)
    return results


def _cut_answer(text: str) -> str:
    """A knowmem answer up to where the model goes on to another question."""
    for stop in _STOPS:
        text = text.split(stop)[0]
    return text.strip()


# --- items ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """The files of one corpus, as items for one model."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    longest: int | None
    config: MuseConfig

    def _load(self, name: str, columns: DataConfig) -> ExampleSet | None:
        return load_file(self.folder, name, columns, self.config.limit)

    def knowmem(self, split: str) -> _Subset:
        """Questions behind ten in-context pairs."""
        name = f"{split}_knowmem"
        files = [f"{self.config.corpus}_knowmem_{split}_{kind}.jsonl" for kind in ("qa", "qa_icl")]
        questions, shots = self._load(files[0], QA), load_file(self.folder, files[1], QA)
        if questions is None or shots is None:
            absent = files[0] if questions is None else files[1]
            return _Subset(name, reason=f"{absent} is not there")
        pairs = [f"Question: {e.prompt}\nAnswer: {e.answer}\n\n" for e in shots.examples]
        items = []
        for example in questions.examples:
            text = "".join(pairs) + f"Question: {example.prompt}\nAnswer: "
            prompt = tuple(text_ids(text, self.tokenizer))
            if len(prompt) > _PROMPT_LENGTH and not self.config.compat:
                return _Subset(
                    name,
                    reason=f"{files[0]}, row {example.row}: its prompt has {len(prompt)} tokens "
                    f"with this tokenizer and the limit is {_PROMPT_LENGTH}; cutting it would cut "
                    "the question",
                )
            prompt = prompt[:_PROMPT_LENGTH]
            items.append(Item((_continued(prompt, text + example.answer, self.tokenizer),), prompt))
        return _Subset(name, tuple(items), tuple(e.answer.strip() for e in questions.examples))

    def verbmem(self) -> _Subset:
        """The start of a text, to be continued as the text goes on."""
        file, longest = f"{self.config.corpus}_verbmem_forget.jsonl", self.longest
        rows = self._load(file, _VERBATIM)
        if rows is None:
            return _Subset("verbmem", reason=f"{file} is not there")
        items = []
        for example in rows.examples:
            prompt = tuple(text_ids(example.prompt, self.tokenizer))
            if longest is not None and len(prompt) + _VERBMEM_TOKENS > longest:
                reason = (
                    f"{file}, row {example.row}: a prompt of {len(prompt)} tokens and "
                    f"{_VERBMEM_TOKENS} new ones, and the model takes {longest}"
                )
                return _Subset("verbmem", reason=reason)
            whole = f"{example.prompt.rstrip()} {example.answer.lstrip()}"
            continued = _continued(prompt, whole, self.tokenizer, _VERBMEM_TOKENS)
            items.append(Item((continued,), prompt))
        return _Subset("verbmem", tuple(items), tuple(e.answer.strip() for e in rows.examples))

    def texts(self, split: str) -> _Subset:
        """Plain texts of which every token but the first is scored."""
        file = f"{self.config.corpus}_privleak_{split}.jsonl"
        rows = self._load(file, _TEXT)
        if rows is None:
            return _Subset(f"privleak_{split}", reason=f"{file} is not there")
        length = min(_TEXT_LENGTH, self.longest or _TEXT_LENGTH)
        items = []
        for example in rows.examples:
            if len(text_ids(example.answer, self.tokenizer)) < 2:
                raise DataError(f"{rows.source}, row {example.row}: a text of a single token.")
            items.append(_text_item(example, self.tokenizer, length, self.config.compat))
        return _Subset(f"privleak_{split}", tuple(items))


def _text_item(
    example: Example, tokenizer: PreTrainedTokenizerBase, length: int, compat: bool
) -> Item:
    ids = tuple(text_ids(example.answer, tokenizer)[:length])
    eos = tokenizer.eos_token_id
    # The last label is left out of Min-K, so that without eos a token of the text goes missing.
    if not compat and eos is not None and len(ids) < length and ids[-1] != eos:
        ids = (*ids, int(eos))
    return Item((Encoded(ids, (IGNORE, *ids[1:]), example.row),))


def _continued(
    prompt: tuple[int, ...], text: str, tokenizer: PreTrainedTokenizerBase, most: int | None = None
) -> Encoded:
    """The reference behind the prompt, for generation to follow as far as the model does."""
    ids = tuple(text_ids(text, tokenizer))
    if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
        # Another split into tokens where they meet: the first token of the text will do.
        ids = (*prompt, ids[-1])
    ids = ids[: len(prompt) + most] if most else ids
    return Encoded(ids, (IGNORE,) * len(prompt) + ids[len(prompt) :], 0)


# --- running and results --------------------------------------------------------------------


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    subset: _Subset,
    options: ScoringOptions,
    journal: Journal,
) -> list[Outcome]:
    named = {f"{subset.name}:{i}": item for i, item in enumerate(subset.items)}
    if not named:
        return []
    if subset.name.endswith("knowmem"):
        stop = partial(_is_cut, tokenizer)
        options = replace(options, max_new_tokens=_KNOWMEM_TOKENS, stop=stop)
    elif subset.name == "verbmem":
        options = replace(options, max_new_tokens=_VERBMEM_TOKENS)
    return list(run_with_journal(f"MUSE {subset.name}", model, named, options, journal).values())


def _is_cut(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> bool:
    """Whether an answer holds what it is cut at."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return any(mark in text for mark in _STOPS)


def _rouge(
    subset: _Subset, outcomes: Sequence[Outcome], tokenizer: PreTrainedTokenizerBase
) -> Results:
    if subset.reason:
        return missing(subset.reason)
    knowmem = subset.name.endswith("knowmem")
    rows = []
    for item, reference, outcome in zip(subset.items, subset.references, outcomes, strict=True):
        # Stops may begin a text: what comes before them is cut before spaces are.
        text = str(tokenizer.decode(list(outcome.generated or ()), skip_special_tokens=True))
        answer = _cut_answer(text) if knowmem else text.strip()
        rows.append(rouge_row(reference, answer, decode(tokenizer, item.prompt or ())))
    return table(rows, "rougeL_f1")
