"""A layout is compared with one process: right ones are equal, faults on purpose are found and their place is
named."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov.engine.parallel import cpu_shims
from megatron_sov.model import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.proof.miniature import Miniature, miniature, write_documents

cpu_shims.prepare_without_gpu()
proving = importlib.import_module("megatron_sov.proof.proving")  # which imports megatron-core
DIFFERS, EQUAL, STANDS = proving.DIFFERS, proving.EQUAL, proving.STANDS
LAYOUT = ("parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.ep=2", "train.global_batch_size=32")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """K-EXAONE's family with a prediction layer, on four processes."""
    documents = tmp_path_factory.mktemp("proof") / "documents"
    write_documents(documents)
    return miniature(apply_settings(recipes.get("tiny-k-exaone"), LAYOUT), 4, documents)


@pytest.fixture(scope="module")
def whole(small: Miniature) -> Any:
    return proving.play_alone(small)


def faulty(small: Miniature, whole: Any, kind: str, group: str, function: str,
           spoil: Callable[[Sequence[Any]], None]) -> Any:
    """Prove with one call done wrongly each time."""
    def meddle(site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> bool:
        if site.kind != kind or group not in site.group or function not in site.where:
            return False
        work(parts)
        spoil(parts)
        return True

    return proving.prove(small, meddle, whole)


def halve(parts: Sequence[Any]) -> None:
    for part in parts:
        part.outputs[0].mul_(0.5)


def test_right_layouts_are_equal(small: Miniature, whole: Any) -> None:
    verdict = proving.prove(small, whole=whole)

    assert (verdict.outcome, verdict.places) == (EQUAL, [])
    assert verdict.largest < 1e-12
    assert verdict.compared["tensors"] > 200 and verdict.messages > 500


def test_zero_1_and_a_cut_row_are_equal(tmp_path: Path) -> None:
    write_documents(tmp_path / "documents")
    layout = ("parallel.cp=2", "parallel.zero1=true", "parallel.overlap_grad_reduce=true",
              "parallel.overlap_param_gather=true", "train.global_batch_size=32")
    config = apply_settings(recipes.get("tiny-solar-open"), layout)

    assert proving.prove(miniature(config, 4, tmp_path / "documents")).outcome == EQUAL


def test_windows_and_bounds_of_layers_and_repeated_predictions_are_equal(tmp_path: Path) -> None:
    write_documents(tmp_path / "documents")
    layout = ("parallel.cp=2", "parallel.ep=2", "parallel.zero1=true", "train.global_batch_size=32",
              "train.recompute=true", "parallel.overlap_grad_reduce=true")
    small = miniature(apply_settings(recipes.get("tiny-k-exaone2"), layout), 2, tmp_path / "documents")
    model = small.config.model

    assert (model.layer_windows[:3], model.mtp_depths) == ((0, 12, 8), 4) and model.swiglu_limits[-1] == 0.01
    assert proving.prove(small).outcome == EQUAL


def test_an_unsummed_output_is_found_in_its_module(small: Miniature, whole: Any) -> None:
    verdict = faulty(small, whole, "reduce_scatter", "TENSOR", "_reduce_scatter_along_first_dim", halve)

    assert verdict.outcome == DIFFERS
    # the embedding's sum comes first, then each layer's
    assert verdict.places[0] == "step 1: forward of embedding.word_embeddings"
    assert any("reduce_scatter over TENSOR_MODEL_PARALLEL_GROUP at mappings.py" in s for s in verdict.sites)


def test_gradients_that_are_not_summed_over_data_are_found(small: Miniature, whole: Any) -> None:
    verdict = faulty(small, whole, "allreduce", "DATA_PARALLEL", "start_grad_sync", halve)

    assert verdict.outcome == DIFFERS
    # nothing on the way is wrong, so that what differs first is a number of the whole step
    assert verdict.places[0] == "step 1: gradient norm"


def test_a_standstill_is_a_refutation(small: Miniature, whole: Any,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    real = dispatcher.all_to_all

    def skipping(group: Any, given: torch.Tensor, *sizes: Any, **named: Any) -> Any:
        return given if group.rank() == 1 else real(group, given, *sizes, **named)

    monkeypatch.setattr(dispatcher, "all_to_all", skipping)

    verdict = proving.prove(small, whole=whole)

    assert verdict.outcome in (STANDS, "fails") and verdict.places


def test_a_loss_that_is_not_a_number_is_a_difference(small: Miniature, whole: Any,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    real = proving._step

    def spoilt(trainer: Any) -> dict[str, float]:
        return {**real(trainer), "loss": float("nan")}

    monkeypatch.setattr(proving, "_step", spoilt)

    verdict = proving.prove(small, whole=whole)

    assert verdict.outcome == DIFFERS and "step 1: loss" in verdict.places


@pytest.mark.parametrize(("recipe", "missing"), [
    ("tiny-solar-open-rl", "own loss"), ("tiny-solar-open-dpo", "own loss"),
    ("tiny-typhoon-s-opd", "own loss"), ("tiny-hyperclova-omni-sft", "encoder of pictures"),
    ("tiny-hyperclova-omni", "encoder of sound")])
def test_the_trunk_of_every_kind_of_run_is_played(recipe: str, missing: str, tmp_path: Path) -> None:
    small = miniature(apply_settings(recipes.get(recipe), ()), 2, tmp_path / "documents")

    assert small.config.objective.name in proving.OBJECTIVES and small.config.problems(2) == []
    assert any(missing in what for what in small.left_out)


def test_the_command_tells_and_ends_with_0(run_command: Any) -> None:
    done = run_command("plan", "tiny-qwen3", "--set", "parallel.tp=2", "--set", "parallel.pp=2", "--nproc",
                       "4", "--prove", "--json")

    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert found["outcome"] == EQUAL and found["num_ranks"] == 4 and found["layout"]["pp"] == 2
    assert any("Transformer Engine" in line for line in found["assumed"])


def test_options_of_another_plan_are_refused(run_command: Any) -> None:
    done = run_command("plan", "tiny-qwen3", "--prove", "--sweep", "--cluster", "h100")

    assert done.returncode == 2 and "--prove" in done.stderr and "--sweep" in done.stderr
