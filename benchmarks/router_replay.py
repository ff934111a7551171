"""Router replay: how far a trainer in fp32 is from the engine in bf16 that wrote the text, without replay of
the engine's routes and with it.

Usage: python benchmarks/router_replay.py > benchmarks/results/router_replay.txt

A tiny model learns some of Python's own library, then our generator continues held-out pieces of it, sampling
at temperature 1 with weights rounded to bf16, and tells log-probabilities and routes.  The trainer reads the
same tokens in fp32.  Printed are the share of choices (token, layer) with another set of experts, and the
mean KL(engine || trainer) of a written token by Schulman's k3 (joschu.net/blog/kl-approx.html), which from
samples of the engine is r - 1 - ln r with r = p(trainer) / p(engine).  An engine in fp32 is the control.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from muon import write_data

RECIPES = ("tiny-solar-open", "tiny-k-exaone")
PROMPT_TOKENS, ROW_TOKENS, SAMPLES = 16, 128, 8


def trained(tokens: Path, recipe: str, steps: int) -> tuple[Any, Any, list[list[int]]]:
    """Return a model in fp32, its settings, and beginnings of held-out documents."""
    from megatron_sov import recipes
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import apply_settings
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import open_sources
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    config = apply_settings(recipes.get(recipe), [
        f"train.steps={max(1, steps)}", f"train.global_batch_size={SAMPLES}", "train.num_threads=1",
        f"train.micro_batch_size={SAMPLES}", "optim.warmup_steps=0", "train.eval_every_steps=0",
        "guards.sigma=0", "guards.hang_timeout_s=0",
        f'data.phases=[{{"name": "main", "seq_len": {ROW_TOKENS}}}]',
        f'data.paths={json.dumps({str(tokens): 1})}'])
    sources = open_sources(config.data.paths, config.model.vocab_size)
    trainer = Trainer(config, world.join(config.parallel), RunFolder(tokens / "not-written"), sources,
                      LanguageModelling)
    for _ in range(steps):
        trainer.update()
    heldout = sources[0].shard("heldout")
    prompts = [heldout.tokens(i, 0, PROMPT_TOKENS).tolist()
               for i, length in enumerate(heldout.lengths) if length >= PROMPT_TOKENS]
    return trainer.model, config, prompts


def in_precision(model: Any, config: Any, precision: str) -> Any:
    """Return the same model with weights of another precision."""
    import torch

    from megatron_sov.engine.model.language_model import build
    from megatron_sov.model.config import apply_settings

    changed = apply_settings(config, [f"train.precision={precision}"])
    other = build(changed.model, changed.parallel, changed.train)
    with torch.no_grad():
        for own, theirs in zip([*other.parameters(), *other.buffers()],
                               [*model.parameters(), *model.buffers()], strict=True):
            own.copy_(theirs)
    return other


def read(policy: Any, document: list[int], routes: np.ndarray | None) -> tuple[Any, Any]:
    """Return the trainer's log-probability of each token but the first, and the experts that each but the
    last visits, in ascending order."""
    import torch

    from megatron_sov.engine.decode.forward_only import Inputs
    from megatron_sov.train.data.requirements import shape_of

    batch = Inputs([document], torch.device("cpu"))
    if routes is not None:
        rows = shape_of(policy.model.architecture).of_document(routes, len(document))
        batch.inputs = dataclasses.replace(batch.inputs, routes=rows)
    labels, step = batch.inputs.tokens.roll(-1), policy.config.routing_step
    step.record = {}
    (logprobs,) = policy.map([batch], lambda hidden, head, _: head.logprobs(hidden[0], labels))
    visited = torch.stack([step.record[layer][0] for layer in sorted(step.record)], 1)
    step.record = None
    return logprobs[:-1].double().numpy(), np.sort(visited[:-1].numpy(), axis=2)


def compare(tokens: Path, recipe: str, steps: int, num_prompts: int, new_tokens: int) -> None:
    """Print the lines of a recipe."""
    from megatron_sov.engine.decode.forward_only import ForwardModel
    from megatron_sov.engine.parallel import world
    from megatron_sov.infer.decoder.generator import MegatronEngine
    from megatron_sov.infer.request import Sampling

    model, config, prompts = trained(tokens, recipe, steps)
    trainer = ForwardModel(model, config.train.head_chunk_tokens)
    prompts = prompts[:num_prompts]
    for precision in ("fp32", "bf16"):
        engine = MegatronEngine(ForwardModel(in_precision(model, config, precision),
                                             config.train.head_chunk_tokens))
        told = engine.generate(prompts, Sampling(new_tokens, temperature=1.0, seed=1, with_routes=True))
        assert told.routes is not None
        for replay in (False, True):
            differing = choices = 0
            gaps = []
            for prompt, written, logprobs, routes in zip(prompts, told.continuations, told.logprobs,
                                                         told.routes, strict=True):
                own, visited = read(trainer, [*prompt, *written], routes if replay else None)
                differing += int((visited != np.sort(routes, axis=2)).any(axis=2).sum())
                choices += visited.shape[0] * visited.shape[1]
                gaps.append(own[len(prompt) - 1:] - np.array(logprobs))
            gap = np.concatenate(gaps)
            print(f"{recipe:<17}{precision:<8}{'yes' if replay else 'no':<8}{len(gap):>8}{choices:>10}"
                  f"{differing:>11}{differing / choices:>10.3%}{np.mean(np.expm1(gap) - gap):>13.3e}"
                  f"{np.abs(gap).max():>13.3e}", flush=True)
    world.leave()


def main() -> int:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of training before")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--files", type=int, default=20, help="of Python's library")
    args = parser.parse_args()
    import torch

    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(free.getsockname()[1])}
    prepare_megatron()
    print(f"{platform.machine()}, {os.cpu_count()} cores, CPU, 1 thread, Python {platform.python_version()}, "
          f"torch {torch.__version__}")
    print(f"{args.steps} steps of {SAMPLES} x {ROW_TOKENS} tokens, then up to {args.prompts} prompts of "
          f"{PROMPT_TOKENS} tokens and {args.new_tokens} new ones at temperature 1; trainer in fp32\n")
    print(f"{'model':<17}{'engine':<8}{'replay':<8}{'tokens':>8}{'choices':>10}{'differing':>11}{'share':>10}"
          f"{'KL (k3)':>13}{'largest gap':>13}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            tokens = write_data(Path(folder), args.files)
        for recipe in RECIPES:
            compare(tokens, recipe, args.steps, args.prompts, args.new_tokens)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
