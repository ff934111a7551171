"""A checkpoint and token shards that megatron-core's own writers made are taken over and trained on: losses
at several layouts, and the held-out loss before and after.

Usage: python benchmarks/ways_over.py > benchmarks/results/ways_over.txt

The checkpoint is a GPTModel's at tensor parallel 2, with layers stacked, as
`megatron.core.dist_checkpointing` saves it; the shards are `IndexedDatasetBuilder`'s.  Training is in fp64,
so that layouts agree to the last digits.
"""

from __future__ import annotations

import argparse as cli
import difflib
import inspect
import json
import optparse
import os
import queue
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCAB_SIZE, PADDED_VOCAB_SIZE, STEPS = 1024, 1152, 4
SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
         "kv_channels": 16, "ffn_hidden_size": 96, "normalization": "RMSNorm", "add_bias_linear": False}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []), "TP2 with SP": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "PP2": (2, ["parallel.pp=2"]), "DP2 with ZeRO-1": (2, ["parallel.zero1=true"])}
SETTINGS = ["train.precision=fp64", f"train.steps={STEPS}", "train.global_batch_size=4",
            "train.micro_batch_size=1", "optim.warmup_steps=0", "optim.lr=1e-3", "train.eval_every_steps=0",
            'data.phases=[{"name": "main", "seq_len": 64}]']


def run(*words: str) -> str:
    """Run one of our commands; returns what it printed."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", *words], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:3])}: {done.stderr}")
    return done.stdout


def write_checkpoint(out: Path) -> None:
    """Write the checkpoint, as one of two ranks."""
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    from megatron_sov.engine.parallel.world import join, leave
    from megatron_sov.model.config import ParallelConfig

    join(ParallelConfig(tp=2))
    torch.manual_seed(7)
    config = TransformerConfig(
        **SIZES, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True, bias_dropout_fusion=False, masked_softmax_fusion=False,
        tensor_model_parallel_size=2, cuda_graph_scope=[])
    model = GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), PADDED_VOCAB_SIZE, 128,
                     rotary_base=10000, position_embedding_type="rope",
                     share_embeddings_and_output_weights=False)
    args = cli.Namespace(
        **SIZES, swiglu=True, norm_epsilon=1e-5, group_query_attention=True, num_experts=None,
        position_embedding_type="rope", untie_embeddings_and_output_weights=True, vocab_size=VOCAB_SIZE,
        padded_vocab_size=PADDED_VOCAB_SIZE, max_position_embeddings=128)
    filesystem_async._results_queue = queue.Queue()
    if dist.get_rank() == 0:
        (out / "iter_0000100").mkdir(parents=True)
        (out / "latest_checkpointed_iteration.txt").write_text("100")
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata={}), "args": args, "iteration": 100},
                            str(out / "iter_0000100"))
    leave()


def write_shards(work: Path) -> None:
    """Train a tokenizer, and have the library write a pair."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Tokenizer

    texts = [p for module in (cli, inspect, difflib, optparse) for p in inspect.getsource(module).split("\n\n"
                                                                                                        "")
             if p.strip()]
    (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run("tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", str(VOCAB_SIZE), "--input",
        str(work / "text.jsonl"), "--output", str(work / "tokenizer"))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
    eos = json.loads((work / "tokenizer/manifest.json").read_text())["content"]["eos_id"]
    builder = IndexedDatasetBuilder(str(work / "theirs.bin"), dtype=np.uint16)
    for text in texts:
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, eos]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(work / "theirs.idx"))


def losses(work: Path, name: str) -> list[float]:
    """Train at a layout; returns the loss of each step."""
    nproc, layout = LAYOUTS[name]
    out = work / name.replace(" ", "-")
    sets = [word for setting in [*SETTINGS, *layout] for word in ("--set", setting)]
    run("megatron_sov", "pretrain", "--config", str(work / "run.json"), "--data", str(work / "tokens"),
        "--from", str(work / "ours"), "--run", str(out), "--nproc", str(nproc), *sets)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


def main() -> None:
    if len(sys.argv) > 2:
        write_checkpoint(Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_shards(work)
        environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(20000 + os.getpid() % 10000)}
        theirs = str(work / "theirs")
        command = [sys.executable, "-W", "ignore", __file__, "--write", theirs]
        writers = [subprocess.Popen(command, env=os.environ | environment | {"RANK": str(r),
                                                                             "LOCAL_RANK": str(r)})
                   for r in range(2)]
        codes = [writer.wait() for writer in writers]
        if any(codes):
            raise SystemExit("the library did not write its checkpoint")
        print(run("megatron_sov", "convert", "from-megatron", theirs, str(work / "ours")), end="")
        print(run("data_prep.cli", "adopt", theirs, "--tokenizer", str(work / "tokenizer"), "--output",
                  str(work / "tokens")), end="")
        manifest: dict[str, Any] = json.loads((work / "ours/manifest.json").read_text())
        (work / "run.json").write_text(json.dumps(manifest["settings"]))
        found = {name: losses(work, name) for name in LAYOUTS}
    first = found["one process"]
    header = "".join(f"{f'loss {n + 1}':>20}" for n in range(STEPS))
    print(f"\n{'layout':<18}{header}{'largest difference':>22}")
    for name, values in found.items():
        difference = max(abs(a - b) for a, b in zip(values, first, strict=True))
        print(f"{name:<18}" + "".join(f"{value:>20.15f}" for value in values) + f"{difference:>22.1e}")


if __name__ == "__main__":
    main()
