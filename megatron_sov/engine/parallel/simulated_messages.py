"""What a simulated process sends: from where, and how it becomes what others want."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist

OWN_FILES = ("/parallel/collectives.py", "/parallel/simulated_world.py", "/parallel/simulated_messages.py")
"""They send for others."""


class Standstill(Exception):
    """All processes wait, two call different things at the same time, or nobody takes what one sends."""


@dataclass(frozen=True)
class CallSite:
    """Where a message is sent from."""

    kind: str
    """What is called, as `allreduce`."""
    group: str
    """Description of the group that megatron-core gives it, as `TENSOR_MODEL_PARALLEL_GROUP`."""
    where: str
    """File, line and function of the library or the project."""

    def __str__(self) -> str:
        return f"{self.kind} over {self.group} at {self.where}"


Meddle = Callable[[CallSite, Sequence["Part"], Callable[[list["Part"]], None]], bool]
"""(where, what each member gives, the call's work) -> whether it has done the work in another way: how tests
plant faults."""


@dataclass
class Part:
    """What one member gives to a call, and where it wants the result."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    input_sizes: list[int] = field(default_factory=list)
    output_sizes: list[int] = field(default_factory=list)
    how: str = ""
    """What all members must say alike: the reduction, or whose tensors all get."""
    value: Any = None
    """What is no tensor."""
    values: list[Any] = field(default_factory=list)
    """Where the values of all members are wanted."""


def plain(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors without their graphs: a message is none of autograd's."""
    return [tensor.detach() for tensor in tensors]


def deliver(mine: torch.Tensor, sent: torch.Tensor) -> None:
    """Copy what was sent to where it is wanted, which a real message does number for number.

    Raises:
        Standstill: they are not as many numbers of the same kind.
    """
    check_alike([mine, sent])
    mine.copy_(sent.reshape(mine.shape))


def check_alike(tensors: Sequence[torch.Tensor]) -> None:
    """Check that members of a call mean the same number of numbers, of the same kind.

    Raises:
        Standstill: they do not; a real message would wait for the rest, or take numbers for others.
    """
    meant = {(tensor.numel(), tensor.dtype): None for tensor in tensors}
    if len(meant) > 1:
        told = ", ".join(f"{count} of {dtype}" for count, dtype in meant)
        raise Standstill(f"members of a call mean different numbers: {told}")


def reduce_kind(opts: Any) -> str:
    """Return the name of a call's reduction, as `SUM`."""
    asked = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
    return str(getattr(asked, "op", asked)).rpartition(".")[2]


def reduced(kind: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what the members give, in the order of ranks, as one."""
    check_alike(parts)
    stacked = torch.stack(list(parts))
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "SUM": lambda parts: parts.sum(0, dtype=parts.dtype), "AVG": lambda parts: parts.mean(0),
        "MAX": lambda parts: parts.amax(0), "MIN": lambda parts: parts.amin(0),
        "PRODUCT": lambda parts: parts.prod(0)}
    return known[kind](stacked)


def site_of(kind: str, group: str) -> CallSite:
    """Return the innermost place of the library or the project that sends the message."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if sends(frame.f_code.co_filename):
            return _site_at(kind, group, frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return CallSite(kind, group, "outside of the library")


@functools.cache
def sends(file: str) -> bool:
    """Return whether a file is of the library or the project, and it sends for itself."""
    return "/megatron" in file and not file.endswith(OWN_FILES)


@functools.cache
def _site_at(kind: str, group: str, code: CodeType, line: int) -> CallSite:
    return CallSite(kind, group, f"{Path(code.co_filename).name}:{line} ({code.co_name})")
