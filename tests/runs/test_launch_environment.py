"""How many processes a run has."""

from __future__ import annotations

import pytest

from megatron_sov.errors import UserError
from megatron_sov.runs import launch_environment
from megatron_sov.runs.launch_environment import (
    HANDED,
    earlier_result,
    is_first,
    note_result,
    num_ranks,
    repeats,
    results,
    under_launcher,
)


def test_the_environment_decides_where_a_launcher_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # alone it says nothing: some clusters export it everywhere
    assert (num_ranks(None), num_ranks(3), under_launcher()) == (1, 3, False)
    monkeypatch.setenv("RANK", "5")
    assert (num_ranks(None), num_ranks(3), under_launcher()) == (8, 8, True)
    with pytest.raises(UserError, match="--nproc 0: must be at least 1"):
        num_ranks(0)
    with pytest.raises(UserError, match=r"--nproc 9{39}: must be at most 4,096"):
        num_ranks(10 ** 39 - 1)


def test_a_rank_on_its_way_leaves_speaking_and_earlier_work_to_its_launcher(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_environment, "_results", [])
    monkeypatch.setenv("RANK", "0")
    assert is_first() and not repeats() and earlier_result() == ()
    monkeypatch.setenv(HANDED, '{"results": [0.5, {"a": 1}]}')
    assert repeats() and not is_first()
    assert [earlier_result(), earlier_result(), earlier_result()] == [(0.5,), ({"a": 1},), ()]
    note_result("mine")
    assert results() == [0.5, {"a": 1}, "mine"]
