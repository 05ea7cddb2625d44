"""What is to stand in place of forget answers: refusals, alternates or the tokens of words.

Maini et al., arXiv 2401.06121, draw one of a hundred such sentences for each forget question;
these are our own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import cycle
from typing import TYPE_CHECKING

import torch

from perta.data.batch import IGNORE, Encoded
from perta.data.examples import Example, ExampleSet, Message
from perta.data.tokens import encode_examples, encode_prompt, text_ids, uses_chat_template
from perta.errors import ConfigError, DataError
from perta.methods.objectives import Training
from perta.models.load import generate, longest_input, pad_id
from perta.options import DataConfig
from perta.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PLACE = files("perta").joinpath("engine", "train", "refusals.txt")
REFUSALS = tuple(_PLACE.read_text("utf-8").splitlines())
_ASKED = (
    "Question: {}\nAnswer: {}\nNow write another version of the answer with some alternate "
    "plausible facts that change answer details."
)
_BEGUN = "Alternate Answer:"
_MOST_TOKENS = 200
_NEXT = re.compile("Question:|Q:")


def with_refusals(
    method: Training,
    examples: ExampleSet,
    encoded: Sequence[Encoded],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    seed: int,
) -> tuple[tuple[Encoded, ...], tuple[Encoded, ...]]:
    """Forget examples, and as many that a method takes as refusals to them, pair by pair.

    `encoded` are the token sequences of `examples`, the forget set, and `model` is θ_full. A row
    that is too long with either answer is left out where bad rows are, and else a DataError; each
    row is there once for every alternate that is drawn. Methods without refusals have none.
    ConfigError as of `check_questions`, which says so before a model is loaded.
    """
    if not method.refusals:
        return tuple(encoded), ()
    check_questions(method, examples)
    if method.words:
        words: list[int] = tokenizer(method.words, add_special_tokens=False)["input_ids"]
        return tuple(encoded), tuple(_relabelled(example, words) for example in encoded)
    sets = [refuse(examples, seed)]
    if count := method.alternates:
        sets = draw_alternates(model, tokenizer, examples, config, count=count, seed=seed)
    forget, refusals = [], []
    for answers in sets:
        made = encode_examples(answers, tokenizer, config, longest=longest_input(model)).encoded
        kept = _same_rows(made, encoded)
        refusals += kept
        forget += _same_rows(encoded, kept)
    return tuple(forget), tuple(refusals)


def _same_rows(examples: Sequence[Encoded], others: Sequence[Encoded]) -> list[Encoded]:
    """Examples whose row is among the others': a row may be too long with one answer only."""
    rows = {example.row for example in others}
    return [example for example in examples if example.row in rows]


def _relabelled(example: Encoded, tokens: Sequence[int]) -> Encoded:
    """The same input; its labels become these tokens, over and over."""
    others = cycle(tokens)
    labels = (IGNORE if label == IGNORE else next(others) for label in example.labels)
    return replace(example, labels=tuple(labels))


def check_questions(method: Training, examples: ExampleSet) -> None:
    """Stop at plain text, for a method that needs questions."""
    is_asking = method.refusals and not method.words
    if is_asking and any(example.kind == "text" for example in examples.examples):
        raise ConfigError(
            f"{examples.source} is plain text, and there is no question to refuse. Use a training "
            "method without refusals, such as `npo-retain`."
        )


def refuse(examples: ExampleSet, seed: int) -> ExampleSet:
    """The same prompts, each with a refusal drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(REFUSALS), (len(examples),), generator=generator).tolist()
    refused = (
        example.with_answer(REFUSALS[i])
        for example, i in zip(examples.examples, drawn, strict=True)
    )
    return replace(examples, examples=tuple(refused))


# --- alternates, drawn from the full model -------------------------------------------------------


@torch.no_grad()
def draw_alternates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSet,
    config: DataConfig,
    *,
    count: int,
    seed: int,
) -> list[ExampleSet]:
    """Sets with the same questions and other answers, drawn at temperature 1 from all tokens.

    θ_full, in evaluation mode, is asked to change the answers, in its chat template if `config`
    says so. DataError where a row leaves no position for an answer.

    Source: Mekala et al., arXiv 2409.13474; question and limits are those of its code.
    """
    drawn, longest = [], longest_input(model) or sys.maxsize
    gpus = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), track("Drawing alternates", len(examples)) as advance:
        torch.manual_seed(seed)
        for example in examples.examples:
            asked = _question(example, tokenizer, config)
            room = min(_MOST_TOKENS, longest - len(asked))
            if room < 1:
                raise DataError(
                    f"{examples.source}, row {example.row}: asking for another answer takes "
                    f"{len(asked)} tokens, and the model has positions for {longest}. Shorten the "
                    "row, or use `dpo`, which draws none."
                )
            drawn.append(_draw(model, tokenizer, asked, count, room))
            advance(1)
    return [
        replace(examples, examples=tuple(e.with_answer(a) for e, a in pairs))
        for answers in zip(*drawn, strict=True)
        for pairs in [zip(examples.examples, answers, strict=True)]
    ]


def _question(
    example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[int]:
    """Tokens that ask for another answer and begin it."""
    text = _ASKED.format(example.prompt, example.answer)
    asked = replace(example, messages=(Message("user", text), Message("assistant", _BEGUN)))
    if not uses_chat_template(asked, tokenizer, config):
        return text_ids(f"{text}\n{_BEGUN}", tokenizer)
    begun: list[int] = tokenizer(_BEGUN, add_special_tokens=False)["input_ids"]
    return [*encode_prompt(asked, tokenizer, config), *begun]


def _draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    count: int,
    room: int,
) -> list[str]:
    """Answers to one prompt of at most `room` tokens, each up to where another question begins."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    answers = generate(
        model,
        prompt,
        max_new_tokens=room,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=count,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=pad_id(tokenizer),
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [_NEXT.split(text)[0].strip() for text in texts]
