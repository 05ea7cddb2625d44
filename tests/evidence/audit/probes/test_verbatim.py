"""Verbatim probes against plain passes in float64, and what all probes share."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pytest
from audit_cases import log_probabilities, material, view

from helpers import tiny_llama
from perta.errors import ConfigError
from perta.evidence.audit.judge import Found
from perta.evidence.audit.probes import verbatim
from perta.evidence.audit.registry import PROBES, choose_probes
from perta.evidence.benchmark import Journal

OWN = """
from perta.evidence.audit.probe import Probe, Rows

class Short(Probe):
    name, group, title = "short", "own", "The first token"
    question, source = "Does the model begin the answer?", "own"

    def run(self, view, name):
        return Rows([outcome.scores[0].exact_memorization for outcome in view.asked(name)])
"""


def test_facts_and_answers_are_those_of_a_plain_pass_in_float64(tmp_path: Path) -> None:
    made, model = material(tmp_path), tiny_llama()
    seen = view(made, model)
    for name in ("forget", "holdout"):
        logs = [log_probabilities(model, fact.encoded) for fact in made.facts[name]]
        sums = [math.fsum(log) for log in logs]
        assert verbatim.Fact().run(seen, name).scores == pytest.approx(
            [math.exp(value) for value in sums], rel=1e-4
        )
        assert verbatim.FactToken().run(seen, name).scores == pytest.approx(
            [math.exp(value / len(log)) for value, log in zip(sums, logs, strict=True)], rel=1e-4
        )
        assert verbatim.Drawn().run(seen, name).scores == pytest.approx(
            [1 - (1 - math.exp(value)) ** 64 for value in sums], rel=1e-4
        )


@pytest.mark.parametrize("probe", [verbatim.Choice(), verbatim.FirstChoice()])
@pytest.mark.parametrize(("share", "leaks"), [(0.2, False), (0.6, True)])
@pytest.mark.parametrize("name", ["retrained", "holdout"])
def test_a_yardstick_below_chance_counts_as_chance(
    probe: verbatim.Choice, share: float, leaks: bool, name: str
) -> None:
    # Of 5 candidates one is right: who guesses has a fifth, and what knew less tells nothing.
    n = 40
    first = isinstance(probe, verbatim.FirstChoice)
    values = (
        [float(i < share * n) for i in range(n)] if first else [share + i / 1e4 for i in range(n)]
    )
    low = [0.0] * n if first else [0.02] * n
    scores: dict[str, dict[str, Sequence[float | None]]] = {
        "cleaned": {"forget": values},
        "full": {"forget": [1.0] * n},
    }
    role, rows = ("retrained", "forget") if name == "retrained" else ("cleaned", "holdout")
    scores.setdefault(role, {})[rows] = low
    more = {role: {rows: {"candidates": [5.0] * n}}}
    numbers = {"forget": range(1, n + 1), "holdout": range(1, n + 1)}
    judgement = probe.judge(Found(scores, numbers, {}, more))
    assert (judgement.verdict == "leaks") == leaks
    assert judgement.yardstick is not None
    assert judgement.yardstick[1].value == pytest.approx(0.2)
    # Without a number of candidates nothing is raised.
    plain = probe.judge(Found(scores, numbers, {}))
    assert plain.yardstick is not None
    assert plain.yardstick[1].value == pytest.approx(low[0])


def test_the_choice_is_among_all_candidates(tmp_path: Path) -> None:
    made, model = material(tmp_path), tiny_llama()
    rows = verbatim.Choice().run(view(made, model), "forget")
    chosen, candidates = rows.scores, [1 + len(f.wrong) for f in made.facts["forget"]]
    assert rows.more == {"candidates": candidates}
    first = verbatim.FirstChoice().run(view(made, model), "forget").scores
    for place, fact in enumerate(made.facts["forget"]):
        right, *wrong = (
            math.exp(math.fsum(log_probabilities(model, encoded)))
            for encoded in ([fact.right, *fact.wrong] if fact.right else fact.sequences)
        )
        assert chosen[place] == pytest.approx(right / (right + math.fsum(wrong)), rel=1e-4)
        assert first[place] == float(right > max(wrong))
    assert set(first) == {0.0, 1.0}


def test_what_was_asked_once_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = material(tmp_path)
    with Journal(tmp_path / "journal", "key") as journal:
        before = verbatim.Answer().run(view(made, journal=journal), "forget").scores
    monkeypatch.setattr("perta.evidence.scoring.items.extend", None)
    with Journal(tmp_path / "journal", "key") as journal:
        assert verbatim.Answer().run(view(made, journal=journal), "forget").scores == before


def test_probes_are_told_for_people_and_have_names_of_their_own() -> None:
    names = [probe.name for probe in PROBES]
    assert len(set(names)) == len(names)
    assert not {probe.group for probe in PROBES} & set(names)
    for probe in PROBES:
        assert probe.question.endswith("?")
        assert probe.title
        assert probe.source
    text = files("perta").joinpath("evidence", "probes.toml").read_text("utf-8")
    assert list(tomllib.loads(text)) == names


def test_probes_are_chosen_by_level_name_group_or_file(tmp_path: Path) -> None:
    quick = choose_probes("quick")
    assert {probe.level for probe in quick} == {"quick"}
    assert len(choose_probes("full")) == len(PROBES)
    assert [probe.name for probe in choose_probes("quick", ["choice", "choice"])] == ["choice"]
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    (own,) = choose_probes("quick", [str(tmp_path / "own.py")])
    made = material(tmp_path)
    assert own.run(view(made), "forget").scores == (
        verbatim.Memorised().run(view(made), "forget").scores
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "it defines 0"),
        (OWN.replace("def run", "def runs"), "with a method `run`"),
        (OWN.replace("question, source", "query, source"), "lacks question"),
        (OWN.replace('"short"', '"fact"'), "there is a probe fact already"),
        (OWN.replace('"short"', "5"), "Short has name of another form"),
        (OWN.replace('"short"', '["fact"]'), "Short has name of another form"),
        (f"{OWN}\n    sets, compared = 'forget', ['unseen']", "has sets, compared of another form"),
        (
            f"{OWN}\n    needs, level, unit = ('luck',), 'deep', 1",
            "has unit, needs, level of another",
        ),
        ("def f(:", "cannot be run: SyntaxError"),
        ("raise SystemExit(3)", "cannot be run: SystemExit"),
    ],
)
def test_a_file_without_a_probe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.py").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message):
        choose_probes("quick", [str(tmp_path / "own.py")])


def test_two_files_with_probes_of_one_name_are_refused(tmp_path: Path) -> None:
    for name, text in {"one": OWN, "other": f"{OWN}\n"}.items():
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
    one, other = (str(tmp_path / f"{name}.py") for name in ("one", "other"))
    assert len(choose_probes("quick", [one, one])) == 1
    with pytest.raises(ConfigError, match="2 files define a probe short"):
        choose_probes("quick", [one, other])


def test_the_nearest_probe_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean `choice`"):
        choose_probes("quick", ["choise"])
