"""Forget environments registered by a test module."""

import pytest

from megatron_sov.judge.tools.registry import ENVIRONMENT_PLUGINS


@pytest.fixture(autouse=True, scope="module")
def no_environments_of_others() -> None:
    ENVIRONMENT_PLUGINS._known.clear()
