"""Rewards of a test's own are forgotten behind it."""

from __future__ import annotations

import pytest

from megatron_sov.rewards.registry import OWN


@pytest.fixture(autouse=True)
def no_rewards_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OWN, "_known", {})
