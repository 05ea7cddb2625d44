"""The shared engine against one plain forward pass per answer and the library's own decoding."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
import transformers as hf

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import IGNORE, Encoded
from perta.data.examples import Example, Message
from perta.data.tokens import encode_example, encode_prompt
from perta.errors import ConfigError
from perta.evidence import metrics
from perta.evidence.people import generate_people
from perta.evidence.scoring import items as items_module
from perta.evidence.scoring.answers import Score
from perta.evidence.scoring.cache import Masking, supports_prefixes
from perta.evidence.scoring.items import (
    Item,
    Outcome,
    ScoringOptions,
    _plain_generation,
    run_in_modes,
    run_items,
)
from perta.options import DataConfig

EOS = 2
OPTIONS = ScoringOptions(Masking(EOS), frozenset({EOS}), 4, 24)


def qa(question: str, answer: str) -> Example:
    return Example(1, "qa", (Message("user", question), Message("assistant", answer)), {})


def make_items(chat: bool, people: int = 3, wrong: bool = True) -> list[Item]:
    tokenizer, config = tiny_tokenizer(chat), DataConfig()
    items = []
    for row in generate_people(people=people, questions=2, seed=0):
        example = qa(row["question"], row["answer"])
        answers = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"][:2]]
        encoded = [
            encode_example(example.with_answer(text), tokenizer, config)
            for text in answers[: None if wrong else 1]
        ]
        prompt = tuple(encode_prompt(example, tokenizer, config))
        items.append(Item(tuple(encoded), prompt, moments=True))
    return items


def train(model: hf.PreTrainedModel, items: list[Item], steps: int = 25) -> hf.PreTrainedModel:
    """Learn the first answers in part, so that generation follows them for a while."""
    from perta.data.batch import collate
    from perta.models.loss import example_losses

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = collate([item.answers[0] for item in items], EOS)
    for _ in range(steps):
        optimizer.zero_grad()
        example_losses(model, batch).mean().backward()
        optimizer.step()
    return model


def architecture(name: str) -> hf.PreTrainedModel:
    return cast(hf.PreTrainedModel, build(name))


def build(name: str) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 384, "initializer_range": 0.2}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS}
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    if name == "llama":
        return tiny_llama()
    if name == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**common, **small, **ends)).eval()
    if name == "gemma2":  # sliding windows and soft-capped logits
        config = hf.Gemma2Config(**common, **small, **ends, sliding_window=16)
        return hf.Gemma2ForCausalLM(config).eval()
    config2 = hf.GPT2Config(**common, **ends, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    return hf.GPT2LMHeadModel(config2).eval()


def oracle_score(model: hf.PreTrainedModel, encoded: Encoded) -> dict[str, float | None]:
    """Each number from one unpadded pass over the whole sequence, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([encoded.input_ids])).logits[0, :-1].double()
    labels = torch.tensor(encoded.labels[1:])
    every, targets = logits[labels != IGNORE].log_softmax(-1), labels[labels != IGNORE]
    lp = every.gather(1, targets[:, None])[:, 0]
    mu = (every.exp() * every).sum(-1)
    var = (every.exp() * every**2).sum(-1) - mu**2
    right = (every.argmax(-1) == targets)[:-1].tolist()
    return {
        "tokens": len(targets),
        "loss": -float(lp.mean()),
        "exact_memorization": metrics.exact_memorization(right),
        "extraction_strength": metrics.extraction_strength(right),
        "min_k": metrics.min_k(lp[:-1]),
        "min_k_plus_plus": metrics.min_k_plus_plus(lp[:-1], mu[:-1], var[:-1]),
    }


def present(score: Score) -> dict[str, float]:
    return {k: v for k, v in dataclasses.asdict(score).items() if v is not None}


def assert_same_scores(outcomes: list[Outcome], others: list[Outcome]) -> None:
    for one, other in zip(outcomes, others, strict=True):
        assert one.generated == other.generated
        for a, b in zip(one.scores, other.scores, strict=True):
            assert present(a) == pytest.approx(present(b), abs=2e-5)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_engine_equals_plain_passes(name: str, chat: bool) -> None:
    items = make_items(chat)
    model = train(architecture(name), items)
    assert supports_prefixes(model)
    followed = 0
    for item, outcome in zip(items, run_items(model, items, OPTIONS), strict=True):
        for k, (encoded, score) in enumerate(zip(item.answers, outcome.scores, strict=True)):
            expected = oracle_score(model, encoded)
            if k > 0:  # asked for with the first answer only
                assert score.min_k_plus_plus is None
                del expected["min_k_plus_plus"]
            assert present(score) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert item.prompt is not None
        assert outcome.generated == _plain_generation(model, item.prompt, OPTIONS)
        followed += outcome.generated[:3] == item.answers[0].input_ids[len(item.prompt) :][:3]
    assert followed > 0  # otherwise nothing was drafted


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_order_and_company_change_nothing(batch_size: int) -> None:
    items = make_items(chat=True)
    model = train(architecture("llama"), items)
    reference = run_items(model, items, OPTIONS)
    other = run_items(model, items[::-1], dataclasses.replace(OPTIONS, batch_size=batch_size))
    assert_same_scores(other[::-1], reference)
    assert_same_scores(run_items(model, items[2:3], OPTIONS), reference[2:3])


def test_learned_answers_are_generated_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    items = make_items(chat=True, people=2, wrong=False)
    model = train(architecture("llama"), items, steps=150)
    options = dataclasses.replace(OPTIONS, max_new_tokens=200)
    monkeypatch.setattr(items_module._Run, "_step", lambda _self: pytest.fail("decoded"))
    for item, outcome in zip(items, run_items(model, items, options), strict=True):
        assert outcome.scores[0].exact_memorization == 1
        assert outcome.generated is not None
        assert outcome.generated[-1] == EOS
        assert item.answers[0].input_ids[len(item.prompt or ()) :][: len(outcome.generated)] == (
            outcome.generated
        )


def test_over_a_batch_of_answers_grows_and_never_more_than_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers that never end: more are begun while no more than a batch is growing."""
    growing: list[int] = []
    step = items_module._Run._step

    def counted(run: items_module._Run) -> None:
        growing.append(len(run.growing))
        step(run)

    monkeypatch.setattr(items_module._Run, "_step", counted)
    endless = dataclasses.replace(OPTIONS, end_ids=frozenset(), batch_size=2, max_new_tokens=8)
    items = make_items(chat=False)
    run_items(architecture("llama"), items, endless)
    assert len(items) == 6
    # Four at once to their end, then the last two.
    assert set(growing) == {4, 2}
    assert growing.index(2) == growing.count(4)


def test_generation_limits() -> None:
    items = make_items(chat=True, wrong=False)
    model = architecture("llama")
    for outcome in run_items(model, items, dataclasses.replace(OPTIONS, max_new_tokens=3)):
        assert outcome.generated is not None
        assert len(outcome.generated) <= 3
    longest = max(len(item.prompt or ()) for item in items) + 5
    for item, outcome in zip(
        items, run_items(model, items, dataclasses.replace(OPTIONS, longest=longest)), strict=True
    ):
        assert len(item.prompt or ()) + len(outcome.generated or ()) <= longest


def test_prompt_that_the_answer_does_not_continue() -> None:
    """Tokens across the boundary, or another prompt altogether: no draft, same answer."""
    items = make_items(chat=False, wrong=False)
    model = architecture("llama")
    changed = [dataclasses.replace(item, prompt=(*(item.prompt or ()), 5, 7)) for item in items]
    for item, outcome in zip(changed, run_items(model, changed, OPTIONS), strict=True):
        assert item.prompt is not None
        assert outcome.generated == _plain_generation(model, item.prompt, OPTIONS)


def test_plain_text_without_prompt() -> None:
    ids = tuple(range(10, 40))
    items = [Item((Encoded(ids[:n], (IGNORE, *ids[1:n]), 1),), moments=True) for n in (30, 7, 12)]
    model = architecture("llama")
    for item, outcome in zip(items, run_items(model, items, OPTIONS), strict=True):
        assert outcome.generated is None
        expected = pytest.approx(oracle_score(model, item.answers[0]), rel=1e-4, abs=1e-4)
        assert dataclasses.asdict(outcome.scores[0]) == expected


def test_architecture_without_prefixes_takes_the_plain_path() -> None:
    items = make_items(chat=True, people=1)
    config = hf.MambaConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.2
    )
    torch.manual_seed(0)
    model = hf.MambaForCausalLM(config).eval()
    assert not supports_prefixes(model)
    for item, outcome in zip(items, run_items(model, items, OPTIONS), strict=True):
        for encoded, score in zip(item.answers, outcome.scores, strict=True):
            assert score.loss == pytest.approx(oracle_score(model, encoded)["loss"], abs=1e-4)
        assert outcome.generated
    hidden = dataclasses.replace(OPTIONS, masking=Masking(EOS, EOS))
    with pytest.raises(ConfigError, match="--compat"):
        run_items(model, items, hidden)


def published_score(model: hf.PreTrainedModel, encoded: Encoded) -> float:
    """Loss with the mask `id != pad` and positions 0 ... n-1."""
    ids = torch.tensor([encoded.input_ids])
    with torch.no_grad():
        logits = model(ids, attention_mask=(ids != EOS).long()).logits[0, :-1].double()
    labels = torch.tensor(encoded.labels[1:])
    kept = labels != IGNORE
    return float(torch.nn.functional.cross_entropy(logits[kept], labels[kept]))


def published_generation(model: hf.PreTrainedModel, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The library's generation with the mask `id != pad`: positions skip masked tokens."""
    ids = torch.tensor([prompt])
    config = hf.GenerationConfig(
        max_new_tokens=OPTIONS.max_new_tokens, eos_token_id=EOS, pad_token_id=EOS, do_sample=False
    )
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=(ids != EOS).long(), generation_config=config
    )
    return tuple(output[0, len(prompt) :].tolist())


def test_compatibility_reproduces_published_masking() -> None:
    items = make_items(chat=True)
    model = train(architecture("llama"), items)
    hidden = dataclasses.replace(OPTIONS, masking=Masking(EOS, EOS))
    right = run_items(model, items, OPTIONS)
    different = 0
    seen: list[int] = []
    compat = run_in_modes(model, items, hidden, lambda place, _outcome: seen.append(place))
    for item, outcome, default in zip(items, compat, right, strict=True):
        for encoded, score, other in zip(item.answers, outcome.scores, default.scores, strict=True):
            assert score.loss == pytest.approx(published_score(model, encoded), abs=1e-4)
            different += abs(score.loss - other.loss) > 1e-3
        assert outcome.generated == published_generation(model, item.prompt or ())
        different += outcome.generated != default.generated
    assert different > len(items)
    assert sorted(seen) == list(range(len(items)))


def test_outcome_survives_json() -> None:
    items = make_items(chat=True, people=1)
    outcome = run_items(architecture("llama"), items, OPTIONS)[0]
    assert Outcome.from_json(dataclasses.asdict(outcome)) == outcome


def test_training_mode_is_restored() -> None:
    model = architecture("llama").train()
    run_items(model, make_items(chat=True, people=1, wrong=False), OPTIONS)
    assert model.training
