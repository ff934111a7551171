"""Sampling settings, stop rules, server locations and results for inference engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from annotated_types import Gt, Le

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    NO_FLAG, AtLeastOne, Flag, NotNegative, NotNegativeInt, ProblemCode, SettingsError, SettingsProblem,
    try_parse_settings)
from megatron_sov.model.config import correct_setting

if TYPE_CHECKING:
    import numpy as np
    import torch

EngineName = Literal["megatron", "transformers", "vllm"]
MEGATRON, TRANSFORMERS, VLLM = ENGINES = get_args(EngineName)
"""Engine names: megatron runs checkpoints at any layout, transformers and vllm run Hugging Face folders."""
Tokens = Sequence[int]
STOP, LENGTH = "stop", "length"
"""Finish reasons with the names of inference servers: ended by `StopRule`, or at the length limit."""
Temperature = Annotated[NotNegative, Flag(value="T", help="0 takes the most probable token; otherwise logits "
                                                          "are divided by it and sampled")]
TopP = Annotated[float, Gt(0), Le(1), Flag(value="P", help="Sample from the most probable tokens with "
                                                           "this total probability (arXiv 1904.09751)")]
SampleSeed = Annotated[NotNegativeInt, Flag(value="S", help="Seed for sampling")]
BatchSize = Annotated[AtLeastOne, Flag(help="Sequences per batch")]
CACHE_TOKENS = 1 << 20
"""Maximum tokens in the KV cache; a single sequence is always allowed. Batches with short sequences do not
reach the limit; if a GPU is too small for long sequences, lower the batch size."""
ScoredTokens = tuple[list[int], list[float]]
"""A continuation's token ids, and a log-probability per token."""
NamedTensors = Iterator[tuple[str, "torch.Tensor"]]
"""Hugging Face names and tensors of a whole model, e.g. from `convert.export_weights`."""


@runtime_checkable
class TokenRules(Protocol):
    """Restricts the next token by a deterministic function of the continuation."""

    def allowed(self, written: Tokens) -> np.ndarray:
        """Return the allowed next tokens, [vocab_size] bool; at least a token is allowed."""


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}  # rules are code
    max_new_tokens: AtLeastOne = 64
    temperature: Temperature = 0.0
    top_k: Annotated[NotNegativeInt, Flag(value="K")] = 0
    """Sample from the `top_k` most probable tokens; 0: from the whole vocabulary."""
    top_p: TopP = 1.0
    seed: SampleSeed = 0
    for_training: Annotated[bool, NO_FLAG] = False
    """Samples are training data. `top_k` and `top_p` are then refused: both truncate the distribution, while
    the trainer computes log-probabilities under the whole distribution."""
    allow_truncation: Annotated[bool, NO_FLAG] = False
    """Accept `top_k` and `top_p` for training; log-probabilities then use the truncated distribution."""
    with_routes: Annotated[bool, NO_FLAG] = False
    """Return the experts per token (`GenerationResult.routes`; engines megatron and vllm)."""
    rules: Annotated[TokenRules | None, NO_FLAG] = None
    """Tokens that `rules` forbids get probability 0 (engine megatron); log-probabilities use the masked
    distribution."""

    def problems(self) -> list[SettingsProblem]:
        problems = []
        if self.for_training and self.truncates and not self.allow_truncation:
            problems.append(SettingsProblem(
                ProblemCode.RULE, "for_training",
                f"top_k = {self.top_k} and top_p = {self.top_p} truncate the distribution: samples for "
                "training must come from the whole distribution, whose log-probabilities the trainer "
                "computes", way_out="leave both out, or set allow_truncation"))
        if self.rules is not None and self.for_training:
            problems.append(SettingsProblem(ProblemCode.RULE, "rules",
                                            "change the distribution: samples for training must come from "
                                            "the whole distribution", way_out="leave them out"))
        return problems

    @property
    def truncates(self) -> bool:
        """Samples come from a truncated distribution."""
        return bool(self.temperature and (self.top_k or self.top_p != 1))

    def check(self) -> None:
        """Raise `UserError` for invalid settings; every engine calls `check`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rules"}
        if problems := try_parse_settings(Sampling, values)[1] or self.problems():
            raise SettingsError("sampling", problems)


@dataclass(frozen=True)
class WholeSampling(Sampling):
    """Sampling settings without `top_k`."""

    top_k: Annotated[NotNegativeInt, NO_FLAG] = 0


def check_no_rules(engine: str, sampling: Sampling) -> None:
    """Raise `UserError` if `sampling` requests token rules from an engine without token rules."""
    if sampling.rules is not None:
        raise UserError(f"--engine {engine}: cannot keep blocks of media tokens whole; use the engine "
                        "megatron")


def check_no_routes(engine: str, sampling: Sampling) -> None:
    """Raise `UserError` if `sampling` requests expert routes from an engine without routes."""
    if sampling.with_routes:
        raise UserError(f"--engine {engine}: does not return the experts of each token; use the engine "
                        "megatron or vllm, or set policy.router_replay=false")


@dataclass(frozen=True)
class StopRule:
    """Ends a continuation before the length limit."""

    ids: tuple[int, ...] = ()
    """Stop tokens, for example the tokenizer's eos."""
    texts: tuple[str, ...] = ()
    """Stop strings, searched in the decoded continuation at every token."""
    decode: Callable[[list[int]], str] | None = None
    """Token ids -> text; required for `texts`."""

    def is_met(self, continuation: Tokens) -> bool:
        """Return whether the last token ends the continuation; earlier tokens are not checked."""
        if continuation[-1] in self.ids:
            return True
        if not self.texts:
            return False
        assert self.decode is not None, "texts need a decoder"
        # an ordinary token has at least a byte, so the last tokens contain the stop string; 8 more tokens
        # cover characters split over tokens
        tail = self.decode(list(continuation[-max(len(t.encode()) for t in self.texts) - 8:]))
        return any(text in tail for text in self.texts)

    def cut(self, continuation: Tokens) -> list[int]:
        """Return the tokens up to the end of the continuation."""
        for length in range(1, len(continuation) + 1):
            if self.is_met(continuation[:length]):
                return list(continuation[:length])
        return list(continuation)

    def truncate_text(self, text: str) -> str:
        """Return the text before the first stop string."""
        return text[:min((text.index(t) for t in self.texts if t in text), default=len(text))]


@dataclass(frozen=True)
class GenerationBounds:
    """Per-prompt limits and an external stop, in addition to `StopRule` and `Sampling` (engine megatron)."""

    limits: Sequence[int]
    """`max_new_tokens` per prompt."""
    should_stop: Callable[[], bool]
    """Called after each row; True ends the unfinished continuations. The first row is always decoded."""


@dataclass(frozen=True)
class Batching:
    """Memory limits, in addition to `CACHE_TOKENS`."""

    batch_size: AtLeastOne = 64
    """Sequences decoded at a time per replica."""
    prefill_tokens: AtLeastOne = 8192
    """Prompt tokens read at a time; longer prompts are read in chunks."""

    def slots(self, num_sequences: int, longest: int, state_tokens: int = 0) -> int:
        """Return how many sequences to decode at a time.

        Args:
            num_sequences: sequences in total.
            longest: limit of tokens of the longest sequence.
            state_tokens: size of a sequence's linear-attention state in cached tokens
                (`ModelConfig.state_tokens`).
        """
        return max(1, min(num_sequences, self.batch_size, CACHE_TOKENS // (longest + state_tokens)))


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Model layout on the engine megatron."""

    nproc: AtLeastOne | None = None
    """Local processes (checkpoints)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Layout (checkpoints) and precision, e.g. --set parallel.ep=2 --set train.precision=bf16."""

    @staticmethod
    def find_setting(word: str) -> str:
        """Return the layout or precision setting that an unknown option resembles, or ""."""
        setting = correct_setting(word)
        return setting if setting.startswith(("parallel.", "train.precision", "train.fp8")) else ""


class WeightVersion:
    """Tracks the version of an engine's weights; after a failed update, reading `version` raises
    `UserError`."""

    def __init__(self, engine: str) -> None:
        self._engine, self._version = engine, 0
        self._failure: str | None = None

    @property
    def version(self) -> int:
        """Weight version; raises like `check`."""
        self.check()
        return self._version

    def check(self) -> None:
        """Raise `UserError` if the last update failed and left two versions mixed."""
        if self._failure is not None:
            raise UserError(f"the engine {self._engine} has weights of two versions, because its update to "
                            f"version {self._failure}; update it with all weights, or load it again")

    @contextlib.contextmanager
    def replace_weights(self, version: int, weights: Iterator[Any] | None) -> Iterator[None]:
        """Mark the weights as invalid during the `with` block, then as `version`.

        Args:
            version: new version.
            weights: iterator that the block reads; closed on failure, so that other processes in a collective
                gather can finish.
        """
        # Set before the first tensor is written: until the block ends, weights of two versions are mixed.
        self._failure = f"{version} did not end"
        try:
            yield
        # `BaseException`: an interrupt also leaves mixed weights.
        except BaseException as e:
            self._failure = f"{version} failed ({e})"
            with contextlib.suppress(AttributeError):
                weights.close()  # type: ignore[union-attr]
            raise
        self._version, self._failure = version, None


@dataclass(frozen=True)
class ServerLocations:
    """Addresses, logs and interpreter for engine servers."""

    logs: Path
    """Log folder for servers started here."""
    urls: tuple[str, ...] = ()
    """Addresses where servers already run; empty: start servers here."""
    python: Path | None = None
    """Python interpreter with the engine; None: `SOV_ENGINE_PYTHON` or the current interpreter."""
    command: tuple[str, ...] = ()
    """Replaces the engine's start command."""


@dataclass(frozen=True)
class GenerationResult:
    """Result of `Engine.generate`; each list has an entry per prompt."""

    continuations: list[list[int]]
    """New tokens, including the stop token."""
    logprobs: list[list[float]]
    """Log-probability of each new token under the sampled distribution: softmax(logits / temperature),
    truncated by `top_k` and `top_p`. At temperature 0: softmax(logits)."""
    finish_reasons: list[str]
    """`STOP` or `LENGTH`; `LENGTH` also for continuations that `GenerationBounds.should_stop` ended."""
    temperature: float
    """Temperature for log-probabilities; a trainer divides logits by `temperature`."""
    version: int
    """Weight version, see `Engine.update`; 0: the loaded weights."""
    routes: list[np.ndarray] | None = field(default=None, compare=False)
    """Experts per token, [tokens - 1, layers, top_k] (`documents.shard_files`); the model did not read the
    last token. None if not requested."""

    @classmethod
    def of(cls, written: Sequence[ScoredTokens], sampling: Sampling, stop: StopRule, version: int,
           routes: list[np.ndarray] | None = None) -> GenerationResult:
        """Build the result and determine each `reason`."""
        for number, (tokens, logprobs) in enumerate(written):
            if len(tokens) != len(logprobs):
                raise ValueError(f"prompt {number}: the engine returned {len(tokens)} tokens and "
                                 f"{len(logprobs)} log-probabilities; the counts must be equal")
        reasons = [STOP if tokens and stop.is_met(tokens) else LENGTH for tokens, _ in written]
        return cls([tokens for tokens, _ in written], [logprobs for _, logprobs in written], reasons,
                   sampling.temperature, version, routes)
