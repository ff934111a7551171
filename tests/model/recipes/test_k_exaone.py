"""K-EXAONE 2.0 at full size is what others counted of its release."""

from __future__ import annotations

import pytest

from megatron_sov.model import recipes
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.count import count_params, layer_weights

TENSORS, SIZE_BYTES = 59_396, 1_498_715_008_512
"""Of the released folder (Megatron-Bridge, examples/model_verification_cards/k-exaone-2/card.yaml)."""


def test_the_released_folder_has_this_architecture_to_the_byte() -> None:
    model = recipes.get("k-exaone2-750b").model

    # bf16, and routers' biases in fp32
    held = sum(w.numel * len(w.layers) * (4 if w.is_buffer else 2) for w in layer_weights(model))
    named = {name for link in models.get_family(model.family).links(model) for name in link.hf_names}

    assert (held, len(named)) == (SIZE_BYTES, TENSORS)
    found = count_params(model)
    assert found.total + found.mtp == pytest.approx(749.4e9, rel=1e-3)
    assert found.active == pytest.approx(37e9, rel=0.01)


def test_windows_and_bounds_are_those_that_programs_read() -> None:
    model = recipes.get("k-exaone2-750b").model

    windows, limits = model.windows(), model.limits()

    # NVIDIA's Dynamo recipe: 20 full-attention and 58 sliding layers; TensorRT-LLM's pull request 17067
    assert (windows.count(0), windows.count(128), windows[1]) == (20, 57, 4096)
    assert [i for i, limit in enumerate(limits) if limit] == list(range(62, 78)) and {*limits} == {0.0, 7.0}
    assert (model.mtp_window(), model.num_predictions, model.num_dense_layers) == (128, 4, 2)


def test_layouts_divide_it() -> None:
    assert recipes.get("k-exaone2-750b").problems(512) == []
    assert recipes.get("k-exaone2-750b-extend").problems(1024) == []


@pytest.mark.parametrize("layers", [2, 6, 80])
def test_another_depth_keeps_what_single_layers_have(layers: int) -> None:
    import dataclasses

    model = recipes.get("k-exaone2-750b").model
    other = dataclasses.replace(model, **model.fields_for_depth(layers))

    assert other.problems() == [] and other.windows()[:2] == [0, 4096][:layers]
    assert other.limits()[-1] == 7.0 and (layers < 6 or other.limits()[0] == 0)
