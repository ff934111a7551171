"""Bits that should be equal: weights that several processes hold,
and gradients that one process computes twice.

Hardware that lies does not raise errors.  Two checks name the process: data-parallel replicas of a weight
must agree after every update, and the same micro-batch must give the same gradients again.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.quantized_weights import read_values
from megatron_sov.engine.parallel.collectives import all_reduce_world, to_comm_device
from megatron_sov.engine.parallel.values import gather_objects

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of all elements read as integers, int64 [], wrapping around;
    a single flipped bit changes it."""
    # integers: equal bits give equal sums in any order, which floats do not, and NaN hides nothing
    sums = [t.detach().contiguous().view(_INTEGERS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack(sums).sum().cpu() if sums else torch.zeros((), dtype=torch.int64)


def gradients(model: LanguageModel) -> list[torch.Tensor]:
    """Return this process's gradients, as far as they were accumulated or summed up."""
    return [p.main_grad for p in model.parameters() if hasattr(p, "main_grad")]


def differing_replicas(model: LanguageModel) -> list[int]:
    """Return the ranks whose weights are not those that most of their replicas hold;
    called by all processes together.

    Where there is no majority (two replicas) all of them are named.
    """
    model.finish_param_gather()
    tensors: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for parameter in model.parameters():
        # routed experts have replicas elsewhere
        tensors[not getattr(parameter, "allreduce", True)].append(parameter)
    tensors[False] += [b for name, b in model.named_buffers() if name.endswith("expert_bias")]
    groups = {False: parallel_state.get_data_parallel_group(with_context_parallel=True),
              True: parallel_state.get_expert_data_parallel_group()}
    # both, whatever the first says
    differ = [_differs(checksum(map(read_values, tensors[routed])), groups[routed])
              for routed in (False, True)]
    return ranks_where(any(differ))


def _differs(mine: torch.Tensor, group: Any) -> bool:
    """Return whether this process's number is not the one that more than half of the group have,
    or there is none such."""
    sent = to_comm_device(mine.reshape(1))
    found = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(found, sent, group=group)
    values = Counter(int(t) for t in found)
    value, count = values.most_common(1)[0]
    # with two replicas nobody can say which one is wrong: both are named
    return len(values) > 1 and (count * 2 <= group.size() or int(mine) != value)


def ranks_where(holds: bool) -> list[int]:
    """Return the ranks on which something holds; called by all processes together."""
    if not all_reduce_world(torch.tensor([float(holds)], dtype=torch.float64)).item():
        return []
    return [rank for rank, found in enumerate(gather_objects(holds)) if found]


@contextlib.contextmanager
def unsynced(model: LanguageModel, wrapped: list[Any]) -> Iterator[None]:
    """Have backward passes leave each process with its own gradients;
    nothing is summed over data-parallel processes."""
    config, settings = model.config, wrapped[0].ddp_config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
    before, overlap = {name: getattr(config, name) for name in names}, settings.overlap_grad_reduce
    for name in names:
        setattr(config, name, None)
    settings.overlap_grad_reduce = False
    try:
        yield
    finally:
        settings.overlap_grad_reduce = overlap
        for name, value in before.items():
            setattr(config, name, value)


@torch.no_grad()
def flip_bit(tensor: torch.Tensor, bit: float | None = None) -> None:
    """Change one bit in a tensor's middle, as a fault on purpose.

    Args:
        tensor: of a type of up to 64 bits.
        bit: which, counted from the last; None: one of the mantissa, so that no figure of the run shows it.
    """
    bits = tensor.view(-1).view(_INTEGERS[tensor.element_size()])
    place = 3 * tensor.element_size() if bit is None else int(bit) % (8 * tensor.element_size() - 1)
    bits[bits.numel() // 2] ^= 1 << place
