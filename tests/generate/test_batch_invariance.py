"""One sequence at a time: what a prompt is continued with is the same to the bit, whatever stands beside."""

from __future__ import annotations

import pytest

from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

PROMPTS = [[5, 9, 2, 70], [30], list(range(20, 60)), [7] * 9, [80, 81, 82, 83, 84], [3, 1, 4, 1, 5], [2] * 17,
           [11, 12]]
SETTINGS = ("model.init_std=0.3", "model.sliding_window_tokens=8", "model.num_layers=4",
            "model.num_experts=4", "train.precision=fp32")


@pytest.mark.usefixtures("one_rank")
def test_a_batch_of_one_three_or_eight_writes_the_same_bits() -> None:
    prepare_megatron()
    from megatron_sov.generate.generator import MegatronEngine
    from megatron_sov.generate.request import Batching, Generated, Sampling
    from megatron_sov.mcore.decode.forward_only import ForwardModel
    from megatron_sov.mcore.parallel import world
    from tests.tiny import tiny_model

    _, model = tiny_model("tiny-k-exaone", *SETTINGS)
    try:
        sampling = Sampling(8, temperature=1.0, seed=3)

        def written(count: int, batching: Batching) -> Generated:
            return MegatronEngine(ForwardModel(model, 50), batching).generate(
                PROMPTS[:count], sampling, streams=range(count))

        alone = {count: written(count, Batching(1)) for count in (1, 3, 8)}
        for count, found in alone.items():
            assert found.continuations == alone[8].continuations[:count]
            assert found.logprobs == alone[8].logprobs[:count]
        # else the numbers depend on what stands beside them: the test would see that
        assert written(8, Batching()).logprobs != alone[8].logprobs
    finally:
        world.leave()
