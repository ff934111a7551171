"""LoRA adapters compared with PEFT and full training: step time, memory, and bytes of a checkpoint.

Usage: python benchmarks/lora_against_peft.py [--turns 7] > benchmarks/results/lora_against_peft.txt

The same dense model, from the same file, learns the same tokens by AdamW, four ways that take turns:
  ours, LoRA          adapters of all linear layers beside frozen weights
  ours, full          all weights
  PEFT, LoRA          transformers' model with PEFT's adapters of the same layers, rank and alpha, and the
                      same numbers in them
  transformers, full  transformers' model, all weights
Each loss is that of its first step.  "trained" and "state" are what gradients, and the optimizer, hold;
"saved" is what autograd keeps of a micro-batch for its backward pass, weights not counted.  Ours keeps the
gradient of the loss by the states in the place of logits.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_sov import recipes
from megatron_sov.engine.parallel import launcher, world
from megatron_sov.model.config import RunConfig, apply_settings

SIZES = ["model.vocab_size=4096", "model.hidden_size=256", "model.head_dim=64", "model.dense_ffn_dim=768",
         "train.precision=fp32", "optim.clip_grad=1.0"]
RANK, ALPHA, TOKENS = 16, 32, 512
MIB = 2**20


class Way:
    """A model that learns."""

    def __init__(self, step: Callable[[], float], loss: Callable[[], Any], weights: Iterable[Any],
                 state: Callable[[], Iterable[Any]]) -> None:
        """Take a way.

        Args:
            step: does a step; returns its loss.
            loss: runs forward and returns what can be differentiated.
            weights: of the model, frozen ones too.
            state: returns the optimizer's tensors.
        """
        self.step, self.loss, self.weights, self.state = step, loss, list(weights), state

    def trained(self) -> list[Any]:
        """Return the trainable parameters."""
        return [weight for weight in self.weights if weight.requires_grad]

    def saved_bytes(self) -> int:
        """Return the bytes that autograd saves for a micro-batch."""
        import torch

        weights = {weight.untyped_storage().data_ptr() for weight in self.weights}
        storages: dict[int, int] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = self.loss()
            total = sum(storages.values())
        del result
        return total


def ours(base: Path, config: RunConfig, tokens: Any) -> tuple[Way, Any, Any]:
    """Return our way, its model and its optimizer."""
    from megatron_sov.checkpoint import load
    from megatron_sov.engine.decode import forward_only
    from megatron_sov.engine.decode.forward_only import DocumentBatch
    from megatron_sov.engine.model.expert_load import ExpertLoad
    from megatron_sov.engine.model.language_model import build_model
    from megatron_sov.engine.model.logprobs import build_head
    from megatron_sov.engine.optimizer.optimizer import Optimizer
    from megatron_sov.engine.parallel.device import get_local_device

    model = build_model(config.model, config.parallel, config.train, config.gpu, config.lora)
    load.initialize_weights(model, config.model, 1)
    load.load_model(base, model)
    optimizer = Optimizer(model, config.optim)
    model.config.finalize_model_grads_func = ExpertLoad(model).finalize_gradients
    inputs = DocumentBatch([tokens[:-1].tolist()], get_local_device()).inputs
    batch: Any = type("Batch", (), {"inputs": inputs})

    def loss(hidden: Any, _: Any) -> tuple[Any, Any]:
        import torch

        sums, _ = build_head(model, TOKENS).cross_entropy(hidden, tokens[1:], {"lm": torch.ones(TOKENS)})
        return sums["lm"] / TOKENS, sums["lm"].detach() / TOKENS

    def step() -> float:
        optimizer.zero_grad()
        (found,) = forward_only.run_pipeline(optimizer.wrapped, [batch], loss, TOKENS, forward_only=False)
        optimizer.step(config.optim.lr)
        return float(found)

    way = Way(step, lambda: loss(model.chunks[0](batch.inputs), batch)[0], model.parameters(),
              lambda: (shard.data for shard in optimizer.state_shards()))
    return way, model, optimizer


def theirs(model: Any, config: RunConfig, tokens: Any) -> Way:
    """Return transformers' way."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=config.optim.lr, betas=(config.optim.beta1, config.optim.beta2),
                             eps=config.optim.eps, weight_decay=config.optim.weight_decay)

    def loss() -> Any:
        logits = model(tokens[None, :-1]).logits[0]
        return torch.nn.functional.cross_entropy(logits, tokens[1:])

    def step() -> float:
        adam.zero_grad()
        result = loss()
        result.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optim.clip_grad)
        adam.step()
        return float(result.detach())

    return Way(step, loss, model.parameters(),
               lambda: (v for state in adam.state.values() for v in state.values() if v.dim()))


def size(tensors: Iterable[Any]) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def measure(turns: int) -> None:
    """Print the tables; runs inside a rank."""
    import peft
    import torch
    import transformers

    from megatron_sov import convert
    from megatron_sov.checkpoint import load
    from megatron_sov.convert.peft import to_peft
    from megatron_sov.engine.model.language_model import build_model

    full = apply_settings(recipes.get("tiny-qwen3"), SIZES)
    adapted = apply_settings(full, [f"lora.rank={RANK}", f"lora.alpha={ALPHA}"])
    world.join_world(full.parallel)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(full.model, full.parallel, full.train)
        load.initialize_weights(model, full.model, 1)
        load.save_checkpoint(folder / "base", model, None, {"step": 0, "tokens": 0}, full.to_dict(), None)
        convert.to_hf(folder / "base", folder / "hf")
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(full.model.vocab_size, (TOKENS + 1,), generator=generator)
        lora, lora_model, lora_optimizer = ours(folder / "base", adapted, tokens)
        whole, whole_model, whole_optimizer = ours(folder / "base", full, tokens)
        load.save_checkpoint(folder / "begin", lora_model, None, {"step": 0, "tokens": 0},
                             adapted.to_dict(), None)
        to_peft(folder / "begin", folder / "peft")

        def loaded() -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")

        wrapped = peft.PeftModel.from_pretrained(loaded(), folder / "peft", is_trainable=True)
        ways = {"ours, LoRA": lora, "ours, full": whole, "PEFT, LoRA": theirs(wrapped, full, tokens),
                "transformers, full": theirs(loaded(), full, tokens)}
        table(ways, turns)
        sizes = {}
        for kind, its_model, optimizer, config in (("LoRA", lora_model, lora_optimizer, adapted),
                                                   ("full", whole_model, whole_optimizer, full)):
            load.save_checkpoint(folder / kind, its_model, optimizer, {"step": 1, "tokens": 1},
                                 config.to_dict(), None)
            sizes[kind] = folder_bytes(folder / kind)
        print(f"\ncheckpoint with the optimizer's state: LoRA {sizes['LoRA'] / MIB:.2f} MiB, full "
              f"{sizes['full'] / MIB:.2f} MiB ({sizes['full'] / sizes['LoRA']:.1f} times as much); PEFT's "
              f"folder {folder_bytes(folder / 'peft') / MIB:.2f} MiB, without such state")
    world.leave_world()


def table(ways: dict[str, Way], turns: int) -> None:
    """Print a line for each way."""
    saved = {name: way.saved_bytes() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for turn in range(turns + 1):
        for name, way in ways.items():
            began_s = time.process_time()
            loss = way.step()
            losses.setdefault(name, loss)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began_s)
    print(f"tiny-qwen3 with {', '.join(SIZES[:4])}; LoRA of all linear layers, rank {RANK}; micro-batch of "
          f"{TOKENS} tokens, fp32; median of {turns} turns, CPU time, one thread\n\n{'way':<20}{'loss':>9}"
          f"{'step ms':>9}{'of PEFT':>9}{'trained MiB':>13}{'state MiB':>11}{'saved MiB':>11}")
    for name, way in ways.items():
        ratio = statistics.median(t / p for t, p in zip(seconds[name], seconds["PEFT, LoRA"], strict=True))
        print(f"{name:<20}{losses[name]:>9.5f}{1e3 * statistics.median(seconds[name]):>9.0f}{ratio:>8.2f}x"
              f"{size(way.trained()) / MIB:>13.2f}{size(way.state()) / MIB:>11.2f}{saved[name] / MIB:>11.2f}",
              flush=True)


def main() -> None:
    """Measure on one rank."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}", flush=True)
    sys.exit(launcher.launch_ranks(lambda: measure(args.turns), 1, num_threads=1))


if __name__ == "__main__":
    main()
