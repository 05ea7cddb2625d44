"""Several ways to ask one question: the worst of them counts, worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from audit_cases import material, view

from perta.evidence.audit.judge import Found, Judgement
from perta.evidence.audit.probe import Rows, View
from perta.evidence.audit.probes._variants import Variants, Ways

N = 20
LOW, HIGH = (0.0,) * N, (1.0,) * N


class Two(Variants):
    name, group, title, question, source = "two", "own", "Two", "?", "own"
    way = "frame"

    def ways(self, view: View, name: str) -> Ways:
        assert len(view.material.facts[name]) == 3
        return {"one": (0.1, None, 0.3), "other": (0.2, None, None)}


def judged(**by_role: Mapping[str, Sequence[float | None]]) -> Judgement:
    more = {role: {"forget": {"ways": ways}} for role, ways in by_role.items()}
    rows = {"forget": range(1, N + 1)}
    return Two().judge(Found({"cleaned": {"forget": LOW}}, rows, {"forget": None}, more))


def test_a_row_has_the_highest_score_of_all_ways(tmp_path: Path) -> None:
    given = view(material(tmp_path, people=3, questions=1))
    assert Two().run(given, "forget") == Rows(
        [0.2, None, 0.3], {"ways": {"one": [0.1, None, 0.3], "other": [0.2, None, None]}}
    )


def test_one_way_that_leaks_is_enough_and_is_named() -> None:
    third = (*LOW[:7], 0.9, *LOW[8:])
    judgement = judged(
        cleaned={"one": LOW, "other": third},
        full={"one": HIGH, "other": HIGH},
        retrained={"one": LOW, "other": LOW},
    )
    assert (judgement.verdict, judgement.leaking_rows) == ("leaks", (8,))
    assert judgement.reason == "frame `other`: still there: 1 row"
    assert judgement.worst_row == (8, 0.9)


def test_rows_that_are_still_there_in_any_way_are_joined() -> None:
    judgement = judged(
        cleaned={"one": (*LOW[:3], 0.8, *LOW[4:]), "other": (*LOW[:7], 0.9, *LOW[8:])},
        full={"one": HIGH, "other": HIGH},
        retrained={"one": LOW, "other": LOW},
    )
    assert judgement.leaking_rows == (4, 8)
    assert judgement.reason == "frame `other`: still there: 1 row, and 1 more of 2 frames leak"


def test_the_yardstick_is_asked_in_the_same_way() -> None:
    # In the other way the retrained model guesses as well: that is no leak.
    half = (0.5,) * N
    judgement = judged(
        cleaned={"one": LOW, "other": half},
        full={"one": HIGH, "other": HIGH},
        retrained={"one": LOW, "other": half},
    )
    assert judgement.verdict == "passed"
    assert judgement.reason.startswith("in each of 2 frames: no more than the retrained model")


def test_ways_that_tell_nothing_are_left_aside_unless_there_is_no_other() -> None:
    silent = {"full": {"one": HIGH, "other": LOW}, "retrained": {"one": LOW, "other": LOW}}
    judgement = judged(cleaned={"one": LOW, "other": LOW}, **silent)
    assert (judgement.verdict, judgement.reason.count("1 frame:")) == ("passed", 1)
    alone = judged(cleaned={"other": LOW}, **silent)
    assert alone.verdict == "not sure"
    assert "knew no more" in alone.reason


def test_one_way_that_is_not_sure_is_no_pass() -> None:
    third = tuple(0.3 if i % 4 == 0 else 0.0 for i in range(N))
    judgement = judged(
        cleaned={"one": LOW, "other": third},
        full={"one": HIGH, "other": HIGH},
        retrained={"one": LOW, "other": LOW},
    )
    assert judgement.verdict in ("not sure", "leaks")
    assert judgement.reason.startswith("frame `other`")


def test_nothing_asked_is_not_passed() -> None:
    assert judged(cleaned={}).verdict == "not sure"


def test_a_way_that_leaks_comes_before_one_in_which_more_is_left_in_the_mean() -> None:
    judgement = judged(
        cleaned={"one": (0.09,) * N, "other": (*LOW[:7], 0.9, *LOW[8:])},
        full={"one": HIGH, "other": HIGH},
        retrained={"one": LOW, "other": LOW},
    )
    assert (judgement.verdict, judgement.leaking_rows) == ("leaks", (8,))
