"""What becomes of responses that take long: whether lengths that are trained are those that a policy writes,
what one response that hangs costs, and what going on with unfinished responses does to the time of a step.

    python benchmarks/rl_delay.py [--rounds 12] [--ways waits late ...] > benchmarks/results/rl_delay.txt

The jobs are the real ones (what is missing, claims, store, judging, publishing); the engine and the clock are
not.  A tenth of the responses are twenty times as long as the others.  A pass of the engine gives each
response of a piece a token, in half a second and 1/64 s for each; a step of training takes 30 s.  One engine,
policies up to one round old, 60 s for a piece where there is a deadline.

  to its end   no deadline: a piece is written until its longest response ends
  waits        unfinished responses are gone on with, and a step waits for them
  late         steps take the groups that are there, and late responses join a later round
  left out     the same run without those that joined later
  requeued     unfinished responses are thrown away and drawn anew, as a queue of requests does
  hung         as `late`, and one response never gets a token

A gap is the largest distance between the distribution of the trained lengths and that of what the policies
would have written without any deadline (Kolmogorov and Smirnov's).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.digests import SHA256, file_digest
from megatron_sov.infer.request import Bounds, Generated, Sampling, StopRule, Tokens
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.model.config import PhaseConfig, PolicyConfig, RolloutConfig
from megatron_sov.model.config.run import with_rounds
from megatron_sov.post.rl.generate import Missing, PieceQueue, SampleAttempt, never, write_rounds
from megatron_sov.post.rl.publish import Publisher
from megatron_sov.post.rl.responses import NO_TOKENS, ResponseSource, key_digest
from megatron_sov.post.rl.reward import JudgingJob
from megatron_sov.rollouts.prompts import read_prompts, round_prompts, stream_of
from megatron_sov.rollouts.rows import Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.rounds import Policy
from megatron_sov.train.data.rounds import RoundDocuments
from megatron_sov.work.progress.locks import Claims, Patience

END, VOCAB, VERSION = 0, 1000, "v" * 64
SHORT, TIMES, LONG_SHARE = (5, 16), 20, 0.1
PASS_S, RESPONSE_S, TRAIN_S, DEADLINE_S = 0.5, 1 / 64, 30.0, 60.0
ROLLOUT = RolloutConfig(prompts_per_round=32, samples_per_prompt=4, piece_prompts=8, max_new_tokens=320,
                        max_prompt_tokens=4, deadline_s=DEADLINE_S, max_staleness=1)
WAYS = ("to its end", "waits", "late", "requeued", "hung")
MISSING_SHARE, HUNG_PROMPT, MAX_GAP = 0.7, 7, 0.02


def length_of(stream: int) -> int:
    """Return how long a response that begins with a stream of random numbers will be."""
    drawn = np.random.default_rng(stream)
    short = int(drawn.integers(*SHORT))
    return TIMES * short if drawn.random() < LONG_SHARE else short


class Scripted:
    """An engine of one token a pass, whose first token tells the length of its response."""

    def __init__(self, hangs: bool) -> None:
        self.now_s, self.step, self._hangs = 0.0, 0, hangs

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None, bounds: Bounds | None = None) -> Generated:
        """Write until all have ended, or the deadline."""
        assert stop is not None and streams is not None
        lengths = [text[1] if len(text) > 1 else length_of(stream)
                   for text, stream in zip(prompts, streams, strict=True)]
        left = np.array([n - len(text) + 1 for n, text in zip(lengths, prompts, strict=True)])
        if self._hangs and [HUNG_PROMPT] in (texts := [list(text) for text in prompts]):
            left[texts.index([HUNG_PROMPT])] = 1 << 30
        passes = 0
        while (active := int((left > passes).sum())) and not (passes and bounds and bounds.should_stop()):
            passes += 1
            self.now_s += PASS_S + active * RESPONSE_S
        written = [self._tokens(text, n, min(passes, more) if more < 1 << 30 else 0)
                   for text, n, more in zip(prompts, lengths, left.tolist(), strict=True)]
        return Generated.of([(w, [-1.0] * len(w)) for w in written], sampling, stop, self.step)

    def _tokens(self, text: Tokens, length: int, count: int) -> list[int]:
        whole = [length, *[1] * (length - 2), END]
        return whole[len(text) - 1:len(text) - 1 + count]

    def update(self, weights: Any, version: int) -> None:
        """Never called: weights are taken by `take`."""
        raise AssertionError


class Numbers:
    """In the place of a tokenizer: a prompt says its only id."""

    end_ids = (END,)

    def ask(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Return prompts' tokens."""
        return [[int(p.messages[-1].content)] for p in prompts]

    def decode(self, tokens: list[int]) -> str:
        """Return nothing: no reward reads it."""
        return ""

    def opened_thoughts(self, asked: Sequence[int]) -> str:
        """Return that there is no template which opens any."""
        return ""


class Requeueing(ResponseSource):
    """Throws unfinished responses away and draws them anew."""

    def write(self, engine: Any, attempts: Sequence[SampleAttempt],
              gives_way: Callable[[], bool] = never) -> list[list[Rollout]]:
        """As `ResponseSource.write`."""
        return super().write(engine, [
            replace(attempt, begun=tuple(replace(row, **NO_TOKENS) for row in attempt.begun))
            for attempt in attempts], gives_way)


@dataclass(frozen=True)
class Trained:
    """What a simulation gave."""

    expected: list[int]
    """Lengths that the policies would have written."""
    lengths: list[int]
    """Of what was trained."""
    joined: list[int]
    """Of these, those that joined a later round."""
    ends_s: list[float]
    """Of the steps."""
    attempts: int
    """Parts that were written."""

    def step_s(self) -> np.ndarray:
        """Return the seconds from the end of each step to that of the next."""
        return np.diff([0.0, *self.ends_s])


class Simulation:
    """One generating job, one judge and one trainer on one clock."""

    def __init__(self, folder: Path, rollout: RolloutConfig, missing_share: float, *,
                 requeues: bool = False, hangs: bool = False) -> None:
        folder.mkdir()
        prompts = folder / "prompts.jsonl"
        count = 3 * rollout.prompts_per_round
        prompts.write_text("".join(json.dumps({"prompt": str(k)}) + "\n" for k in range(1, count + 1)))
        (folder / "tokenizer.json").write_text("{}")
        self.rollout, self.engine = rollout, Scripted(hangs)
        self.store = RolloutStore.create(folder / "store", file_digest(folder / "tokenizer.json", SHA256),
                                         VOCAB)
        self.claims = Claims(self.store.claims, 600)
        base = recipes.get("tiny-solar-open")
        config = with_rounds(replace(
            base, rollout=rollout,
            policy=PolicyConfig(method="dapo", missing_share=missing_share, max_gen_batches=1),
            model=replace(base.model, vocab_size=VOCAB),
            data=replace(base.data, phases=(PhaseConfig("main", seq_len=512),))))
        self.publisher = Publisher(config, folder / "rounds", self.store.path, read_prompts(prompts),
                                   VERSION, folder)
        vars(self.publisher)["_bytes_of_token"] = np.ones(VOCAB, np.int64)
        writer = Requeueing if requeues else ResponseSource
        self.writer = writer(Numbers(), rollout, "scripted", False, {},  # type: ignore[arg-type]
                             lambda: self.engine.now_s)
        self.changed_s = 0.0
        self.ends_s: list[float] = []

    def run(self) -> Trained:
        """Write, judge and train all rounds."""
        missing = Missing(self.store, self.claims, self.publisher.prompts, self.rollout,
                          range(1, self.rollout.rounds + 1), self.policy_of,
                          lambda number: key_digest(self.rollout, number, {}))
        desk = PieceQueue(missing, self.store, 1e9, {}, patience=Patience(self.pass_by),
                          clock_s=lambda: self.engine.now_s)
        publish = desk.publish
        desk.publish = partial(self.published, publish)  # type: ignore[method-assign]
        desk.next = partial(self.asked, desk.next)  # type: ignore[method-assign]
        write_rounds(self.engine, self.take, self.policy(0), self.writer, desk)
        self.engine.now_s = math.inf  # the last steps, behind all that was written
        self.train()
        return self.trained()

    def policy(self, step: int) -> Policy:
        """Return the policy behind a step."""
        return Policy(Path(f"step-{step}"), step, f"{step:064x}")

    def policy_of(self, number: int) -> Policy | None:
        """Return the newest policy of this moment, where it may write a round."""
        self.train()
        step = sum(end_s <= self.engine.now_s for end_s in self.ends_s)
        return self.policy(step) if step >= number - 1 - self.rollout.max_staleness else None

    def take(self, policy: Policy) -> None:
        """Give the engine another policy."""
        self.engine.step = policy.step

    def pass_by(self, seconds: float) -> None:
        """Let time pass."""
        self.engine.now_s += seconds

    def asked(self, next_: Any) -> Any:
        """Return what the generating job is to do; it ends with the last round that is trained."""
        self.train()
        return None if len(self.ends_s) == self.rollout.rounds else next_()

    def published(self, publish: Any, attempts: Sequence[SampleAttempt],
                  rows: Sequence[list[Rollout]]) -> None:
        """Publish parts and judge them."""
        self.train()  # what began before these parts were there
        publish(attempts, rows)
        for number in {attempt.piece.round for attempt in attempts}:
            JudgingJob(self.store, self.claims, VERSION,
                       lambda judged: [Result(row.key.sample / 4, "scored", {}) for row in judged],
                       range(number, number + 1), {}).run()
        self.changed_s = self.engine.now_s
        self.train()

    def train(self) -> None:
        """Train the rounds whose step begins by now."""
        while (number := len(self.ends_s) + 1) <= self.rollout.rounds:
            free_s = self.ends_s[-1] if self.ends_s else 0.0
            if max(free_s, self.changed_s) > self.engine.now_s or self.publisher.publish(number):
                return
            self.ends_s.append(max(free_s, self.changed_s) + TRAIN_S)

    def trained(self) -> Trained:
        """Return what stands in the published rounds."""
        rounds = RoundDocuments(self.publisher.rounds, VOCAB)
        lengths: list[int] = []
        joined: list[int] = []
        expected = [length_of(stream_of(number, prompt.id, sample))
                    for number in range(1, self.rollout.rounds + 1)
                    for prompt in round_prompts(self.publisher.prompts, self.rollout, number)
                    for sample in range(self.rollout.samples_per_prompt)]
        for number in range(1, self.rollout.rounds + 1):
            opened = rounds.read(number, 512, 1)
            found = (np.diff(opened.starts) - 1).tolist()  # a prompt is one token
            lengths += found
            joined += found[:len(read_manifest(opened.path).content["late_from"])]
        return Trained(expected, lengths, joined, self.ends_s, len(self.store.parts()))


def gap(trained: Sequence[int], expected: Sequence[int]) -> float:
    """Return the largest distance of two distributions."""
    at = np.union1d(trained, expected)
    shares = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (trained, expected)]
    return float(np.abs(shares[0] - shares[1]).max())


def main() -> int:
    """Simulate everything and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="of each (default %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    rollout = replace(ROLLOUT, rounds=args.rounds)
    ways: dict[str, dict[str, Any]] = {
        "to its end": {"rollout": replace(rollout, deadline_s=0.0), "missing_share": 0.0},
        "waits": {"rollout": rollout, "missing_share": 0.0},
        "late": {"rollout": rollout, "missing_share": MISSING_SHARE},
        "requeued": {"rollout": rollout, "missing_share": 0.0, "requeues": True},
        "hung": {"rollout": rollout, "missing_share": MISSING_SHARE, "hangs": True}}
    found: dict[str, Trained] = {}
    print(f"{args.rounds} rounds of {rollout.prompts_per_round} prompts with {rollout.samples_per_prompt} "
          f"responses in pieces of {rollout.piece_prompts} prompts, all times simulated\n\n{'':<12}"
          f"{'trained':>9}{'joined late':>13}{'mean length':>13}{'gap':>8}{'s/step':>8}{'longest':>9}"
          f"{'parts':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.ways:
            asked = ways[name]
            done = found[name] = Simulation(Path(folder) / name.replace(" ", "-"), **asked).run()
            tell(name, done)
            if name == "late":
                left = list(done.lengths)
                for n in done.joined:
                    left.remove(n)
                tell("left out", dataclasses.replace(done, lengths=left, joined=[]))
    expected = next(iter(found.values())).expected
    print(f"\n{len(expected)} responses of {np.mean(expected):.1f} tokens in the mean were asked for")
    sound = all(gap(found[name].lengths, expected) <= MAX_GAP for name in WAYS[:3] if name in found)
    if {"late", "hung"} <= set(found):
        held_s = float((found["hung"].step_s() - found["late"].step_s()).max())
        print(f"a response that hangs makes a step {held_s:.0f} s longer at most (deadline {DEADLINE_S:g}), "
              f"and all of them {found['hung'].ends_s[-1] - found['late'].ends_s[-1]:.0f} s")
        sound = sound and held_s <= DEADLINE_S + PASS_S + 1
    print(f"gaps of our own ways at most {MAX_GAP}, and no step held longer than the deadline"
          if sound else "NOT SO")
    return 0 if sound else 1


def tell(name: str, done: Trained) -> None:
    """Print a line of the table."""
    step_s = done.step_s()
    print(f"{name:<12}{len(done.lengths):>9,}{len(done.joined):>13,}{np.mean(done.lengths):>13.1f}"
          f"{gap(done.lengths, done.expected):>8.4f}{step_s.mean():>8.0f}{step_s.max():>9.0f}"
          f"{done.attempts:>7,}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
