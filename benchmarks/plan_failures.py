"""What failures cost, as `plan` has it: the simulation against its closed form, against two soaks whose
restarts were measured, against what others published, and 10,000 GPUs.

    python benchmarks/plan_failures.py > benchmarks/results/plan_failures.txt

A minute on one core; nothing is trained.
"""

from __future__ import annotations

import heapq
import itertools
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.plan.operation import (
    Conditions, FailureKind, best_interval_s, checkpoint_bytes, conditions, goodput, operation)
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.units import SECONDS_OF_A_YEAR, SECONDS_OF_AN_HOUR

GOAL = 0.97
RECIPE, NUM_GPUS, STEP_S = "k-exaone-236b", 10_240, 5.0
LAYOUT = ("parallel.ep=8", "parallel.pp=8")
RESTARTS_S = (60, 120, 180, 300, 600, 900)
DAYS = 90
NUM_RUNS = 40
POD_GBYTES_PER_S = 20 / 256
"""NVIDIA's standard of a SuperPOD's storage, for each GPU."""


@dataclass(frozen=True)
class Breakage(FailureKind):
    """A failure whose node is left out until it is repaired."""


@dataclass(frozen=True)
class RepairConditions(Conditions):
    """Conditions with few nodes that take the places of broken ones."""

    spare_nodes: int | None = None
    """When none is left the run waits for a repair.  None: always enough."""
    repair_s: float = 86400.0
    """Until a broken node serves again."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run, in seconds that add up to `wall_s`."""

    work_s: float
    """Done for good."""
    redone_s: float
    """Done and lost, so done again."""
    stalled_s: float
    """Held up by checkpoints."""
    restarting_s: float
    """From failures to first new steps."""
    waiting_s: float
    """For nodes under repair."""
    num_failures: int
    """All of them, those during restarts too."""

    @property
    def wall_s(self) -> float:
        """From beginning to end."""
        return self.work_s + self.redone_s + self.stalled_s + self.restarting_s + self.waiting_s

    @property
    def goodput(self) -> float:
        """Effective training time: share of the time in which work was done for good."""
        return self.work_s / self.wall_s


def simulate(c: Conditions, work_s: float, seed: int = 0, delays: Iterator[float] | None = None) -> Outcome:
    """Return what becomes of a run that has so much to do; the same for the same seed.

    Event by event: each stretch between two failures is one step of the loop, and the checkpoints in it are
    counted, not walked through.

    Args:
        c: what the run lives with.
        work_s: what it has to do.
        seed: of what is drawn.
        delays: time to the next failure, from each start of training and of a restart on, where it is known,
            as from a cluster's own log; None: drawn.
    """
    drawn, repairs = Random(seed), list[float]()
    delays = _delays(c, drawn) if delays is None else delays
    done_s = redone_s = stalled_s = restarting_s = waiting_s = 0.0
    num_failures = 0
    while True:
        left_s = work_s - done_s
        ahead_s, needs_s = next(delays), wall_of(c, left_s)
        if ahead_s >= needs_s:
            return Outcome(work_s, redone_s, stalled_s + needs_s - left_s, restarting_s, waiting_s,
                           num_failures)
        worked_s, kept_s = progress(c, ahead_s)
        done_s, redone_s, stalled_s = (done_s + kept_s, redone_s + worked_s - kept_s,
                                       stalled_s + ahead_s - worked_s)
        while True:
            num_failures += 1
            kind = drawn.choices(c.kinds, [k.share for k in c.kinds])[0]
            if isinstance(kind, Breakage) and isinstance(c, RepairConditions) and c.spare_nodes is not None:
                now_s = done_s + redone_s + stalled_s + restarting_s + waiting_s
                waiting_s += _wait_for_node(repairs, now_s, c)
            ahead_s = next(delays)
            restarting_s += min(ahead_s, kind.restart_s)
            if ahead_s >= kind.restart_s:
                break


def _delays(c: Conditions, drawn: Random) -> Iterator[float]:
    """Yield the time to the next failure, from any moment on."""
    while True:
        yield drawn.expovariate(c.failures_per_s) if c.failures_per_s else math.inf


def _wait_for_node(repairs: list[float], now_s: float, c: RepairConditions) -> float:
    """Send a node away and return how long the run waits for one in its place.

    Args:
        repairs: when the nodes that are away come back, a heap; changed.
        now_s: time of the failure.
        c: spare nodes, time of a repair.
    """
    assert c.spare_nodes is not None
    while repairs and repairs[0] <= now_s:
        heapq.heappop(repairs)
    heapq.heappush(repairs, now_s + c.repair_s)
    # as many are away as spares served: the next one to come back is taken
    return repairs[0] - now_s if len(repairs) > c.spare_nodes else 0.0


def progress(c: Conditions, time_s: float) -> tuple[float, float]:
    """Return the work done, and how much of it is in a checkpoint that is there whole, a time after the start
    of training."""
    if time_s < c.interval_s:
        return time_s, 0.0
    begun = math.floor((time_s - c.interval_s) / c.period_s)
    since_s = time_s - c.interval_s - begun * c.period_s
    worked_s = c.interval_s * (begun + 1) + min(max(since_s - c.stall_s, 0.0), c.interval_s)
    return worked_s, c.interval_s * (begun + (since_s >= c.stall_s + c.write_s))


def wall_of(c: Conditions, work_s: float) -> float:
    """Return how long some work takes without failures, its last checkpoint not counted."""
    begun = max(0, math.ceil(work_s / c.interval_s) - 1)
    waits_s = max(0.0, c.write_s - c.interval_s)
    return work_s + begun * c.stall_s + max(0, begun - 1) * waits_s


def young_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the work between checkpoints that loses least, to first order (Young, Communications of the ACM
    17(9), 1974).

    Args:
        cost_s: how long a checkpoint holds up the run.
        mtbf_s: mean time between failures of the whole run.
    """
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the same to higher order (Daly, Future Generation Computer Systems 22(3), 2006, equation 37)."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(cost_s / (2 * mtbf_s))
    return young_interval_s(cost_s, mtbf_s) * (1 + x / 3 + x * x / 9) - cost_s


def runs(c: Conditions, work_s: float) -> list[Outcome]:
    """Simulate the same run many times."""
    return [simulate(c, work_s, seed) for seed in range(NUM_RUNS)]


def against_closed_form() -> None:
    """Print both for conditions from easy to hopeless."""
    print("== the simulation against the closed form, 200 mean times between failures, 40 runs each")
    print(f"{'mtbf':>8} {'restart':>8} {'interval':>8} {'stall':>6} {'write':>6}   "
          f"{'closed':>8} {'simulated':>9} {'std error':>9} {'errors':>6}")
    worst = 0.0
    for mtbf_s, restart_s, interval_s, (stall_s, write_s) in itertools.product(
            (1_000, 18_000, 200_000), (60, 600), (120, 1800), ((0.1, 30), (10, 300))):
        c = Conditions(1 / mtbf_s, (FailureKind("any", 1, restart_s),), interval_s, stall_s, write_s)
        found = [outcome.goodput for outcome in runs(c, 200 * mtbf_s)]
        error = statistics.stdev(found) / math.sqrt(len(found))
        off = (statistics.mean(found) - goodput(c)) / error
        worst = max(worst, abs(off))
        print(f"{mtbf_s:8,} {restart_s:8} {interval_s:8} {stall_s:6} {write_s:6}   {goodput(c):8.4f} "
              f"{statistics.mean(found):9.4f} {error:9.5f} {off:+6.1f}")
    print(f"farthest apart: {worst:.1f} standard errors\n")


def intervals() -> None:
    """Print Young's, Daly's and the best interval of the closed form."""
    print("== the interval between checkpoints, in seconds of work")
    print(f"{'mtbf':>8} {'stall':>6} {'write':>6}   {'Young':>7} {'Daly':>7} {'best':>7}   effective then")
    for mtbf_s, (stall_s, write_s) in itertools.product((3_600, 18_000, 86_400),
                                                        ((0.1, 60), (2, 60), (60, 0))):
        c = Conditions(1 / mtbf_s, (FailureKind("any", 1, 600),), 1.0, stall_s, write_s)
        found = (young_interval_s(stall_s, mtbf_s), daly_interval_s(stall_s, mtbf_s), best_interval_s(c))
        shares = "  ".join(f"{goodput(replace(c, interval_s=s)):.4f}" for s in found)
        print(f"{mtbf_s:8,} {stall_s:6} {write_s:6}   {' '.join(f'{s:7.0f}' for s in found)}   {shares}")
    print()


def soak_of_faults() -> tuple[float, float]:
    """Return mean and standard deviation of the steps that the run of benchmarks/soak.py does again, and
    print them.

    benchmarks/results/soak.txt: 1000 steps, a checkpoint every 10, 88 restarts, 1320 steps done.  The unit is
    a step.  26 of the 88 came while the run started or loaded; rate and length of a restart are set so that
    as many come, and as many of them then.  Steps done again are what the simulation predicts.
    """
    steps, interval, restarts, during_start, done = 1000, 10, 88, 26, 1320
    damaged, refused = 4, 29
    low, high = 1e-3, 1.0
    for _ in range(40):  # the rate at which 88 come on average
        rate = math.sqrt(low * high)
        restart = -math.log(1 - during_start / restarts) / rate
        c = Conditions(rate, (FailureKind("any", 1, restart),), interval, 0.0, 0.5)
        mean = statistics.mean(o.num_failures for o in runs(c, steps))
        low, high = (low, rate) if mean > restarts else (rate, high)
    # a step that is cut off is in no event: half of one for each failure in training
    again = [o.redone_s - 0.5 * (restarts - during_start) + damaged * interval for o in runs(c, steps)]
    print("== a run of 1000 steps under 99 faults (benchmarks/results/soak.txt)")
    print(f"restarts: measured {restarts}, simulated {mean:.0f} (set), {during_start} of them during a start")
    print(f"steps done again: simulated {statistics.mean(again):.0f} +- {statistics.stdev(again):.0f}, "
          f"{damaged} x {interval} of them for checkpoints damaged on purpose\nmeasured: {done - steps}, or "
          f"{done - steps + refused} where the {refused} refused steps are not among the {steps}; three "
          "rollbacks of the guard are in it\n")
    return statistics.mean(again), statistics.stdev(again)


def moments_of_the_slurm_soak(seed: int) -> Iterator[float]:
    """Yield the time, in steps, to the next event as benchmarks/slurm_events.py draws them: 1 to 12 steps
    after training began, or (3 of 10) during the start, when nothing has been done yet."""
    drawn = Random(seed)
    for _ in range(30):
        yield drawn.uniform(0, 1) if drawn.random() < 0.3 else drawn.randint(1, 12) + drawn.random()
        yield math.inf  # the restart itself goes well
    while True:
        yield math.inf


def soak_on_slurm() -> list[tuple[float, float]]:
    """Return mean and standard deviation of the steps that the soak on Slurm does again, for checkpoints that
    are there 0, 1, 2 and 5 steps after they were begun, and print them.

    benchmarks/results/slurm_events.txt: 200 steps, a checkpoint every 5, 30 events, 976 s, 46 steps again.
    The unit is a step.  11 of the 30 events (time limit, scancel) let the run save before it leaves, and
    lose nothing.  How long a step and a start took follows from what was measured.
    """
    steps, interval, events, saved, wall_s, share, again = 200, 5, 30, 11, 976, 0.025, 46
    step_s = share * wall_s / steps
    restart_s = (wall_s - (steps + again) * step_s) / (events + 1)
    print("== 30 events on Slurm (benchmarks/results/slurm_events.txt)")
    told = []
    for write in (0.0, 1.0, 2.0, 5.0):
        c = Conditions(1.0, (FailureKind("any", 1, restart_s / step_s),), interval, 0.0, write)
        found = [simulate(c, steps, delays=moments_of_the_slurm_soak(seed)) for seed in range(200)]
        redone = [(o.redone_s - 0.5 * o.num_failures) * (events - saved) / events for o in found]
        shares = [steps / (o.wall_s + restart_s / step_s) for o in found]
        told.append((statistics.mean(redone), statistics.stdev(redone)))
        print(f"a checkpoint is there {write:g} steps after it was begun: {told[-1][0]:.0f} +- "
              f"{told[-1][1]:.0f} steps done again, effective {statistics.mean(shares):.1%}")
    print(f"measured: {again} steps done again, effective {share:.1%}\nThat a checkpoint is written is told "
          "at the end of a step, that it is complete at the end of a later one: 1 to 2 steps.\nA step of "
          f"{step_s:.2f} s and a start of {restart_s:.0f} s are taken from the same run, so that of the two "
          "figures the first is predicted.\n")
    return told


def published() -> None:
    """Print what the closed form has for runs whose effective training time was published."""
    print("== published runs, at their failure rates")
    llama = Conditions(419 / (54 * 86400), (FailureKind("any", 1, 600),), 1.0, 1.0, 60.0)
    for restart_s in (300, 600, 900):
        c = replace(llama, kinds=(FailureKind("any", 1, restart_s),))
        c = replace(c, interval_s=best_interval_s(c))
        print(f"Llama 3 405B, 16,384 H100, 419 in 54 days (arXiv 2407.21783): restart {restart_s:4} s -> "
              f"{goodput(c):.1%}; published: above 90 %")
    byte = 9600 * 0.173 / SECONDS_OF_A_YEAR
    for restart_s in (120, 300, 600):
        c = Conditions(byte, (FailureKind("any", 1, restart_s),), 1.0, 0.1, 60.0)
        c = replace(c, interval_s=best_interval_s(c))
        print(f"ByteRobust, 9,600 GPUs at Llama 3's rate (arXiv 2509.16293): restart {restart_s:4} s -> "
              f"{goodput(c):.1%}; published: 97 % over three months")
    print()


def ten_thousand() -> None:
    """Print whether 10,000 GPUs reach the goal, by failure rate, restart and storage."""
    config = apply_settings(recipes.get(RECIPE), list(LAYOUT))
    h100 = cluster.load("h100", needs_account=False)
    pod = replace(h100, storage_write_gbytes_per_s=POD_GBYTES_PER_S * NUM_GPUS)
    size_gb = checkpoint_bytes(config).total / 1e9
    print(f"== {RECIPE} on {NUM_GPUS:,} H100 ({', '.join(LAYOUT)}): checkpoints of {size_gb:,.0f} GB, at the "
          "best interval")
    for profile in (h100, pod):
        told = operation(config, profile, NUM_GPUS, STEP_S, 10**6)
        print(f"storage of {profile.storage_write_gbytes_per_s:.0f} GB/s: held up {told.stall_s:.2f} s, "
              f"written in {told.write_s:.0f} s, every {told.interval_s:.0f} s; a failure every "
              f"{told.mtbf_s / SECONDS_OF_AN_HOUR:.1f} h (0.17 a GPU-year)")
    print(f"\neffective training time in closed form (goal {GOAL:.0%}: *)")
    print(f"{'failures/GPU-year':>18} {'storage':>9}" + "".join(f"{f'{r} s':>10}" for r in RESTARTS_S)
          + "   (restart)")
    for rate, profile in itertools.product((0.05, 0.11, 0.17, 0.30, 0.50), (h100, pod)):
        cells = ""
        for restart_s in RESTARTS_S:
            p = replace(profile, failures_per_gpu_year=rate, restart_s=float(restart_s))
            value = operation(config, p, NUM_GPUS, STEP_S, 10**6).effective_share
            cells += f"{f'{value:.2%}' + ('*' if value >= GOAL else ' '):>10}"
        print(f"{rate:18} {profile.storage_write_gbytes_per_s:7.0f}/s{cells}")
    for rate, restart_s in ((0.17, 300.0), (0.17, 600.0)):
        p = replace(pod, failures_per_gpu_year=rate, restart_s=restart_s)
        of_run = operation(config, p, NUM_GPUS, STEP_S, 10**6)
        c = conditions(p, NUM_GPUS, of_run.interval_s, of_run.stall_s, of_run.write_s)
        began_s = time.perf_counter()
        found = runs(c, DAYS * 86400)
        took_s = (time.perf_counter() - began_s) / NUM_RUNS
        shares = [o.goodput for o in found]
        print(f"simulated, {DAYS} days, restart {restart_s:.0f} s: {statistics.mean(shares):.2%} "
              f"({min(shares):.2%} to {max(shares):.2%} in {NUM_RUNS} runs), "
              f"{statistics.mean(o.num_failures for o in found):.0f} failures, {took_s * 1e3:.1f} ms a run")
    low_s, high_s = 0.0, 3600.0
    for _ in range(40):  # the longest restart at which the goal is reached
        middle_s = (low_s + high_s) / 2
        p = replace(pod, restart_s=middle_s)
        reached = operation(config, p, NUM_GPUS, STEP_S, 10**6).effective_share >= GOAL
        low_s, high_s = (middle_s, high_s) if reached else (low_s, middle_s)
    print(f"\nAt 0.17 a GPU-year, Llama 3's rate, {GOAL:.0%} of {NUM_GPUS:,} GPUs' time is reached where a "
          f"restart takes {low_s:.0f} s at most\n(storage of {pod.storage_write_gbytes_per_s:.0f} GB/s), and "
          f"not with the {h100.restart_s:.0f} s that a profile takes for granted.\n")


def spares() -> None:
    """Print what nodes that are away for repair cost where few stand by."""
    h100 = cluster.load("h100", needs_account=False)
    print("== nodes that stand by for broken ones: 1,280 nodes, half of all failures break one for two days")
    kinds = (FailureKind("process", 0.5, 300), Breakage("node", 0.5, 300))
    base = conditions(h100, NUM_GPUS, 60, 0.1, 20)
    c = RepairConditions(**vars(base) | {"kinds": kinds, "repair_s": 2 * 86400})
    away = c.failures_per_s * 0.5 * c.repair_s
    print(f"away on average: {away:.1f}")
    for num in (0, 2, 4, 8, 12, 16):
        found = runs(replace(c, spare_nodes=num), 30 * 86400)
        print(f"{num:3} spare: effective {statistics.mean(o.goodput for o in found):.2%}, waited "
              f"{statistics.mean(o.waiting_s / o.wall_s for o in found):.2%} of the time")
    print(f"enough of them: {goodput(c):.2%}")


def main() -> int:
    """Print everything."""
    against_closed_form()
    intervals()
    soak_of_faults()
    soak_on_slurm()
    published()
    ten_thousand()
    spares()
    print(f"\n{platform.machine()}, Python {platform.python_version()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
