"""Versions of the library number and describe layers differently, and some differences raise nothing: every
layer has the number of its entry in our lists, and our router."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import newest


def layers_built() -> dict[str, Any]:
    """Build a model whose layers are of two kinds, its prediction layer with experts, and say what each is;
    then what is said of a wrong number, and of the library's own router."""
    from unittest import mock

    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_sov import recipes
    from megatron_sov.engine.model import language_model, specs
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig, apply_settings

    config = apply_settings(recipes.get("tiny-k-exaone"), ["model.mtp_experts=true"])
    world.join(ParallelConfig())
    model, (chunk,) = config.model, language_model.build_configured(config).chunks
    layers = [*chunk.decoder.layers, chunk.mtp.layers[0].transformer_layer]
    found = [{"number": layer.layer_number, "attention": layer.self_attention.layer_number,
              "router": layer.mlp.router.layer_number if layer.is_moe_layer else None,
              "window": layer.self_attention.core_attention.window_tokens}
             for layer in layers]
    kinds = [*model.layer_types(), model.mtp_layer_type()]
    windows = [*model.windows(), model.mtp_window()]
    wanted = [{"number": n, "attention": n, "router": n if n > model.num_dense_layers else None,
               "window": window} for n, window in enumerate(windows, 1)]
    stands_still = [bool(chunk.config.no_rope_freq[layer.layer_number - 1]) for layer in layers]
    refusals = []
    layers[-1].mlp.router.layer_number = 1
    with pytest.raises(RuntimeError) as told:
        language_model.check_layers(chunk, 0)
    refusals.append(str(told.value))
    with mock.patch.object(specs, "BalancedRouter", TopKRouter), pytest.raises(RuntimeError) as told:
        language_model.build_configured(config)
    return {"found": found, "wanted": wanted, "stands_still": stands_still, "kinds": kinds,
            "parameters": [n for n, _ in chunk.named_parameters() if n.startswith("mtp.")],
            "refusals": [*refusals, str(told.value)]}


@pytest.mark.distributed
def test_every_layer_has_the_number_of_its_entry_in_our_lists(ranks: Any, job: Any) -> None:
    (built,), = ranks(job(__file__, "layers_built", 1))
    assert built["found"] == built["wanted"]
    assert built["stands_still"] == [kind == "full_attention" for kind in built["kinds"]]
    assert built["kinds"][0] != built["kinds"][-1]  # a prediction layer numbered 1 would be seen
    # the names of weights in checkpoints, between those of the norms, as they were with 0.16
    inside = ["transformer_layer" in name for name in built["parameters"]]
    assert inside == [*sorted(inside[:-1]), False] and any(inside)
    last = len(built["kinds"])
    assert built["refusals"] == [f"layer {last}: BalancedRouter has number 1",
                                 "layer 2: its router is the library's TopKRouter"]


LAYOUT_RUN = str(Path(__file__).parents[1] / "layouts" / "layout_run.py")
CASES = {"tiny-k-exaone": (["train.precision=fp64", "model.num_layers=4"],
                           ["parallel.tp=2", "parallel.sp=true", "parallel.ep=2"]),
         "tiny-solar-open": (["train.precision=fp32", "model.num_layers=2"], ["parallel.ep=2"])}
"""Recipe -> its settings, and those of two processes."""


def compared(job: Any, recipe: str, path: str, reference: Path, *, layout: bool = False,
             is_reference: bool = False) -> Any:
    """Return a job that learns from a path of data, in two processes if `layout`, beside a reference."""
    settings, further = CASES[recipe]
    return job(LAYOUT_RUN, "compared", 1 + layout, {
        "recipe": recipe, "settings": [*settings, *(further if layout else [])], "paths": [path],
        "is_reference": is_reference, "reference": str(reference)})


@pytest.mark.distributed
def test_both_versions_learn_the_same_and_continue_each_others_checkpoints(
        ranks: Any, newest_ranks: Any, job: Any, packed_data: Any, tmp_path: Path) -> None:
    """Two steps, and the second once more from the other's checkpoint: to the bit in the same layout."""
    recipe, path = "tiny-k-exaone", str(packed_data.text)
    (older,), = ranks(compared(job, recipe, path, tmp_path / "older", is_reference=True))
    (newer,), (on_older,) = newest_ranks(
        compared(job, recipe, path, tmp_path / "newer", is_reference=True),
        compared(job, recipe, path, tmp_path / "older"))
    (on_newer,), = ranks(compared(job, recipe, path, tmp_path / "newer"))
    assert older["scratch"][0]["loss"] > older["scratch"][1]["loss"]
    for found in (newer, on_older, on_newer):
        assert (found["scratch"], found["continued"]) == (older["scratch"], older["continued"])
        assert set((found["scratch apart"] | found["continued apart"]).values()) == {0.0}


@pytest.mark.parametrize(("told", "is_said"), [
    ("megatron-core (0.20.0)\nAvailable versions: 0.20.0, 0.19.2", True),
    ("megatron-core (0.19.10)\n", True), ("megatron-core (0.19.2)\n", False), ("", False)])
def test_a_newer_release_is_said_and_no_index_is_no_failure(monkeypatch: pytest.MonkeyPatch, told: str,
                                                           is_said: bool) -> None:
    monkeypatch.setattr(newest.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=told))
    sentence = newest.newer_release("megatron-core", "0.19.2", "3.12")
    assert sentence.startswith("note: megatron-core 0.") if is_said else sentence == ""


def test_the_version_that_is_fetched_is_the_one_that_is_not_installed() -> None:
    assert newest.other((3, 11)) == newest.NEWER
    assert newest.other((3, 12)) == newest.other((3, 13)) == newest.OLDER
    (own,) = {newest.OLDER, newest.NEWER} - {newest.other()}
    assert newest.lane() == newest.lane(newest.other()) != newest.lane(own)


@pytest.mark.distributed
def test_the_other_version_is_what_runs(newest_ranks: Any, job: Any) -> None:
    assert newest_ranks(job(__file__, "version", 1)) == [[newest.lane()]]


def version() -> str:
    from megatron_sov.engine import lanes

    return lanes.VERSION
