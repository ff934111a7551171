"""`megatron-sov rl reward` beside the job that writes."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.base.errors import StopRequested, UserError
from megatron_sov.cli import main
from megatron_sov.commands.rl.rl_reward import opened_store
from megatron_sov.post.rl.reward import ENVIRONMENT
from megatron_sov.rollouts.rows import STOP, AskedPrompt, Key, Rollout
from megatron_sov.rollouts.store import RolloutStore


def test_a_store_that_is_not_made_yet_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "store"
    threading.Timer(0.2, RolloutStore.create, (path, "sha256:" + "0" * 64, 512)).start()
    assert opened_store(path, 600.0).vocab_size == 512


def test_one_that_never_comes_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"store: is no rollout store \(it has no store.json\)"):
        opened_store(tmp_path / "store", 0.0)
    with pytest.raises(StopRequested, match=r"store: nobody has made this store within 0.1 s"):
        opened_store(tmp_path / "store", 0.1)


def test_where_waiting_ends_before_the_last_round_the_command_is_not_done(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RolloutStore.create(tmp_path / "store", "sha256:" + "0" * 64, 512)
    key = Key("0" * 16, 0, "p" * 64, "s" * 16)
    row = Rollout(key, 1, 0, {"prompt": "?"}, np.array([1], np.int32), np.array([2], np.int32),
                  np.array([-1], np.float32), np.zeros(1, np.int32), STOP, "!", 1.0, "test", 0.0, 1.0)
    asked = ["rl", "reward", "--store", str(store.path), "--reward", ENVIRONMENT]
    outcome = {"reward": 1.0, "status": "scored", "components": {}, "reason": ""}
    store.add_rollouts("round-0001-piece-0000", [replace(row, outcome=outcome)],
                       AskedPrompt(3, 1).to_provenance(0))
    assert main([*asked, "--wait", "0.1"]) == 75
    assert (f"warning: {store.path}: nothing more has come for 0.1 s, and 1 of 1 pieces of round 2 are not "
            "written: whoever trains waits for their rewards; give the same command again"
            ) in capsys.readouterr().err
    assert main([*asked, "--wait", "600", "--rounds", "1"]) == 0
    assert main(asked) == 0
