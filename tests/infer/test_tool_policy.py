"""An engine on several processes generates turns while only the first process plays episodes."""

from collections.abc import Sequence
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel import world
from megatron_sov.infer.request import GenerationResult, Sampling, StopRule, Tokens
from megatron_sov.infer.tool_policy import EnginePolicy, run_with_policy
from megatron_sov.model.config import ParallelConfig


class Echo:
    """Engine that repeats the last token of each prompt, and records its prompts."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None) -> GenerationResult:
        assert stop is not None
        self.asked.append([[list(p) for p in prompts], sampling.max_new_tokens, sampling.seed, stop.ids,
                           streams])
        written = [([p[-1]] * sampling.max_new_tokens, [-1.0] * sampling.max_new_tokens) for p in prompts]
        return GenerationResult.of(written, sampling, stop, 0)


def play() -> dict[str, Any]:
    """Play two rounds; runs on each rank."""
    world.join_world(ParallelConfig())
    engine = Echo()

    def work(policy: Any) -> list[Any]:
        return [[w.ids for w in policy.sample(*asked)]
                for asked in (([[1, 2], [3]], 2, [7, 8]), ([[4]], 1, [9]))]

    result = run_with_policy(EnginePolicy(engine, Sampling(seed=5), StopRule((9,))), work)
    world.leave_world()
    return {"result": result, "asked": engine.asked}


def fail() -> list[str]:
    """Fail on the first process, between turns, and in the engine of all processes; runs on each rank."""
    class Refusing(Echo):
        def generate(self, *asked: Any, **more: Any) -> GenerationResult:
            raise UserError("the engine refuses")

    def bad_task(policy: Any) -> Any:
        policy.sample([[1]], 1, [1])
        raise UserError("the task is too long")

    world.join_world(ParallelConfig())
    told = []
    for engine, work in ((Echo(), bad_task), (Refusing(), bad_task)):
        try:
            run_with_policy(EnginePolicy(engine, Sampling(seed=5), StopRule((9,))), work)
        except UserError as e:
            told.append(str(e))
    policy = EnginePolicy(Echo(), Sampling(seed=5), StopRule((9,)))
    told.append(run_with_policy(policy, lambda policy: "goes on"))
    world.leave_world()
    return told


def test_tools_run_once_while_all_processes_sample(ranks: Any, job: Any) -> None:
    (first, second), failed = ranks(job(__file__, "play", nproc=2), job(__file__, "fail", nproc=2))
    assert first["result"] == [[[2, 2], [3, 3]], [[4]]] and second["result"] is None
    assert first["asked"] == second["asked"] == [[[[1, 2], [3]], 2, 5, [9], [7, 8]], [[[4]], 1, 5, [9], [9]]]
    said = ["the task is too long", "the engine refuses"]  # on all processes, so that none continues alone
    assert failed == [[*said, "goes on"], [*said, None]]
