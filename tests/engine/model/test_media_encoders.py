"""Image features replace placeholder tokens: documents do not mix; reading in spans gives equal states."""

import json
from typing import Any

import pytest

from tests.tiny import tiny_model

VISION = {"kind": "siglip", "placeholder_ids": [5], "image_size": 8, "patch_size": 4, "hidden_size": 16,
          "num_layers": 1, "num_heads": 2, "ffn_dim": 24}
SETTINGS = ["model.vocab_size=96", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2",
            "model.head_dim=8", "model.dense_ffn_dim=48", "model.init_std=0.3", "train.precision=fp64",
            f"model.vision={json.dumps(VISION)}"]
DOCUMENT = [11, 5, 5, 5, 5, 12, 13, 5, 5, 14, 15, 16]
"""Four placeholders (5) for an image, and two for the first half of a second image."""


def compare_hidden_states(layout: dict[str, Any]) -> dict[str, Any]:
    """Return the largest differences of a document's hidden states from those of the document alone.

    "after_documents" and "other_images": after another document, with other images; "other_second_image":
    with another second image; "spans": read in spans of 3 tokens through a cache.
    """
    import dataclasses

    import numpy as np
    import torch

    from megatron_sov.engine.decode.cached_decoder import CachedDecoder
    from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
    from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan
    from megatron_sov.engine.model.language_model import gather_hidden_states
    from megatron_sov.engine.parallel import collectives, context
    from megatron_sov.model.modality import join_inputs, slice_inputs, take_records

    _, model = tiny_model("tiny-qwen3", *SETTINGS, layout=layout)
    bank = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    policy = ForwardModel(model, 64)

    def show_images(first: int, second: int) -> Any:
        positions = np.flatnonzero(np.array(DOCUMENT) == 5)
        features = np.array([4 * first + i for i in range(4)] + [4 * second, 4 * second + 1])
        return {"pictures": take_records(positions, features, bank, 4)}

    def compute_last_document(pictures: list[tuple[int, int]]) -> torch.Tensor:
        row = DocumentBatch([DOCUMENT] * len(pictures), torch.device("cpu"), 4 * len(DOCUMENT))
        row.inputs = dataclasses.replace(row.inputs, encoder_inputs=join_inputs(
            (i * len(DOCUMENT), show_images(*images)) for i, images in enumerate(pictures)))
        end = len(pictures) * len(DOCUMENT)
        row_states = policy.map([row], lambda depths, *_: context.gather_row(
            gather_hidden_states(depths[0], model.config))[end - len(DOCUMENT):end])
        return collectives.broadcast_from_last_stage(
            row_states[0] if row_states else torch.zeros(len(DOCUMENT), 32, dtype=torch.float64))

    expected = compute_last_document([(0, 1)])
    others = {"after_documents": compute_last_document([(2, 2), (0, 1)]),
              "other_images": compute_last_document([(1, 0), (0, 1)]),
              "other_second_image": compute_last_document([(0, 2)])}
    states_by_span = []
    with CachedDecoder(policy, CacheSize(1, 16)) as decoder:
        for start in range(0, 12, 3):
            output = decoder.read([CacheSpan(0, start, DOCUMENT[start:start + 3],
                                             slice_inputs(show_images(0, 1), start, 3))],
                                  decoder.agree_row_tokens(3))
            states_by_span.append(collectives.broadcast_from_last_stage(
                gather_hidden_states(output.hidden, model.config)[:3] if output.hidden is not None
                else torch.zeros(3, 32, dtype=torch.float64)))
    others["spans"] = torch.cat(states_by_span)
    return {name: float((other - expected).abs().max()) for name, other in others.items()}


@pytest.mark.distributed
def test_documents_are_separate_and_cached_spans_equal_whole_rows(ranks: Any, job: Any) -> None:
    layouts = ((1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2}), (2, {"cp": 2}))
    results = ranks(*(job(__file__, "compare_hidden_states", n, {"layout": layout}) for n, layout in layouts))
    for (_, layout), per_rank in zip(layouts, results, strict=True):
        for differences in per_rank:
            assert max(differences["after_documents"], differences["other_images"],
                       differences["spans"]) < 1e-12, layout
            assert differences["other_second_image"] > 1e-3, "the second image has an effect"
