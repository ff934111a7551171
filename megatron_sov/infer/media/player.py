"""A model of a folder as what plays episodes with tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.chat.encode import TurnEncoder
from megatron_sov.base.chat.folder import chat_files, read_chat_encoder
from megatron_sov.base.digests import file_digest
from megatron_sov.base.errors import UserError
from megatron_sov.infer.asking import check_engine, check_length
from megatron_sov.infer.engine import Engine, EngineName, engine_for, run_engine
from megatron_sov.infer.engines.load import load_tokenizer
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.request import Batching, Sampling, StopRule
from megatron_sov.infer.turns import EnginePolicy, with_policy
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.playing import ToolPolicy


@dataclass(frozen=True)
class Runs:
    """How an engine runs the model."""

    engine: EngineName | None
    """None: the one that fits."""
    settings: Sequence[str]
    """`key=value` changes of layout and precision."""
    nproc: int | None
    """Local processes."""
    option: str = "--set"
    """That the settings are given by."""


class Player:
    """A model with its chat template, and an engine."""

    def __init__(self, path: Path, runs: Runs, limits: EpisodeLimits, way_out: str,
                 template: dict[str, Any] | None = None) -> None:
        """Check what can be checked before the model is loaded.

        Args:
            path: the model.
            runs: how.
            limits: of an episode.
            way_out: what a user does whose model ends before an episode may.
            template: variables of the chat template.

        Raises:
            UserError: the engine cannot run the model, it is too short, or has no chat template.
        """
        self.target: Target = find_target(path)
        self.engine = runs.engine or engine_for(self.target)
        self._runs = runs
        self._longest = limits.max_prompt_tokens + limits.max_response_tokens + limits.max_turn_tokens
        check_engine(self.engine, self.target, runs.settings, runs.nproc, runs.option)
        check_length(self.target, self._longest, "max_prompt_tokens, max_response_tokens and max_turn_tokens "
                     "of an episode", way_out)
        folder = self.target.tokenizer_folder
        chat = read_chat_encoder(folder)
        if chat is None:
            raise UserError(f"{folder}: has no chat template; fine-tune on chats first")
        self.encoder = TurnEncoder(chat, str(folder), template or {})
        eos = load_tokenizer(folder).eos_token_id
        # a turn that eos ends is no whole one
        self._ends = tuple(sorted({*self.encoder.end_ids, *([] if eos is None else [int(eos)])}))
        self.chat = {file.name: file_digest(file) for file in chat_files(folder)}
        """File of the chat template -> its hash."""

    def run(self, sampling: Sampling, num_parallel: int, played: Callable[[ToolPolicy], Any]) -> Any:
        """Return what is played by the model as a policy; None on other processes than the first."""
        def work(engine: Engine) -> Any:
            return with_policy(EnginePolicy(engine, sampling, StopRule(self._ends)), played)

        return run_engine(self.engine, self.target, work, longest=self._longest,
                          batching=Batching(num_parallel), settings=self._runs.settings,
                          nproc=self._runs.nproc, option=self._runs.option)
