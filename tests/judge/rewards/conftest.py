"""Fixtures that forget the rewards of earlier tests and share one sandbox per enclosure."""

from collections.abc import Iterator

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.registry import REWARD_PLUGINS
from megatron_sov.sandbox.sandbox import SANDBOXES, Sandbox


@pytest.fixture(autouse=True)
def forget_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without rewards that other tests have registered."""
    monkeypatch.setattr(REWARD_PLUGINS, "_known", {})


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def enclosure(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of an enclosure that this machine has; the programs of a test module share one sandbox of it."""
    try:
        sandbox = Sandbox(enclosure=request.param)
    except UserError as e:
        pytest.skip(str(e))
    SANDBOXES[(request.param, (), 1)] = sandbox
    yield request.param
    SANDBOXES.pop((request.param, (), 1)).close()
