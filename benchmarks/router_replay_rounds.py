"""What router replay (R3) does to reinforcement learning of a tiny mixture of experts whose engine routes
otherwise than its trainer, far more often than rounding makes it: rewards with replay and without.

Usage: python benchmarks/router_replay_rounds.py --work FOLDER [--seeds 0 1 2] [--arms replay live same]
       python benchmarks/router_replay_rounds.py --work FOLDER --print

Start, questions and settings are those of rl_learning.py, whose folder may be given; the method is GRPO
without a divergence.  While a round is written, noise of NOISE times their own spread is added to the
routers' weights, drawn anew for each round, and taken away before it is trained.

  same    without noise: what there is to learn
  live    with noise; the trainer's routers choose
  replay  with noise; the trainer replays what the engine chose

Printed are the mean reward of the last rounds, as the engine with its noise gets it, the right answers to
held-out wordings before and after without any noise, and what the steps measured: the divergence of the
trainer from the engine, and the share of tokens whose ratio was clipped; of the first round also the share of
choices (token, layer) that the trainer would have made otherwise.  A run that is complete is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rl_learning
from rl_learning import HERE, accuracy
from router_replay import read
from seed_runs import rows_of, run_arms, words

from megatron_sov.runs.obs.events import final_steps, read_events

ROUNDS, LAST, NOISE = 30, 5, 2.0
"""Rounds, those of them whose rewards are told, and the noise in units of a router's standard deviation."""
POLICY = (*rl_learning.POLICY, f"rollout.rounds={ROUNDS}", "policy.method=grpo", "policy.kl=none",
          "train.global_batch_size=32", "train.micro_batch_size=32", rows_of(128))
ARMS: dict[str, tuple[float, bool]] = {"same": (0.0, False), "live": (NOISE, False), "replay": (NOISE, True)}
"""Arm -> noise, and whether routes are replayed."""


@contextlib.contextmanager
def other_routers(model: Any, noise: float, seed: int) -> Iterator[None]:
    """Have a model's routers score otherwise, for a while.

    Args:
        model: whose routers.
        noise: its standard deviation, in units of that of each router's weights.
        seed: of the draw.
    """
    import torch

    routers = {name: p for name, p in model.named_parameters() if name.endswith("router.weight")}
    assert routers, "a model without routers"
    kept = {name: p.detach().clone() for name, p in routers.items()}
    with torch.no_grad():
        for name, p in routers.items():
            drawn = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest())
            p += noise * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(drawn))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in routers.items():
                p.copy_(kept[name])


def share_that_differs(policy: Any, documents: Sequence[list[int]], routes: Sequence[np.ndarray]) -> float:
    """Return the share of choices (token, layer) that a model as it stands makes otherwise than told."""
    differs = [(read(policy, document, None)[1] != np.sort(told, axis=2)).any(axis=2).ravel()
               for document, told in zip(documents, routes, strict=True)]
    return float(np.concatenate(differs).mean())


def run_with_noise(noise: float, seed: int, told: Path, arguments: list[str]) -> int:
    """Run a command whose own engine writes with other routers, anew for each round; returns its code.

    Args:
        noise: see `other_routers`.
        seed: of the draws.
        told: gets the share of choices that the trainer would make otherwise, where routes are told.
        arguments: of the command.
    """
    from megatron_sov import cli
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.infer.decoder.generator import MegatronEngine

    inner: Callable[..., Any] = MegatronEngine.generate

    def generate(engine: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        # the version is the steps that the policy has learned: a round that is written again is the same one
        with other_routers(engine._model.model, noise, 1000 * seed + engine._held.version):
            found = inner(engine, prompts, *args, **kwargs)
        if found.routes is not None and not told.exists():
            documents = [[*prompt, *written] for prompt, written in zip(prompts, found.continuations,
                                                                        strict=True)]
            told.write_text(str(share_that_differs(engine._model, documents[::8], found.routes[::8])))
        return found

    setattr(MegatronEngine, "generate", generate)  # noqa: B010
    return cli.main(arguments)


class Seed(rl_learning.Seed):
    """Data and runs of one seed."""

    def run_folder(self, arm: str) -> Path:
        """Return an arm's run."""
        return self.folder / f"routes-{arm}"

    def arm(self, name: str) -> None:
        """Run an arm, unless it is complete, and ask what it has learned."""
        start, run_folder, (noise, replay) = self.start(), self.run_folder(name), ARMS[name]
        if not (run_folder / "complete.json").exists():
            arguments = [
                "rl", "run", "tiny-solar-open", "--from", start, "--run", run_folder, "--store",
                run_folder.with_suffix(".store"), "--prompts", self.folder / "prompts.jsonl", "--reward",
                f"{HERE / 'rl_reward.py'}:Exact", "--workers", "1", "--resume", "--batch-size", "256",
                *words((*POLICY, f"policy.router_replay={str(replay).lower()}", f"train.seed={self.seed}",
                        f"rollout.seed={self.seed}"))]
            self._run_in_one_process(noise, run_folder.with_suffix(".differs"),
                                     [str(word) for word in arguments])
        self.ask(run_folder)

    def _run_in_one_process(self, noise: float, told: Path, arguments: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        code = (f"import sys; from pathlib import Path; sys.path.insert(0, {str(HERE)!r}); "
                "from router_replay_rounds import run_with_noise; "
                f"sys.exit(run_with_noise({noise}, {self.seed}, Path({str(told)!r}), sys.argv[1:]))")
        with open(self.log, "a") as log:
            ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], stdout=log,
                                   stderr=subprocess.STDOUT, check=False, env=os.environ | rank).returncode
        if ended:
            raise SystemExit(f"{' '.join(arguments)}\nended with exit code {ended}; see {self.log}")


def figures(run_folder: Path) -> tuple[float, float, float]:
    """Return the mean reward of a run's last rounds, and of all its steps the mean divergence of the trainer
    from the engine and the mean share of clipped tokens."""
    events = list(read_events(run_folder / "events.jsonl"))
    rewards = {e["round"]: e["means"]["reward"] for e in events if e["event"] == "round"}
    meters = [e["meters"] for e in final_steps(events)]
    return (statistics.mean(rewards[number] for number in sorted(rewards)[-LAST:]),
            statistics.mean(m["engine_kl"] for m in meters), statistics.mean(m["clip_share"] for m in meters))


def report(work: Path) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; tiny-solar-open, 2 of 4 experts are chosen; noise of {NOISE:g} "
          f"of their spread on the engine's routers; {ROUNDS} rounds of GRPO, rewards of the last {LAST}")
    print(f"{'arm':<8}{'seed':>5}{'reward':>9}{'held out, % (before -> after)':>32}{'KL (k3)':>11}"
          f"{'clipped':>10}")
    differing: list[float] = []
    for arm in ARMS:
        rewards = []
        for folder in sorted(work.glob("seed-*")):
            run_folder = folder / f"routes-{arm}"
            after, before = accuracy(run_folder), accuracy(folder / "start")
            if after is None or before is None:
                continue
            reward, divergence, clipped = figures(run_folder)
            rewards.append(reward)
            print(f"{arm:<8}{folder.name[5:]:>5}{reward:>9.3f}{f'{before:.1f} -> {after:.1f}':>32}"
                  f"{divergence:>11.2e}{clipped:>10.2%}")
            if (told := run_folder.with_suffix(".differs")).exists():
                differing.append(float(told.read_text()))
        if rewards:
            print(f"{arm:<8}{'mean':>5}{statistics.mean(rewards):>9.3f}")
    if differing:
        print(f"choices of the first round that the trainer would make otherwise: "
              f"{', '.join(f'{share:.1%}' for share in differing)}")


if __name__ == "__main__":
    run_arms(__doc__, ARMS, lambda seed, work, arm: Seed(seed, work).arm(arm), report)
