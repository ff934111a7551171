"""A whole chain by one command: text to a Hugging Face folder on a real Slurm, with a stage
that fails on the way.

    python benchmarks/slurm_chain.py

Needs root and Slurm's daemons (`make slurm`).  The chats are broken at first: the chain stops there, says so,
and `--continue` picks it up when they are mended.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import logging
import optparse
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import yaml
from slurm_events import PROFILE, virtual_cluster

from megatron_sov import cli
from megatron_sov.base.artifacts import read_manifest

MODEL = ("--set model.vocab_size=2048 --set model.hidden_size=32 --set model.num_layers=2 --set "
         "model.num_heads=4 --set model.num_kv_heads=2 --set model.head_dim=8 --set model.expert_ffn_dim=16")
SMALL = ("--set train.global_batch_size=8 --set train.micro_batch_size=2 --set data.heldout_tokens=128 --set "
         "train.num_threads=1 --set train.steps=4")
MODULES = (argparse, difflib, inspect, logging, optparse, subprocess, textwrap)
PHASE = """--set 'data.phases=[{"name": "main", "seq_len": %d}]'"""
STAGES = [
    {"stage": "tokenizer",
     "arguments": "train --preset solar-open --vocab-size 2048 --input text.jsonl --output tokenizer"},
    {"name": "text", "stage": "data",
     "arguments": "pack --tokenizer tokenizer --input text.jsonl --heldout 0.1 --output text"},
    {"stage": "pretrain", "nodes": 2,
     "arguments": f"tiny-solar-open --data text --run pretrain {MODEL} {SMALL} {PHASE % 128}"},
    {"stage": "extend", "nodes": 2,
     "arguments": f"tiny-solar-open --from pretrain --data text --run extend {SMALL} {PHASE % 256} "
                  "--set needle.lengths_tokens=[256] --set 'needle.languages=[\"code\"]'"},
    {"name": "chats", "stage": "data",
     "arguments": "pack --tokenizer tokenizer --format chat --input chat.jsonl --heldout 0.1 --output chats"},
    {"stage": "sft",
     "arguments": f"tiny-solar-open --from extend --data chats:0.8 --data text:0.2 --run sft {SMALL} "
                  f"{PHASE % 256} --set objective.text_coeff=0.1"},
    {"stage": "convert", "arguments": "to-hf sft hf"},
]


def states(cluster: object, file: Path) -> dict[str, str]:
    """Wait for all jobs of a chain; returns stage -> state of its job."""
    jobs = json.loads(file.with_name(f"{file.name}.jobs.json").read_text())["jobs"]
    return {name: cluster.wait(numbers[-1], timeout_s=1800)["JobState"]  # type: ignore[attr-defined]
            for name, numbers in jobs.items()}


def main() -> int:
    """Run the chain twice."""
    module = virtual_cluster()
    if (reason := module.why_not()) is not None:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        paragraphs = [p for m in MODULES for p in inspect.getsource(m).split("\n\n") if p.strip()]
        Path("text.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs))
        Path("chat.jsonl").write_text('{"messages": "none"}\n')
        Path("site.yaml").write_text(PROFILE)
        chain = Path("chain.yaml")
        chain.write_text(yaml.safe_dump({"cluster": "site.yaml", "stages": STAGES}, sort_keys=False))
        with module.VirtualCluster(Path(folder) / "cluster") as cluster:
            os.environ["SLURM_CONF"] = cluster.env["SLURM_CONF"]
            for words, title in (([], "one command"), (["--continue"], "the chats mended, --continue")):
                start_s = time.time()
                print(f"\n== {title}: megatron-sov submit chain {' '.join([*words, 'chain.yaml'])}",
                      flush=True)
                if cli.main(["submit", "chain", *words, "chain.yaml"]):
                    return 1
                found = states(cluster, chain)
                print(f"after {time.time() - start_s:.0f} s: "
                      f"{', '.join(f'{k} {v}' for k, v in found.items())}", flush=True)
                chats = [{"messages": [{"role": "user", "content": f"What is {i}?"},
                                       {"role": "assistant", "content": f"{i}."}]}
                         for i in range(200)]
                Path("chat.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
            if set(found.values()) != {"COMPLETED"}:
                cli.main(["submit", "chain", "chain.yaml"])
                raise SystemExit("\n".join(p.read_text() for p in sorted(Path().rglob("slurm/*.log"))))
        print(f"hf/manifest.json: {read_manifest(Path('hf')).kind}")
        os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
