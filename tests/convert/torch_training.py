"""Jobs for ranks: continue a training with transformers' model, torch's optimizer and torch's loader of
checkpoints."""

import importlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
    set_optimizer_state_dict)
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
WARMUP, STEPS, LOWEST = 2, 24, 0.1


class DoublePrecision:
    """torch for transformers' modules, which round norms, rotary angles and scores to float32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def continue_torch(folder: str, batches: str, saved: str = "", saved_after: int = 0) -> list[float]:
    """Load weights, optimizer and step, train on recorded rows, return the losses; save the training after
    some of the steps."""
    from megatron_sov.engine.parallel.world import join_world
    from megatron_sov.model.config import ParallelConfig

    join_world(ParallelConfig())
    model, optimizer = build_model(Path(folder).parent)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, compute_rate)
    state = {"model": get_model_state_dict(model),
             "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT),
             "lr_scheduler": {"last_epoch": 0}}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)
    scheduler.last_epoch = state["lr_scheduler"]["last_epoch"]
    losses: list[float] = []
    for rows in torch.load(batches):
        local = rows[dist.get_rank()::dist.get_world_size()]
        num_targets = sum(row[2].sum() for row in rows)
        total = torch.zeros((), dtype=torch.float64)
        for row in local:
            loss = sum_losses(model, *row)
            (loss * dist.get_world_size() / num_targets).backward()  # FSDP averages over processes
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        dist.all_reduce(total)
        losses.append(float(total / num_targets))
        if len(losses) == saved_after:
            dcp.save({"model": get_model_state_dict(model), "lr_scheduler": scheduler.state_dict(),
                      "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT)},
                     checkpoint_id=saved)
    return losses


def compute_rate(step: int) -> float:
    """Return the share of the peak rate: linear warm-up, then cosine decay to `LOWEST`."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * (step + 1 - WARMUP) / (STEPS - WARMUP))) / 2


def build_model(folder: Path) -> tuple[Any, torch.optim.AdamW]:
    """Return transformers' model in double precision, sharded over the processes, and its optimizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager",
                                             experts_implementation="eager").double()
    module = importlib.import_module(type(model).__module__)
    module.torch = DoublePrecision()  # type: ignore[attr-defined]
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    model.model.rotary_emb.inv_freq = config.rope_parameters["rope_theta"] ** -exponents
    if dist.get_world_size() > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == decays],
               "weight_decay": float(decays)} for decays in (True, False)]
    return model, torch.optim.AdamW(groups, lr=0.01)  # loading replaces the other values


def sum_losses(model: Any, tokens: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor,
               bounds: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of a row's losses; its documents do not see each other."""
    index = torch.arange(len(tokens))
    document = torch.searchsorted(bounds[1:].long(), index, right=True)
    is_hidden = (index[None] > index[:, None]) | (document[None] != document[:, None])
    mask = torch.zeros(is_hidden.shape, dtype=torch.float64).masked_fill(is_hidden, -torch.inf)
    logits = model(input_ids=tokens[None], position_ids=index[None], attention_mask=mask[None, None],
                   use_cache=False).logits
    return (cross_entropy(logits[0], labels, reduction="none") * weights).sum()
