"""Forward and backward passes of a step: gradients do not depend on the micro-batches, and repeat exactly."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact, read_manifest
from megatron_sov.base.documents.shard_files import IndexedWriter
from megatron_sov.base.errors import UserError
from megatron_sov.engine.model.replica_checks import list_gradients
from megatron_sov.engine.parallel import rng
from megatron_sov.model.config import apply_settings
from megatron_sov.train.data.requirements import build_route_shape
from megatron_sov.train.data.sources import open_sources
from tests.tiny import tiny_trainer

SETTINGS = ("model.num_layers=2", "model.head_dim=8", "model.expert_ffn_dim=16",
            "train.global_batch_size=8", "train.precision=fp32", "guards.hang_timeout_s=0")
BuildRun = Callable[..., Any]


@pytest.fixture
def build_run(alone: Any, packed_data: Any, tmp_path: Path) -> Iterator[BuildRun]:
    """Return `build_run(*settings, faults, data)`: builds a small trainer; returns its parts and its first
    batch."""
    trainers = []

    def build(*settings: str, faults: str = "", data: Path = packed_data.text) -> Any:
        trainer = tiny_trainer(str(data), *SETTINGS, *settings, run=tmp_path, faults=faults, place=alone)
        trainers.append(trainer)
        batch = trainer.objective.prepare(trainer.objective.collect(trainer.policy, 0))
        return SimpleNamespace(
            forward_backward=trainer.forward_backward, objective=trainer.objective, batch=batch,
            model=trainer.model, seed=trainer.config.train.seed, load=trainer.expert_load.gather)

    yield build
    for trainer in trainers:
        trainer.close()


def flatten_sums(sums: Any) -> torch.Tensor:
    """Return a step's sums over terms and over sources, joined into a vector."""
    return torch.cat([torch.tensor(list(sums.terms.values()), dtype=torch.float64), sums.by_source.flatten()])


def copy_gradients(model: Any) -> torch.Tensor:
    """Return copies of all gradients, as one vector."""
    return torch.cat([g.detach().flatten().clone() for g in list_gradients(model)])


def test_gradients_and_sums_do_not_depend_on_micro_batches(build_run: BuildRun) -> None:
    results = []
    for size in (1, 4, 8):
        run = build_run(f"train.micro_batch_size={size}")
        assert len(run.batch.micro_batches) == 8 // size
        sums = run.forward_backward.compute_gradients(run.batch, run.objective, 1)
        results.append((flatten_sums(sums), copy_gradients(run.model)))
        assert run.forward_backward.is_finite
    first_sums, first_gradient = results[0]
    for sums, gradient in results[1:]:
        torch.testing.assert_close(sums, first_sums, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, first_gradient, rtol=1e-3, atol=1e-6)
    assert first_gradient.abs().max() > 1e-3


def test_sums_are_terms_then_loss_and_targets_of_each_source(build_run: BuildRun) -> None:
    run = build_run("train.micro_batch_size=2")
    sums = run.forward_backward.compute_gradients(run.batch, run.objective, 1)
    assert list(sums.terms) == sorted(run.objective.coefficients)
    losses, targets = sums.by_source.T
    assert len(losses) == 2, "even and odd"
    assert targets.sum() == run.batch.targets["lm"] > 0
    assert float(losses.sum()) == pytest.approx(sums.terms["lm"], rel=1e-6)
    assert float(losses.sum() / targets.sum()) == pytest.approx(math.log(368), rel=0.1), (
        "an untrained model predicts all tokens with equal probability")


def test_meters_do_not_depend_on_micro_batches(build_run: BuildRun) -> None:
    for size in (1, 8):
        run = build_run(f"train.micro_batch_size={size}")
        original_loss = run.objective.loss

        def loss(hidden: Any, head: Any, batch: Any, original_loss: Any = original_loss) -> Any:
            odd = (batch.labels % 2 * batch.weights).sum()
            # meters are (sum, count); the mean is reported, and nothing for a count of 0
            return dataclasses.replace(original_loss(hidden, head, batch), meters={
                "odd": (odd, batch.weights.sum()), "never": (0.0, 0), "rows": (3.0, 2)})

        run.objective.loss, run.objective.meters = loss, ("rows", "odd", "never")
        labels, weights = (torch.cat([getattr(m, name) for m in run.batch.micro_batches])
                           for name in ("labels", "weights"))
        expected = float((labels % 2)[weights > 0].double().mean())
        assert 0 < expected < 1
        assert run.forward_backward.compute_gradients(run.batch, run.objective, 1).meters == {
            "rows": 1.5, "odd": pytest.approx(expected, rel=1e-12)}
    run.objective.meters = ("rows",)
    with pytest.raises(UserError, match=r"meters \['never', 'odd', 'rows'\]"):
        run.forward_backward.compute_gradients(run.batch, run.objective, 1)


def add_routes(data: Path, folder: Path, recorded_share: float) -> Path:
    """Copy token shards to `folder` and add random routes for a share of their tokens."""
    shape = build_route_shape(apply_settings(recipes.get("tiny-solar-open"), SETTINGS).model)
    random, manifest = np.random.default_rng(0), read_manifest(data, "tokens")
    with create_artifact(folder, "tokens") as artifact:
        sources = open_sources({str(data): 1.0}, 368)
        for source, record in zip(sources, manifest.content["sources"], strict=True):
            for split in ("train", "heldout"):
                shard = source.open_split(split)
                prefix = f"{source.name}-{split}"
                with IndexedWriter(artifact.path / prefix, "uint16", {"routes": shape.dtype}) as writer:
                    for document, length in enumerate(shard.lengths):
                        all_experts = np.tile(np.arange(shape.num_experts), (length, shape.layers, 1))
                        routes = random.permuted(all_experts, axis=2)[:, :, :shape.top_k].astype(shape.dtype)
                        routes[random.random(length) >= recorded_share] = shape.mark
                        writer.write(np.array([length]), {"bin": shard.tokens(document, 0, length),
                                                          "routes": routes.reshape(-1)})
                record["splits"][split]["shards"] = [{"prefix": prefix}]
            record |= {"sidecars": ["routes"], "routes": shape.record()}
        artifact.content = manifest.content
    return folder


def test_routes_of_data_are_replayed_and_their_share_is_reported(build_run: BuildRun, packed_data: Any,
                                                                 tmp_path: Path) -> None:
    results = {}
    for name, data in (("live", packed_data.text),
                       ("unknown", add_routes(packed_data.text, tmp_path / "unknown", 0.0)),
                       ("recorded", add_routes(packed_data.text, tmp_path / "recorded", 0.75))):
        run = build_run("train.micro_batch_size=2", data=data)
        sums = run.forward_backward.compute_gradients(run.batch, run.objective, 1)
        results[name] = sums.terms["lm"], sums.meters
    # of the last run, with recorded routes
    routes = np.concatenate([m.inputs.routes for m in run.batch.micro_batches])
    padding = np.concatenate([m.inputs.padding.numpy() for m in run.batch.micro_batches])
    share = float((routes[~padding] != 255).mean())  # 255 marks a token without recorded routes
    assert 0.6 < share < 0.9
    (live_loss, live_meters), (recorded_loss, recorded_meters) = results["live"], results["recorded"]
    assert live_meters == {} and recorded_meters == {"replayed_routes": pytest.approx(share)}
    assert results["unknown"] == (live_loss, {"replayed_routes": 0.0})
    assert abs(recorded_loss / live_loss - 1) > 1e-5, "random experts compute another loss"


def test_a_non_finite_loss_is_attributed_to_its_process(build_run: BuildRun) -> None:
    run = build_run("train.micro_batch_size=2", faults="nan@step=2")
    finite = []
    for step in (1, 2, 3):
        sums = run.forward_backward.compute_gradients(run.batch, run.objective, step)
        finite.append([run.forward_backward.is_finite,
                       *(bool(v.isfinite().all()) for v in (flatten_sums(sums), copy_gradients(run.model)))])
    assert finite == [[True] * 3, [False] * 3, [True] * 3]


def test_repeated_passes_are_equal_despite_dropout_and_have_no_side_effect(build_run: BuildRun) -> None:
    """`compute_local_gradients` computes a part of the batch twice, as turn 0 and turn 1."""
    settings = ("train.micro_batch_size=2", "train.hidden_dropout=0.2")
    repeated, single = build_run(*settings), build_run(*settings)
    gradients_by_turn = []
    for turn in (0, 1):
        repeated.forward_backward.compute_local_gradients(repeated.batch, repeated.objective, 1, turn)
        gradients_by_turn.append(copy_gradients(repeated.model))
    assert torch.equal(gradients_by_turn[0], gradients_by_turn[1])
    sums_after_repetition = flatten_sums(
        repeated.forward_backward.compute_gradients(repeated.batch, repeated.objective, 1))
    rng.seed_step(single.seed, 0)
    single_sums = flatten_sums(single.forward_backward.compute_gradients(single.batch, single.objective, 1))
    assert torch.equal(single_sums, sums_after_repetition)
    assert torch.equal(copy_gradients(single.model), copy_gradients(repeated.model))
    assert torch.equal(single.load(), repeated.load()), "experts are counted once"
    assert not torch.equal(copy_gradients(repeated.model), gradients_by_turn[0]), (
        "a turn has only a part of the batch")


def test_a_flipped_bit_in_the_repeated_pass_is_detected(build_run: BuildRun) -> None:
    run = build_run("train.micro_batch_size=2", faults="miscompute@step=1")
    gradients_by_turn = []
    for turn in (0, 1):
        run.forward_backward.compute_local_gradients(run.batch, run.objective, 1, turn)
        gradients_by_turn.append(copy_gradients(run.model))
    assert int((gradients_by_turn[0] != gradients_by_turn[1]).sum()) == 1
