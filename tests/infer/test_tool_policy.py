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
        self.calls: list[Any] = []

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None) -> GenerationResult:
        assert stop is not None
        self.calls.append([[list(p) for p in prompts], sampling.max_new_tokens, sampling.seed, stop.ids,
                           streams])
        completions = [([p[-1]] * sampling.max_new_tokens, [-1.0] * sampling.max_new_tokens) for p in prompts]
        return GenerationResult.of(completions, sampling, stop, 0)


def play_two_rounds() -> dict[str, Any]:
    """Inside ranks: sample two batches of turns; return the responses and the calls of the engine."""
    world.join_world(ParallelConfig())
    engine = Echo()

    def work(policy: Any) -> list[Any]:
        rounds = [policy.sample([[1, 2], [3]], 2, [7, 8]), policy.sample([[4]], 1, [9])]
        return [[response.ids for response in responses] for responses in rounds]

    result = run_with_policy(EnginePolicy(engine, Sampling(seed=5), StopRule((9,))), work)
    return {"result": result, "calls": engine.calls}


def fail_at_each_place() -> list[str]:
    """Inside ranks: raise an error on the main process between turns, then in the engine of all processes.

    Returns the error of each run, and the result of a run after them.
    """
    class FailingEngine(Echo):
        def generate(self, *args: Any, **options: Any) -> GenerationResult:
            raise UserError("the engine fails")

    def bad_task(policy: Any) -> Any:
        policy.sample([[1]], 1, [1])
        raise UserError("the task is too long")

    world.join_world(ParallelConfig())
    outcomes = []
    for engine, work in ((Echo(), bad_task), (FailingEngine(), bad_task)):
        try:
            run_with_policy(EnginePolicy(engine, Sampling(seed=5), StopRule((9,))), work)
        except UserError as e:
            outcomes.append(str(e))
    policy = EnginePolicy(Echo(), Sampling(seed=5), StopRule((9,)))
    outcomes.append(run_with_policy(policy, lambda policy: "goes on"))
    return outcomes


def test_tools_run_once_while_all_processes_sample(ranks: Any, job: Any) -> None:
    (main_rank, other_rank), outcomes = ranks(job(__file__, "play_two_rounds", nproc=2),
                                              job(__file__, "fail_at_each_place", nproc=2))
    assert main_rank["result"] == [[[2, 2], [3, 3]], [[4]]] and other_rank["result"] is None
    assert main_rank["calls"] == other_rank["calls"] == [[[[1, 2], [3]], 2, 5, [9], [7, 8]],
                                                         [[[4]], 1, 5, [9], [9]]]
    errors = ["the task is too long", "the engine fails"]  # on all processes, so that none waits for another
    assert outcomes == [[*errors, "goes on"], [*errors, None]]
