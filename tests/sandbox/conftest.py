"""One sandbox per enclosure that this machine has."""

from collections.abc import Iterator

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.sandbox.sandbox import Sandbox


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        made = Sandbox(enclosure=request.param)
    except UserError as e:
        pytest.skip(str(e))
    with made:
        yield made
