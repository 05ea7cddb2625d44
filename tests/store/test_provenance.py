"""Which sets records name."""

from __future__ import annotations

from perta.store.provenance import data_of


def test_merged_moments_are_of_the_rows_of_every_part_and_of_no_facts() -> None:
    records = {
        "kept": {"inputs": {"data": "R", "checkpoint": "b"}},
        "facts": {"inputs": {"data": "F", "checkpoint": "b", "facts_by": "b"}},
        "both": {"inputs": {"moments_1": "kept", "moments_2": "facts"}},
    }
    assert data_of(records["both"], records) == {"R"}
