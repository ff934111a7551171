"""How busy 512 GPUs' engines are by the queue of requests, simulated: whether servers go on writing while the
trainer learns and while a round's longest responses are under way, beside taking turns.

    python benchmarks/engine_queue.py [--rounds 6] > benchmarks/results/engine_queue.txt

Queue, pieces, claims, store and the fleet with its threads are the product's own; servers and clock are not.
256 GPUs write, as 32 engines of 8 GPUs with 32 responses at a time each, 256 learn.  A round has 256 prompts
with 16 responses each, a piece is one prompt.  An engine with n responses under way gives each a token in
25 ms + 0.1 ms x n.  Learning a round takes 0.8 of the time in which full engines would write it, so that
engines are what a run waits for.  New weights stop all engines for 10 s.  These are round numbers, no
measurement of a GPU.

Lengths are log-normal, cut at the longest response, with the published mean:
  nano     31,599 tokens in the mean, at most 131,072 (Nemotron-3-Nano, NeMo RL 0.6: data/rl_throughput.csv)
  qwen3    5,691 tokens in the mean, at most 8,192 (Qwen3-235B, the same file)
  tail     at most 20,480 as DAPO has it (arXiv 2503.14476), and a mean of a fifth of that, which is assumed
The width is not published with them.  It is 0.99 on the log scale: a 99th percentile ten times the median.
  one      no distribution: all responses have 1,000 tokens, one in the middle of each round 50,000

  turns    `rollout.max_staleness` 0: engines wait while the trainer learns, and for the longest response
  ahead 1  `rollout.max_staleness` 1: the next round is written meanwhile

  with work   share of the engines' time with at least one response under way
  full        share of their places (32 each) that were taken
  tokens      of those that full engines would have written

Shares are of the time between the end of the second step and that of the last but one.  Tokens are counted
in 64s, time in steps of 1 s.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from rl_delay import Numbers

from megatron_sov.base.digests import SHA256, file_digest
from megatron_sov.infer.engines.fleet import AddressKeeper, Fleet
from megatron_sov.infer.engines.server_engine import ServerEngine
from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.rl.generate import Missing, PieceQueue
from megatron_sov.post.rl.requests import ResponseQueue
from megatron_sov.post.rl.responses import ResponseSource, key_digest
from megatron_sov.rollouts.prompts import read_prompts, round_prompts
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.rounds import Policy
from megatron_sov.work.endpoints.token_server import STOP, TokenAnswer, TokenRequest, VersionSpan
from megatron_sov.work.progress.locks import Claims

ENGINES, PLACES, PROMPTS, SAMPLES = 32, 32, 256, 16
STEP_S, RESPONSE_S, TRAIN_SHARE, UPDATE_S, TICK_S = 0.025, 0.0001, 0.8, 10.0, 1.0
UNIT, END, VOCAB, WIDTH = 64, 0, 4000, 0.99
LENGTHS = {"nano": (31_599, 131_072), "qwen3": (5_691, 8_192), "tail": (4_096, 20_480)}
"""Name -> mean and longest."""
ONE = (1_000, 50)
"""Tokens of a response, and how many times as long one of a round is."""
ASKED_SHARE = 0.9


def full_rate() -> float:
    """Return the tokens a second of all engines, full."""
    return ENGINES * PLACES / (STEP_S + RESPONSE_S * PLACES)


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution cut at the longest response."""

    median: float
    longest: int
    width: float = WIDTH

    @classmethod
    def of(cls, mean: float, longest: int) -> Lengths:
        """Return that with a mean, which counts what is cut at the longest."""
        quantiles = np.array([NormalDist().inv_cdf((k + 0.5) / 4000) for k in range(4000)])
        low, high = 1.0, 10.0 * longest
        while high - low > 0.5:
            middle = (low + high) / 2
            found = np.minimum(middle * np.exp(WIDTH * quantiles), longest).mean()
            low, high = (middle, high) if found < mean else (low, middle)
        return cls((low + high) / 2, longest)

    def draw(self, prompt: int, count: int) -> int:
        """Return the length of the so-manieth response that a prompt is asked for."""
        digest = hashlib.sha256(f"{prompt} {count}".encode()).digest()
        share = (int.from_bytes(digest[:6], "big") + 0.5) / 2 ** 48
        drawn = self.median * np.exp(self.width * NormalDist().inv_cdf(share))
        return max(UNIT, int(min(drawn, self.longest)))


class World:
    """The clock, and what is under way on all servers."""

    def __init__(self, lengths: Lengths) -> None:
        self.lengths, self.now_s = lengths, 0.0
        self.long_prompts: set[int] = set()
        self.changed = threading.Condition()
        self.servers = [SimulatedServer(self, number) for number in range(ENGINES)]
        self.submitted, self.inside, self.finished = 0, 0, 0
        self.asked: Counter[int] = Counter()
        self.marks: list[tuple[float, float, float, float]] = []
        self.with_work_s, self.places_s, self.tokens = 0.0, 0.0, 0.0

    def settle(self) -> None:
        """Wait until the fleet has given out what servers have room for."""
        with self.changed:
            while self.inside != min(ENGINES * PLACES, self.submitted - self.finished):
                self.changed.wait(0.05)

    def tick(self) -> int:
        """Let a second pass; returns how many responses end in it."""
        self.settle()
        ended: list[tuple[float, int, threading.Event]] = []
        with self.changed:
            self.now_s += TICK_S
            for server in self.servers:
                if (count := len(server.under_way)) == 0:
                    continue
                written = TICK_S / (STEP_S + RESPONSE_S * count)
                server.progress += written
                self.with_work_s += TICK_S
                self.places_s += TICK_S * count
                self.tokens += written * count
                while server.under_way and server.under_way[0][0] <= server.progress:
                    ended.append(heapq.heappop(server.under_way))
            expected = self.finished + len(ended)
            for _, _, event in ended:
                event.set()
            while self.finished < expected:
                self.changed.wait(0.05)
        return len(ended)

    def mark(self) -> None:
        """Note what was done until now."""
        self.marks.append((self.now_s, self.with_work_s, self.places_s, self.tokens))


class SimulatedServer:
    """A `TokenServer` on the world's clock."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number, self.url = world, number, f"simulated-{number}"
        self.under_way: list[tuple[float, int, threading.Event]] = []
        self.progress, self._version, self._counter = 0.0, 0, 0

    def write(self, request: TokenRequest) -> list[TokenAnswer]:
        """Return a response when its time has come."""
        event, world, begun = threading.Event(), self.world, self._version
        with world.changed:
            prompt = request.ids[0]
            length = world.lengths.draw(prompt, world.asked[prompt])
            if prompt in world.long_prompts and not world.asked[prompt]:
                length *= ONE[1]
            world.asked[prompt] += 1
            self._counter += 1
            heapq.heappush(self.under_way, (self.progress + length, self._counter, event))
            world.inside += 1
            world.changed.notify_all()
        event.wait()
        with world.changed:
            world.inside -= 1
        count = length // UNIT
        tokens = [*[1] * (count - 1), END]
        return [TokenAnswer(tokens, [-1.0] * count, STOP, (VersionSpan(begun, 0, count),))]

    def pause(self) -> None:
        """Do nothing: the clock stands."""

    def update(self, files: Sequence[str], version: int) -> None:
        """Take a version."""
        self._version = version

    def resume(self) -> None:
        """Do nothing."""

    def abort(self, requests: Sequence[TokenRequest]) -> None:
        """Never called: there is no deadline."""
        raise AssertionError

    def score(self, ids: Sequence[int]) -> list[float]:
        """Never called."""
        raise AssertionError

    def is_healthy(self) -> bool:
        """Return that it is."""
        return True


class CountedFleet(Fleet):
    """A fleet that tells the world what it was given and what it has answered."""

    world: World

    def submit(self, request: TokenRequest) -> Future[list[TokenAnswer]]:
        """As `Fleet.submit`."""
        with self.world.changed:
            self.world.submitted += 1
        future = super().submit(request)
        future.add_done_callback(self._answered)
        return future

    def _answered(self, future: Future[list[TokenAnswer]]) -> None:
        with self.world.changed:
            self.world.finished += 1
            self.world.changed.notify_all()


class Simulation:
    """A run of rounds, whose trainer is a time that passes."""

    def __init__(self, folder: Path, lengths: Lengths, rounds: int, max_staleness: int) -> None:
        """Begin; lengths without a width are those of `one`."""
        folder.mkdir()
        self.rollout = RolloutConfig(
            rounds=rounds, prompts_per_round=PROMPTS, samples_per_prompt=SAMPLES, piece_prompts=1,
            max_new_tokens=ONE[1] * lengths.longest, max_prompt_tokens=4, max_staleness=max_staleness)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": str(k)}) + "\n" for k in range(1, VOCAB)))
        (folder / "tokenizer.json").write_text("{}")
        store = RolloutStore.create(folder / "store", file_digest(folder / "tokenizer.json", SHA256), VOCAB)
        self.world, self.trained, self.folder = World(lengths), 0, folder
        source = ResponseSource(Numbers(), self.rollout, "simulated", False, {})  # type: ignore[arg-type]
        asked = read_prompts(prompts)
        if not lengths.width:
            self.world.long_prompts = {
                int(round_prompts(asked, self.rollout, number)[PROMPTS // 2].record["prompt"])
                for number in range(1, rounds + 1)}
        missing = Missing(store, Claims(store.claims, 1e6), asked, self.rollout, range(1, 2), self.policy_of,
                          lambda number: key_digest(self.rollout, number, {}))
        self.desk = PieceQueue(missing, store, 1e9, {}, clock_s=self.clock_s)
        self.source = source
        self.queue_cpu_s = 0.0

    def clock_s(self) -> float:
        """Return the simulated time."""
        return self.world.now_s

    def policy_of(self, number: int) -> Policy | None:
        """Return the newest policy, where it may write a round."""
        if self.trained < number - 1 - self.rollout.max_staleness:
            return None
        return Policy(Path(f"step-{self.trained}"), self.trained, f"{self.trained:064x}")

    def run(self, train_s: float) -> None:
        """Write and train all rounds, as `Producer` and the trainer take turns."""
        keepers = [AddressKeeper(server, 60) for server in self.world.servers]
        fleet = CountedFleet(keepers, VOCAB, PLACES)
        fleet.world = self.world
        with fleet:
            while fleet.num_there < ENGINES:
                time.sleep(0.05)
            room = ENGINES * PLACES
            engine = ServerEngine("vllm", fleet, self.folder, self.folder / "weights", room)
            queue = ResponseQueue(engine, self.source, self.desk, None, room, self.clock_s)
            for number in range(1, self.rollout.rounds + 1):
                fleet.update([], self.trained)
                self.world.now_s += UPDATE_S
                last = min(number + self.rollout.max_staleness, self.rollout.rounds)
                self.desk.missing.add_rounds(range(number, last + 1))
                began_s = time.thread_time()
                while queue.advance(1e9, lambda: self._is_needed(number)):  # noqa: B023
                    pass
                self.queue_cpu_s += time.thread_time() - began_s
                ends_s = self.world.now_s + train_s
                while self.world.now_s < ends_s:
                    self.world.tick()
                self.trained = number
                self.world.mark()
            queue.close()

    def _is_needed(self, number: int) -> bool:
        """Let time pass until a response ends; returns whether the round is not written yet."""
        if not self.desk.missing.is_open(number):
            return False
        while self.world.submitted > self.world.finished and not self.world.tick():
            pass
        return True


def ways() -> Iterator[tuple[str, int]]:
    """Yield names and `max_staleness`."""
    yield "turns", 0
    yield "ahead 1", 1


def show(work: Path, name: str, rounds: int) -> bool:
    """Print the rows of some lengths; returns whether engines have work one round ahead as long as asked."""
    mean, longest = LENGTHS.get(name, ONE)
    lengths = Lengths.of(mean, longest) if name in LENGTHS else Lengths(mean, mean, 0.0)
    write_s = PROMPTS * SAMPLES * mean / full_rate()
    longest_s = (longest if name in LENGTHS else mean * ONE[1]) * (STEP_S + RESPONSE_S * PLACES)
    print(f"{name}: median {lengths.median:,.0f}, full engines write a round in {write_s:,.0f} s, the "
          f"longest response takes {longest_s:,.0f} s beside others, learning {TRAIN_SHARE * write_s:,.0f} s",
          flush=True)
    reached, turns_s = True, 0.0
    for way, max_staleness in ways():
        done = Simulation(work / f"{name}-{max_staleness}", lengths, rounds, max_staleness)
        done.run(TRAIN_SHARE * write_s)
        first, last = done.world.marks[1], done.world.marks[-2]
        took_s, with_work_s, places_s, tokens = (b - a for a, b in zip(first, last, strict=True))
        step_s, work_share = took_s / (rounds - 3), with_work_s / took_s / ENGINES
        turns_s = turns_s or step_s
        print(f"{name:<8}{way:<9}{step_s:>8,.0f}{step_s / turns_s:>10.2f}{work_share:>11.1%}"
              f"{places_s / took_s / ENGINES / PLACES:>8.1%}{tokens / took_s / full_rate():>8.1%}"
              f"{done.queue_cpu_s / rounds:>12.1f}", flush=True)
        if max_staleness == 1 and name in LENGTHS:
            reached = work_share >= ASKED_SHARE
    return reached


def main() -> int:
    """Simulate everything and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="of each (default %(default)s)")
    parser.add_argument("--lengths", nargs="+", choices=[*LENGTHS, "one"], default=[*LENGTHS, "one"])
    args = parser.parse_args()
    print(f"{args.rounds} rounds of {PROMPTS} prompts with {SAMPLES} responses, {ENGINES} engines of 8 GPUs "
          f"and {PLACES} places on half of 512 GPUs, all times simulated but the queue's own CPU seconds "
          "for a round\n\n"
          f"{'lengths':<8}{'way':<9}{'s/step':>8}{'of turns':>10}{'with work':>11}{'full':>8}{'tokens':>8}"
          f"{'queue CPU s':>12}")
    # many small parts are synced: in memory that costs nothing
    with tempfile.TemporaryDirectory(dir="/dev/shm") as work:
        reached = [show(Path(work), name, args.rounds) for name in args.lengths]
    print(f"engines with work for {ASKED_SHARE:.0%} of the time and more, one round ahead"
          if all(reached) else "NOT SO")
    print(f"load {os.getloadavg()[0]:.0f} at the end, which CPU seconds alone depend on")
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
