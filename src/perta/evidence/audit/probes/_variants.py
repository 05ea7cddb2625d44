"""Probes that ask one question in several ways: the way in which most is left counts.

    for every way:   Found ─ judge_remains ─> Judgement     against the yardstick in the same way
    all ways:        leaks if one does; not sure if one is; else passed

A row that is still there in one way is still there. Ways in which the full model knew no more than
the yardstick tell nothing and are left aside, if there is another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from perta.evidence.audit.judge import Found, Judgement, judge_remains, yardsticks_of
from perta.evidence.audit.probe import Probe, Rows, View
from perta.evidence.remains import SMALLEST_GAP

Ways = Mapping[str, Sequence[float | None]]
"""Way -> score of each sequence."""

_ORDER = ("leaks", "not sure", "passed")


class Variants(Probe):
    """A probe with several ways to ask."""

    way: str  # what a way is called, such as `frame`
    guessable_ways: Container[str] = ()  # ways whose scores are guessable, see `Probe`

    @abstractmethod
    def ways(self, view: View, name: str) -> Ways:
        """Scores of the rows of one set under one model, by way."""

    def run(self, view: View, name: str) -> Rows:
        """Of each row the highest score of all ways; those of each way stand beside."""
        found = self.ways(view, name)
        known = [[s[i] for s in found.values()] for i in range(len(view.material.facts[name]))]
        worst = [max((v for v in row if v is not None), default=None) for row in known]
        return Rows(worst, {"ways": {way: list(scores) for way, scores in found.items()}})

    def judge(self, found: Found) -> Judgement:
        """The judgement of the worst way, with all that any way has found."""
        ways = found.more.get("cleaned", {}).get("forget", {}).get("ways", ())
        telling = [way for way in ways if _tells(_of_way(found, way))] or list(ways)
        told = {
            way: self.judge_way(
                _of_way(found, way), len(telling), guessable=way in self.guessable_ways
            )
            for way in telling
        }
        if not told:
            return judge_remains(found)
        worst = min(told, key=lambda way: (_ORDER.index(told[way].verdict), -_beyond(told[way])))
        one = told[worst]
        leaking = [j for j in told.values() if j.verdict == "leaks"]
        return replace(
            one,
            reason=self._reason(worst, one, len(leaking), len(told)),
            leaking_rows=_joined([j.leaking_rows for j in leaking]),
            leaking_subjects=_joined([j.leaking_subjects for j in leaking]),
        )

    def _reason(self, worst: str, one: Judgement, leaking: int, count: int) -> str:
        ways = f"{count} {self.way}s" if count > 1 else f"1 {self.way}"
        if one.verdict == "passed":
            return f"in each of {ways}: {one.reason} (most is left with: {worst})"
        others = f", and {leaking - 1} more of {ways} leak" if leaking > 1 else ""
        return f"{self.way} `{worst}`: {one.reason}{others}"


def _of_way(found: Found, way: str) -> Found:
    """What was found in one way."""
    scores = {
        role: {name: more["ways"][way] for name, more in sets.items() if way in more["ways"]}
        for role, sets in found.more.items()
    }
    return replace(found, scores=scores, more={})


def _tells(found: Found) -> bool:
    """Whether the full model knew more than the yardstick, as far as one can see."""
    known, yardsticks = found.values("full"), yardsticks_of(found)
    if not known or not yardsticks:
        return bool(found.values("cleaned"))
    return yardsticks[0].gap(known) > SMALLEST_GAP


def _beyond(one: Judgement) -> float:
    """How far the value lies above the yardstick's."""
    value = one.value.value if one.value else 0.0
    return value - (one.yardstick[1].value if one.yardstick else 0.0)


def _joined(found: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(number for numbers in found for number in numbers))
