"""What is asked of an engine, whichever it is, and what it gives back: how tokens are chosen, where a
continuation ends, how probable each token was, and which version of weights wrote it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, runtime_checkable

from annotated_types import Gt, Le

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    NO_FLAG, AtLeastOne, Flag, NotNegative, NotNegativeInt, ProblemCode, SettingsError, SettingsProblem,
    try_parse_settings)
from megatron_sov.model.config import correct_setting

if TYPE_CHECKING:
    import numpy as np
    import torch

Tokens = Sequence[int]
STOP, LENGTH = "stop", "length"
"""Finish reasons, as inference servers name them: something of `StopRule` ended it, or it is as long as
allowed."""
Temperature = Annotated[NotNegative, Flag(value="T", help="0 takes the most probable token; otherwise logits "
                                                          "are divided by it and sampled")]
TopP = Annotated[float, Gt(0), Le(1), Flag(value="P", help="Sample from the smallest set of tokens with "
                                                           "this probability (arXiv 1904.09751)")]
SampleSeed = Annotated[NotNegativeInt, Flag(value="S", help="Of the samples")]
BatchSize = Annotated[AtLeastOne, Flag(help="Sequences that are written at a time")]
CACHE_TOKENS = 1 << 20
"""Tokens whose keys and values are kept at a time; one sequence at least, however long.  A batch of short
sequences never reaches it; whose GPU is too small for long ones lowers the batch size."""
Written = tuple[list[int], list[float]]
"""Tokens behind a prompt, and the log-probability of each."""


@runtime_checkable
class TokenRules(Protocol):
    """Which tokens may stand next; a function of what was written, so that it is the same everywhere."""

    def allowed(self, written: Tokens) -> np.ndarray:
        """Return whether each id may stand behind what was written, [vocabulary] bool; at least one may."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}  # rules are code
    max_new_tokens: AtLeastOne = 64
    """Longest continuation."""
    temperature: Temperature = 0.0
    top_k: Annotated[NotNegativeInt, Flag(value="K")] = 0
    """Samples come from this many most probable tokens; 0: from all."""
    top_p: TopP = 1.0
    seed: SampleSeed = 0
    num_drafts: Annotated[NotNegativeInt, Flag("--speculative", "K")] = 0
    """Tokens that the multi-token prediction layer drafts for each pass of the model (engine megatron); 0:
    none.  Greedy continuations stay the same, samples follow the same distribution with
    other random numbers."""
    for_training: Annotated[bool, NO_FLAG] = False
    """Whether samples will be trained on.  `top_k` and `top_p` are refused then: they draw from a part of the
    distribution that a trainer computes, so the two log-probabilities of a token are not of one thing."""
    allow_truncation: Annotated[bool, NO_FLAG] = False
    """Take them all the same; log-probabilities are those of the part."""
    with_routes: Annotated[bool, NO_FLAG] = False
    """Whether to tell which experts tokens visited (`Generated.routes`; megatron and vllm)."""
    rules: Annotated[TokenRules | None, NO_FLAG] = None
    """Tokens that it does not allow have no probability (engine megatron, without drafts); log-probabilities
    are those of the part."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not go together."""
        found = []
        if self.for_training and self.truncates and not self.allow_truncation:
            found.append(SettingsProblem(
                ProblemCode.RULE, "for_training",
                f"top_k = {self.top_k} and top_p = {self.top_p} cut it off: "
                "samples that are trained on come from the whole distribution, whose log-probabilities a "
                "trainer computes", way_out="leave both out, or set allow_truncation"))
        if self.rules is not None and (self.num_drafts or self.for_training):
            found.append(SettingsProblem(ProblemCode.RULE, "num_drafts",
                                         "drafts know nothing of which tokens are allowed",
                                         self.num_drafts, "leave it out"))
        return found

    @property
    def truncates(self) -> bool:
        """Whether samples come from a part of the distribution only."""
        return bool(self.temperature and (self.top_k or self.top_p != 1))

    def check(self) -> None:
        """Raise `UserError` where a value has no meaning; every engine asks."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rules"}
        if problems := try_parse_settings(Sampling, given)[1] or self.problems():
            raise SettingsError("sampling", problems)


@dataclass(frozen=True)
class ResponseSampling(Sampling):
    """How each next token is chosen, without drafts."""

    num_drafts: Annotated[NotNegativeInt, NO_FLAG] = 0


@dataclass(frozen=True)
class WholeSampling(ResponseSampling):
    """How each next token is chosen, of all tokens or of the most probable part of them."""

    top_k: Annotated[NotNegativeInt, NO_FLAG] = 0


def refuse_drafts(engine: str, sampling: Sampling) -> None:
    """Raise `ValueError` where drafts are asked of an engine that has none."""
    if sampling.num_drafts:
        raise ValueError(f"num_drafts = {sampling.num_drafts}: the engine {engine} does not draft")


def refuse_rules(engine: str, sampling: Sampling) -> None:
    """Raise `UserError` where tokens are ruled out and an engine cannot leave them out."""
    if sampling.rules is not None:
        raise UserError(f"--engine {engine}: it does not keep blocks of media whole; use the engine megatron")


def refuse_routes(engine: str, sampling: Sampling) -> None:
    """Raise `UserError` where routes are asked of an engine that does not tell them."""
    if sampling.with_routes:
        raise UserError(f"--engine {engine}: it does not tell which experts tokens visited, and routes are "
                        "never guessed; use the engine megatron or vllm, or set "
                        "policy.router_replay=false")


@dataclass(frozen=True)
class StopRule:
    """What ends a continuation before it is as long as allowed."""

    ids: tuple[int, ...] = ()
    """Tokens, such as the tokenizer's eos."""
    texts: tuple[str, ...] = ()
    """Strings, found in the decoded continuation wherever they stand in its tokens."""
    decode: Callable[[list[int]], str] | None = None
    """From token ids to text; needed for `texts`."""

    def ends(self, continuation: Tokens) -> bool:
        """Return whether a continuation, which did not end before its last token, ends with it."""
        if continuation[-1] in self.ids:
            return True
        if not self.texts:
            return False
        assert self.decode is not None, "texts need a decoder"
        # every token but special ones is at least a byte, so the last ones decide;
        # a few more for characters cut in two
        tail = self.decode(list(continuation[-max(len(t.encode()) for t in self.texts) - 8:]))
        return any(text in tail for text in self.texts)

    def cut(self, continuation: Tokens) -> list[int]:
        """Return the tokens up to the one that ends the continuation, if any does."""
        for length in range(1, len(continuation) + 1):
            if self.ends(continuation[:length]):
                return list(continuation[:length])
        return list(continuation)

    def reason(self, continuation: Tokens) -> str:
        """Return why a continuation is no longer: `STOP` or `LENGTH`."""
        return STOP if continuation and self.ends(continuation) else LENGTH

    def cut_text(self, text: str) -> str:
        """Return a continuation's text up to the first of the strings."""
        return text[:min((text.index(t) for t in self.texts if t in text), default=len(text))]


@dataclass(frozen=True)
class Bounds:
    """What ends continuations otherwise than `StopRule` and the sampling (engine megatron)."""

    limits: Sequence[int]
    """Longest continuation of each prompt."""
    should_stop: Callable[[], bool]
    """Asked behind each row: whether all end where they are, unfinished; a row at least is always read."""


@dataclass(frozen=True)
class Batching:
    """What bounds memory, beside `CACHE_TOKENS`."""

    batch_size: AtLeastOne = 64
    """Sequences that are continued at a time, on each process that has sequences of its own."""
    prefill_tokens: AtLeastOne = 8192
    """Tokens of prompts that are read at a time; longer prompts are read in pieces."""

    def slots(self, num_sequences: int, longest: int, state_tokens: int = 0) -> int:
        """Return how many sequences to continue at a time, of which the longest may grow to `longest` tokens,
        and each keeps as much as so many more (`ModelConfig.state_tokens`)."""
        return max(1, min(num_sequences, self.batch_size, CACHE_TOKENS // (longest + state_tokens)))


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """How a model that runs on our own engine is split."""

    nproc: AtLeastOne | None = None
    """Local processes (checkpoints)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Layout (checkpoints) and precision, e.g. --set parallel.ep=2 --set train.precision=bf16."""

    @staticmethod
    def find_setting(word: str) -> str:
        """Return the setting of layout or precision that an unknown option may mean; "": none is known."""
        found = correct_setting(word)
        return found if found.startswith(("parallel.", "train.precision", "train.fp8")) else ""


NamedTensors = Iterator[tuple[str, "torch.Tensor"]]
"""Hugging Face names and tensors of a whole model, as `convert.export_weights` gives them."""


class HeldWeights:
    """The version of an engine's weights; what writes with them asks `version`, and is refused where they
    are parts of two."""

    def __init__(self, engine: str) -> None:
        """Begin with the weights that were loaded, version 0, of an engine by its name."""
        self._engine, self._version = engine, 0
        self._failure: str | None = None

    @property
    def version(self) -> int:
        """The weights' version; raises as `check` does."""
        self.check()
        return self._version

    def check(self) -> None:
        """Raise `UserError` where the last update failed, so that the weights are of no version."""
        if self._failure is not None:
            raise UserError(f"the engine {self._engine} holds parts of two models: its update to version "
                            f"{self._failure}; update it with all weights, or load it anew")

    @contextlib.contextmanager
    def replaced(self, version: int, weights: Iterator[Any] | None) -> Iterator[None]:
        """Put the block's work in the place of the weights; until it has ended well there are none.

        Args:
            version: what they are then.
            weights: what is read from; closed if the block fails, so that processes which gather it together
                with this one can finish.
        """
        # Set before the first tensor is written: until the block ends the memory holds two versions.
        self._failure = f"{version} did not end"
        try:
            yield
        # An interrupt leaves half of the weights behind as well.
        except BaseException as e:
            self._failure = f"{version} failed ({e})"
            with contextlib.suppress(AttributeError):
                weights.close()  # type: ignore[union-attr]
            raise
        self._version, self._failure = version, None


@dataclass(frozen=True)
class Generated:
    """What an engine gives back; each list has an entry for each prompt."""

    continuations: list[list[int]]
    """Without the prompt, with the ending token where it came."""
    logprobs: list[list[float]]
    """Log-probability of each of these tokens under the distribution that it was drawn from: softmax(logits /
    temperature), within `top_k` and `top_p` where they cut it.  At temperature 0, where nothing is drawn,
    under softmax(logits)."""
    finish_reasons: list[str]
    """`STOP` or `LENGTH`; with `Bounds` also this of what is shorter than its limit, and was stopped."""
    temperature: float
    """The one that log-probabilities belong to; a trainer divides its logits by the same."""
    version: int
    """Of the weights that wrote this, as `Engine.update` was told it; 0: those that were loaded."""
    drafted: int = 0
    """Tokens that were drafted and then judged by the model."""
    accepted: int = 0
    """How many of them the model took."""
    routes: list[np.ndarray] | None = field(default=None, compare=False)
    """Of each prompt with its continuation but for the last token, which the model never read: experts that
    tokens visited, [tokens - 1, layers, top_k] (`documents.shard_files`); None: not asked for."""

    @classmethod
    def of(cls, written: Sequence[Written], sampling: Sampling, stop: StopRule, version: int,
           drafted: int = 0, accepted: int = 0, routes: list[np.ndarray] | None = None) -> Generated:
        """Return what was written for each prompt, with all that follows from what was asked."""
        for number, (tokens, logprobs) in enumerate(written):
            if len(tokens) != len(logprobs):
                raise ValueError(f"prompt {number}: the engine wrote {len(tokens)} tokens and told "
                                 f"{len(logprobs)} log-probabilities; one belongs to each")
        return cls([tokens for tokens, _ in written], [logprobs for _, logprobs in written],
                   [stop.reason(tokens) for tokens, _ in written], sampling.temperature, version,
                   drafted, accepted, routes)
