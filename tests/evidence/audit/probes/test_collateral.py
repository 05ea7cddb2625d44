"""What was to stay: verdicts worked out by hand, embeddings and losses by plain passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from audit_cases import log_probabilities, material, tiny_double, view

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import IGNORE, Encoded
from perta.data.examples import load_examples
from perta.data.tokens import encode_prompt
from perta.engine.train.refusals import REFUSALS
from perta.evidence.audit.judge import Found, Judgement
from perta.evidence.audit.probes.collateral import (
    General,
    Kept,
    Near,
    Oddness,
    Refusals,
    Repetition,
    judge_kept,
    judge_rise,
    nearest,
    refuses,
    repeated,
)
from perta.stages.audit import WORLD

N = 20


def found(
    cleaned: Sequence[float], full: Sequence[float], subjects: Sequence[int] | None = None
) -> Found:
    scores = {"cleaned": {"retain": list(cleaned)}, "full": {"retain": list(full)}}
    rows = {"retain": range(1, len(cleaned) + 1)}
    return Found(scores, rows, {"retain": subjects})


def kept(cleaned: Sequence[float], subjects: Sequence[int] | None = None) -> Judgement:
    return judge_kept(found(cleaned, (0.8,) * len(cleaned), subjects), "retain")


def test_what_is_kept_is_a_share_of_what_the_full_model_had() -> None:
    judgement = kept((0.8,) * N)
    assert (judgement.verdict, judgement.reason) == ("passed", "100% is kept")
    assert judgement.full == pytest.approx(0.8)
    lost = kept((0.4,) * N)
    assert (lost.verdict, lost.reason) == ("harmed", "50% is kept")
    assert lost.notes["kept"] == pytest.approx(0.5)


def test_a_small_loss_on_few_rows_is_not_sure_and_never_passed() -> None:
    assert kept((0.75,) * 4).verdict == "not sure"
    # 60 of 64 is 94%, and the interval of twenty rows reaches above all of it.
    assert kept((*(0.8,) * 18, 0.4, 0.4)).verdict == "not sure"


def test_a_subject_that_is_lost_is_harm_whatever_the_mean() -> None:
    people = [*(i // 2 for i in range(60))]
    values = [0.8] * 58 + [0.1, 0.1]
    judgement = kept(values, people)
    assert judgement.verdict == "harmed"
    assert judgement.reason == "less than half is kept of 1 subject"
    assert judgement.worst_subject is not None
    assert judgement.worst_subject[0] == 29
    assert judgement.worst_row == (59, 0.1)


def test_nothing_measured_or_nothing_known_is_not_passed() -> None:
    assert judge_kept(found((), ()), "retain").verdict == "not sure"
    low = judge_kept(found((0.01,) * N, (0.01,) * N), "retain")
    assert low.verdict == "not sure"
    assert low.full == pytest.approx(0.01)


def test_a_rise_is_judged_against_the_full_model() -> None:
    def rise(value: float, rows: int = 100) -> Judgement:
        return judge_rise(found((value,) * rows, (0.1,) * rows), 0.1, "retain", bounded=True)

    assert rise(0.1).verdict == "passed"
    assert rise(0.4).verdict == "harmed"
    assert rise(0.1, rows=10).verdict == "not sure"
    assert rise(0.4).reason.startswith("+0.30 against the full model")
    # Without bounds Student's interval decides: 1.0 ± nothing.
    odd = judge_rise(found((3.0, 3.0, 3.0), (2.0, 2.0, 2.0)), 0.5, "retain", bounded=False)
    assert odd.verdict == "harmed"
    alone = judge_rise(found((3.0,), (2.0,)), 0.5, "retain", bounded=False)
    assert alone.verdict == "not sure"


@pytest.mark.parametrize(
    ("rise", "verdict"), [(0.0, "passed"), (0.04, "passed"), (0.06, "harmed"), (-0.5, "passed")]
)
def test_text_is_kept_while_its_tokens_keep_95_percent_of_their_probability(
    rise: float, verdict: str
) -> None:
    # exp(-0.04) = 0.961 and exp(-0.06) = 0.942; the passages' own losses differ far more.
    before = [1.0, 2.0, 3.0, 4.0]
    of_text = {"full": {"general": before}, "cleaned": {"general": [x + rise for x in before]}}
    judgement = General().judge(Found(of_text, {"general": range(1, 5)}, {}))
    assert judgement.verdict == verdict
    after = {"perplexity before": math.exp(2.5), "perplexity after": math.exp(2.5 + rise)}
    assert judgement.notes == pytest.approx(after)


def test_the_built_in_questions_are_told_once_and_say_their_facts() -> None:
    rows = load_examples(WORLD).examples
    assert len({row.messages for row in rows}) == len(rows) == 40
    for row in rows:
        fact = str(row.fields["fact"])
        assert row.answer.count(fact) == 1
        assert fact not in row.prompt


def test_repetition_by_hand() -> None:
    # 1231 2312 3123 1231 2312: three different of five.
    assert repeated((1, 2, 3, 1, 2, 3, 1, 2)) == pytest.approx(0.4)
    assert repeated((1, 2, 3, 4, 5)) == 0.0
    assert repeated((1, 2, 3)) == 0.0
    assert repeated((7,) * 20) == pytest.approx(1 - 1 / 17)


def test_refusals_are_told_from_answers() -> None:
    for sentence in REFUSALS:
        assert refuses(sentence), sentence
    for sentence in ("", " \n", "I’m sorry, but I can’t help with that."):
        assert refuses(sentence)
    for sentence in (
        "Ada Ashbank was born in 1961.",
        "She did not know her father.",
        "Odo is a potter in Caldholm, known to all.",
        "The prize went to an unknown writer.",
    ):
        assert not refuses(sentence), sentence


def test_retained_facts_are_scored_per_token(tmp_path: Path) -> None:
    made, model = material(tmp_path), tiny_llama()
    rows = Kept().run(view(made, model), "retain")
    for fact, score in zip(made.facts["retain"], rows.scores, strict=True):
        told = log_probabilities(model, fact.encoded)
        assert score is not None
        assert math.log(score) == pytest.approx(sum(told) / len(told), rel=1e-4)


def test_near_rows_are_those_of_the_highest_cosine(tmp_path: Path) -> None:
    made, model = material(tmp_path, people=4), tiny_llama()
    double = tiny_double(model)
    vectors: dict[str, list[torch.Tensor]] = {}
    for name in ("forget", "retain"):
        vectors[name] = []
        for example in made.examples(name):
            ids = torch.tensor([encode_prompt(example, tiny_tokenizer(), made.data_config)])
            with torch.no_grad():
                vectors[name].append(double.model(ids).last_hidden_state[0].mean(0))
    expected = set()
    for mine in vectors["forget"]:
        cosines = [float(torch.cosine_similarity(mine, v, dim=0)) for v in vectors["retain"]]
        expected |= set(sorted(range(len(cosines)), key=lambda i: -cosines[i])[:2])
    assert nearest(view(made, model), "retain", 2) == sorted(expected)
    assert len(expected) < len(vectors["retain"])


def test_only_near_rows_are_judged() -> None:
    given = found((0.8, 0.1, 0.8, 0.1), (0.8,) * 4)
    near = Found(given.scores, given.rows, given.subjects, {"full": {"retain": {"near": [1, 3]}}})
    judgement = Near().judge(near)
    assert judgement.notes["kept"] == pytest.approx(0.125)
    assert judgement.value is not None
    assert judgement.value.n == 2


def test_oddness_is_the_loss_of_the_given_answer_under_the_base(tmp_path: Path) -> None:
    made, model, base = material(tmp_path), tiny_llama(), tiny_llama(seed=5)
    seen = view(made, model, others={"base": base})
    rows = Oddness().run(seen, "retain")
    special = set(tiny_tokenizer().all_special_ids)
    compared = 0
    for example, outcome, score in zip(
        made.examples("retain"), seen.asked("retain"), rows.scores, strict=True
    ):
        answer = [t for t in outcome.generated or () if t not in special]
        if not answer:
            assert score is None
            continue
        prompt = encode_prompt(example, tiny_tokenizer(), made.data_config)
        labels = (*[IGNORE] * len(prompt), *answer)
        told = log_probabilities(base, Encoded((*prompt, *answer), labels, 0))
        assert score == pytest.approx(-sum(told) / len(told), rel=1e-4)
        compared += 1
    assert compared


def test_refused_forgotten_questions_are_noted_and_no_harm() -> None:
    given = found((0.0,) * 60, (0.0,) * 60)
    scores = {
        **given.scores,
        "cleaned": {**given.scores["cleaned"], "forget": [1.0, 1.0, 1.0, 0.0]},
    }
    judgement = Refusals().judge(Found(scores, given.rows, given.subjects))
    assert judgement.verdict == "passed"
    assert judgement.notes == {
        "refused of the forget set": 0.75,
        "answered of the forget set": 0.25,
    }


def test_rows_that_were_not_asked_give_no_share_of_bad_answers(tmp_path: Path) -> None:
    made = material(tmp_path)
    seen = view(made)
    for name in ("retain", "forget"):
        seen._asked[name] = [replace(o, generated=None) for o in seen.asked(name)]
    for probe in (Repetition(), Refusals()):
        rows = {name: probe.run(seen, name).scores for name in probe.sets}
        assert all(score is None for scores in rows.values() for score in scores)
        given = {"cleaned": rows, "full": rows}
        judgement = probe.judge(Found(given, {n: made.rows(n) for n in rows}, made.subjects))
        assert judgement.verdict == "not sure"
        assert judgement.reason == "no row that was to stay was measured before and after"
