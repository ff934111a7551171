"""What is written for ranks that are new processes, and read there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.data.mapped_files import numbers
from megatron_sov.data.token_shards import ShardChain, open_sources
from megatron_sov.errors import UserError
from megatron_sov.mcore.parallel.rank_plan import plan_file, read_plan
from megatron_sov.plugins.loading import load
from megatron_sov.train.stopping import stoppable


def passed_on(value: Any) -> Any:
    """Return what a new process would find in the place of a value."""
    with plan_file(lambda: value, 1) as plan:
        return read_plan(os.dup(plan))()


def test_shards_are_opened_again_and_a_bare_map_of_a_file_is_not_copied(packed_data: Any) -> None:
    shard = open_sources({str(packed_data.text): 1.0}, 368)[0].shard("train")
    again = passed_on(shard)
    assert isinstance(again, ShardChain) and again is not shard
    assert again.tokens(3, 0, 9).tolist() == shard.tokens(3, 0, 9).tolist()
    assert passed_on(np.arange(3)).tolist() == [0, 1, 2]
    (index,) = {file for file in Path(packed_data.text).rglob("*.bin") if "even" in str(file)
                and "train" in str(file)}
    with pytest.raises(TypeError, match="map of a file"):
        passed_on(numbers(index, np.dtype(np.uint8), index.stat().st_size)[3:9])


def test_code_that_a_person_named_is_run_again_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("class Own:\n    number = 7\n")
    value = load(f"{file}:Own").value()
    assert passed_on(value).number == 7
    with plan_file(lambda: value, 1) as plan:
        file.write_text("class Own:\n    number = 8\n")
        with pytest.raises(UserError, match=r"own\.py: has changed"):
            read_plan(os.dup(plan))


def test_a_rank_is_asked_itself_to_stop() -> None:
    with stoppable() as flag:
        again = passed_on(flag)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (again.reason, flag.reason) == ("SIGUSR1", None)
