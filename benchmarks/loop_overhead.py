"""Overhead of the training loop over a minimal megatron.core loop: step times of both, in one process.

Usage: python benchmarks/loop_overhead.py [--nproc 2] > benchmarks/results/loop_overhead.txt
       python benchmarks/loop_overhead.py --transformers > benchmarks/results/loop_transformers.txt

Three loops train the same architecture with the same number of tokens per step. They take turns, so that
other load on the machine affects all of them:
  ours    the step of `train.loop`: data order, objective, schedule, optimizer, events, stop flag
  same    the same model and loss on batches in memory: only megatron-core's schedule and the optimizer step
  stock   megatron-core's GPTModel (its attention, router and loss) on batches in memory, as in Megatron-LM's
          train_step
With --transformers, three loops take turns in one process, for a dense model and a mixture of experts:
"ours", "same", and the model of the same sizes in `transformers` with torch's fused AdamW, on the token ids
of "same". Ratios are medians over turns of ours / the other loop. CPU time includes all threads of rank 0,
with data loading.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov import recipes
from megatron_sov.engine.parallel import collectives, launcher, world
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.token_shards import ShardChain

VOCAB_SIZE, SEQ_LEN, DOCUMENT_TOKENS, NUM_DOCUMENTS = 8192, 512, 512, 4000
COMMON = (f"model.vocab_size={VOCAB_SIZE}", "model.head_dim=64", "train.steps=100000",
          "train.eval_every_steps=0", f'data.phases=[{{"name": "main", "seq_len": {SEQ_LEN}}}]')
SETTINGS = (*COMMON, "model.hidden_size=256", "model.expert_ffn_dim=256", "train.global_batch_size=8",
            "train.micro_batch_size=4")
WARMUP_TURNS = 2
"""First steps of each loop that are not timed."""


def write_shard(folder: Path) -> None:
    """Write train.bin and train.idx with documents of SEQ_LEN tokens, so that attention of all loops has the
    same number of pairs."""
    lengths = np.full(NUM_DOCUMENTS, DOCUMENT_TOKENS, np.int32)
    ends = np.cumsum(lengths.astype(np.int64))
    header = b"MMIDIDX\x00\x00" + np.array([1], np.uint64).tobytes() + bytes([4])
    (folder / "train.idx").write_bytes(
        header + np.array([NUM_DOCUMENTS, NUM_DOCUMENTS + 1], np.uint64).tobytes() + lengths.tobytes()
        + (4 * (ends - lengths)).tobytes() + np.arange(NUM_DOCUMENTS + 1, dtype=np.int64).tobytes())
    np.random.default_rng(0).integers(1, VOCAB_SIZE, int(ends[-1]),
                                      dtype=np.int32).tofile(folder / "train.bin")


def our_step(config: RunConfig, place: world.ParallelWorld, source: Source, folder: Path
             ) -> Callable[[], None]:
    """Return a function that runs one step of the training loop and records its events."""
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.loop import train_step
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer
    from megatron_sov.work.processes.stop_signals import StopFlag

    trainer, stop = Trainer(config, place, RunFolder(folder / "run"), [source], LanguageModelling), StopFlag()
    if place.is_main:
        trainer.recorder.events = EventLog(folder / "events.jsonl")

    def step() -> None:
        result = train_step(trainer)
        assert result is not None
        trainer.recorder.record_step(trainer.state, result, trainer.observe_step())
        trainer.checkpointer.sync(stop)

    return step


def load_batches(config: RunConfig, place: world.ParallelWorld, source: Source) -> list[Any]:
    """Return the micro-batches of eight steps."""
    from megatron_sov.train.objectives.data_batches import DataBatches

    batches = DataBatches(config, [source], place)
    ready = [batches.next().micro_batches for _ in range(8)]
    batches.close()
    return ready


def same_model_step(config: RunConfig, place: world.ParallelWorld, source: Source) -> Callable[[], None]:
    """Return a function that trains the same model for one step without the training loop."""
    import torch

    from megatron_sov.checkpoint import initial_weights
    from megatron_sov.engine.decode import forward_only
    from megatron_sov.engine.model.expert_load import ExpertLoad
    from megatron_sov.engine.model.language_model import build_model
    from megatron_sov.engine.model.logprobs import build_head
    from megatron_sov.engine.optimizer.optimizer import Optimizer

    model = build_model(config.model, config.parallel, config.train)
    initial_weights.initialize_weights(model, config.model, config.train.seed)
    optimizer = Optimizer(model, config.optim)
    model.config.finalize_model_grads_func = ExpertLoad(model).finalize_gradients
    ready = itertools.cycle(load_batches(config, place, source))
    num_sequences = config.train.global_batch_size
    routing = model.config.routing_step
    routing.seq_len, routing.num_sequences = SEQ_LEN, num_sequences

    def loss(hidden: Any, batch: Any) -> tuple[Any, Any]:
        head = build_head(model, config.train.head_chunk_tokens)
        sums, _ = head.cross_entropy(hidden, batch.labels, {"lm": batch.weights})
        total = sums["lm"] / (num_sequences * SEQ_LEN)
        return total, total.detach()

    def step() -> None:
        optimizer.zero_grad()
        routing.aux_loss = {}
        row_tokens = config.train.micro_batch_size * SEQ_LEN
        parts = forward_only.run_pipeline(optimizer.wrapped, next(ready), loss, row_tokens,
                                          forward_only=False)
        optimizer.step(config.optim.lr)
        collectives.all_reduce_dp(torch.stack(parts).sum().double())

    return step


def stock_step(config: RunConfig, place: world.ParallelWorld) -> Callable[[], None]:
    """Return a function that runs Megatron-LM's train_step with megatron-core's GPTModel."""
    import torch
    from megatron.core.distributed import (
        DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_sov.engine.model.specs import build_transformer_config
    from megatron_sov.engine.parallel.collectives import all_reduce_dp

    library = build_transformer_config(config.model, config.parallel, config.train)
    spec = get_gpt_decoder_block_spec(library, use_transformer_engine=False, normalization="RMSNorm")
    model = GPTModel(library, spec, VOCAB_SIZE, SEQ_LEN, position_embedding_type="rope")
    generator = torch.Generator().manual_seed(place.rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0, 0.02, generator=generator)
    wrapped = DistributedDataParallel(library, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    library.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=config.optim.lr, clip_grad=1.0,
                                                       params_dtype=torch.float32), [wrapped],
                                       use_gloo_process_groups=False)
    size = config.train.micro_batch_size
    count = config.train.global_batch_size // size // place.dp_size
    tokens = torch.randint(1, VOCAB_SIZE, (size, SEQ_LEN + 1), generator=generator)
    positions = torch.arange(SEQ_LEN).expand(size, -1)

    def loss(losses: Any) -> tuple[Any, Any, dict[str, Any]]:
        return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {"loss": losses.detach().sum()}

    def forward(iterator: Iterator[Any], network: Any) -> tuple[Any, Any]:
        batch = next(iterator)
        return network(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous()), loss

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        parts = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([tokens] * count), model=wrapped,
            num_microbatches=count, seq_length=SEQ_LEN, micro_batch_size=size, decoder_seq_length=SEQ_LEN,
            forward_only=False)
        optimizer.step()
        all_reduce_dp(torch.stack([p["loss"] for p in parts]).sum().double())

    return step


def transformers_step(config: RunConfig, batches: list[Any]) -> Callable[[], None]:
    """Return a function that trains the same architecture in transformers, with torch's fused AdamW, on
    `batches`."""
    import torch
    import transformers

    m, size = config.model, config.train.micro_batch_size
    sizes: dict[str, Any] = {
        "vocab_size": m.vocab_size, "hidden_size": m.hidden_size, "intermediate_size": m.dense_ffn_dim,
        "num_hidden_layers": m.num_layers, "num_attention_heads": m.num_heads, "head_dim": m.head_dim,
        "num_key_value_heads": m.num_kv_heads, "tie_word_embeddings": m.tied_embeddings,
        "attn_implementation": "sdpa"}
    network: Any
    if m.num_experts:
        network = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
            **sizes, num_experts=m.num_experts, num_experts_per_tok=m.num_experts_per_token,
            moe_intermediate_size=m.expert_ffn_dim, norm_topk_prob=True))
    else:
        network = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.optim.lr, fused=True)
    ready = itertools.cycle(batches)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in next(ready):
            ids = batch.inputs.tokens.view(size, SEQ_LEN)
            network(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


PEERS = {"dense": ("tiny-qwen3", ("model.num_kv_heads=5", "model.dense_ffn_dim=960")),
         "experts": ("tiny-qwen3-moe", ("model.num_kv_heads=5", "model.num_experts=8",
                                        "model.num_experts_per_token=2", "model.expert_ffn_dim=480"))}
"""Kind -> recipe that transformers also implements, and its sizes: about 13 million active parameters."""


def measure_transformers(turns: int, folder: Path, kind: str) -> None:
    """Time the loops and transformers in turn for a kind of `PEERS`, and print a line."""
    recipe, sizes = PEERS[kind]
    (folder / kind).mkdir()
    config = apply_settings(recipes.get(recipe), [
        *COMMON, "model.hidden_size=320", "model.num_layers=6", "model.num_heads=5",
        "train.global_batch_size=2", "train.micro_batch_size=2", "train.precision=fp32", *sizes])
    place = world.join_world(config.parallel)
    source = Source("web", None, "text", {}, {"train": NUM_DOCUMENTS * DOCUMENT_TOKENS}, 1.0,
                    ShardChain([folder / "train"]))
    steps = {"ours": our_step(config, place, source, folder / kind),
             "same": same_model_step(config, place, source),
             "transformers": transformers_step(config, load_batches(config, place, source))}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + WARMUP_TURNS):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if turn >= WARMUP_TURNS:
                taken[name].append(time.process_time() - began)
    world.leave_world()
    ratios = {name: statistics.median(a / b for a, b in zip(taken[name], taken["transformers"], strict=True))
              for name in ("ours", "same")}
    figures = "".join(f"{name}: {1e3 * statistics.median(t):8.1f} CPU ms a step   "
                      for name, t in taken.items())
    print(f"{kind:9}{figures}" + "   ".join(f"{name} / transformers {ratio:.3f}"
                                            for name, ratio in ratios.items()), flush=True)


def measure(turns: int, folder: Path) -> None:
    """Time the three loops in turn on every rank; rank 0 prints a table."""
    config = apply_settings(recipes.get("tiny-solar-open"), SETTINGS)
    place = world.join_world(config.parallel)
    source = Source("web", None, "text", {}, {"train": NUM_DOCUMENTS * DOCUMENT_TOKENS}, 1.0,
                    ShardChain([folder / "train"]))
    steps = {"ours": our_step(config, place, source, folder), "same": same_model_step(config, place, source),
             "stock": stock_step(config, place)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + WARMUP_TURNS):
        for name, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            if turn >= WARMUP_TURNS:
                times[name].append(time.perf_counter() - start)
                cpu_times[name].append(time.process_time() - cpu_start)
    world.leave_world()
    if place.is_main:
        print(f"\n{place.size} process(es), {turns} steps of {config.train.global_batch_size} x "
              f"{SEQ_LEN} tokens each")
        print(f"{'loop':<8}{'wall ms':>12}{'CPU ms':>12}{'ours / it, wall':>18}{'CPU':>8}")
        for name in steps:
            wall, cpu_ms = (1e3 * statistics.median(taken[name]) for taken in (times, cpu_times))
            ratios = (statistics.median(o / t for o, t in zip(taken["ours"], taken[name], strict=True))
                      for taken in (times, cpu_times))
            print(f"{name:<8}{wall:>12.1f}{cpu_ms:>12.1f}{next(ratios):>18.3f}{next(ratios):>8.3f}",
                  flush=True)


def on_one_and_more(measure: Callable[[int, Path], None], description: str | None, turns: int) -> None:
    """Parse the command line, and run `measure` on one process and on `--nproc`. `turns`: default of
    `--turns`."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--turns", type=int, default=turns)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}", flush=True)
    for nproc in sorted({1, args.nproc}):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_shard(folder)
            if launcher.launch_ranks(partial(measure, args.turns, folder), nproc, num_threads=1):
                sys.exit(1)


def compare_with_transformers(turns: int) -> None:
    """Compare with transformers, each model in its own process."""
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}; {turns} steps of 2 x {SEQ_LEN} tokens, fp32, one thread",
          flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(folder)
        for kind in PEERS:
            if launcher.launch_ranks(partial(measure_transformers, turns, folder, kind), 1, num_threads=1):
                sys.exit(1)


if __name__ == "__main__" and "--transformers" in sys.argv:
    compare_with_transformers(turns=12)
elif __name__ == "__main__":
    on_one_and_more(measure, __doc__, turns=40)
