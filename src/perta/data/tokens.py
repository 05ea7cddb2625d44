"""Examples as token sequences in which answers carry loss.

Example -> `encode_examples` -> Encoded
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from perta.data.batch import IGNORE, Encoded
from perta.data.examples import Example, ExampleSet, Message, report_bad_rows
from perta.errors import DataError
from perta.options import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Templates that print today's date would tokenise the same row differently tomorrow.
_TEMPLATE_DATE = "10 Apr 2025"


@dataclass(frozen=True)
class EncodedSet:
    """Token sequences of a set; `skipped` as in `ExampleSet`."""

    encoded: tuple[Encoded, ...] = field(repr=False)
    skipped: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def labelled_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORE for e in self.encoded for label in e.labels[1:])


def encode_examples(
    examples: ExampleSet,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    *,
    longest: int | None = None,
) -> EncodedSet:
    """Tokenise a set.

    Args:
        examples: what `load_examples` returned.
        tokenizer: the model's tokenizer.
        config: chat template, system prompt and length limit.
        longest: most tokens the model takes.

    Returns:
        One token sequence per example; for plain text one per window of at most `max_length`
        tokens, those of one text equally long but for a token.

    Raises:
        DataError: answers that are empty or cut off at the length limit (unless skipped).
        EmptyDatasetError: nothing is left.
    """
    config = config or DataConfig()
    limit = min(config.max_length, longest or config.max_length)
    encoded: list[Encoded] = []
    bad: list[str] = []
    for example in examples.examples:
        whole = encode_example(example, tokenizer, config)
        if example.kind == "text":
            encoded.extend(_windows(whole, limit))
        elif len(whole.input_ids) > limit:
            size = len(whole.input_ids)
            bad.append(f"row {example.row}: answer cut off, {size} tokens and the limit is {limit}")
        elif not any(label != IGNORE for label in whole.labels[1:]):
            bad.append(f"row {example.row}: no answer tokens")
        else:
            encoded.append(whole)
    cure = " Raise --max-length if the model takes more." if bad else ""
    report_bad_rows(examples.source, bad, config.skip_bad_rows, left=len(encoded), cure=cure)
    return EncodedSet(tuple(encoded), examples.skipped + tuple(bad))


def encode_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Encoded:
    """Tokenise one example; every assistant turn carries loss, nothing else does.

    The token that ends the answer is labelled too, and eos is appended where the sequence does
    not end with it, so that the loss covers stopping.

    Args:
        example: the example.
        tokenizer: the model's tokenizer.
        config: chat template and system prompt.

    Returns:
        The whole sequence, not truncated.
    """
    turns = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
    ids = _token_ids(_render(example, len(example.messages), False, tokenizer, config), tokenizer)
    labels = [IGNORE] * len(ids)
    for turn in turns:
        start = common_prefix(ids, encode_prompt(example, tokenizer, config, turn))
        stop = len(ids)
        if turn != turns[-1]:
            end = _token_ids(_render(example, turn + 1, False, tokenizer, config), tokenizer)
            stop = common_prefix(ids, end)
        labels[start:stop] = ids[start:stop]
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids, labels = [*ids, eos], [*labels, eos]
    return Encoded(tuple(ids), tuple(labels), example.row)


def encode_prompt(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    turn: int = -1,
) -> list[int]:
    """Tokens before the assistant turn `turn`, with the generation prompt; empty for text."""
    stop = turn % len(example.messages)
    if example.kind == "text":
        return []
    return _token_ids(_render(example, stop, True, tokenizer, config), tokenizer)


def uses_chat_template(
    example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> bool:
    """Whether the example goes through the tokenizer's chat template."""
    return bool(example.kind in ("qa", "chat") and config.chat_template and tokenizer.chat_template)


def _render(
    example: Example,
    stop: int,
    generate: bool,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[str, bool]:
    """Text of the first `stop` messages, and whether the tokenizer adds special tokens."""
    messages = example.messages[:stop]
    if uses_chat_template(example, tokenizer, config):
        return _apply_template(messages, generate, tokenizer, config), False
    if example.kind in ("text", "completion"):
        return "".join(m.content for m in messages), True
    # The space belongs to the answer: most tokenizers join it with the first word.
    lines = [
        f"Question: {m.content}\nAnswer:"
        if m.role == "user"
        else f" {m.content}"
        if m.role == "assistant"
        else m.content
        for m in messages
    ]
    return "\n\n".join("".join(pair) for pair in _pairs(lines, messages)), True


def _pairs(lines: Sequence[str], messages: Sequence[Message]) -> list[list[str]]:
    """Group an answer with the question before it."""
    groups: list[list[str]] = []
    for line, message in zip(lines, messages, strict=True):
        if message.role == "assistant" and groups:
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups


def _apply_template(
    messages: Sequence[Message],
    generate: bool,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> str:
    chat = [{"role": m.role, "content": m.content} for m in messages]
    with_system = chat
    if config.system_prompt and chat[0]["role"] != "system":
        with_system = [{"role": "system", "content": config.system_prompt}, *chat]
    try:
        text = tokenizer.apply_chat_template(
            with_system,
            tokenize=False,
            add_generation_prompt=generate,
            date_string=_TEMPLATE_DATE,
        )
    except Exception as error:
        # Some templates (Gemma's) refuse a system message; others fail for good reasons.
        if with_system is chat or "system" not in str(error).lower():
            raise DataError(f"The tokenizer's chat template refused a row: {error}") from error
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generate, date_string=_TEMPLATE_DATE
        )
    return str(text)


def _token_ids(rendered: tuple[str, bool], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text, special = rendered
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    # A tokenizer that closes every text with eos would put it between prompt and answer.
    if (
        special
        and ids
        and ids[-1] == tokenizer.eos_token_id
        and not text.endswith(str(tokenizer.eos_token))
    ):
        ids = ids[:-1]
    return ids


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common prefix: a token that spans prompt and answer is answer."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _windows(whole: Encoded, limit: int) -> list[Encoded]:
    """Cut plain text into as few windows as fit the limit; every token but the first has a label.

    A window counts as one example. So that a last one with few labels neither stands without
    context nor counts as much as a full one, it shows as many tokens before them as fit, and
    windows weigh by their labels: the mean over a text's windows is the mean over its tokens.
    """
    ids = whole.input_ids
    edges = [*range(1, len(ids), limit - 1), len(ids)]
    mean = (len(ids) - 1) / (len(edges) - 1) if len(edges) > 1 else 1.0
    windows = []
    for start, stop in itertools.pairwise(edges):
        first = max(0, stop - limit)
        labels = (*[IGNORE] * (start - first), *ids[start:stop])
        windows.append(Encoded(ids[first:stop], labels, whole.row, (stop - start) / mean))
    return windows
