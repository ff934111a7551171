"""Cached generation with and without drafts of the multi-token-prediction layer, on a tiny K-EXAONE trained
here.

Usage: python benchmarks/generate_speed.py > benchmarks/results/generate_speed.txt
The text is drawn from a few sentences, so that a tiny model learns it in minutes; how many drafts are
accepted depends on the text.  One process, one thread; plain and speculative decoding take turns, and medians
of their times are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

RECIPE, VOCAB, SENTENCES, SENTENCE_TOKENS = "tiny-k-exaone", 512, 48, (6, 14)
DOCUMENTS, DOCUMENT_TOKENS = 600, 200
DRAFTS, BATCHES, NEW_TOKENS, PROMPT_TOKENS = (1, 2, 3), (1, 8), 96, 40


def write_text(prefix: Path) -> np.ndarray:
    """Write a token shard of documents made of sentences in a random order;
    returns the tokens [documents, tokens]."""
    random = np.random.default_rng(0)
    sentences = [random.integers(1, VOCAB, random.integers(*SENTENCE_TOKENS)) for _ in range(SENTENCES)]
    documents = np.stack([np.concatenate([sentences[i] for i in random.integers(
        0, SENTENCES, DOCUMENT_TOKENS)])[:DOCUMENT_TOKENS] for _ in range(DOCUMENTS)])
    starts = (4 * DOCUMENT_TOKENS * np.arange(DOCUMENTS)).astype(np.int64)
    lengths, places = np.full(DOCUMENTS, DOCUMENT_TOKENS, np.int32), np.arange(DOCUMENTS + 1, dtype=np.int64)
    header = b"MMIDIDX\x00\x00" + np.array([1], np.uint64).tobytes() + bytes([4])
    header += np.array([DOCUMENTS, DOCUMENTS + 1], np.uint64).tobytes()
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + starts.tobytes() + places.tobytes())
    documents.astype(np.int32).tofile(prefix.with_suffix(".bin"))
    return documents


def main() -> None:
    """Train, then generate in turns, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="steps of training")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=29517, help="a free port")
    args = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(args.port))
    import torch

    from megatron_sov import recipes
    from megatron_sov.engine.parallel import world
    from megatron_sov.engine.parallel.device import on_gpu
    from megatron_sov.infer.decoder.generator import MegatronEngine
    from megatron_sov.infer.request import Sampling
    from megatron_sov.model.config import apply_settings
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import Source, TokenShard
    from megatron_sov.train.loop import train_step
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    torch.set_num_threads(1)
    config = apply_settings(recipes.get(RECIPE), [
        f"model.vocab_size={VOCAB}", f"model.num_layers={args.layers}", "model.mtp_loss_coeff=0.3",
        f"train.steps={args.steps}", "train.tokens=0", "train.global_batch_size=8",
        "train.micro_batch_size=8", 'data.phases=[{"name": "sentences", "seq_len": 128}]'])
    place = world.join_world(config.parallel)
    with tempfile.TemporaryDirectory() as folder:
        documents = write_text(Path(folder) / "text")
        source = Source("sentences", None, "text", {}, {"train": documents.size}, 1.0,
                        train_documents=TokenShard(Path(folder) / "text"))
        trainer = Trainer(config, place, RunFolder(Path(folder) / "run"), [source], LanguageModelling)
        for _ in range(args.steps):
            train_step(trainer)
        device = torch.cuda.get_device_name() if on_gpu() else "CPU, 1 thread"
        print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), {device}, "
              f"Python {platform.python_version()}, torch {torch.__version__}")
        print(f"{RECIPE}, {args.layers} layers, {args.steps} steps of training on drawn sentences; "
              f"{NEW_TOKENS} new tokens behind {PROMPT_TOKENS}; median of {args.rounds} rounds in turns\n")
        print(f"{'sampling':<16}{'prompts':>8}{'drafts':>8}{'accepted':>10}{'tokens/s':>10}{'wall ratio':>12}"
              f"{'CPU ratio':>11}{'same text':>11}")
        engine = MegatronEngine(trainer.policy)
        for sampling in (Sampling(NEW_TOKENS), Sampling(NEW_TOKENS, temperature=0.8, top_p=0.95)):
            for batch in BATCHES:
                prompts = documents[:batch, :PROMPT_TOKENS].tolist()
                _compare(lambda k, p=prompts, s=sampling: engine.generate(
                    p, replace(s, num_drafts=k)),  # type: ignore[misc]
                         args.rounds, batch, "greedy" if sampling.temperature == 0 else "T 0.8, p 0.95")
    world.leave_world()


def _compare(run, rounds: int, batch: int, label: str) -> None:  # type: ignore[no-untyped-def]
    """Print a row for plain decoding and one for each number of drafts."""
    times: dict[int, list[tuple[float, float]]] = {k: [] for k in (0, *DRAFTS)}
    found = {}
    for number in range(rounds + 1):
        for k in times:
            began, used = time.perf_counter(), time.process_time()
            found[k] = run(k)
            if number:  # the first round warms up
                times[k].append((time.perf_counter() - began, time.process_time() - used))
    wall, cpu_s = ({k: statistics.median(t[i] for t in taken) for k, taken in times.items()} for i in (0, 1))
    for k, result in found.items():
        accepted = f"{result.accepted / result.drafted:.1%}" if result.drafted else "-"
        same = ("-" if k == 0 or label != "greedy" else "yes"
                if result.continuations == found[0].continuations else "NO")
        print(f"{label:<16}{batch:>8}{k:>8}{accepted:>10}{batch * NEW_TOKENS / wall[k]:>10.0f}"
              f"{wall[0] / wall[k]:>11.2f}x"
              f"{cpu_s[0] / cpu_s[k]:>10.2f}x{same:>11}", flush=True)


if __name__ == "__main__":
    main()
