"""Version of an engine's weights, and errors after failed updates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.infer.request import WeightVersion


def test_version_changes_after_the_update() -> None:
    held = WeightVersion("own")
    assert held.version == 0
    with held.replace_weights(3, None), pytest.raises(UserError, match="update to version 3"):
        held.check()
    assert held.version == 3


def test_failed_update_invalidates_weights() -> None:
    closed = []

    def weights() -> Iterator[tuple[str, None]]:
        try:
            yield "a", None
        finally:
            closed.append(True)

    held, stream = WeightVersion("own"), weights()
    with pytest.raises(RuntimeError, match="cable"), held.replace_weights(1, stream):
        next(stream)
        raise RuntimeError("a cable was pulled")
    assert closed == [True], "the processes that gather the weights wait for this one"
    with pytest.raises(UserError, match=r"1 failed \(a cable"):
        held.check()
    with held.replace_weights(2, iter(())):
        pass
    assert held.version == 2
