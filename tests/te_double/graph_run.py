"""Training runs in ranks, with models of Transformer Engine modules, with and without CUDA graphs."""

import hashlib
from typing import Any

import numpy as np

from megatron_sov.engine.parallel import world
from tests.layouts import layout_run
from tests.te_double import quantized_run

GRAPHS = 'gpu.cuda_graphs=["moe_router", "moe_preprocess"]'


def both(recipe: str, settings: list[str], path: str, *, graphs: str = GRAPHS, steps: int = 3,
         quantises: bool = False) -> list[dict[str, Any]]:
    """Train without graphs and with graphs; return the results of `_train` of both runs.

    Args:
        recipe, settings: recipe and settings of both runs.
        path: folder of token shards.
        graphs: setting that switches graphs on.
        steps: training steps.
        quantises: quantize the double's products as `train.fp8` says.
    """
    if quantises:
        quantized_run.quantize_products()
    return [_train(recipe, [*settings, *more], path, steps, quantises) for more in ([], [graphs])]


def _train(recipe: str, settings: list[str], path: str, steps: int, quantises: bool) -> dict[str, Any]:
    """Train, and return the results.

    Returns:
        steps: the results of `layout_run.run_step`, with balancing losses and the number of replayed passes.
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
    replay, replays = operators.replay, [0]

    def count_and_replay(self: Any) -> None:
        replays[0] += 1
        replay(self)

    operators.replay = count_and_replay
    config = (quantized_run.build_config(recipe, settings, path) if quantises
              else layout_run.build_small_config(recipe, settings, [path], "lm"))
    trainer = layout_run.build_trainer(config)
    compute_gradients, padding = trainer.forward_backward.compute_gradients, [0]

    def count_padding(batch: Any, *others: Any) -> Any:
        padding[0] += sum(int(m.inputs.padding.sum()) for m in batch.micro_batches)
        return compute_gradients(batch, *others)

    trainer.forward_backward.compute_gradients = count_padding  # type: ignore[method-assign]
    found = []
    for _ in range(steps):
        replays[0] = 0
        found.append(layout_run.run_step(trainer))
        losses = trainer.model.config.routing_step.aux_loss
        found[-1] |= {"replays": replays[0],
                      "balancing": {layer: float(loss) for layer, loss in sorted(losses.items())}}
    batch = trainer.objective.prepare(trainer.objective.collect(trainer.policy, steps))
    trainer.forward_backward.compute_local_gradients(batch, trainer.objective, steps + 1, 0)
    alone = _digest(p.main_grad for p in trainer.model.parameters())
    weights = _digest([*trainer.model.parameters(), *trainer.model.buffers()])
    operators.replay = replay
    world.leave_world()
    return {"steps": found, "alone": alone, "weights": weights, "padding": padding[0]}


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.array(tensor.detach().double()).tobytes())
    return digest.hexdigest()
