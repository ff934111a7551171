"""Garbage collection at the configured steps only."""

import gc

import pytest

from megatron_sov.train.side_jobs.side_jobs import GarbageCollector


def test_garbage_is_collected_only_at_configured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = GarbageCollector(every_steps=3)
    try:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        collected: list[int] = []
        monkeypatch.setattr(gc, "collect", lambda: collected.append(step))
        for step in range(1, 8):
            garbage.after_step(step)
        assert collected == [3, 6]
    finally:
        garbage.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.freeze()  # as all other tests have it, see tests/conftest.py
