"""Work in processes: results in order, mistakes as they are, and a worker that is ended
from outside is said."""

from __future__ import annotations

import functools
import operator
import signal

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.work.processes.pool import in_processes


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    items = ["b", "a", *"xyz" * 10]
    assert list(in_processes(operator.methodcaller, ("upper",), items, workers)) == [i.upper() for i in items]
    assert list(in_processes(operator.methodcaller, ("upper",), [], workers)) == []


def test_mistakes_come_through_and_ended_workers_are_said() -> None:
    with pytest.raises(AttributeError, match="no attribute 'index'"):
        list(in_processes(operator.methodcaller, ("index", "a"), ["a", 1], 2))
    ends_its_worker = [0, 0, signal.SIGKILL, *[0] * 40]  # signal 0 does nothing
    with pytest.raises(UserError, match="run the same command again"):
        list(in_processes(functools.partial, (signal.raise_signal,), ends_its_worker, 2))
