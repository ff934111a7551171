"""Training with CUDA graphs of routers gives bit-identical results to training without graphs.

Graphs of the double replay the captured operators on the memory of the capture. A mask or count read from
other memory would change the losses, and a synchronization with the GPU during the capture raises an error.
"""

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov.engine.model import graphs
from megatron_sov.engine.model.specs import BlockOutputLayer
from megatron_sov.engine.parallel import world
from megatron_sov.engine.router import RoutingStep
from tests.layouts import layout_run
from tests.te_double import quantized_run

GRAPHS = 'gpu.cuda_graphs=["moe_router", "moe_preprocess"]'
RAMP = ("train.ramp_from_batch_size=4", "train.ramp_increment=4", "train.ramp_steps=2",
        "train.global_batch_size=12")
PP2 = ("model.num_layers=4", "parallel.pp=2")
OVERLAP = ("parallel.ep=2", "parallel.expert_overlap=micro_batches", "train.micro_batch_size=1")
ROUTER_ONLY = 'gpu.cuda_graphs=["moe_router"]'
CASES: dict[str, tuple[str, int, tuple[str, ...], dict[str, Any], list[int]]] = {
    # the number of sequences changes without a new capture
    "larger batches": ("tiny-solar-open", 1, (*RAMP, "model.num_layers=3", "train.recompute=selective",
                                              'gpu.recompute_modules=["layernorm", "moe_act"]'), {},
                       [2 * 3 * n for n in (2, 4, 6)]),
    "interleaved stages": ("tiny-solar-open", 2, (
        *PP2, "parallel.vpp=2", "train.recompute=selective",
        'gpu.recompute_modules=["core_attn", "shared_experts"]'), {"steps": 2}, [2 * 2 * 4] * 2),
    # the library reads the dtype of the captured weights
    "split experts": ("tiny-k-exaone", 2, ("model.num_layers=3", "parallel.tp=2", "parallel.sp=true",
                                           "parallel.etp=2"), {"steps": 2}, [2 * 2 * 4] * 2),
    "overlapped sums and gathers": ("tiny-solar-open", 2, (
        "model.num_layers=2", "parallel.ep=2", "parallel.zero1=true", "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true"), {"steps": 2}, [2 * 2 * 2] * 2),
    "router alone": ("tiny-qwen3-moe", 1, ("model.num_layers=2", "gpu.permute_fusion=off"),
                     {"graphs": ROUTER_ONLY, "steps": 2}, [2 * 2 * 4] * 2),
    "8 bits": ("tiny-solar-open", 1, ("model.num_layers=2", "train.fp8=mxfp8",
                                      "train.fp8_bf16_layers_at_end=1", "train.recompute=selective",
                                      'gpu.recompute_modules=["layernorm"]'),
               {"quantizes": True, "steps": 2}, [2 * 2 * 2] * 2),
    # a third graph per micro-batch computes the weight gradients of shared experts
    "overlapped messages": ("tiny-solar-open", 2, (
        *OVERLAP, "model.num_layers=3", "parallel.zero1=true", "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true", "parallel.delay_weight_grads=true",
        "train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]'), {"steps": 2},
        [3 * 3 * 4] * 2),
    # the dense layer and the prediction layer have no graph
    "overlapped stages": ("tiny-k-exaone", 4, (
        *OVERLAP, "model.num_layers=6", "parallel.pp=2", "parallel.vpp=2",
        "parallel.pipeline_layout=[2,2,1,1]", "model.mtp_experts=true", "train.recompute=selective",
        'gpu.recompute_modules=["layernorm"]'), {"graphs": ROUTER_ONLY, "steps": 2}, [2 * 2 * 4] * 2),
}
"""Name -> (recipe, processes, settings, arguments of `train_twice`, replayed graphs of each step on process
0: 2 (forward and backward) or 3 x its layers with graphs x micro-batches)."""


def train_twice(recipe: str, settings: list[str], path: str, *, graphs: str = GRAPHS, steps: int = 3,
                quantizes: bool = False) -> list[dict[str, Any]]:
    """Train without graphs and with graphs; return the results of `train_and_hash` of both runs.

    Args:
        recipe, settings: recipe and settings of both runs.
        path: folder of token shards.
        graphs: setting that switches graphs on.
        steps: training steps.
        quantizes: quantize the double's products as `train.fp8` says.
    """
    if quantizes:
        quantized_run.quantize_products()
    return [train_and_hash(recipe, [*settings, *more], path, steps, quantizes) for more in ([], [graphs])]


def train_and_hash(recipe: str, settings: list[str], path: str, steps: int,
                   quantizes: bool) -> dict[str, Any]:
    """Train, and return the results.

    Returns:
        steps: the results of `layout_run.run_step`, with balancing losses and the number of replayed graphs.
        alone: hash of the local gradients of one more batch's first micro-batch.
        weights: hash of the final weights and buffers.
        padding: number of padding tokens in all rows.
    """
    from megatron.core.tensor_parallel import random
    from transformer_engine.pytorch import recording  # the double's own

    get_rng_state = random._get_cuda_rng_state

    def get_state_outside_captures(*args: Any, **kwargs: Any) -> Any:
        if recording.is_recording():
            raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture")
        return get_rng_state(*args, **kwargs)

    random._get_cuda_rng_state = get_state_outside_captures
    operators: Any = recording.CapturedOperators
    replay, num_replays = operators.replay, 0

    def count_and_replay(self: Any) -> None:
        nonlocal num_replays
        num_replays += 1
        replay(self)

    operators.replay = count_and_replay
    config = (quantized_run.build_config(recipe, settings, path) if quantizes
              else layout_run.build_small_config(recipe, settings, [path], "lm"))
    trainer = layout_run.build_trainer(config)
    compute_gradients, num_padding = trainer.forward_backward.compute_gradients, 0

    def count_padding(batch: Any, *others: Any) -> Any:
        nonlocal num_padding
        num_padding += sum(int(m.inputs.padding.sum()) for m in batch.micro_batches)
        return compute_gradients(batch, *others)

    trainer.forward_backward.compute_gradients = count_padding  # type: ignore[method-assign]
    results = []
    for _ in range(steps):
        num_replays = 0
        result = layout_run.run_step(trainer)
        losses = trainer.model.config.routing_step.aux_loss
        balancing = {layer: float(loss) for layer, loss in sorted(losses.items())}
        results.append(result | {"replays": num_replays, "balancing": balancing})
    batch = trainer.objective.prepare(trainer.objective.collect(trainer.policy, steps))
    trainer.forward_backward.compute_local_gradients(batch, trainer.objective, steps + 1, 0)
    alone = hash_tensors(p.main_grad for p in trainer.model.parameters())
    weights = hash_tensors([*trainer.model.parameters(), *trainer.model.buffers()])
    operators.replay = replay
    world.leave_world()
    return {"steps": results, "alone": alone, "weights": weights, "padding": num_padding}


def hash_tensors(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.array(tensor.detach().double()).tobytes())
    return digest.hexdigest()


@pytest.mark.deep
@pytest.mark.distributed
def test_losses_counts_biases_and_weights_have_the_bits_of_a_run_without(te_ranks: Any, job: Any,
                                                                         packed_data: Any) -> None:
    result = te_ranks(*(job(__file__, "train_twice", nproc, {
        "recipe": recipe, "settings": ["train.precision=bf16", *settings], "path": str(packed_data.text),
        **more}) for recipe, nproc, settings, more, _ in CASES.values()))
    for (name, (*_, replays)), per_rank in zip(CASES.items(), result, strict=True):
        assert [step["replays"] for step in per_rank[0][1]["steps"]] == replays, name
        for plain, with_graphs in per_rank:
            assert plain["padding"] > 0, f"{name}: no row had padding"
            for step in (*plain["steps"], *with_graphs["steps"]):
                del step["replays"]
            assert with_graphs == plain, name


def test_overridden_methods_exist_in_the_library() -> None:
    """If the library renamed a method, its override would never run, and the padding mask would be lost."""
    ours = {name for name, value in vars(graphs.build_graphed_layer(BlockOutputLayer)).items()
            if callable(value)}
    assert len(ours) == 4 and all(hasattr(BlockOutputLayer, name) for name in ours)


def test_graphs_serve_the_passes_that_they_were_captured_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs serve only whole steps, because the partial step of a probe has other micro-batches in flight,
    and only while `RoutingStep` has no `table`, `shared` and `record`, which graphs do not read."""
    step, captures = RoutingStep(), []

    class Layer:
        config = SimpleNamespace(routing_step=step)

    router_graphs = graphs.RouterGraphs(SimpleNamespace(
        config=SimpleNamespace(routing_step=step, cuda_graph_impl="transformer_engine")), [], None)
    monkeypatch.setattr(graphs.parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(router_graphs, "_capture", lambda *sizes: captures.append(sizes))
    layer, served = graphs.build_graphed_layer(Layer)(), []
    layer.cuda_graphs = ["graph"]
    for num_micro_batches, whole in ((4, True), (1, False), (4, True), (8, True)):
        router_graphs.prepare(64, 32, num_micro_batches, whole=whole)
        served.append(layer.cuda_graphs)
    assert (captures, served) == ([(64, 4), (64, 8)], [["graph"], [], ["graph"], ["graph"]])
    for name in ("table", "shared", "record"):
        setattr(step, name, {})
        assert not layer.cuda_graphs, name
        setattr(step, name, None)
