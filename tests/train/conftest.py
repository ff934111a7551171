"""A process group of one process, in the test process."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def alone(one_rank: None) -> Iterator[Any]:
    """This process's place in a world of its own."""
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    yield world.join_world(ParallelConfig())
    world.leave_world()
