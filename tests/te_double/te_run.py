"""Training steps on several ranks, with models of Transformer Engine modules from the double."""

import functools
import inspect
import json
import sys
from collections import Counter
from typing import Any

from megatron_sov.engine.parallel import world
from megatron_sov.train.loop import train_step
from tests.layouts import layout_run
from tests.te_double.library_shapes import CONTRACT


def count_modules_and_products(recipe: str, settings: list[str], paths: list[str]) -> dict[str, Any]:
    """Train one step; return modules by class, optimizer classes, and products by kind."""
    from transformer_engine.pytorch.gemm import COUNTS  # the double's own

    trainer = layout_run.build_trainer(layout_run.build_small_config(recipe, settings, paths, "lm"))
    COUNTS.clear()
    train_step(trainer)
    modules = Counter(type(m).__name__ for m in trainer.model.modules())
    optimizers = {type(o.optimizer).__name__ for o in trainer.optimizer.megatron_optimizer.chained_optimizers}
    return {"modules": modules, "optimizers": sorted(optimizers),
            "products": {f"{kind} {recipe}".strip(): count for (kind, recipe), count in COUNTS.items()}}


def record_calls(recipe: str, settings: list[str], paths: list[str]) -> list[list[Any]]:
    """Train one step. Return the different calls of names in the contract, each as [name, method or None,
    number of positional arguments, keywords]."""
    contract = json.loads(CONTRACT.read_text())
    calls: set[tuple[Any, ...]] = set()
    for name, shape in contract["transformer_engine"]["symbols"].items():
        home, _, last = name.rpartition(".")
        value = getattr(sys.modules.get(home), last, None)
        if isinstance(shape, dict) and isinstance(value, type):
            for method in shape:
                function = inspect.getattr_static(value, method, None)
                if inspect.isfunction(function) and function.__module__.startswith("transformer_engine"):
                    setattr(value, method, _recorder(function, (name, method), calls, bound=True))
        elif inspect.isfunction(value):
            _replace_everywhere(value, _recorder(value, (name, None), calls, bound=False))
    trainer = layout_run.build_trainer(layout_run.build_small_config(recipe, settings, paths, "lm"))
    train_step(trainer)
    return sorted(map(list, calls), key=str)


def compare_permutations_without_tokens() -> list[Any]:
    """Route all tokens to the experts of the first process, so that the second has none. Return the largest
    differences of outputs and of input gradients between fused and unfused permutations, relative to the
    largest value."""
    import torch
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_sov.engine.model.language_model import build_run_model
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings

    config = apply_settings(recipes.get("tiny-solar-open"), [
        "train.precision=bf16", "model.num_layers=2", "model.num_experts=4", "model.num_experts_per_token=2",
        "parallel.ep=2", "parallel.expert_dispatcher=allgather", "gpu.grad_accumulation_fusion=off"])
    world.join_world(config.parallel)
    model = build_run_model(config)
    layer: Any = next(m for m in model.modules() if isinstance(m, MoELayer)).eval()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    layer.router.expert_bias[:2] = 100  # experts 0 and 1, of process 0
    results = []
    for is_fused in (True, False):
        layer.config.moe_permute_fusion = is_fused
        x = torch.linspace(-1, 1, 3 * config.model.hidden_size).bfloat16().view(3, 1, -1).requires_grad_()
        y = layer(x)[0]
        y.float().square().sum().backward()
        results.append((y, x.grad))
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]


def train_overloaded(settings: list[str], paths: list[str]) -> list[Any]:
    """Train two steps in which routers send all tokens to the first process's experts.

    Returns:
        [loss, gradient norm] of each step, sum of all weights' magnitudes, number of spilled passes of each
        step, and whether this process has the overloaded experts.
    """
    import torch

    config = layout_run.build_small_config("tiny-solar-open", settings, paths, "lm")
    trainer = layout_run.build_trainer(config)
    routing_step = trainer.model.config.routing_step
    for router in trainer.expert_load._list_routers():
        router.expert_bias[:router.config.num_moe_experts // 2] = 100
    results, spilled = [], []
    for _ in range(2):
        result = train_step(trainer)
        results.append([result.loss, result.grad_norm])
        spilled.append(routing_step.spill.num_spilled if routing_step.spill else 0)
        assert routing_step.spill is None or routing_step.spill._num_pending == 0
    weights = float(sum(weight.double().abs().sum() for weight in trainer.model.parameters()))
    is_overloaded = torch.distributed.get_rank() == 0
    return [results, weights, spilled, is_overloaded]


def _recorder(function: Any, name: tuple[str, str | None], calls: set[Any], *, bound: bool) -> Any:
    """Return a function that adds its call to `calls`, and calls `function`; `bound`: a method."""
    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.add((*name, len(args) - bound, tuple(sorted(kwargs))))
        return function(*args, **kwargs)

    return recorded


def _replace_everywhere(old: Any, new: Any) -> None:
    """Replace a function in all modules that import it by name."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()) if module else []:
            if value is old:
                setattr(module, name, new)
