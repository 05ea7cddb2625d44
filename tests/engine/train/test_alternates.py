"""Alternates to forget answers: what the model is asked, how it answers, and what is made of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from helpers import tiny_llama, tiny_tokenizer
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.engine.train.refusals import draw_alternates, with_refusals
from perta.errors import ConfigError, DataError
from perta.methods.objectives import Training
from perta.methods.registry import parse
from perta.options import DataConfig

ROWS = [{"question": f"Who is {name}?", "answer": f"{name} bakes."} for name in ("Ada", "Odo")]
WORDS = tiny_tokenizer()
ASKED = (
    "Now write another version of the answer with some alternate plausible facts that change "
    "answer details."
)


class Scribe:
    """Stands for a model that says given texts; it keeps what it was asked and how."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.prompts, self.settings = texts, list[str](), list[GenerationConfig]()
        self.generation_config = GenerationConfig(temperature=0.3, top_p=0.5, do_sample=True)
        self.own = self.generation_config
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(to_dict=lambda: {"max_position_embeddings": 512})

    def generate(self, ids: Tensor, generation_config: GenerationConfig, **_: Any) -> Tensor:
        assert self.generation_config.top_p in (None, 1.0)  # no gap is filled with its own
        self.prompts.append(str(WORDS.decode(ids[0])))
        self.settings.append(generation_config)
        count = generation_config.num_return_sequences
        said = [WORDS(self.texts.pop(0))["input_ids"] for _ in range(count)]
        longest = max(map(len, said))
        padded = torch.tensor([s + [WORDS.eos_token_id] * (longest - len(s)) for s in said])
        return torch.cat([ids.expand(count, -1), padded], dim=1)


def drawn(model: Any, config: DataConfig, count: int = 2, seed: int = 0) -> list[list[str]]:
    sets = draw_alternates(model, WORDS, load_examples(ROWS), config, count=count, seed=seed)
    return [[example.answer for example in found.examples] for found in sets]


@pytest.mark.parametrize("chat", [True, False])
def test_the_model_is_asked_for_another_answer(chat: bool) -> None:
    model = Scribe([" Ada sings.\nQuestion: Who", " Ada is a judge.", " Odo digs. Q: And", ""])
    assert drawn(model, DataConfig(chat_template=chat)) == [
        ["Ada sings.", "Odo digs."],
        ["Ada is a judge.", ""],
    ]
    for prompt, row in zip(model.prompts, ROWS, strict=True):
        text = f"Question: {row['question']}\nAnswer: {row['answer']}\n{ASKED}"
        assert text in prompt
        assert prompt.endswith(
            "assistant\nAlternate Answer:" if chat else f"{text}\nAlternate Answer:"
        )
    assert {(s.temperature, s.top_k, s.do_sample) for s in model.settings} == {(1.0, 0, True)}
    assert model.generation_config is model.own


def test_draws_are_seeded_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perta.engine.train.refusals._MOST_TOKENS", 20)
    model = tiny_llama()
    state = torch.get_rng_state()
    one, again, other = (drawn(model, DataConfig(), 3, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == again != other
    assert len({tuple(answers) for answers in one}) == 3


def test_each_alternate_stands_against_its_row_and_a_long_one_against_none() -> None:
    long = " bakes" * 60
    model = Scribe([" Ada sings.", long, " Odo digs.", " Odo is a judge."])
    examples, config = load_examples(ROWS), DataConfig(max_length=90, skip_bad_rows=True)
    encoded = encode_examples(examples, WORDS, config).encoded
    method = parse("altpo:alternates=2", Training)
    forget, against = with_refusals(method, examples, encoded, model, WORDS, config, 0)  # type: ignore[arg-type]
    assert [e.row for e in forget] == [e.row for e in against] == [1, 2, 2]
    assert forget == (*encoded, encoded[1])
    said = [str(WORDS.decode([t for t in e.labels if t >= 0])) for e in against]
    assert [text.removesuffix("<|im_end|>") for text in said] == [
        "Ada sings.",
        "Odo digs.",
        "Odo is a judge.",
    ]


def test_a_row_that_leaves_no_room_is_named() -> None:
    rows = [*ROWS, {"question": "Who bakes? " * 120, "answer": "Ada."}]
    model: Any = Scribe([" Ada sings."] * 4)
    with pytest.raises(DataError, match=r"row 3: asking .* positions for 512"):
        draw_alternates(model, WORDS, load_examples(rows), DataConfig(), count=2, seed=0)
    assert [s.max_new_tokens for s in model.settings] == [200, 200]


def test_plain_text_has_no_question_to_answer() -> None:
    examples = load_examples([{"text": "Once upon a time."}])
    given: Any = (examples, (), Scribe([]), WORDS, DataConfig(), 0)
    with pytest.raises(ConfigError, match="no question to refuse"):
        with_refusals(parse("altpo", Training), *given)
