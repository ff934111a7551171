"""Checks for silent data corruption: replicas of weights, and repeated gradients, must have equal bits.

Faulty hardware may not raise errors. Data-parallel replicas of a weight must agree after every update, and
the same micro-batch must give the same gradients again. Megatron-Core's function for this,
`check_param_hashes_across_dp_replicas`, hashes weights on the host, leaves out context parallelism and router
biases, and names no rank. Test:
`test_replica_checks.py::test_a_majority_names_the_process_whose_weight_changed`."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.quantized_weights import dequantize_weight
from megatron_sov.engine.parallel.collectives import all_reduce_world, to_comm_device
from megatron_sov.engine.parallel.values import gather_objects

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


@torch.no_grad()
def compute_checksum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Add up all elements as integers, with wrap-around, int64 []; a flipped bit changes the sum."""
    # integer sums do not depend on the order, unlike float sums, and NaN does not absorb differences
    sums = [t.detach().contiguous().view(_INTEGERS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack(sums).sum().cpu() if sums else torch.zeros((), dtype=torch.int64)


def list_gradients(model: LanguageModel) -> list[torch.Tensor]:
    """Return the local gradient buffers (`main_grad`)."""
    return [p.main_grad for p in model.parameters() if hasattr(p, "main_grad")]


def find_differing_replicas(model: LanguageModel) -> list[int]:
    """Return the ranks whose weights differ from the majority of their replicas. Collective.

    Without a majority (two replicas), all ranks of the group are returned."""
    model.finish_param_gather()
    # True: tensors of routed experts, which have a data-parallel group of their own
    tensors: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for parameter in model.parameters():
        tensors[not getattr(parameter, "allreduce", True)].append(parameter)  # `allreduce` = False: expert
    tensors[False] += [b for name, b in model.named_buffers() if name.endswith("expert_bias")]
    groups = {False: parallel_state.get_data_parallel_group(with_context_parallel=True),
              True: parallel_state.get_expert_data_parallel_group()}
    # compute both checksums on every rank: the second contains a collective as well
    differ = [_differs_from_majority(compute_checksum(map(dequantize_weight, tensors[routed])),
                                     groups[routed])
              for routed in (False, True)]
    return gather_ranks_where(any(differ))


def _differs_from_majority(local_checksum: torch.Tensor, group: Any) -> bool:
    """Return whether the local checksum differs from the majority's, or the group has no majority."""
    tensor = to_comm_device(local_checksum.reshape(1))
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor, group=group)
    values = Counter(int(t) for t in gathered)
    value, count = values.most_common(1)[0]
    # with two replicas either may be wrong: report both
    return len(values) > 1 and (count * 2 <= group.size() or int(local_checksum) != value)


def gather_ranks_where(holds: bool) -> list[int]:
    """Return the ranks on which `holds` is true. Collective."""
    if not all_reduce_world(torch.tensor([float(holds)], dtype=torch.float64)).item():
        return []
    return [rank for rank, rank_holds in enumerate(gather_objects(holds)) if rank_holds]


@contextlib.contextmanager
def disable_gradient_sync(model: LanguageModel, wrapped: list[Any]) -> Iterator[None]:
    """Disable gradient reduction: each process keeps its own gradients inside the context."""
    config, settings = model.config, wrapped[0].ddp_config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
    previous, overlap = {name: getattr(config, name) for name in names}, settings.overlap_grad_reduce
    for name in names:
        setattr(config, name, None)
    settings.overlap_grad_reduce = False
    try:
        yield
    finally:
        settings.overlap_grad_reduce = overlap
        for name, value in previous.items():
            setattr(config, name, value)


@torch.no_grad()
def flip_bit(tensor: torch.Tensor, bit: float | None = None) -> None:
    """Flip one bit in the middle of a tensor, for fault injection.

    Args:
        tensor: a tensor with elements of up to 64 bits.
        bit: index from the least significant bit, not the sign. None: a mantissa bit that no metric shows.
    """
    bits = tensor.view(-1).view(_INTEGERS[tensor.element_size()])
    bit_index = 3 * tensor.element_size() if bit is None else int(bit) % (8 * tensor.element_size() - 1)
    bits[bits.numel() // 2] ^= 1 << bit_index
