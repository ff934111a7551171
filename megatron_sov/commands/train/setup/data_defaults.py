"""Completes stage settings from data and model. Imports numpy, but not torch."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.families.count import count_params
from megatron_sov.model.objectives import FORMATS
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.model.recipes.stage_defaults import COMMANDS, Stage, find_rate_settings, find_stage_defaults
from megatron_sov.plan.footprint.memory import build_account
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.data.ledger import count_unit_tokens
from megatron_sov.train.data.sources import Source, open_sources
from megatron_sov.train.data.streams import Cursor, DocumentStream, Packing

MIN_SEQ_LEN, MAX_SEQ_LEN, TEXT_SEQ_LEN = 256, 8192, 2048
"""Limits for the default sample length in tokens, and the default length for text."""
MIN_EPOCH_STEPS = 16
"""Minimum steps per epoch; default batch sizes shrink to reach it."""
MAX_WINDOWS = 8
"""Document windows packed to count samples; larger sources are extrapolated."""
MIN_ACTIVATION_BYTES = 2 << 30
"""Allowed activation memory for a micro-batch of responses, unless weights, gradients and optimizer on one
process take more."""
PROMPTS_PER_ROUND = 64
"""Maximum of the default `rollout.prompts_per_round`."""
CHECKPOINT_ROUNDS = 10
"""Rounds between checkpoints, at most."""


@dataclass(frozen=True)
class CompletedSettings:
    """Stage settings, with settings derived from the data."""

    config: RunConfig
    notes: tuple[str, ...] = ()
    """Chosen values with reasons."""


def complete_stage(request: RecipeRequest, config: RunConfig, stage: Stage | None, nproc: int | None,
                   num_prompts: int = 0) -> CompletedSettings:
    """Return the settings completed from data, model and the defaults of a post-training stage; None:
    complete `train.epochs` alone."""
    requested = list_requested_settings(request)
    # an unused default must not enter the run's settings, which a resumed command reads
    if "train.epochs" not in requested and requested & {"train.steps", "train.tokens", "rollout.rounds"}:
        config = _with_train(config, epochs=0.0)
    if stage == "policy":
        return _complete_rounds(request, config, nproc, num_prompts, requested)
    if not request.is_model_only or stage is None:
        return _with_steps(config, requested) if config.train.epochs else CompletedSettings(config)
    return _complete_model(config, stage, nproc, requested)


def list_requested_settings(request: RecipeRequest) -> frozenset[str]:
    """Return the keys in --set and --config files; phases count as `data.phases`."""
    keys = request.requested_keys
    return keys | {"data.phases" for key in keys if key.startswith("data.phases.")}


def _with_train(config: RunConfig, **changes: object) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))  # type: ignore[arg-type]


def _complete_model(config: RunConfig, stage: Stage, nproc: int | None, requested: Collection[str]
                    ) -> CompletedSettings:
    """Complete a stage without recipe, for the model in --from."""
    total, name = count_params(config.model).total, COMMANDS[stage]
    config = apply_settings(config, list(find_rate_settings(config, stage, total, requested)))
    sources = open_all_sources(config)
    reason = _format_reason(requested, "optim.lr", f"default of {name}")
    notes = [f"learning rate {config.optim.lr:g}{reason}"]
    if "data.phases" not in requested:
        seq_len, why = _choose_seq_len(config, sources)
        [phase] = config.data.phases
        config = dataclasses.replace(config, data=dataclasses.replace(
            config.data, phases=(dataclasses.replace(phase, seq_len=seq_len),)))
        notes.append(f"samples of {seq_len:,} tokens ({why})")
    samples = count_epoch_samples(config, sources)
    if "train.global_batch_size" not in requested:
        size = _choose_batch_size(config, nproc, find_stage_defaults(config, stage).batch_size, samples)
        config = _with_train(config, global_batch_size=size)
        notes.append(f"batches of {size:,} (from {samples:,} samples an epoch)")
    completed = _with_steps(config, requested, samples)
    config, schedule = completed.config, {}
    steps, defaults = config.num_steps(), find_stage_defaults(config, stage)
    if not {"optim.warmup_steps", "optim.warmup_tokens", "optim.schedule_by"} & set(requested):
        schedule["optim.warmup_steps"] = round(defaults.warmup_share * steps)
    if "train.eval_every_steps" not in requested:
        schedule["train.eval_every_steps"] = max(1, round(samples / config.train.global_batch_size))
    config = apply_settings(config, [f"{key}={value}" for key, value in schedule.items()])
    notes[1:1] = [*completed.notes, f"{config.optim.schedule} schedule"]
    return CompletedSettings(config, tuple(notes))


def _format_reason(requested: Collection[str], key: str, why: str) -> str:
    return "" if key in requested else f" ({why})"


def _with_steps(config: RunConfig, requested: Collection[str], samples: int | None = None
                ) -> CompletedSettings:
    """Set the steps for `train.epochs`, if it is not 0."""
    epochs = config.train.epochs
    if not epochs:
        return CompletedSettings(config)
    samples = count_epoch_samples(config, open_all_sources(config)) if samples is None else samples
    steps = max(1, math.ceil(samples * epochs / config.train.global_batch_size - 1e-9))
    words = f"{epochs:g} epoch{'' if epochs == 1 else 's'} = {steps:,} step{'' if steps == 1 else 's'}"
    return CompletedSettings(_with_train(config, steps=steps), (words,))


def open_all_sources(config: RunConfig) -> list[Source]:
    # all formats: commands refuse formats with specific messages
    return open_sources(config.data.paths, config.model.vocab_size, FORMATS, warns=False)


def _choose_seq_len(config: RunConfig, sources: Sequence[Source]) -> tuple[int, str]:
    """Return the sample length that holds the longest document, and the reason."""
    max_length = min(MAX_SEQ_LEN, config.model.max_position_tokens)
    max_length -= max_length % config.parallel.row_multiple
    chats = [s for s in sources if s.is_chat and s.num_tokens["train"]]
    if not chats:
        return min(TEXT_SEQ_LEN, max_length), "text"
    longest = max(int(count_unit_tokens(s.open_split("train").lengths, s.group).max()) for s in chats)
    unit = "pair" if any(s.group > 1 for s in chats) else "conversation"
    length = max(MIN_SEQ_LEN, 1 << (longest - 1).bit_length())  # the next power of two
    if length <= max_length:
        return length, f"the longest {unit} has {longest:,}"
    if max_length < MAX_SEQ_LEN:
        return max_length, f"the longest {unit} has {longest:,}, and the model holds {max_length:,}"
    return max_length, f"at most; the longest {unit} has {longest:,}"


def _choose_batch_size(config: RunConfig, nproc: int | None, max_size: int, samples: int) -> int:
    """Return a batch size: the samples of all processes, times a power of two up to `max_size`, so that an
    epoch of `samples` has at least `MIN_EPOCH_STEPS` steps. With 0 for both: the smallest size."""
    size = config.train.micro_batch_size * max(1, num_ranks(nproc) // config.parallel.ranks_per_replica)
    size *= config.parallel.pp if config.parallel.vpp > 1 else 1
    while 2 * size <= min(max_size, samples // MIN_EPOCH_STEPS):
        size *= 2
    return size


def count_epoch_samples(config: RunConfig, sources: Sequence[Source]) -> int:
    """Count the samples per epoch over all data, at the length of the first phase."""
    return sum(_count_samples(config, s) for s in sources if s.num_tokens["train"] and s.share > 0) or 1


def _count_samples(config: RunConfig, source: Source) -> int:
    packing: Packing = config.data.packing
    if source.is_chat:  # packing splits no conversation
        packing = "drop" if config.data.over_long == "drop" else "truncate"
    stream = DocumentStream(source.name, source.open_split("train"), config.train.seed, packing, Cursor(),
                            source.group)
    windows = max(1, min(MAX_WINDOWS, stream.num_windows))
    num_samples = stream.count_samples(config.data.phases[0].seq_len, windows)
    return math.ceil(num_samples * stream.num_windows / windows)


def _complete_rounds(request: RecipeRequest, config: RunConfig, nproc: int | None, num_prompts: int,
                     requested: Collection[str]) -> CompletedSettings:
    """Complete the rounds in reinforcement learning."""
    notes: list[str] = []
    if request.is_model_only:
        total = count_params(config.model).total
        config = apply_settings(config, list(find_rate_settings(config, "policy", total, requested)))
        reason = _format_reason(requested, "optim.lr", "default of rl")
        notes.append(f"learning rate {config.optim.lr:g}{reason}")
        config, lengths = _with_lengths(config, requested)
        notes += lengths
    config = _with_micro_batches(request, _with_row_length(request, config, requested), nproc, requested)
    if request.is_model_only:
        rows = config.train.micro_batch_size
        notes.append(f"rows of {config.data.phases[0].seq_len:,} tokens, up to {rows:,} in a micro-batch")
        if "rollout.prompts_per_round" not in requested and num_prompts:
            count = max(1, min(PROMPTS_PER_ROUND, num_prompts) // config.rollout.steps_per_round)
            config = apply_settings(
                config, [f"rollout.prompts_per_round={count * config.rollout.steps_per_round}"])
    if config.train.epochs and "rollout.rounds" not in requested and num_prompts:
        rounds = math.ceil(config.train.epochs * num_prompts / config.rollout.prompts_per_round)
        config = apply_settings(config, [f"rollout.rounds={rounds}"])
        notes.append(f"{config.train.epochs:g} passes over {num_prompts:,} prompts = {rounds:,} rounds of "
                     f"{config.rollout.prompts_per_round:,}")
    # RL runs have few, long steps. The interval must divide the permanent interval.
    every = CHECKPOINT_ROUNDS * config.rollout.steps_per_round
    if "train.checkpoint_every_steps" not in requested and config.train.keep_every_steps % every == 0:
        config = _with_train(config, checkpoint_every_steps=min(config.train.checkpoint_every_steps, every))
    return CompletedSettings(config, tuple(notes))


def _with_lengths(config: RunConfig, requested: Collection[str]) -> tuple[RunConfig, list[str]]:
    """Limit prompt and response lengths to the model's context; return settings and notes."""
    row_tokens = config.model.max_position_tokens
    if "data.phases" in requested:
        row_tokens = min(row_tokens, config.data.phases[0].seq_len)
    # half of a document for the prompt, half for the response
    max_tokens = row_tokens // config.documents_per_unit // 2
    changes = [f"rollout.{name}={min(getattr(config.rollout, name), max_tokens)}"
               for name in ("max_prompt_tokens", "max_new_tokens") if f"rollout.{name}" not in requested]
    config = apply_settings(config, changes)
    return config, [f"responses of up to {config.rollout.max_new_tokens:,} tokens"
                    + _format_reason(requested, "rollout.max_new_tokens", "rollout.max_new_tokens")]


def _with_row_length(request: RecipeRequest, config: RunConfig, requested: Collection[str]) -> RunConfig:
    """Make rows hold the longest prompt and response, or both in a pair, unless the length was set or the
    recipe's rows are long enough."""
    longest = config.documents_per_unit * (config.rollout.max_prompt_tokens + config.rollout.max_new_tokens)
    if "data.phases" in requested or (not request.is_model_only and config.data.phases[0].seq_len >= longest):
        return config
    # the next power of two; above `MAX_SEQ_LEN` the next multiple, which wastes less memory
    seq_len = max(MIN_SEQ_LEN, 1 << (longest - 1).bit_length())
    if seq_len > MAX_SEQ_LEN:
        seq_len = -(-longest // MIN_SEQ_LEN) * MIN_SEQ_LEN
    max_length = config.model.max_position_tokens
    max_length -= max_length % config.parallel.row_multiple
    return apply_settings(config, [f"data.phases.0.seq_len={min(seq_len, max_length)}"])


def _with_micro_batches(request: RecipeRequest, config: RunConfig, nproc: int | None,
                        requested: Collection[str]) -> RunConfig:
    """Make micro-batches hold all responses to a prompt, so that the prompt is computed once, within the
    limits on memory and batch size."""
    chooses_batch_size = request.is_model_only and "train.global_batch_size" not in requested
    chosen = config
    if chooses_batch_size:
        chosen = _with_train(config, global_batch_size=_choose_batch_size(config, nproc, 0, 0))
    is_set = "train.micro_batch_size" in requested or request.from_file or bool(request.base.code)
    has_fixed_batches = config.policy.on_policy_share < 1 or config.train.ramp_from_batch_size > 0
    if is_set or has_fixed_batches or not config.may_share_prompts:
        return chosen
    rollout, seq_len = config.rollout, config.data.phases[0].seq_len
    responses = config.documents_per_unit if config.documents_per_unit > 1 else rollout.samples_per_prompt
    rows = -(-responses * (rollout.max_prompt_tokens + rollout.max_new_tokens) // seq_len)
    for size in range(min(rows, MAX_SEQ_LEN // seq_len), config.train.micro_batch_size, -1):
        larger = _with_train(config, micro_batch_size=size)
        smallest_batch = _choose_batch_size(larger, nproc, 0, 0)
        if chooses_batch_size:
            larger = _with_train(larger, global_batch_size=smallest_batch)
        if larger.train.global_batch_size % smallest_batch == 0 and _fits_activations(larger, seq_len):
            return larger
    return chosen


def _fits_activations(config: RunConfig, seq_len: int) -> bool:
    """Return whether a micro-batch's activations stay within `MIN_ACTIVATION_BYTES`."""
    alone = dataclasses.replace(config, parallel=ParallelConfig(), train=dataclasses.replace(
        config.train, global_batch_size=config.train.micro_batch_size))
    memory = build_account(alone, 1, 0, seq_len)
    activation_bytes = memory.layer_inputs + max(memory.one_layer, memory.head)
    return activation_bytes <= max(MIN_ACTIVATION_BYTES, memory.states)
