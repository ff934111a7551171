"""What a start costs in groups of processes: calls of `new_group` in which a process takes part, and the
seconds of `world.join`, in a world in which nothing is sent (torch's fake process group).

    python benchmarks/group_calls.py [--output FILE]

"bound": the default group bound to its device (`device_id`), where NCCL splits each group off all processes,
and all of them take part in each call; "library": each group made by itself, a process takes part in those
that it is in; "shared": one for groups of the same members that serve the same, as `join` makes them.
Connecting is not in the seconds: a group of NCCL connects its members when they first send something.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path
from unittest import mock

from megatron_sov.engine.parallel import cpu_shims, world
from megatron_sov.model import recipes
from megatron_sov.model.config import ParallelConfig, apply_settings
from megatron_sov.plan.footprint.memory import communicators, nccl_bytes

LAYOUTS = ((480, "solar-open-102b", {"pp": 2, "ep": 8}), (512, "k-exaone-236b", {"pp": 4, "ep": 16}),
           (1024, "k-exaone-236b", {"pp": 8, "ep": 64}))
"""Processes, recipe, layout."""


def calls_of_a_start(parallel: ParallelConfig, num_ranks: int, shared: bool) -> tuple[int, int, float]:
    """Return the calls of the first process, those for groups that it is in, and processor seconds."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    begun = time.process_time()
    with (mock.patch.dict(os.environ, RANK="0", WORLD_SIZE=str(num_ranks)),
          mock.patch.object(dist, "new_group", wraps=dist.new_group) as made):
        if shared:
            world.join(parallel)
        else:
            parallel_state.initialize_model_parallel(
                parallel.tp, parallel.pp, expert_model_parallel_size=parallel.ep,
                expert_tensor_parallel_size=parallel.etp, create_gloo_process_groups=False)
    seconds = time.process_time() - begun
    world.leave()
    return made.call_count, sum(0 in call.kwargs["ranks"] for call in made.call_args_list), seconds


def main() -> None:
    """Print a row for each layout."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/group_calls.txt"))
    output = parser.parse_args().output
    cpu_shims.prepare_without_gpu()
    lines = [f"groups of a start: {platform.machine()}, torch's fake process group, the first process; "
             "processor seconds", "",
             "processes  layout        bound  library  shared   s library  s join   communicators  GiB"]
    for num_ranks, recipe, layout in LAYOUTS:
        config = apply_settings(recipes.get(recipe), [f"parallel.{k}={v}" for k, v in layout.items()])
        calls, own, before_s = calls_of_a_start(config.parallel, num_ranks, shared=False)
        _, shared, after_s = calls_of_a_start(config.parallel, num_ranks, shared=True)
        text = " ".join(f"{name}{size}" for name, size in layout.items())
        lines.append(f"{num_ranks:>9}  {text:<12} {calls:>6} {own:>8} {shared:>7} {before_s:>11.2f} "
                     f"{after_s:>7.2f} {communicators(config, num_ranks):>15}  "
                     f"{nccl_bytes(config, num_ranks) / 2**30:.2f}")
    output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
