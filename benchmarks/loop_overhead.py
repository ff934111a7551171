"""CPU and wall time of a training step, compared with Megatron-Core's stock loop and with transformers.

Usage: python benchmarks/loop_overhead.py [--nproc 2] > benchmarks/results/loop_overhead.txt
       python benchmarks/loop_overhead.py --transformers > benchmarks/results/loop_transformers.txt

Three loops train the same architecture with the same number of tokens per step. They take turns in one
process, so that other load on the machine affects all loops:

  ours    the step of `train.loop`: data order, objective, schedule, optimizer, events, stop flag
  same    the same model and loss on batches in memory: only megatron-core's schedule and the optimizer step
  stock   megatron-core's GPTModel (its attention, router and loss) on batches in memory, as in Megatron-LM's
          train_step

With --transformers the third loop is the same architecture in `transformers` with torch's fused AdamW, on the
token ids of "same", once for a dense model and once for a mixture of experts. Ratios are medians over turns.
CPU time includes all threads of rank 0, with data loading.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from long_sequence import write_random_source
from measurement import describe_machine

from megatron_sov import recipes
from megatron_sov.engine.parallel import collectives, launcher, world
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.train.data.sources import Source

VOCAB_SIZE, SEQ_LEN, NUM_DOCUMENTS = 8192, 512, 4000
COMMON = (f"model.vocab_size={VOCAB_SIZE}", "model.head_dim=64", "train.steps=100000",
          "train.eval_every_steps=0", f'data.phases=[{{"name": "main", "seq_len": {SEQ_LEN}}}]')
SETTINGS = (*COMMON, "model.hidden_size=256", "model.expert_ffn_dim=256", "train.global_batch_size=8",
            "train.micro_batch_size=4")
WARMUP_TURNS = 2
"""Number of first steps of each loop that are not timed."""


def build_our_step(config: RunConfig, place: world.ParallelWorld, source: Source,
                   folder: Path) -> Callable[[], None]:
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


def build_same_step(config: RunConfig, place: world.ParallelWorld, source: Source) -> Callable[[], None]:
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


def build_stock_step(config: RunConfig, place: world.ParallelWorld) -> Callable[[], None]:
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
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
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


def build_transformers_step(config: RunConfig, batches: list[Any]) -> Callable[[], None]:
    """Return a function that trains the same architecture in transformers, with torch's fused AdamW, on
    `batches`."""
    import torch
    import transformers

    model = config.model
    sizes: dict[str, Any] = {
        "vocab_size": model.vocab_size, "hidden_size": model.hidden_size,
        "intermediate_size": model.dense_ffn_dim, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "head_dim": model.head_dim,
        "num_key_value_heads": model.num_kv_heads, "tie_word_embeddings": model.tied_embeddings,
        "attn_implementation": "sdpa"}
    network: Any
    if model.num_experts:
        network = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
            **sizes, num_experts=model.num_experts, num_experts_per_tok=model.num_experts_per_token,
            moe_intermediate_size=model.expert_ffn_dim, norm_topk_prob=True))
    else:
        network = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.optim.lr, fused=True)
    ready = itertools.cycle(batches)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in next(ready):
            ids = batch.inputs.tokens.view(config.train.micro_batch_size, SEQ_LEN)
            network(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


PEERS = {"dense": ("tiny-qwen3", ("model.num_kv_heads=5", "model.dense_ffn_dim=960")),
         "experts": ("tiny-qwen3-moe", ("model.num_kv_heads=5", "model.num_experts=8",
                                        "model.num_experts_per_token=2", "model.expert_ffn_dim=480"))}
"""Kind -> recipe that transformers also implements, and its sizes: about 13 million active parameters."""


def time_in_turn(steps: dict[str, Callable[[], None]], turns: int) -> tuple[dict[str, list[float]], ...]:
    """Run each step once in every turn; return loop -> wall seconds of its turns, and loop -> CPU seconds."""
    wall_s: dict[str, list[float]] = {name: [] for name in steps}
    cpu_s: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + WARMUP_TURNS):
        for name, step in steps.items():
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            step()
            if turn >= WARMUP_TURNS:
                wall_s[name].append(time.perf_counter() - begin_s)
                cpu_s[name].append(time.process_time() - begin_cpu_s)
    return wall_s, cpu_s


def compute_ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """Return the median over turns of one loop's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def open_source(place: world.ParallelWorld, folder: Path) -> Source:
    """Return documents of SEQ_LEN tokens, so that the attention of all loops computes as many pairs."""
    return write_random_source(folder / f"data-{place.rank}", NUM_DOCUMENTS, SEQ_LEN, VOCAB_SIZE)


def compare_with_transformers(kind: str, turns: int, folder: Path) -> None:
    """Time our loops and transformers in turn for a kind of `PEERS`, and print a line."""
    recipe, sizes = PEERS[kind]
    config = apply_settings(recipes.get(recipe), [
        *COMMON, "model.hidden_size=320", "model.num_layers=6", "model.num_heads=5",
        "train.global_batch_size=2", "train.micro_batch_size=2", "train.precision=fp32", *sizes])
    place = world.join_world(config.parallel)
    source = open_source(place, folder)
    _, cpu_s = time_in_turn({
        "ours": build_our_step(config, place, source, folder),
        "same": build_same_step(config, place, source),
        "transformers": build_transformers_step(config, load_batches(config, place, source))}, turns)
    world.leave_world()
    times = (f"{name}: {1e3 * statistics.median(cpu_s[name]):8.1f} CPU ms a step" for name in cpu_s)
    ratios = (f"{name} / transformers {compute_ratio(cpu_s, name, 'transformers'):.3f}"
              for name in ("ours", "same"))
    print(f"{kind:9}" + "   ".join([*times, *ratios]), flush=True)


def compare_with_megatron(turns: int, folder: Path) -> None:
    """Time the three loops in turn on every rank; rank 0 prints a table."""
    config = apply_settings(recipes.get("tiny-solar-open"), SETTINGS)
    place = world.join_world(config.parallel)
    source = open_source(place, folder)
    wall_s, cpu_s = time_in_turn({
        "ours": build_our_step(config, place, source, folder),
        "same": build_same_step(config, place, source),
        "stock": build_stock_step(config, place)}, turns)
    world.leave_world()
    if not place.is_main:
        return
    print(f"\n{place.size} process(es), {turns} steps of {config.train.global_batch_size} x {SEQ_LEN} "
          f"tokens\n{'loop':<8}{'wall ms':>12}{'CPU ms':>12}{'ours / loop, wall':>20}{'CPU':>8}")
    for name in wall_s:
        print(f"{name:<8}{1e3 * statistics.median(wall_s[name]):>12.1f}"
              f"{1e3 * statistics.median(cpu_s[name]):>12.1f}{compute_ratio(wall_s, 'ours', name):>20.3f}"
              f"{compute_ratio(cpu_s, 'ours', name):>8.3f}", flush=True)


def main() -> int:
    """Run each comparison in new processes."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2, help="also compare with Megatron on N processes")
    parser.add_argument("--turns", type=int, help="timed steps of each loop (default: 40; transformers: 12)")
    parser.add_argument("--transformers", action="store_true", help="compare with transformers")
    args = parser.parse_args()
    print(describe_machine(), flush=True)
    comparisons = [(compare_with_megatron, nproc) for nproc in sorted({1, args.nproc})]
    turns = args.turns or 40
    if args.transformers:
        turns = args.turns or 12
        print(f"{turns} steps of 2 x {SEQ_LEN} tokens, fp32, one thread", flush=True)
        comparisons = [(partial(compare_with_transformers, kind), 1) for kind in PEERS]
    for compare, nproc in comparisons:
        with tempfile.TemporaryDirectory() as folder:
            if launcher.launch_ranks(partial(compare, turns, Path(folder)), nproc, num_threads=1):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
