"""Other answers to forget questions, drawn from the full model, for methods that prefer them."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from perta.data.examples import Example, ExampleSet, Message
from perta.data.tokens import encode_prompt, text_ids, uses_chat_template
from perta.errors import DataError
from perta.models.load import generate, longest_input, pad_id
from perta.options import DataConfig
from perta.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ASKED = (
    "Question: {}\nAnswer: {}\nNow write another version of the answer with some alternate "
    "plausible facts that change answer details."
)
_BEGUN = "Alternate Answer:"
_MOST_TOKENS = 200
_NEXT = re.compile("Question:|Q:")


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

    Args:
        model: θ_full, in evaluation mode.
        tokenizer: the model's.
        examples: questions with their answers, which the model is asked to change.
        config: whether the model is asked in its chat template.
        count: number of sets.
        seed: of the draws.

    Raises:
        DataError: a row that leaves no position for an answer.

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
