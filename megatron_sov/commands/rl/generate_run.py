"""Runs `megatron-sov rl generate`.

The prompts of a round are split into pieces. A job claims a piece, generates its responses, and adds them to
the rollout store as a part; another attempt at the piece adds another part. A training run may request more
pieces for a round that has too few groups to learn from (`policy.max_gen_batches`).
"""

from functools import partial
from typing import Any

from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import ExitCode, UserError, warn
from megatron_sov.commands.rl.checks import (
    RolloutsRequest, check_sequence_length, check_tokenizer, count_max_tokens, drop_unused_prompts)
from megatron_sov.commands.rl.options import RlGenerateOptions
from megatron_sov.commands.rl.rollout_source import build_rollout_source
from megatron_sov.engine.parallel.world import run_on_first
from megatron_sov.infer.engine import ENGINE_SET, Engine, check_engine, choose_engine
from megatron_sov.infer.engines.server_engine import ServerEngine
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.request import MEGATRON, VLLM, Batching
from megatron_sov.model.config import RunConfig
from megatron_sov.post.rl.generate.pieces import FurtherPieces, PendingPieces, PieceQueue
from megatron_sov.post.rl.generate.requests import build_requests, write_by_requests
from megatron_sov.post.rl.generate.responses import compute_sampling_digest
from megatron_sov.post.rl.generate.writers import (
    EngineSettings, LoadPolicy, RolloutSource, run_policies, write_batches)
from megatron_sov.post.rl.publish.publisher import is_published, read_further_pieces
from megatron_sov.rollouts.prompts import PromptList, write_unused_rows
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.rollouts.store import RolloutStore, StoreSettings
from megatron_sov.runs.folder import ROUNDS
from megatron_sov.runs.rounds import build_start_policy, find_round_policy
from megatron_sov.work.progress.locks import Claims


def generate_rollouts(request: RolloutsRequest) -> int:
    """Write the missing responses in `request.rounds`, and print how many."""
    options, config = request.options, request.config
    start = find_target(options.start_from)
    if not (start.path / MANIFEST).is_file():
        raise UserError(f"--from {options.start_from}: has no {MANIFEST}, whose hash identifies its "
                        "responses; convert the folder with `megatron-sov convert from-hf`")
    # The store records the tokenizer's digest, because responses are token ids.
    check_tokenizer(options.start_from, start.tokenizer_folder)
    engine = _build_engine_settings(request, start)
    source, unused_rows = build_rollout_source(
        options, config, request.prompts, start, engine_name=engine.name, environment=request.environment)
    # unused: longer than `rollout.max_prompt_tokens`
    prompts = drop_unused_prompts(f"--prompts {options.prompts}", request.prompts, unused_rows, options.store)
    select_round_prompts(prompts, config.rollout, request.rounds[0])  # refuses a file with too few prompts
    settings = StoreSettings(options.store, start.tokenizer_folder, start.vocab_size)
    initial_policy = build_start_policy(start.path)

    def write_rounds(engine: Engine, load_policy: LoadPolicy) -> dict[str, Any]:
        # `settings.open` creates the store: on rank 0 first, before the other ranks open it.
        run_on_first(lambda: write_unused_rows(settings.open().path, unused_rows))
        queue = _build_queue(request, settings.open(), prompts, source, start)
        if isinstance(engine, ServerEngine):
            max_running = engine.room  # responses that the servers generate at a time
            return write_by_requests(build_requests(engine, source, max_running), queue, max_running,
                                     load_policy)
        return write_batches(engine, source, queue, loaded=initial_policy, load_policy=load_policy)

    summary = run_policies(engine, start, write_rounds)
    if summary is None:  # not rank 0
        return ExitCode.OK
    return _report_summary(options, request.rounds, summary)


def _build_engine_settings(request: RolloutsRequest, start: Target) -> EngineSettings:
    options, rollout, environment = request.options, request.config.rollout, request.environment
    name = options.engine or choose_engine(start)
    check_engine(name, start, options.engine_set, options.nproc, ENGINE_SET)
    check_sequence_length(rollout, environment, start)
    # episodes in an environment stop between two turns, with every engine
    can_stop = name in (MEGATRON, VLLM) or environment is not None
    if rollout.deadline_s and not can_stop:
        raise UserError(f"rollout.deadline_s = {rollout.deadline_s:g}: --engine {name} cannot stop within a "
                        f"response; use --engine {MEGATRON}, or set it to 0")
    locations = options.places(options.run) if name == VLLM else None
    max_tokens = count_max_tokens(rollout, environment)
    return EngineSettings(
        name=name, longest=max_tokens, batching=Batching(options.batch_size),
        settings=options.engine_set, nproc=options.nproc, option=ENGINE_SET,
        with_routes=request.config.policy.router_replay, places=locations)


def _build_queue(request: RolloutsRequest, store: RolloutStore, prompts: PromptList, source: RolloutSource,
                 start: Target) -> PieceQueue:
    options, config = request.options, request.config
    rollout = config.rollout
    # Row keys contain the digest: rows from different sampling settings do not count as written.
    pending = PendingPieces(
        store=store, claims=Claims(store.claims, rollout.lease_s), prompts=prompts, rollout=rollout,
        rounds=request.rounds, find_policy=partial(find_round_policy, options.run, start.path,
                                                   rollout=rollout),
        further=_find_further_pieces(options, config),
        sampling_digest=lambda number: compute_sampling_digest(rollout, number, source.chosen_by))
    provenance = {"engine": options.engine or choose_engine(start), "settings": list(options.engine_set),
                  "environment": options.environment}
    return PieceQueue(pending=pending, store=store, wait_s=options.wait, provenance=provenance)


def _find_further_pieces(options: RlGenerateOptions, config: RunConfig) -> FurtherPieces | None:
    """Return a function that reads the further pieces of a round; None without `policy.max_gen_batches`."""
    if config.policy.parts.max_gen_batches <= 1:
        return None
    rounds = options.run / ROUNDS

    def read_request(number: int) -> tuple[int, bool]:
        """Return how many further pieces round `number` requests, and whether the count is final."""
        # a published round is complete and requests no more pieces
        return read_further_pieces(rounds, number), is_published(rounds, number)

    return read_request


def _report_summary(options: RlGenerateOptions, rounds: range, summary: dict[str, Any]) -> int:
    unfinished = f", {summary['unfinished']:,} of them unfinished" if summary["unfinished"] else ""
    print(f"{options.store}: {summary['parts']:,} parts with {summary['responses']:,} responses of "
          f"{summary['tokens']:,} tokens were written by this job{unfinished}")
    if summary["waits_for"]:
        warn(f"{summary['waits_for']}; repeat the command, or raise --wait")
        return ExitCode.STOPPED
    print(f"rounds {rounds[0]} to {rounds[-1]} are written")
    return ExitCode.OK
