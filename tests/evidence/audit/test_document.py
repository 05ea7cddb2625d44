"""What an audit comes to in one line."""

from __future__ import annotations

from perta.evidence.audit.document import summary_of, told_in_short


def test_harm_to_what_was_to_stay_is_counted_too() -> None:
    verdicts = {"fact": "passed", "choice": "not sure"}
    harmed = {**verdicts, "world": "harmed"}
    for found, more in ((verdicts, ""), (harmed, ", 1 harmed")):
        probes = [{"name": name, "verdict": verdict} for name, verdict in found.items()]
        audit = {"level": "standard", "perta": {"content": "abc"}, "probes": probes}
        line = f"Audit, level standard: 1 passed, 0 leaks, 1 not sure{more}"
        assert told_in_short(audit) == told_in_short(summary_of(audit)) == line
