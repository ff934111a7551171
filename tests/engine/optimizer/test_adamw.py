"""AdamW in host memory equals AdamW, and updates the tensors that Megatron-Core holds."""

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
    before = [main.data_ptr() for main in mains]
    optimizer = HostAdamW(groups)
    assert all(main.data_ptr() != old for main, old in zip(mains, before, strict=True)), "they have moved"
    for step in (1, 2, 3):
        for i, main in enumerate(mains):
            gradient = (torch.arange(len(main)) - 11.5 * step).to(torch.bfloat16)
            optimizer.copy_gradient(main, gradient)
            weight, first, second = expected[i]
            first = 0.9 * first + 0.1 * gradient.double()
            second = 0.95 * second + 0.05 * gradient.double().square()
            decay = next(g["weight_decay"] for g in groups if any(p is main for p in g["params"]))
            # arXiv 1711.05101, algorithm 2, with the rate applied to the decay too
            update = first / (1 - 0.9 ** step) / ((second / (1 - 0.95 ** step)).sqrt() + 1e-8)
            expected[i] = weight * (1 - 1e-2 * decay) - 1e-2 * update, first, second
        optimizer.step()
    for main, wanted in zip(mains, expected, strict=True):
        state = optimizer.state[main]
        for found, value in zip((main, state["exp_avg"], state["exp_avg_sq"]), wanted, strict=True):
            torch.testing.assert_close(found.double(), value, rtol=2e-6, atol=1e-6)


@pytest.mark.each(("share", "moved"), [(0.0, []), (0.01, [40]), (0.5, [40, 30]), (0.7, [40, 30]),
                                              (0.71, [40, 30, 20]), (1.0, [40, 30, 20, 10])])
def test_a_share_is_of_elements_and_never_less(share: float, moved: list[int]) -> None:
    groups = build_groups(40, 30, 20, 10)
    mains = sorted((m for group in groups for m in group["params"]), key=len, reverse=True)
    stays, moves = split_groups(groups, mains, share)
    assert sorted((len(m) for group in moves for m in group["params"]), reverse=True) == moved
    for side in (stays, moves):
        assert all(group["params"] for group in side), "no group is empty"
        assert all((len(m) in (40, 20)) == (group["weight_decay"] == 0.1)
                   for group in side for m in group["params"])
    assert sum(len(group["params"]) for group in (*stays, *moves)) == 4


# CPU AdamW gives each element the same bits wherever ZeRO-1 splits.


NUM_WEIGHTS = 4099


def weights_after(steps: int, cuts: list[int], dtype: torch.dtype, optimizer: Any = CpuAdamW,
                  **settings: Any) -> torch.Tensor:
    """Return all weights after some updates of the pieces between `cuts`, in two groups."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(NUM_WEIGHTS, generator=generator).to(dtype) / 50
    pieces = [torch.nn.Parameter(piece.clone()) for piece in weights.tensor_split(cuts)]
    groups = [{"params": part} for part in (pieces[::2], pieces[1::2]) if part]
    made = optimizer(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **settings)
    for _ in range(steps):
        gradients = torch.randn(NUM_WEIGHTS, generator=generator).to(dtype) / 1000
        for piece, gradient in zip(pieces, gradients.tensor_split(cuts), strict=True):
            piece.grad = gradient
        made.step()
    return torch.cat([piece.detach() for piece in pieces])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_has_the_same_bits_wherever_it_is_cut(dtype: torch.dtype) -> None:
    whole = weights_after(6, [], dtype)
    for cuts in ([1], [7, 40], [2048], list(range(3, NUM_WEIGHTS, 13)), [0, 0, 64]):
        assert torch.equal(weights_after(6, cuts, dtype), whole), cuts
    plain = weights_after(6, [], dtype, torch.optim.AdamW)
    assert torch.allclose(whole, plain, rtol=1e-5 if dtype == torch.float32 else 1e-14, atol=0)
