"""Messages between simulated processes: call sites, reductions and copies."""

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist

RELAY_FILES = ("/parallel/collectives.py", "/layout_proof/simulated_world.py",
               "/layout_proof/simulated_messages.py")
"""Files that send on behalf of callers."""


class Deadlock(Exception):
    """Deadlock, mismatched collective calls, or a message without a receiver."""


@dataclass(frozen=True)
class CallSite:
    """Source line that sends a message."""

    kind: str  # collective, for example `allreduce`
    group: str  # megatron-Core's description of the group, for example `TENSOR_MODEL_PARALLEL_GROUP`
    where: str  # file, line and function in Megatron-Core or its caller

    def __str__(self) -> str:
        return f"{self.kind} over {self.group} at {self.where}"


MessageFault = Callable[[CallSite, Sequence["CallPart"], Callable[[list["CallPart"]], None]], bool]
"""(call site, all members' parts, default work) -> True if the function replaced the work. Tests plant
faults."""


@dataclass
class CallPart:
    """A member's inputs and outputs in a collective `_Call`."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    input_sizes: list[int] = field(default_factory=list)
    output_sizes: list[int] = field(default_factory=list)
    how: str = ""  # attribute that must be equal on all members: reduction, source or target rank
    value: Any = None  # python object in an object gather
    values: list[Any] = field(default_factory=list)  # list that receives all members' objects


def detach_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Detach the tensors: messages are not part of autograd graphs."""
    return [tensor.detach() for tensor in tensors]


def copy_message_tensor(mine: torch.Tensor, sent: torch.Tensor) -> None:
    """Copy a received message into the output tensor `mine`. Raises `Deadlock`: number of elements or dtype
    differ."""
    check_same_kind([mine, sent])
    mine.copy_(sent.reshape(mine.shape))


def check_same_kind(tensors: Sequence[torch.Tensor]) -> None:
    """Check that all members pass the same number of elements and the same dtype. Raises `Deadlock`: they
    differ; on a cluster the call would hang or mix up values."""
    kinds = {(tensor.numel(), tensor.dtype): None for tensor in tensors}
    if len(kinds) > 1:
        differences = ", ".join(f"{count} of {dtype}" for count, dtype in kinds)
        raise Deadlock(f"members of a call pass different shapes or dtypes: {differences}")


def get_reduction_name(opts: Any) -> str:
    """Return a call's reduction by name, for example `SUM`."""
    operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
    return str(getattr(operation, "op", operation)).rpartition(".")[2]


def reduce_call_parts(kind: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Reduce the members' `CallPart` tensors in rank order."""
    check_same_kind(parts)
    stacked = torch.stack(list(parts))
    reductions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "SUM": lambda parts: parts.sum(0, dtype=parts.dtype), "AVG": lambda parts: parts.mean(0),
        "MAX": lambda parts: parts.amax(0), "MIN": lambda parts: parts.amin(0),
        "PRODUCT": lambda parts: parts.prod(0)}
    return reductions[kind](stacked)


def find_call_site(kind: str, group: str) -> CallSite:
    """Return the innermost frame in Megatron-Core or its caller that sends the message."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_sender_file(frame.f_code.co_filename):
            return _build_call_site(kind, group, frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return CallSite(kind, group, "outside of Megatron-Core")


def format_failure(error: BaseException) -> str:
    """Return an error with its innermost line of code outside of torch and this package."""
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if "/torch/" not in frame.filename
                 and "/layout_proof/" not in frame.filename), frames[-1])
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error).strip().split("\n")[0])
    return f"{type(error).__name__}: {text} at {Path(last.filename).name}:{last.lineno} ({last.name})"


@functools.cache
def is_sender_file(file: str) -> bool:
    """Return whether a file belongs to Megatron-Core or its caller and sends for itself."""
    return "/megatron" in file and not file.endswith(RELAY_FILES)


@functools.cache
def _build_call_site(kind: str, group: str, code: CodeType, line: int) -> CallSite:
    return CallSite(kind, group, f"{Path(code.co_filename).name}:{line} ({code.co_name})")
