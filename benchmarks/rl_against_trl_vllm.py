"""The time of a step of GRPO beside TRL's GRPOTrainer, both with the same vLLM server, model and prompts.

Usage: SOV_ENGINE_PYTHON=PYTHON python benchmarks/rl_against_trl_vllm.py --work FOLDER --trl SITE [--steps 14]
       [--turns 2]

PYTHON is the interpreter of an environment with vLLM (docs/install.md), FOLDER that of
rl_engine_learning.py, SITE a folder with TRL (`pip install --no-deps --target SITE trl`), which is no
dependency of ours.

One server of vLLM on this machine's CPU, started once as `--engine vllm` starts it, serves both, one after
the other: TRL in its server mode (`use_vllm`, `vllm_mode="server"`), ours by `--engine-url`.  TRL's weights
go to a server by NCCL, which a CPU does not have: in its place TRL's client writes them into shared memory,
whence the server reads them as it reads ours, in each step.  vLLM is not in TRL's environment, and TRL is
told that it is.  fp32, one micro-batch, no reference, one process of one thread; the first two steps of each
are left out.  "ahead" is ours with `rollout.max_staleness=1`: the servers write the next round by the policy
of before while this one is learned, which is off-policy by one step; TRL's trainer has no such mode.

Seconds are by the clock, and of the processor: of the trainer's process and of the server's.  Ours writes a
checkpoint and the store in each step, and judges in another process, whose seconds are in the clock alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine_servers import server_keepers
from rl_against_trl import TRAINER
from rl_engine_learning import QUIET, DenseSeed
from rl_learning import HERE
from seed_runs import run, words

PROMPTS, SAMPLES, NEW_TOKENS, SKIPPED, GOAL = 32, 8, 12, 2, 0.5
CLOCK = '''
import json, sys, time
import psutil


def server_s(group):
    """Return the processor's seconds of the server, of which no process ends meanwhile."""
    leader = psutil.Process(group)
    times = [p.cpu_times() for p in (leader, *leader.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def now():
    return [time.monotonic(), time.process_time() + server_s(group)]


def since(began):
    return [b - a for a, b in zip(began, now())]


times = {"generate": [], "step": [], "tokens": []}
'''
SERVED = ''',
                    use_vllm=True, vllm_mode="server", vllm_server_base_url=url'''
TRL_SCRIPT = CLOCK + '''
from importlib import import_module

import torch

# nothing is imported from vLLM
import_module("trl.import_utils").is_vllm_available = lambda min_version=None: False
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_client, vllm_generation

folder, prompts, steps, out, size, samples, length, url, weights, group = sys.argv[1:]
group = int(group)
torch.set_num_threads(1)
vllm_client.is_vllm_available = vllm_generation.is_vllm_available = lambda min_version=None: True


def init_communicator(self, device=0):
    self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": {}})


def update_named_params(self, metadata, named_params):
    save_file({name: tensor.detach().contiguous() for name, tensor in named_params}, weights)
    self.session.post(f"{self.base_url}/pause?mode=keep&clear_cache=false")
    self._start_weight_update()
    self.session.post(f"{self.base_url}/update_weights", json={"update_info": {"files": [weights]}})
    self._finish_weight_update()
    self.session.post(f"{self.base_url}/resume")


vllm_client.VLLMClient.init_communicator = init_communicator
vllm_client.VLLMClient.update_named_params = update_named_params
rows = [json.loads(line) for line in open(prompts)]
data = Dataset.from_list([{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]}
                          for r in rows])


''' + TRAINER.replace("MORE", SERVED) + '''

client = trainer.vllm_generation.vllm_client
asked = client.generate


def counted(*args, **kwargs):
    found = asked(*args, **kwargs)
    times["tokens"].append(sum(map(len, found["completion_ids"])) / len(found["completion_ids"]))
    return found


client.generate = counted
trainer._generate = timed
trainer.train()
json.dump(times, open(out, "w"))
'''
OUR_SCRIPT = CLOCK + '''
from megatron_sov import cli
from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.post.rl.feed import Producer
from megatron_sov.train.trainer import Trainer

group = int(sys.argv[2])
begins = []


def noted(*args, inner=Trainer.bring_data, **kwargs):
    begins.append(now())
    return inner(*args, **kwargs)


def timed(*args, inner=Producer._write_by_servers, **kwargs):
    began = now()
    try:
        return inner(*args, **kwargs)
    finally:
        times["generate"].append(since(began))


Trainer.bring_data, Producer._write_by_servers = noted, timed
code = cli.main(sys.argv[3:])
begins.append(now())
times["step"] = [[b - a for a, b in zip(*pair)] for pair in zip(begins, begins[1:])]
json.dump(times, open(sys.argv[1], "w"))
sys.exit(code)
'''
Times = dict[str, list[list[float]]]


class Arms:
    """Both, at one server."""

    def __init__(self, seed: DenseSeed, site: Path, steps: int, url: str, group: int, model: Path) -> None:
        self.seed, self.site, self.steps, self.url, self.group, self.model = (seed, site, steps, url, group,
                                                                              model)

    def trl(self) -> Times:
        """Return the times of TRL's steps."""
        weights = Path("/dev/shm") / f"sov-trl-{os.getpid()}.safetensors"
        try:
            return self._timed("trl", TRL_SCRIPT, lambda out: [
                self.model, self.seed.folder / "prompts.jsonl", self.steps, out, PROMPTS, SAMPLES, NEW_TOKENS,
                self.url, weights, self.group], {"PYTHONPATH": str(self.site)})
        finally:
            weights.unlink(missing_ok=True)

    def ours(self, staleness: int = 0) -> Times:
        """Return the times of our steps, from one to the next, where rounds are written by a policy that is
        so many rounds old at most."""
        folder, store = self.seed.folder / "against-trl", self.seed.folder / "against-trl.store"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)
        settings = (*(f"model.{size}" for size in DenseSeed.sizes), "policy.method=grpo", "policy.kl=none",
                    "train.global_batch_size=32", "train.micro_batch_size=32", f"rollout.rounds={self.steps}",
                    f"rollout.prompts_per_round={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}",
                    f"rollout.piece_prompts={PROMPTS}", f"rollout.max_new_tokens={NEW_TOKENS}",
                    "rollout.max_prompt_tokens=64", "optim.lr=5e-4", "train.num_threads=1",
                    'data.phases=[{"name": "main", "seq_len": 512}]', "train.eval_every_steps=0",
                    "train.precision=fp32", f"rollout.max_staleness={staleness}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = self._timed("ours", OUR_SCRIPT, lambda out: [
            out, self.group, "rl", "run", DenseSeed.recipe, "--from", self.seed.start(), "--run", folder,
            "--store", store, "--prompts", self.seed.folder / "prompts.jsonl", "--reward",
            f"{HERE / 'rl_reward.py'}:Exact", "--workers", "1", "--engine", "vllm", "--engine-url", self.url,
            "--engine-set", f"requests={PROMPTS * SAMPLES}", *words(settings)], rank)
        for line in (folder / "events.jsonl").read_text().splitlines():
            if (event := json.loads(line))["event"] == "round":
                found["tokens"].append(event["means"]["response_tokens"])
        return found

    def _timed(self, name: str, script: str, arguments: object, environment: dict[str, str]) -> Times:
        out = self.seed.folder / f"{name}-vllm.json"
        out.unlink(missing_ok=True)
        with open(self.seed.log, "a") as log:  # as torchrun starts it: in this one process
            subprocess.run([sys.executable, "-W", "ignore", "-c", script,
                            *map(str, arguments(out))],  # type: ignore[operator]
                           stdout=log, stderr=subprocess.STDOUT, check=True, cwd=self.seed.folder,
                           env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
        return dict(json.loads(out.read_text()))


def median_of(times: Times, place: int) -> tuple[float, float, float]:
    """Return the medians of whole steps, of generation and of all else.

    Args:
        times: of all steps.
        place: 0: by the clock; 1: of the processor.
    """
    pairs = [(step[place], generate[place]) for step, generate in
             zip(times["step"][SKIPPED:], times["generate"][SKIPPED:], strict=False)]
    return (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs),
            statistics.median(a - b for a, b in pairs))


def show(found: dict[str, Times]) -> None:
    """Print a turn of both."""
    lengths = ", ".join(f"{name} {statistics.mean(map(float, times['tokens'])):.2f}"  # type: ignore[arg-type]
                        for name, times in found.items())
    print(f"load {os.getloadavg()[0]:.1f}; tokens of a response in the mean: {lengths}")
    for place, told in enumerate(("by the clock", "of the processors")):
        medians = {name: median_of(times, place) for name, times in found.items()}
        for name, (step, generate, rest) in medians.items():
            print(f"  {told:<18} {name:<5} step {step:7.3f} s   generation {generate:7.3f} s   all else "
                  f"{rest:7.3f} s")
        for name in sorted(medians.keys() - {"TRL"}, reverse=True):
            ratios = [a / b for a, b in zip(medians[name], medians["TRL"], strict=True)]
            goal = f" (goal {GOAL})" if name == "ours" else ""
            print(f"  {told:<18} {name} / TRL: step {ratios[0]:.2f}{goal}, generation {ratios[1]:.2f}, all "
                  f"else {ratios[2]:.2f}", flush=True)


def main() -> None:
    """Measure both, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trl", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    os.environ.update(QUIET)
    from megatron_sov.infer.engines.server_engine import server_settings
    from megatron_sov.infer.engines.server_process import OwnServer

    seed = DenseSeed(0, args.work.absolute())
    model = seed.folder / "start.hf"
    if not (model / "config.json").exists():
        run(seed.log, "megatron_sov", "convert", "to-hf", seed.start(), model)
    asked = server_settings("vllm", ['more=["--enforce-eager"]', "dtype=float32",
                                     f"requests={PROMPTS * SAMPLES}"], "--engine-set")
    with tempfile.TemporaryDirectory() as logs:
        keeper = OwnServer("vllm", 0, model, 512, asked, Path(logs))
        try:
            server = keeper.start(lambda: False)
            assert server is not None, "it was not asked to stop"
            (group,) = (process.pid for process in server_keepers(os.getpid()))
            print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
                  f"{platform.python_version()}; {PROMPTS} prompts x {SAMPLES} responses of at most "
                  f"{NEW_TOKENS} tokens, medians of {args.steps - SKIPPED} steps", flush=True)
            arms = Arms(seed, args.trl.absolute(), args.steps, server.url, group, model)
            for turn in range(args.turns):
                order: list[tuple[str, Callable[[], Times]]] = [
                    ("TRL", arms.trl), ("ours", arms.ours), ("ahead", partial(arms.ours, 1))]
                show({name: measure() for name, measure in (order if turn % 2 == 0 else order[::-1])})
        finally:
            keeper.end()


if __name__ == "__main__":
    main()
