"""Forget environments registered by a test module."""

from __future__ import annotations

import pytest

from megatron_sov.judge.tools.registry import ENVIRONMENT_PLUGINS


@pytest.fixture(autouse=True, scope="module")
def no_environments_of_others() -> None:
    ENVIRONMENT_PLUGINS._known.clear()
