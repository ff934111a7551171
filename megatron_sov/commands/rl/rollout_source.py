"""Builds the `RolloutSource`: single responses, or episodes in a tool environment."""

from dataclasses import asdict
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.chat.folder import read_chat_encoder, read_chat_fields
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.commands.rl.checks import EnvironmentRequest
from megatron_sov.commands.rl.options import SamplingOptions
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.judge.tools.playing import EpisodeSettings
from megatron_sov.model.config import RunConfig
from megatron_sov.post.rl.generate.episodes import Episodes
from megatron_sov.post.rl.generate.responses import ResponseSource
from megatron_sov.post.rl.generate.writers import RolloutSource
from megatron_sov.rollouts.prompts import PromptList, UnusedRows, find_unused_rows, sampling_digest


def build_rollout_source(options: SamplingOptions, config: RunConfig, prompts: PromptList, start: Target, *,
                         engine_name: str, environment: EnvironmentRequest | None
                         ) -> tuple[RolloutSource, UnusedRows]:
    """Return the `RolloutSource`, and the --prompts rows outside every round.

    Args:
        options: sampling options of the command.
        config: settings of the run.
        prompts: all prompts of the file.
        start: model of the first round, with tokenizer and chat template.
        engine_name: engine that generates the responses.
        environment: tool environment; None: single responses.
    """
    folder, rollout = start.tokenizer_folder, config.rollout
    chat = read_chat_encoder(folder)
    if not options.plain and chat is None:
        raise UserError(f"{folder}: has no chat template, which prompts need; fine-tune on chats first, or "
                        "continue the prompts as plain text with --plain")
    encoder = PromptEncoder(start, not options.plain)
    chat_digests = {"tokenizer": tokenizer_digest(folder), "form": sampling_digest(read_chat_fields(folder))}
    chosen_by: dict[str, Any] = {"plain": options.plain, "chat": chat_digests}
    if environment is None:
        responses = ResponseSource(encoder, rollout, engine_name, options.plain, chosen_by,
                                   with_routes=config.policy.router_replay)
        too_long = responses.measure_long_prompts(prompts)
        return responses, find_unused_rows(prompts, too_long, rollout.max_prompt_tokens)
    assert chat is not None, "options refuse --plain"
    limits = environment.limits
    table = EpisodeSettings(environment.order, TurnEncoder(chat, str(folder)), limits, options.batch_size)
    chosen_by |= {"environment": environment.version, "limits": asdict(limits)}
    episodes = Episodes(
        table=table, version=environment.version, decode=encoder.decode, end_ids=encoder.end_ids,
        rollout=rollout, engine_name=engine_name, chosen_by=chosen_by,
        with_routes=config.policy.router_replay)
    return episodes, find_unused_rows(prompts, {}, rollout.max_prompt_tokens)
