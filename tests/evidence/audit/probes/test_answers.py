"""Drawn and greedy answers: which facts they say, and how often."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from audit_cases import material, tiny_double, view

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import Encoded
from perta.data.words import stems
from perta.evidence.audit.judge import Found
from perta.evidence.audit.probe import Effort, Material
from perta.evidence.audit.probes import answers
from perta.evidence.benchmark import Journal
from perta.evidence.quick import scoring_options

EFFORT = Effort(samples=20, max_new_tokens=12)


def test_leak_at_k_is_the_share_of_subsets_with_a_hit() -> None:
    for n, c, k in [(6, 0, 3), (6, 1, 1), (6, 2, 3), (6, 5, 2), (6, 6, 6), (6, 1, 6)]:
        subsets = list(combinations(range(n), k))
        hit = sum(any(i < c for i in subset) for subset in subsets)
        assert answers.leak_at(n, c, k) == pytest.approx(hit / len(subsets))


@pytest.mark.parametrize("cached", [True, False])
def test_tokens_are_drawn_at_the_quantiles_of_the_tempered_probabilities(
    cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta.evidence.audit.probes.answers.supports_prefixes", lambda _: cached)
    model, prompt = tiny_llama(), [5, 9, 60, 7]
    ends = frozenset(range(0, 384, 3))  # so that answers end at different places
    options = replace(scoring_options(model, tiny_tokenizer(), [], 16, 5), end_ids=ends)
    uniforms = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = answers.draw_answers(model, prompt, options, uniforms, 0.7)
    double = tiny_double(model)
    for answer, row in zip(found, uniforms.tolist(), strict=True):
        ids = list(prompt)
        for token, quantile in zip(answer, row, strict=False):
            with torch.no_grad():
                logits = double(torch.tensor([ids])).logits[0, -1] / 0.7
            sums = logits.softmax(-1).cumsum(-1).tolist()
            assert token == next(t for t, total in enumerate(sums) if total > quantile)
            ids.append(token)
        assert len(answer) == 5 or answer[-1] in options.end_ids
        assert options.end_ids.isdisjoint(answer[:-1])
    assert len({len(answer) for answer in found}) > 2
    one = [answers.draw_answers(model, prompt, options, u[None], 0.7)[0] for u in uniforms]
    assert one == found


def test_hits_are_as_many_as_the_probability_of_the_fact_lets_expect(tmp_path: Path) -> None:
    # The fact is one token: its probability in one draw is known exactly.
    made, model = material(tmp_path, people=2, questions=1), tiny_llama()
    seen = view(made, model, effort=Effort(samples=400, max_new_tokens=1))
    (item, *_), tokenizer = seen.items("forget"), tiny_tokenizer()
    assert item.prompt is not None
    with torch.no_grad():
        logits = tiny_double(model)(torch.tensor([item.prompt])).logits[0, -1]
    words = {t: stems(str(tokenizer.decode([t]))) for t in range(384)}
    token = max((t for t in words if words[t]), key=lambda t: float(logits[t]))
    alike = [t for t in words if answers.says(words[t], [words[token]])]
    expected = float(logits.softmax(-1)[alike].sum())
    ids = (*item.prompt, token)
    fact = replace(
        made.facts["forget"][0], encoded=Encoded(ids, (*[-100] * len(item.prompt), token), 1)
    )
    facts = {**made.facts, "forget": (fact, *made.facts["forget"][1:])}
    seen = view(replace(made, facts=facts), model, effort=seen.effort)
    rows = answers.DrawnPlainly().run(seen, "forget")
    deviation = (400 * expected * (1 - expected)) ** 0.5
    assert abs(rows.more["hits"][0] - 400 * expected) <= 4 * deviation
    assert rows.scores[0] == pytest.approx(answers.leak_at(400, rows.more["hits"][0], 16))


def test_draws_do_not_depend_on_the_batch_and_are_kept(tmp_path: Path) -> None:
    made = material(tmp_path)
    with Journal(tmp_path / "journal", "key") as journal:
        before = answers.DrawnSharply().run(view(made, effort=EFFORT, journal=journal), "forget")
    small = replace(EFFORT, batch_size=1)
    assert answers.DrawnSharply().run(view(made, effort=small), "forget") == before
    assert before.more["answers"] == 20
    assert list(before.more["leak_at"]) == [1, 2, 4, 8, 16, 20]
    with Journal(tmp_path / "journal", "key") as journal:
        seen = view(made, effort=EFFORT, journal=journal)
        seen.model = None  # type: ignore[assignment]
        seen.items = None  # type: ignore[method-assign,assignment]
        assert answers.DrawnSharply().run(seen, "forget") == before


def test_words_of_a_fact_are_whole_and_in_order() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Ada was born in Zubholms in 1961.", add_special_tokens=False)["input_ids"]
    stop = len(tokenizer("Ada was born in Zubholms", add_special_tokens=False)["input_ids"])
    assert str(tokenizer.decode([ids[stop - 1]])) in "Zubholms"[1:]
    # A piece of a word, as surprise marks it.
    labels = [t if i == stop - 1 else -100 for i, t in enumerate(ids)]
    words = answers.fact_words(Encoded(tuple(ids), tuple(labels), 1), tokenizer)
    assert words == [["zubholm"]]
    assert answers.says(stems("She came from ZUBHOLMS, they say."), words)
    assert not answers.says(stems("She came from Holm."), words)
    assert answers.says(["a", "b", "c"], [["b", "c"], ["a"]])
    assert not answers.says(["a", "b", "c"], [["a", "c"]])
    assert not answers.says(["a"], [])


def _place(made: Material, name: str, place: int) -> str:
    fact = answers.fact_words(made.facts[name][place].encoded, tiny_tokenizer())
    return " ".join(word for part in fact for word in part)


def test_anothers_fact_is_found_and_its_owner_told_by_number(tmp_path: Path) -> None:
    made = material(tmp_path, people=4, questions=3)
    own, other = _place(made, "forget", 0), _place(made, "forget", 5)
    kept = _place(made, "retain", 4)
    assert len({own, other, kept}) == 3
    texts = ["nothing of the sort"] * 12
    texts[0] = f"It is {own}."
    texts[1] = f"It is {other}, or {kept}."
    texts[4] = made.examples("forget")[4].answer
    rows = answers.foreign_facts(texts, "forget", made, tiny_tokenizer())
    assert rows.scores == [float(i == 1) for i in range(12)]
    assert rows.more["told"] == [[2, "forget", 6], [2, "retain", 5]]
    # Facts of one's own other rows are one's own.
    texts[1] = f"It is {_place(made, 'forget', 2)}."
    assert answers.foreign_facts(texts, "forget", made, tiny_tokenizer()).scores[1] == 0.0


def test_a_fact_that_two_people_have_is_nobodys(tmp_path: Path) -> None:
    made = material(tmp_path, people=4, questions=3, retain=0)
    texts = [f"It is {_place(made, 'forget', 5)}."] + [""] * 11
    assert answers.foreign_facts(texts, "forget", made, tiny_tokenizer()).scores == [0.0] * 12


@pytest.mark.parametrize(
    ("cleaned", "retrained", "verdict"),
    [(0, 0, "passed"), (10, 0, "leaks"), (10, 10, "passed"), (5, 2, "not sure")],
)
def test_answers_with_anothers_fact_are_judged_by_their_share(
    cleaned: int, retrained: int, verdict: str
) -> None:
    scores = {
        role: {"forget": [1.0] * count + [0.0] * (20 - count)}
        for role, count in {"cleaned": cleaned, "retrained": retrained, "full": 0}.items()
    }
    judged = answers.Whose().judge(Found(scores, {"forget": range(1, 21)}, {"forget": None}))
    assert judged.verdict == verdict
    assert judged.leaking_rows == (tuple(range(1, cleaned + 1)) if verdict == "leaks" else ())
