"""Runs `megatron-sov rl generate`.

The prompts of a round are split into pieces. A job claims a piece, generates its responses, and adds them to
the rollout store as a part; another attempt at the piece adds another part. A training run may request more
pieces for a round that has too few groups to learn from (`policy.max_gen_batches`).
"""

from functools import partial
from typing import Any

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import ExitCode, UserError, warn
from megatron_sov.checkpoint import load
from megatron_sov.commands.rl.checks import (
    RolloutsRequest, check_sequence_length, check_tokenizer, count_max_tokens)
from megatron_sov.commands.rl.generation import GenerationBuilder
from megatron_sov.commands.rl.options import RlGenerateOptions
from megatron_sov.engine.parallel.world import run_on_first
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engine import ENGINE_SET, Engine, check_engine, choose_engine, run_with_engine
from megatron_sov.infer.engines.server_engine import ServerEngine
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.request import MEGATRON, VLLM, Batching
from megatron_sov.post.rl.generate.requests import build_requests, write_by_requests
from megatron_sov.post.rl.generate.writers import write_batches
from megatron_sov.rollouts.prompts import write_unused_rows
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.runs.checkpoints import read_adapter_base
from megatron_sov.runs.rounds import Policy, build_start_policy, find_round_policy


def generate_rollouts(request: RolloutsRequest) -> int:
    """Write the missing responses in `request.rounds`, and print how many."""
    options, config, rollout = request.options, request.config, request.config.rollout
    start = find_target(options.start_from)
    if not (start.path / MANIFEST).is_file():
        raise UserError(f"--from {options.start_from}: has no {MANIFEST}, whose hash identifies its "
                        "responses; convert the folder with `megatron-sov convert from-hf`")
    # The store records the tokenizer's digest, because responses are token ids.
    check_tokenizer(options.start_from, start.tokenizer_folder)
    engine_name = options.engine or choose_engine(start)
    _check_engine(request, engine_name, start)
    generation = GenerationBuilder(
        options=options, config=config, start=start, engine_name=engine_name, environment=request.environment,
        wait_s=options.wait, provenance={"engine": engine_name, "settings": list(options.engine_set),
                                         "environment": options.environment})
    settings = generation.build(request.prompts, f"--prompts {options.prompts}", options.store)
    # refuses a file with too few prompts
    select_round_prompts(settings.prompts, rollout, request.rounds[0])
    find_policy = partial(find_round_policy, options.run, start.path, rollout=rollout)
    initial_policy = build_start_policy(start.path)

    def write_rounds(engine: Engine) -> dict[str, Any]:
        # `store.open` creates the store: on rank 0 first, before the other ranks open it.
        run_on_first(lambda: write_unused_rows(settings.store.open().path, settings.set_aside))
        queue, load_policy = settings.build_queue(request.rounds, find_policy), partial(_load_policy, engine)
        if isinstance(engine, ServerEngine):
            max_running = engine.room  # responses that the servers generate at a time
            return write_by_requests(build_requests(engine, settings.source, max_running), queue, max_running,
                                     load_policy)
        return write_batches(engine, settings.source, queue, loaded=initial_policy, load_policy=load_policy)

    summary = run_with_engine(
        engine_name, start, write_rounds, longest=count_max_tokens(rollout, request.environment),
        batching=Batching(options.batch_size), settings=options.engine_set, nproc=options.nproc,
        option=ENGINE_SET, with_routes=config.policy.router_replay,
        places=options.places(options.run) if engine_name == VLLM else None)
    if summary is None:  # not rank 0
        return ExitCode.OK
    return _report_summary(options, request.rounds, summary)


def _check_engine(request: RolloutsRequest, name: str, start: Target) -> None:
    options, rollout, environment = request.options, request.config.rollout, request.environment
    check_engine(name, start, options.engine_set, options.nproc, ENGINE_SET)
    check_sequence_length(rollout, environment, start)
    # episodes in an environment stop between two turns, with every engine
    can_stop = name in (MEGATRON, VLLM) or environment is not None
    if rollout.deadline_s and not can_stop:
        raise UserError(f"rollout.deadline_s = {rollout.deadline_s:g}: --engine {name} cannot stop within a "
                        f"response; use --engine {MEGATRON}, or set it to 0")


def _load_policy(engine: Engine, policy: Policy) -> None:
    """Load a checkpoint into an engine; processes of a Megatron model read local shards."""
    model = engine.forward_model.model if isinstance(engine, MegatronEngine) else None
    # Stream weights to a server engine, and the merged weights of an adapter to a model without adapter.
    if model is None or (read_adapter_base(policy.path) is not None and not model.lora.on):
        weights = convert.open_weights(policy.path)
        engine.update(((name, weights.read(name)) for link in weights.links for name in link.hf_names),
                      policy.step)
        return
    load.check_weights(policy.path)
    load.load_model(policy.path, model)
    engine.update(None, policy.step)


def _report_summary(options: RlGenerateOptions, rounds: range, summary: dict[str, Any]) -> int:
    unfinished = f", {summary['unfinished']:,} of them unfinished" if summary["unfinished"] else ""
    print(f"{options.store}: {summary['parts']:,} parts with {summary['responses']:,} responses of "
          f"{summary['tokens']:,} tokens were written by this job{unfinished}")
    if summary["waits_for"]:
        warn(f"{summary['waits_for']}; repeat the command, or raise --wait")
        return ExitCode.STOPPED
    print(f"rounds {rounds[0]} to {rounds[-1]} are written")
    return ExitCode.OK
