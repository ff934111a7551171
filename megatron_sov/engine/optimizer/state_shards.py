"""The part of a parameter that this process updates (with ZeRO-1 a range), and the optimizer state as blocks.

Megatron-Core's distributed optimizer concatenates all parameters and gives every data-parallel process an
equal range: of a parameter it updates the elements [start, stop) of the flattened tensor. Within a block such
a range consists of a few rectangles, so optimizer state has the same names and shapes at every layout, with
ZeRO-1 and without."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from layout_proof.cpu_shims import is_cpu_only
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, ParameterLookup, list_declared_blocks
from megatron_sov.engine.optimizer.adamw import HostAdamW, wait_for_copies

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""(index of the first element, extent per axis)."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's state tensors in torch."""
MASTER = "master"


@dataclass(frozen=True)
class StateShard:
    """The elements [start, start + main.numel()) of a flattened parameter, updated by this process."""

    parameter: torch.nn.Parameter
    """Parameter of the model."""
    start: int
    """Index of the first element."""
    main: torch.Tensor
    """Contiguous tensor to update: the parameter's own memory, or a float32 master weight."""
    inner: "ShardOptimizer"
    """Optimizer that updates `main` and holds its state."""
    exclusive: bool
    """True (ZeRO-1): no other data-parallel process updates these elements."""

    @property
    def stop(self) -> int:
        return self.start + self.main.numel()

    def state(self) -> dict[str, torch.Tensor]:
        """Return moments or momentum and, under bf16, master weights: [elements] views of live memory."""
        state, names = self.inner.state[self.main], getattr(self.inner, "state_names", MOMENTS)
        if not state and hasattr(self.inner, "initialize_state"):  # Transformer Engine's, with its own dtypes
            self.inner.initialize_state(self.main, False)
        elif not state:  # before the first update: the initial state
            if _counts_per_parameter(self.inner):
                state["step"] = torch.tensor(0.0)
            for name in names:
                state[name] = torch.zeros_like(self.main, memory_format=torch.preserve_format)
        tensors = {name: state[name] for name in names}
        if self.main.dtype != self.parameter.dtype:
            tensors[MASTER] = self.main
        return {name: tensor.detach().view(-1) for name, tensor in tensors.items()}


class ShardOptimizer(Protocol):
    """Interface for optimizers that update a `StateShard`: AdamW or Muon."""

    param_groups: list[dict[str, Any]]
    """Groups of shards with their settings."""
    state: Any
    """Shard -> name -> state tensor."""

    def step(self) -> Any:
        """Update all shards from their gradients."""


def list_shards(optimizer: Any) -> list[StateShard]:
    """Return the shards of a library optimizer (dense parameters and routed experts have separate
    optimizers).

    Parameters without a local range are left out."""
    if optimizer.optimizer is None:
        return []
    if isinstance(optimizer, DistributedOptimizer):
        return list(_iter_ranges(optimizer))
    return list(_iter_parameters(optimizer))


def _iter_ranges(optimizer: DistributedOptimizer) -> Iterator[StateShard]:
    """Yield ranges of parameters in this process's part of Megatron-Core's buffers (ZeRO-1)."""
    for models, mains in ((optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
                          (optimizer.model_fp32_groups, optimizer.shard_fp32_groups)):
        for model_group, main_group in zip(models, mains, strict=True):
            for parameter, main in zip(model_group, main_group, strict=True):
                start = optimizer._get_model_param_range_map(parameter)["param"].start
                yield StateShard(parameter, start, main, optimizer.optimizer, exclusive=True)


def _iter_parameters(optimizer: Any) -> Iterator[StateShard]:
    """Yield whole parameters of an optimizer that repeats the update on every data-parallel process."""
    parameter_by_main: dict[int, Any] = {}  # id of a float32 master weight -> its 16-bit parameter
    low_groups, high_groups = (getattr(optimizer, "float16_groups", []),
                               getattr(optimizer, "fp32_from_float16_groups", []))
    for low, high in zip(low_groups, high_groups, strict=True):
        parameter_by_main |= {id(main): parameter for parameter, main in zip(low, high, strict=True)}
    for group in optimizer.optimizer.param_groups:
        for main in group["params"]:
            parameter = parameter_by_main.get(id(main), main)
            yield StateShard(parameter, 0, main, optimizer.optimizer, exclusive=False)


def assign_gradients(shards: Iterable[StateShard]) -> None:
    """Set `grad` of every shard to its part of the reduced gradients.

    As in Megatron-Core, gradients reduced in bf16 are converted to float32 first."""
    to_host = False
    for shard in shards:
        gradient: torch.Tensor = (
            shard.parameter.main_grad.view(-1)[shard.start:shard.stop])  # type: ignore[attr-defined]
        if isinstance(shard.inner, HostAdamW):
            shard.inner.copy_gradient(shard.main, gradient.view(shard.main.shape))
            to_host = True
        else:
            shard.main.grad = gradient.view(shard.main.shape).to(shard.main.dtype)
    if to_host:
        wait_for_copies()


def iter_state_shards(model: LanguageModel, shards: Iterable[StateShard]) -> Iterator[LocalShard]:
    """Yield the local optimizer state: `exp_avg/KEY`, `exp_avg_sq/KEY`, `momentum/KEY`, `master/KEY`."""
    for block, shard in iter_shard_blocks(model, shards):
        for name, flat in shard.state().items():
            for piece in iter_pieces(block, shard, flat):
                yield dataclasses.replace(piece, key=f"{name}/{block.key}")


def iter_shard_blocks(model: LanguageModel,
                      shards: Iterable[StateShard]) -> Iterator[tuple[LocalShard, StateShard]]:
    """Yield (`LocalShard`, `StateShard`) for every block that this process updates, completely or in part."""
    shard_by_parameter = {id(shard.parameter): shard for shard in shards}
    lookup = ParameterLookup(model)
    for block in list_declared_blocks(model):
        shard = shard_by_parameter.get(id(lookup.find_parameter(block)))
        if shard is not None:
            yield block, shard


def iter_pieces(block: LocalShard, shard: StateShard, flat: torch.Tensor) -> Iterator[LocalShard]:
    """Yield the parts of `flat` [shard elements] that belong to `block`, as `LocalShard` objects."""
    if not block.data.is_contiguous():
        raise ValueError(f"{block.key}: its block is not a contiguous part of the parameter, "
                         "so its state cannot be cut alike")
    # several blocks may share a parameter (experts, query and key): convert to offsets in the parameter
    first = int(block.data.storage_offset()) - int(shard.parameter.storage_offset())
    start, stop = max(shard.start, first), min(shard.stop, first + block.data.numel())
    leading = len(block.global_shape) - block.data.dim()
    # under ZeRO-1 the updating process writes the elements; otherwise replica 0 writes
    replica = (*block.replica[:-1], 0) if shard.exclusive else block.replica
    for place, extent in iter_rectangles(block.data.shape, start - first, stop - first):
        count = math.prod(extent)
        inner = (o + p for o, p in zip(block.offset[leading:], place, strict=True))
        begin = start - shard.start
        yield LocalShard(block.key, flat[begin:begin + count].view(extent), block.global_shape,
                         (*block.offset[:leading], *inner), replica)
        start += count


def iter_rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Cut the elements [start, stop) of a row-major tensor into at most 2 * axes - 1 rectangles.

    Rectangles come in element order: end of a row, whole rows, beginning of a row, and so on for inner axes.
    """
    if stop <= start:
        return
    row = math.prod(shape[1:])
    # row `first` has `head` elements before the range; row `last` has `tail` elements inside it
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    # range inside one row: recurse with one axis less
    if head and first == last:
        yield from _iter_row_rectangles(shape, first, head, tail)
        return
    if head:
        yield from _iter_row_rectangles(shape, first, head, row)
        first += 1
    if first < last:
        yield (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])
    if tail:
        yield from _iter_row_rectangles(shape, last, 0, tail)


def _iter_row_rectangles(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Rectangle]:
    for place, extent in iter_rectangles(shape[1:], start, stop):
        yield (index, *place), (1, *extent)


@contextlib.contextmanager
def allow_float64() -> Iterator[None]:
    """Let Megatron-Core, which knows three dtypes by type name, create the distributed optimizer for float64
    on GPUs. The CPU shims do so in each process."""
    original_type = torch.Tensor.type

    def get_type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original_type(tensor, *args, **kwargs)
        return name.replace("DoubleTensor", "FloatTensor") if isinstance(name, str) else name

    new_type = original_type if is_cpu_only() else get_type_name
    with mock.patch.object(torch.Tensor, "type", new_type):
        yield


def set_update_count(shards: Iterable[StateShard], num_updates: int) -> None:
    """Set the number of updates in the state, for AdamW's bias correction.

    Each parameter gets its own counter: Megatron-Core's loading shares one tensor among all parameters, which
    torch's AdamW would then increment once per parameter."""
    for shard in shards:
        if _counts_per_parameter(shard.inner):
            shard.state()
            shard.inner.state[shard.main]["step"] = torch.tensor(float(num_updates))
        else:
            for group in shard.inner.param_groups:
                group["step"] = num_updates


def _counts_per_parameter(inner: ShardOptimizer) -> bool:
    """Return whether updates are counted per parameter (torch), not per group (Transformer Engine, Apex)."""
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
