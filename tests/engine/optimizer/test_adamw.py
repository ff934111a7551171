"""AdamW in host memory: updates follow the formula and do not depend on how ZeRO-1 splits the weights."""

from typing import Any

import pytest
import torch

from megatron_sov.engine.optimizer.adamw import CpuAdamW, HostAdamW, split_groups


def build_groups(*sizes: int) -> list[dict[str, Any]]:
    """Return two groups with different settings and master weights of these sizes, alternating."""
    mains = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in sizes]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    return [{**settings, "weight_decay": 0.1, "params": mains[::2]},
            {**settings, "weight_decay": 0.0, "params": mains[1::2]}]


def test_steps_are_the_formulas() -> None:
    groups = build_groups(96, 7, 33)
    mains = [main for group in groups for main in group["params"]]
    expected = [(main.double(), torch.zeros(len(main)).double(), torch.zeros(len(main)).double())
                for main in mains]
    old_addresses = [main.data_ptr() for main in mains]
    optimizer = HostAdamW(groups)
    for main, old_address in zip(mains, old_addresses, strict=True):
        assert main.data_ptr() != old_address, "HostAdamW moves the data of existing tensors"
    for step in (1, 2, 3):
        for i, main in enumerate(mains):
            gradient = (torch.arange(len(main)) - 11.5 * step).to(torch.bfloat16)
            optimizer.copy_gradient(main, gradient)
            weight, exp_avg, exp_avg_sq = expected[i]
            exp_avg = 0.9 * exp_avg + 0.1 * gradient.double()
            exp_avg_sq = 0.95 * exp_avg_sq + 0.05 * gradient.double().square()
            decay = next(g["weight_decay"] for g in groups if any(p is main for p in g["params"]))
            # arXiv 1711.05101, algorithm 2, with the rate applied to the decay too
            update = exp_avg / (1 - 0.9 ** step) / ((exp_avg_sq / (1 - 0.95 ** step)).sqrt() + 1e-8)
            expected[i] = weight * (1 - 1e-2 * decay) - 1e-2 * update, exp_avg, exp_avg_sq
        optimizer.step()
    for main, expected_state in zip(mains, expected, strict=True):
        state = optimizer.state[main]
        for tensor, expected_tensor in zip((main, state["exp_avg"], state["exp_avg_sq"]), expected_state,
                                           strict=True):
            torch.testing.assert_close(tensor.double(), expected_tensor, rtol=2e-6, atol=1e-6)


@pytest.mark.each(("share", "host_sizes"), [
    (0.0, []), (0.01, [40]), (0.5, [40, 30]), (0.7, [40, 30]), (0.71, [40, 30, 20]), (1.0, [40, 30, 20, 10])])
def test_at_least_the_share_of_elements_moves_to_the_host(share: float, host_sizes: list[int]) -> None:
    groups = build_groups(40, 30, 20, 10)
    mains = sorted((main for group in groups for main in group["params"]), key=len, reverse=True)
    gpu_groups, host_groups = split_groups(groups, mains, share)
    sizes = [len(main) for group in host_groups for main in group["params"]]
    assert sorted(sizes, reverse=True) == host_sizes
    for group in (*gpu_groups, *host_groups):
        assert group["params"], "no group is empty"
        for main in group["params"]:
            # build_groups puts 40 and 20 into the group with decay
            assert group["weight_decay"] == (0.1 if len(main) in (40, 20) else 0.0)
    assert sum(len(group["params"]) for group in (*gpu_groups, *host_groups)) == 4


NUM_WEIGHTS = 4099


def update_weights(steps: int, boundaries: list[int], dtype: torch.dtype, optimizer: Any = CpuAdamW,
                   **settings: Any) -> torch.Tensor:
    """Update weights that are split at `boundaries` into parameters of two groups; return all weights."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(NUM_WEIGHTS, generator=generator).to(dtype) / 50
    shards = [torch.nn.Parameter(shard.clone()) for shard in weights.tensor_split(boundaries)]
    groups = [{"params": group_shards} for group_shards in (shards[::2], shards[1::2]) if group_shards]
    adamw = optimizer(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **settings)
    for _ in range(steps):
        gradients = torch.randn(NUM_WEIGHTS, generator=generator).to(dtype) / 1000
        for shard, gradient in zip(shards, gradients.tensor_split(boundaries), strict=True):
            shard.grad = gradient
        adamw.step()
    return torch.cat([shard.detach() for shard in shards])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_has_the_same_bits_wherever_zero1_splits_it(dtype: torch.dtype) -> None:
    unsplit = update_weights(6, [], dtype)
    for boundaries in ([1], [7, 40], [2048], list(range(3, NUM_WEIGHTS, 13)), [0, 0, 64]):
        assert torch.equal(update_weights(6, boundaries, dtype), unsplit), boundaries
    torch_weights = update_weights(6, [], dtype, torch.optim.AdamW)
    assert torch.allclose(unsplit, torch_weights, rtol=1e-5 if dtype == torch.float32 else 1e-14, atol=0)
