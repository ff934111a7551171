"""Parameter groups: rules by name for rate, weight decay, optimizer and freezing; overlapped messages."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.model.local_shards import ParameterLookup, list_local_shards
from megatron_sov.engine.optimizer import parameter_groups
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.optimizer.parameter_groups import assign_shards, find_rule
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import OptimConfig, apply_settings
from tests.tiny import SIZES, tiny_model

# Overlapped communication: buckets are in flight during a step, and evaluation waits for gathered weights.

RUN = str(Path(__file__).parents[2] / "layouts/layout_run.py")
FP64, ZERO1 = "train.precision=fp64", "parallel.zero1=true"
REDUCE, GATHER, BUCKETS = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
                           "parallel.bucket_params=9000")
LAYOUTS = {"plain": (2, []), "both": (2, [ZERO1, REDUCE, GATHER, BUCKETS])}
"""Name -> number of ranks, and settings; "both" overlaps reductions and gathers."""


@pytest.mark.deep
@pytest.mark.distributed
def test_overlap_is_overlap_and_evaluation_waits_for_the_weights(ranks: Any, job: Any,
                                                                 packed_data: Any) -> None:
    jobs = [job(RUN, "train_with_overlap", num_ranks, {
        "settings": [FP64, *settings], "paths": [str(packed_data.text)]})
            for num_ranks, settings in LAYOUTS.values()]
    results = dict(zip(LAYOUTS, ranks(*jobs), strict=True))
    plain = results["plain"][0]
    assert plain["heldout"] and plain["losses"][-1] < plain["losses"][0]
    for name, per_rank in results.items():
        for result in per_rank:
            assert result["losses"] == pytest.approx(plain["losses"], rel=1e-12), name
            assert result["heldout"] == pytest.approx(plain["heldout"], rel=1e-11), name
        (rank0,), (rank1,) = ([result for result in per_rank if result["dp_rank"] == rank] for rank in (0, 1))
        assert (rank0["updated"] != rank1["updated"]) == (name == "both"), (
            f"{name}: before the all-gather, each rank has only the updates of its own ZeRO-1 shard")
        assert rank0["evaluated"] == rank1["evaluated"] and rank0["final"] == rank1["final"], name
    assert results["both"][0]["groups"] > 2, "dense and expert parameters, in buckets"
    assert set(results["plain"][0]["reductions in flight"]) == {0}
    for result in results["both"]:  # the first step only counts the backward passes that add to each gradient
        assert result["reductions in flight"][1:] == [result["groups"]] * 3


def compare_zero1_layouts() -> list[Any]:
    """Wrap a model for ZeRO-1 with our parameter layout, and with the one that Megatron-Core computes.

    Returns, for each kind of overlap: whether both layouts are equal, the number of buckets, and whether
    Megatron-Core warns of a missing layout, with and without ours.
    """
    from unittest import mock

    from megatron.core.distributed import distributed_data_parallel

    config, model = tiny_model("tiny-solar-open", layout={"ep": 2})

    def wrap_chunks(changes: dict[str, Any]) -> tuple[list[Any], bool]:
        messages, parallel = list[str](), dataclasses.replace(config.parallel, zero1=True, **changes)
        with mock.patch.object(distributed_data_parallel, "log_single_rank",
                               lambda logger, level, message: messages.append(message)):
            (chunk,) = parameter_groups.wrap_chunks(model, parallel)
        layouts = [[[*buffer.param_index_map.values()], buffer.bucket_indices]
                   for buffer in chunk.full_param_layout.layouts.values()]
        return layouts, any("full_param_layout not provided" in message for message in messages)

    results = []
    for changes in ({}, {"overlap_grad_reduce": True}, {"overlap_grad_reduce": True, "bucket_params": 9000}):
        layouts, warns = wrap_chunks(changes)
        with mock.patch.object(parameter_groups, "_zero1_layout", lambda *_, **__: None):
            computed_layouts, warns_without = wrap_chunks(changes)
        results.append([layouts == computed_layouts, sum(len(buckets) for _, buckets in layouts), warns,
                        warns_without])
    return results


@pytest.mark.distributed
def test_layouts_of_zero1_are_those_of_megatron_core(ranks: Any, job: Any) -> None:
    for results in ranks(job(__file__, "compare_zero1_layouts", 2))[0]:
        *whole, in_small_buckets = results
        assert whole == [[True, 2, False, True]] * 2  # one bucket for dense weights, one for experts
        is_equal, num_buckets, warns, _ = in_small_buckets
        assert is_equal and num_buckets > 2 and not warns


SMALL_SETTINGS = (*SIZES, "model.dense_ffn_dim=40", FP64, "optim.clip_grad=0.0", "optim.weight_decay=0.2")
GROUPS = ('optim.groups=[{"pattern": "*linear_proj.weight", "lr_scale": 0.5}, '
          '{"pattern": "decoder.layers.1.*", "weight_decay": 0.0}, {"pattern": "*final_layernorm.weight", '
          '"weight_decay": 0.3}, {"pattern": "output_layer.weight", "lr_scale": 0.0}]')


def get_expected_setting(key: str) -> tuple[float, float]:
    """Return the factor of the learning rate and the weight decay that `GROUPS` gives a tensor."""
    if key == "output_layer.weight":
        return 0.0, 0.2
    if key.endswith("final_layernorm.weight"):
        return 1.0, 0.3
    if key.startswith("decoder.layers.1."):
        return 1.0, 0.0
    lr_scale = 0.5 if key.endswith("linear_proj.weight") else 1.0
    return lr_scale, 0.0 if "norm" in key else 0.2


def compare_grouped_updates(settings: list[str]) -> dict[str, float]:
    """Take three updates with our optimizer, and with torch.optim.AdamW with one group per tensor.

    Returns the largest difference of each tensor.
    """
    config, model = tiny_model("tiny-k-exaone", *SMALL_SETTINGS, *settings)
    optimizer = Optimizer(model, config.optim, config.parallel)
    lookup = ParameterLookup(model)
    key_of = {id(lookup.find_parameter(block)): block.key for block in list_local_shards(model)}
    parameters = list(model.parameters())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    groups = []
    for parameter, copy in zip(parameters, copies, strict=True):
        scale, decay = get_expected_setting(key_of[id(parameter)])
        groups.append({"params": [copy], "lr": 0.01 * scale, "weight_decay": decay})
    reference = torch.optim.AdamW(groups, betas=(config.optim.beta1, config.optim.beta2),
                                  eps=config.optim.eps)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        optimizer.zero_grad()
        for parameter, copy in zip(parameters, copies, strict=True):
            copy.grad = torch.randn(copy.shape, generator=generator, dtype=torch.float64)
            parameter.main_grad.copy_(copy.grad)
        optimizer.step(0.01)
        reference.step()
    return {f"{key_of[id(parameter)]} {i}": float((parameter.detach() - copy.detach()).abs().max())
            for i, (parameter, copy) in enumerate(zip(parameters, copies, strict=True))}


def list_rules(settings: list[str]) -> list[Any]:
    """Return algorithm, factor, weight decay and frozen flag of some tensors."""
    config = apply_settings(recipes.get("tiny-k-exaone"), [*SMALL_SETTINGS, *settings]).optim
    tensors = {"decoder.layers.1.mlp.router.weight": 2,
               "decoder.layers.1.self_attention.linear_qkv.weight": 2,
               "decoder.layers.1.pre_mlp_layernorm.weight": 1, "embedding.word_embeddings.weight": 2,
               "output_layer.weight": 2}
    rules = [find_rule(config, key, dim) for key, dim in tensors.items()]
    return [[r.algorithm, r.lr_scale, r.weight_decay, r.frozen] for r in rules]


def list_errors(cases: list[list[str]]) -> list[str]:
    """Return the optimizer's errors for invalid settings."""
    errors = []
    base = apply_settings(recipes.get("tiny-k-exaone"), [*SMALL_SETTINGS, "parallel.pp=2"])
    world.join_world(base.parallel)
    for settings in cases:
        model = build_model(base.model, base.parallel, base.train)
        try:
            Optimizer(model, apply_settings(base, settings).optim, base.parallel)
        except UserError as e:
            errors.append(str(e))
    return errors


@pytest.mark.distributed
def test_groups_change_only_matching_parameters(ranks: Any, job: Any) -> None:
    exceptions = ('optim.groups=[{"pattern": "*router.weight", "optimizer": "adamw"}, '
                  '{"pattern": "decoder.*", "lr_scale": 0.5}, '
                  '{"pattern": "decoder.layers.1.pre*", "frozen": true}, '
                  '{"pattern": "embedding.*", "optimizer": "muon"}]')
    unknown = ['optim.groups=[{"pattern": "decoder.layers.0.*"}, {"pattern": "decoder.layer.1.*"}]']
    everything = ['optim.groups=[{"pattern": "*", "frozen": true}]']
    (differences,), (adamw_rules,), (muon_rules,), *refused = ranks(
        job(__file__, "compare_grouped_updates", 1, {"settings": [GROUPS]}),
        job(__file__, "list_rules", 1, {"settings": []}),
        job(__file__, "list_rules", 1, {"settings": ["optim.name=muon", exceptions]}),
        job(__file__, "list_errors", 2, {"cases": [unknown, everything]}))
    assert len(differences) > 60 and max(differences.values()) < 1e-14, max(differences, key=differences.get)
    decayed, norm = ["adamw", 1.0, 0.2, False], ["adamw", 1.0, 0.0, False]
    assert adamw_rules == [decayed, decayed, norm, decayed, decayed]
    # the last matching pattern applies: the router is Muon's again, at half the rate
    assert muon_rules == [["muon", 0.5, 0.2, False], ["muon", 0.5, 0.2, False], ["adamw", 1.0, 0.0, True],
                          ["adamw", 1.0, 0.2, False], ["adamw", 1.0, 0.2, False]]
    for unknown_error, frozen_error in refused[0]:
        assert "optim.groups.1.pattern = 'decoder.layer.1.*': matches no parameter" in unknown_error
        assert "freeze every parameter" in frozen_error


def test_a_process_with_nothing_to_update_has_nothing_to_offload() -> None:
    """With few trained parameters, the range of some ZeRO-1 processes is padding only."""
    adam = torch.optim.AdamW([{"params": [], "is_expert_parallel": False}])
    library: Any = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)])
    model: Any = None
    assert assign_shards(library, model, {}, OptimConfig(), zero1=True, on_host=0.5) == []
    assert library.chained_optimizers[0].optimizer is adam and adam.param_groups == []
