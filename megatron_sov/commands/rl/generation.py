"""Builds the `GenerationSettings` of `rl run` and `rl generate`."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.chat.folder import read_chat_encoder, read_chat_fields
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.commands.rl.checks import EnvironmentRequest
from megatron_sov.commands.rl.options import RlGenerateOptions, RlRunOptions
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.judge.tools.playing import EpisodeSettings
from megatron_sov.model.config import RunConfig
from megatron_sov.post.rl.generate.episodes import Episodes
from megatron_sov.post.rl.generate.responses import ResponseSource
from megatron_sov.post.rl.generate.writers import GenerationSettings, RolloutSource
from megatron_sov.rollouts.prompts import (
    UNUSED_ROWS_FILE, PromptList, UnusedRows, find_unused_rows, sampling_digest)
from megatron_sov.rollouts.store import StoreSettings
from megatron_sov.runs.launch_environment import is_first_rank


@dataclass(frozen=True, kw_only=True)
class GenerationBuilder:
    """Builds `GenerationSettings` with the same start, environment and engine."""

    options: RlRunOptions | RlGenerateOptions
    config: RunConfig
    start: Target
    """Model of the first round, with tokenizer and chat template."""
    engine_name: str
    environment: EnvironmentRequest | None
    """Tool environment; None: single responses."""
    provenance: Mapping[str, Any]
    wait_s: float | None = None

    def build(self, prompts: PromptList, listed_in: str, store: Path) -> GenerationSettings:
        """Return the settings without the prompts that no round uses, and print their counts.

        Args:
            prompts: all prompts of the file.
            listed_in: option and file of the prompts.
            store: rollout store.
        """
        source, unused = self._build_source(prompts)
        if is_first_rank():
            listed = f"; {store / UNUSED_ROWS_FILE} lists them" if unused.rows else ""
            print(f"{listed_in}: {unused.account.describe()}{listed}", file=sys.stderr)
        return GenerationSettings(
            store=StoreSettings(store, self.start.tokenizer_folder, self.start.vocab_size),
            prompts=prompts.exclude(unused.too_long), set_aside=unused, rollout=self.config.rollout,
            run=self.options.run, source=source, provenance=self.provenance, wait_s=self.wait_s,
            max_gen_batches=self.config.policy.parts.max_gen_batches)

    def _build_source(self, prompts: PromptList) -> tuple[RolloutSource, UnusedRows]:
        """Return the source of single responses or episodes, and the rows outside every round."""
        options, config, environment = self.options, self.config, self.environment
        folder, rollout = self.start.tokenizer_folder, config.rollout
        chat = read_chat_encoder(folder)
        if not options.plain and chat is None:
            raise UserError(f"{folder}: has no chat template, which prompts need; fine-tune on chats first, "
                            "or continue the prompts as plain text with --plain")
        encoder = PromptEncoder(self.start, not options.plain)
        chat_digests = {"tokenizer": tokenizer_digest(folder),
                        "form": sampling_digest(read_chat_fields(folder))}
        chosen_by: dict[str, Any] = {"plain": options.plain, "chat": chat_digests}
        if environment is None:
            responses = ResponseSource(encoder, rollout, self.engine_name, options.plain, chosen_by,
                                       with_routes=config.policy.router_replay)
            too_long = responses.measure_long_prompts(prompts)
            return responses, find_unused_rows(prompts, too_long, rollout.max_prompt_tokens)
        assert chat is not None, "options refuse --plain"
        limits = environment.limits
        table = EpisodeSettings(environment.order, TurnEncoder(chat, str(folder)), limits, options.batch_size)
        chosen_by |= {"environment": environment.version, "limits": asdict(limits)}
        episodes = Episodes(
            table=table, version=environment.version, decode=encoder.decode, end_ids=encoder.end_ids,
            rollout=rollout, engine_name=self.engine_name, chosen_by=chosen_by,
            with_routes=config.policy.router_replay)
        return episodes, find_unused_rows(prompts, {}, rollout.max_prompt_tokens)
