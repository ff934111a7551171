"""A sandbox for each enclosure that this machine has."""

from collections.abc import Iterator

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.sandbox.sandbox import Sandbox


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox with default limits. Tests are skipped for an enclosure that this machine does not have."""
    try:
        sandbox = Sandbox(enclosure=request.param)
    except UserError as e:
        pytest.skip(str(e))
    with sandbox:
        yield sandbox
