"""What is settled before CUDA starts; tests/layouts/test_precision.py shows that runs repeat."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from megatron_sov.errors import UserError
from megatron_sov.mcore.parallel.determinism import VARIABLES, switch_on


@pytest.fixture(autouse=True)
def _left_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    for name in VARIABLES:
        os.environ.pop(name, None)


def test_every_library_is_told() -> None:
    switch_on()
    assert (torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled())
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory, "empty memory is filled, each time"
    assert [os.environ[name] for name in VARIABLES] == [":4096:8", "Ring", "0"]


def test_a_fitting_environment_stays_and_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    switch_on()
    assert os.environ["NCCL_ALGO"] == "Tree"
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    with pytest.raises(UserError, match=r"the environment has NCCL_ALGO=NVLS, "
                                        r"with which .* unset it or use Ring or Tree"):
        switch_on()


def test_started_cuda_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA has started before"):
        switch_on()
