"""The output head beside fused accumulation of weight gradients, which the library's own would refuse."""

from __future__ import annotations

from typing import Any

import pytest


def heads() -> list[Any]:
    """Return the fusion's value in a head and in the model's config, and the library's refusal of its own."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer import TransformerConfig

    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.model import output_head
    from megatron_sov.mcore.parallel import world

    world.join(ParallelConfig())
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1,
                               use_cpu_initialization=True, perform_initialization=False,
                               gradient_accumulation_fusion=True)

    def make() -> Any:
        return tensor_parallel.ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.zeros_,
                                                    bias=False, skip_bias_add=False)

    with output_head.without_fusion():
        head = make()
    try:
        make()
    except RuntimeError as e:
        return [head.gradient_accumulation_fusion, config.gradient_accumulation_fusion, str(e)]
    return []


def built_head() -> list[Any]:
    """Return the type of a model's output head, as it is built."""
    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.parallel import world

    config = recipes.get("tiny-qwen3")
    world.join(ParallelConfig())
    return [type(build(config.model, ParallelConfig(), config.train).chunks[0].output_layer).__name__]


@pytest.mark.distributed
def test_the_head_of_a_model_has_a_config_of_its_own(ranks: Any, job: Any) -> None:
    ((of_head, of_model, refusal),), ((built,),) = ranks(job(__file__, "heads", 1, {}),
                                                        job(__file__, "built_head", 1, {}))
    assert (of_head, of_model, built) == (False, True, "OutputHead")
    assert "gradient_accumulation_fusion" in refusal and "APEX" in refusal
