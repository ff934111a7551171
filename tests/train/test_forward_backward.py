"""Forward and backward passes of a step: gradients do not depend on the
micro-batches, and recomputed values are equal."""

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
Make = Callable[..., Any]


@pytest.fixture
def make(alone: Any, packed_data: Any, tmp_path: Path) -> Iterator[Make]:
    """Return `make(*settings, faults, data)`: computation, objective and the first batch of a small run."""
    made = []

    def run(*settings: str, faults: str = "", data: Path = packed_data.text) -> Any:
        trainer = tiny_trainer(str(data), *SETTINGS, *settings, run=tmp_path, faults=faults, place=alone)
        made.append(trainer)
        batch = trainer.objective.prepare(trainer.objective.collect(trainer.policy, 0))
        return SimpleNamespace(
            forward_backward=trainer.forward_backward, objective=trainer.objective, batch=batch,
            model=trainer.model,
            seed=trainer.config.train.seed,
            load=trainer.expert_load.gather)

    yield run
    for trainer in made:
        trainer.close()


def flat(sums: Any) -> torch.Tensor:
    """Return all sums of a step, as one vector."""
    return torch.cat([torch.tensor(list(sums.terms.values()), dtype=torch.float64), sums.by_source.flatten()])


def gradients(model: Any) -> torch.Tensor:
    """Return copies of all gradients, as one vector."""
    return torch.cat([g.detach().flatten().clone() for g in list_gradients(model)])


def test_gradients_and_sums_do_not_depend_on_micro_batches(make: Make) -> None:
    found = []
    for size in (1, 4, 8):
        run = make(f"train.micro_batch_size={size}")
        assert len(run.batch.micro_batches) == 8 // size
        sums = run.forward_backward.compute_gradients(run.batch, run.objective, 1)
        found.append((flat(sums), gradients(run.model)))
        assert run.forward_backward.is_finite
    for sums, gradient in found[1:]:
        torch.testing.assert_close(sums, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-6)
    assert found[0][1].abs().max() > 1e-3


def test_sums_are_terms_then_loss_and_targets_of_each_source(make: Make) -> None:
    run = make("train.micro_batch_size=2")
    sums = run.forward_backward.compute_gradients(run.batch, run.objective, 1)
    assert list(sums.terms) == sorted(run.objective.coefficients)
    losses, targets = sums.by_source.T
    assert len(losses) == 2, "even and odd"
    assert targets.sum() == run.batch.targets["lm"] > 0
    assert float(losses.sum()) == pytest.approx(sums.terms["lm"], rel=1e-6)
    assert float(losses.sum() / targets.sum()) == pytest.approx(math.log(368), rel=0.1), (
        "it knows nothing yet")


def test_meters_do_not_depend_on_micro_batches(make: Make) -> None:
    for size in (1, 8):
        run = make(f"train.micro_batch_size={size}")
        plain = run.objective.loss

        def loss(hidden: Any, head: Any, batch: Any, plain: Any = plain) -> Any:
            odd = (batch.labels % 2 * batch.weights).sum()
            return dataclasses.replace(plain(hidden, head, batch), meters={
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


def with_routes(data: Path, folder: Path, known: float) -> Path:
    """Write a copy of token shards with random routes for a share `known` of the tokens."""
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
                        every = np.tile(np.arange(shape.num_experts), (length, shape.layers, 1))
                        routes = random.permuted(every, axis=2)[:, :, :shape.top_k].astype(shape.dtype)
                        routes[random.random(length) >= known] = shape.mark
                        writer.write(np.array([length]), {"bin": shard.tokens(document, 0, length),
                                                          "routes": routes.reshape(-1)})
                record["splits"][split]["shards"] = [{"prefix": prefix}]
            record |= {"sidecars": ["routes"], "routes": shape.record()}
        artifact.content = manifest.content
    return folder


def test_routes_of_data_are_replayed_and_their_share_is_reported(make: Make, packed_data: Any,
                                                                 tmp_path: Path) -> None:
    found = {}
    for name, data in (("live", packed_data.text),
                       ("unknown", with_routes(packed_data.text, tmp_path / "unknown", 0.0)),
                       ("recorded", with_routes(packed_data.text, tmp_path / "recorded", 0.75))):
        run = make("train.micro_batch_size=2", data=data)
        sums = run.forward_backward.compute_gradients(run.batch, run.objective, 1)
        found[name] = sums.terms["lm"], sums.meters
    routes = np.concatenate([m.inputs.routes for m in run.batch.micro_batches])
    padding = np.concatenate([m.inputs.padding.numpy() for m in run.batch.micro_batches])
    share = float((routes[~padding] != 255).mean())
    assert 0.6 < share < 0.9
    assert found["live"][1] == {} and found["recorded"][1] == {"replayed_routes": pytest.approx(share)}
    assert found["unknown"] == (found["live"][0], {"replayed_routes": 0.0})
    assert abs(found["recorded"][0] / found["live"][0] - 1) > 1e-5, "drawn experts answer otherwise"


def test_a_non_finite_loss_is_attributed_to_its_process(make: Make) -> None:
    run = make("train.micro_batch_size=2", faults="nan@step=2")
    finite = []
    for step in (1, 2, 3):
        sums = run.forward_backward.compute_gradients(run.batch, run.objective, step)
        finite.append([run.forward_backward.is_finite,
                       *(bool(v.isfinite().all()) for v in (flat(sums), gradients(run.model)))])
    assert finite == [[True] * 3, [False] * 3, [True] * 3]


def test_repeated_passes_are_equal_despite_dropout_and_have_no_side_effect(make: Make) -> None:
    settings = ("train.micro_batch_size=2", "train.hidden_dropout=0.2")
    probed, plain = make(*settings), make(*settings)
    own = []
    for turn in (0, 1):
        probed.forward_backward.compute_local_gradients(probed.batch, probed.objective, 1, turn)
        own.append(gradients(probed.model))
    assert torch.equal(own[0], own[1])
    probed_sums = flat(probed.forward_backward.compute_gradients(probed.batch, probed.objective, 1))
    rng.seed_step(plain.seed, 0)
    plain_sums = flat(plain.forward_backward.compute_gradients(plain.batch, plain.objective, 1))
    assert torch.equal(plain_sums, probed_sums)
    assert torch.equal(gradients(plain.model), gradients(probed.model))
    assert torch.equal(plain.load(), probed.load()), "experts are counted once"
    assert not torch.equal(gradients(probed.model), own[0]), "a part of the batch is not the batch"


def test_a_flipped_bit_in_the_repeated_pass_is_detected(make: Make) -> None:
    run = make("train.micro_batch_size=2", faults="miscompute@step=1")
    own = []
    for turn in (0, 1):
        run.forward_backward.compute_local_gradients(run.batch, run.objective, 1, turn)
        own.append(gradients(run.model))
    assert int((own[0] != own[1]).sum()) == 1
