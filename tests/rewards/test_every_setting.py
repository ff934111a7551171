"""Each setting of rewards, of tool environments and of a task's protocol, driven over its bounds and to wrong
types."""

from __future__ import annotations

from importlib import import_module

import pytest

from megatron_sov.eval.suites.protocol import Protocol
from megatron_sov.rewards.registry import BUILT_IN as REWARDS
from megatron_sov.tools.registry import BUILT_IN as ENVIRONMENTS
from tests.settings.every_field import find_wrongs


@pytest.mark.parametrize("place", [*REWARDS.values(), *ENVIRONMENTS.values(),
                                   (Protocol.__module__, Protocol.__name__)], ids=lambda place: place[1])
def test_each_setting_is_told_by_its_code(place: tuple[str, ...]) -> None:
    module, name, *_ = place
    assert not find_wrongs(getattr(import_module(module), name))
