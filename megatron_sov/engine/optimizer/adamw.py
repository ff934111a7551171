"""AdamW in torch for CPU training and for optimizer state in host memory."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megatron_sov.engine.parallel.device import PinnedArena, count_bytes

VECTOR_BYTES = 64
"""Vector size of AVX-512, a multiple of the sizes on other machines."""


class CpuAdamW(torch.optim.AdamW):
    """AdamW over contiguous tensors in host memory.

    Torch's fused CPU kernel processes whole vectors, and rounds the elements after the last whole vector
    differently. Where ZeRO-1 splits a tensor decides about these elements; `CpuAdamW` pads them to a whole
    vector, and results no longer depend on the split."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update whole vectors in place, and the remaining elements in a padded copy."""
        assert closure is None
        for group in self.param_groups:
            lists: tuple[list[torch.Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *lists)
            *values, _, steps = lists  # parameters, gradients, moments, AMSGrad's maxima (unused), steps
            if not steps:
                continue
            torch._foreach_add_(steps, 1)
            whole_vectors = [[t.view(-1)[:_count_vector_elements(t)] for t in tensors] for tensors in values]
            _call_kernel(group, whole_vectors, steps)
            if all(p.numel() == _count_vector_elements(p) for p in values[0]):
                continue
            remainders = [[t.view(-1)[_count_vector_elements(t):] for t in tensors] for tensors in values]
            padded = [[_pad_to_vector(t) for t in tensors] for tensors in remainders]
            _call_kernel(group, padded, steps)
            for kind in (0, 2, 3):  # parameters and both moments; 1 is the gradient
                for remainder, updated in zip(remainders[kind], padded[kind], strict=True):
                    remainder.copy_(updated[:len(remainder)])


class HostAdamW(CpuAdamW):
    """`CpuAdamW` over master weights that it moves to host memory, for a share of the parameters.

    Megatron-Core's `HybridDeviceOptimizer` also keeps every master weight on the GPU unless Transformer
    Engine's optimizer holds it, recreates its optimizers after a checkpoint load, and runs only with a GPU.
    This class moves the master weights themselves, so Megatron-Core's copies to and from model weights, its
    gradient norm and our checkpoints find them in place."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        """Move the master weights.

        Args:
            param_groups: groups with float32 master weights under `params`.
        """
        mains = [main for group in param_groups for main in group["params"]]
        arena = PinnedArena(2 * sum(map(count_bytes, mains)))
        for main in mains:
            # same tensor object: Megatron-Core's lists and attributes of master weights stay valid
            main.data = arena.allocate_like(main).copy_(main.data)
        super().__init__(param_groups)
        self._gradients = {main: arena.allocate_like(main) for main in mains}

    def copy_gradient(self, main: torch.Tensor, gradient: torch.Tensor) -> None:
        """Start copying a master weight's gradient from the GPU; call `wait_for_copies` before reading it."""
        main.grad = self._gradients[main].copy_(gradient.to(main.dtype), non_blocking=True)


def _count_vector_elements(tensor: torch.Tensor) -> int:
    """Count the elements in whole vectors; the remaining elements follow them."""
    return tensor.numel() - tensor.numel() % (VECTOR_BYTES // tensor.element_size())


def _pad_to_vector(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, -len(tensor) % (VECTOR_BYTES // tensor.element_size())))


def _call_kernel(group: dict[str, Any], values: Sequence[list[torch.Tensor]],
                 steps: list[torch.Tensor]) -> None:
    """Call the kernel with parameters, gradients and both moments."""
    beta1, beta2 = group["betas"]
    parameters, gradients, exp_avg, exp_avg_sq = values
    torch._fused_adamw_(parameters, gradients, exp_avg, exp_avg_sq, [], steps, lr=group["lr"], beta1=beta1,
                        beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                        maximize=False)


def wait_for_copies() -> None:
    torch.cuda.current_stream().synchronize()


def split_groups(groups: list[dict[str, Any]], mains: Iterable[torch.Tensor],
                 share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return GPU groups and host groups with the settings of `groups`.

    The first master weights that make up at least `share` of all elements move to the host.

    Args:
        groups: AdamW's groups, each with its master weights under `params`.
        mains: all master weights, in the order in which they move.
        share: share of elements, 0 to 1.
    """
    sizes = {id(main): main.numel() for main in mains}
    remaining_elements, moved_ids = share * sum(sizes.values()), set[int]()
    for main_id, size in sizes.items():
        if remaining_elements > 0:
            moved_ids.add(main_id)
            remaining_elements -= size
    gpu_groups: list[dict[str, Any]] = []
    host_groups: list[dict[str, Any]] = []
    for group in groups:
        on_gpu = [p for p in group["params"] if id(p) not in moved_ids]
        on_host = [p for p in group["params"] if id(p) in moved_ids]
        # torch refuses groups without parameters
        if on_gpu:
            gpu_groups.append({**group, "params": on_gpu})
        if on_host:
            host_groups.append({**group, "params": on_host})
    return gpu_groups, host_groups
