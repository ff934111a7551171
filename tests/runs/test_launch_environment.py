"""How many processes a run has."""

from __future__ import annotations

import pytest

from megatron_sov.errors import UserError
from megatron_sov.runs.launch_environment import num_ranks, under_launcher


def test_the_environment_decides_where_a_launcher_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # alone it says nothing: some clusters export it everywhere
    assert (num_ranks(None), num_ranks(3), under_launcher()) == (1, 3, False)
    monkeypatch.setenv("RANK", "5")
    assert (num_ranks(None), num_ranks(3), under_launcher()) == (8, 8, True)
    with pytest.raises(UserError, match="--nproc 0: must be at least 1"):
        num_ranks(0)
