"""When bulk goes before interactive work, over every history of one stage."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.core.batching.bulk_share import BulkShare

LIMIT_S = 2.0


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=60))
def test_bulk_goes_first_exactly_when_it_was_passed_over_for_the_limit(steps: list[tuple[float, bool]]) -> None:
    """Each step: seconds that pass, and whether both classes could go (else bulk goes, or there is none)."""
    share, now_s = BulkShare(LIMIT_S), 0.0
    since_s: float | None = None
    for passed_s, could_both in steps:
        now_s += passed_s
        if not could_both:
            share.restart()
            since_s = None
            continue
        since_s = now_s if since_s is None else since_s
        is_due = share.is_due(now_s)
        assert is_due == (now_s - since_s >= LIMIT_S)
        if is_due:
            share.restart()
            since_s = None


def test_a_stage_that_was_idle_owes_nothing() -> None:
    share = BulkShare(LIMIT_S)
    assert not share.is_due(1_000.0)
    share.restart()
    assert not share.is_due(2_000.0)
    assert share.is_due(2_000.0 + LIMIT_S)
