"""A fixture that forgets the environments that other test modules have registered."""

import pytest

from megatron_sov.judge.tools.registry import ENVIRONMENT_PLUGINS


@pytest.fixture(autouse=True, scope="module")
def forget_environments() -> None:
    ENVIRONMENT_PLUGINS._known.clear()
