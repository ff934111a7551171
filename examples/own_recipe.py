# What: your own recipe, derived from a shipped recipe: two layers and three steps, for experiments.
# Run:  megatron-sov pretrain examples/own_recipe.py:two_layers --data tokens --run runs/own_recipe
# See:  "complete: step 3", the checkpoint, and the next commands.

from dataclasses import replace

from megatron_sov import recipes
from megatron_sov.model.config import PhaseConfig


def two_layers():
    run = recipes.get("tiny-qwen3")
    return replace(
        run, recipe="two-layers",
        model=replace(run.model, hidden_size=64, num_layers=2, dense_ffn_dim=128),
        data=replace(run.data, phases=(PhaseConfig("main", seq_len=64),), heldout_tokens=512),
        optim=replace(run.optim, lr=2e-3),
        train=replace(run.train, steps=3, global_batch_size=8, micro_batch_size=4))
