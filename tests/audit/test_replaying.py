"""What a replay has to come to: every token and reward, and every bit where the layout is the run's."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_sov.audit.repeating import RepeatOutcome
from megatron_sov.audit.replaying import LAYOUT_BOUND, Replay, ReplayedRound

SAME = Replay("run", 1, 6, True, (ReplayedRound(1, 8, 0, 0, True),), RepeatOutcome.EQUAL.value, "", 0.0)
OTHER_BITS = RepeatOutcome.DIFFERENT.value


@pytest.mark.parametrize(("own_layout", "changed", "passes"), [
    (True, {}, True),
    (True, {"weights": OTHER_BITS, "distance": 1e-9}, False),
    (True, {"rounds": (ReplayedRound(1, 8, 0, 0, False),)}, False),  # other advantages of the same responses
    (False, {"weights": OTHER_BITS, "distance": LAYOUT_BOUND / 10}, True),
    (False, {"weights": OTHER_BITS, "distance": LAYOUT_BOUND * 10}, False),
    (False, {"weights": OTHER_BITS, "distance": float("inf")}, False),
    (False, {"rounds": (ReplayedRound(1, 8, 1, 0, True),)}, False),
    (False, {"rounds": (ReplayedRound(1, 8, 0, 1, True),)}, False)])
def test_what_passes(own_layout: bool, changed: dict[str, object], passes: bool) -> None:
    assert dataclasses.replace(SAME, own_layout=own_layout, **changed).passed == passes
