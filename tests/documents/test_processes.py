"""Work in processes: results in order, mistakes as they are, and a worker that is ended from outside is said."""

from __future__ import annotations

import operator

import psutil
import pytest

from megatron_sov.documents import in_processes
from megatron_sov.errors import UserError


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    items = ["b", "a", *"xyz" * 10]
    assert list(in_processes(operator.methodcaller, ("upper",), items, workers)) == [i.upper() for i in items]
    assert list(in_processes(operator.methodcaller, ("upper",), [], workers)) == []


def test_mistakes_come_through_and_ended_workers_are_said() -> None:
    with pytest.raises(AttributeError, match="no attribute 'index'"):
        list(in_processes(operator.methodcaller, ("index", "a"), ["a", 1], 2))
    results = in_processes(operator.methodcaller, ("upper",), ["a"] * 40, 2)
    next(results)
    next(p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())).kill()
    with pytest.raises(UserError, match="run the same command again"):
        list(results)
