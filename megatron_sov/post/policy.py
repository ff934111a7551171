"""Learning from one's own responses by their rewards, as `PolicyConfig` puts it together.

A group's responses begin with the same prompt, of which a micro-batch needs one (arXiv 2506.05433): what a
token becomes depends on it and those before it alone, so the tokens of a document before its first learned
label are the same numbers in every response to the prompt.  Labels, weights and columns of what is left out
are those of nothing that is learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from megatron_sov.base.chat.encode import TYPE_TEXT
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.requirements import NeededColumn
from megatron_sov.engine.data.rounds import SOURCE
from megatron_sov.engine.data.token_shards import TEXTS, Source, open_sources
from megatron_sov.engine.data.views import TEXT, as_text
from megatron_sov.engine.mcore.model.attention import SharedPrompts, Span
from megatron_sov.engine.mcore.model.gpu_settings import own_attention_serves
from megatron_sov.engine.mcore.model.logprobs import Head
from megatron_sov.engine.mcore.model.specs import PRECISION, uses_transformer_engine
from megatron_sov.engine.mcore.parallel.device import to_device
from megatron_sov.model.config import RunConfig
from megatron_sov.post.parts.policy_loss import PolicyLoss
from megatron_sov.post.parts.responses import learned, responses_of
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators

KNOWLEDGE = "knowledge"
MOST_CLIPPED, MOST_ENGINE_KL = 0.05, 0.05
"""What is told in a round's first step.  Published engines differ from trainers by a KL of about 1e-3 a token
(arXiv 2510.11370)."""


class PolicyLearning(DataObjective):
    """``policy + kl_coeff * kl + knowledge_coeff * CE(text) / its tokens`` (+ multi-token prediction on all
    that is learned)."""

    comparable_loss = False

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        asked, rollout = context.config.policy, context.config.rollout
        self._rollout = rollout
        self._temperature, self._loss = rollout.temperature, PolicyLoss(asked, rollout.max_new_tokens)
        self.meters = self._loss.meters
        self.coefficients = dict(self._loss.coefficients)
        if asked.has_text:
            self.coefficients[KNOWLEDGE] = asked.parts.knowledge_coeff
        self.coefficients |= self._mtp_coefficient
        self._shares_prompts = can_share(context.config)

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count tokens or responses of the global batch.  A prompt that several responses have is computed
        once."""
        hosts = [m.host for m in batch.micro_batches]
        counts = [self._loss.denominators(responses_of(m)) for m in hosts]
        targets = {term: sum(count[term] for count in counts) for term in self._loss.coefficients}
        if KNOWLEDGE in self.coefficients:
            targets[KNOWLEDGE] = sum(float((m.weights.double() * _is_text(m)).sum()) for m in hosts)
        counted = with_denominators(batch, targets | self._mtp_targets(hosts))
        if not self._shares_prompts:
            return counted
        return dataclasses.replace(counted, micro_batches=tuple(map(sharing_prompts, counted.micro_batches)))

    def doubt(self, step: int, meters: Mapping[str, float]) -> str:
        """As `train.objective.doubt_of`: a clip that acts where nothing was learned yet, and an engine that
        speaks for another model."""
        is_first = (step - 1) % self._rollout.steps_per_round == 0
        if is_first and (share := meters.get("clip_share", 0.0)) > MOST_CLIPPED:
            return (f"{share:.0%} of the tokens are clipped in a round's first step, whose ratios are 1 but "
                    "for rounding: policy.clip_low and policy.clip_high are narrower than the trainer's own "
                    "rounding; widen them, or raise train.precision")
        if is_first and (gap := meters.get("engine_kl", 0.0)) > MOST_ENGINE_KL:
            # a store may also bring a stale round where rollout.max_staleness is 0
            return (f"engine_kl = {gap:.2g} a token: look at staleness_steps of the round; above 0, older "
                    "weights wrote its responses: lower rollout.max_staleness; at 0 the engine's model or "
                    "precision is far from the trainer's; see engine_gap in docs/policy_methods.md")
        return ""

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the summed losses of a micro-batch's responses, and of its text."""
        # most labels are a prompt's
        wanted = learned(batch.host) if KNOWLEDGE in self.coefficients else batch.host.weights > 0
        logprobs = head.logprobs(hidden[0], batch.labels, self._temperature, wanted)
        terms, meters = self._loss.terms(logprobs, batch.columns, responses_of(batch))
        losses = -logprobs.detach()
        if KNOWLEDGE in self.coefficients:
            terms[KNOWLEDGE], losses = self._of_text(hidden[0], head, batch, losses)
        terms |= self._mtp_sum(hidden, head, batch)
        counted = batch.weights > 0
        by_source = per_source(losses.where(counted, 0.0), counted.to(losses.dtype), batch.sources,
                               self._num_sources)
        return LossSums(terms, by_source, meters)

    def _of_text(self, hidden: torch.Tensor, head: Head, batch: MicroBatch,
                 losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed cross-entropy of text, at temperature 1, and the log's losses with those of text
        in their places; the head is not applied again to a micro-batch without text, as most are."""
        if not bool((_is_text(batch.host) & (batch.host.weights > 0)).any()):
            return losses.new_zeros(()), losses
        is_text = _is_text(batch)
        sums, of_labels = head.cross_entropy(hidden, batch.labels, {KNOWLEDGE: batch.weights * is_text})
        return sums[KNOWLEDGE], torch.where(is_text, of_labels, losses)


def _is_text(batch: MicroBatch) -> torch.Tensor:
    return batch.types == TYPE_TEXT


def can_share(config: RunConfig) -> bool:
    """Return whether a run's rows may hold prompts once: no row is cut over processes, nothing is predicted
    further ahead, left out by lot or rounded in blocks of tokens, no route is replayed (of a prompt each
    response has its own), rows may have other lengths than those of other processes, and the attention is
    ours."""
    layout, train = config.parallel, config.train
    te = uses_transformer_engine(PRECISION[train.precision])
    return (config.policy.share_prompts and layout.tp == layout.pp == layout.cp == 1
            and (layout.ep * layout.etp == 1 or layout.expert_dispatcher == "alltoall")
            and not config.model.num_mtp_layers and not train.hidden_dropout and train.fp8 == "none"
            and not config.policy.router_replay
            and own_attention_serves(te, layout.cp, config.gpu.attention,
                                     capped=config.model.attention_softcap is not None))


def sharing_prompts(batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch without what is in it more than once; without such a thing the same.

    Placeholders of two pictures are the same tokens, so a row that has any is left as it is.
    """
    host = batch.host
    if host.inputs.media:
        return batch
    source, kept = np.arange(len(host.labels)), np.ones(len(host.labels), bool)
    spans = _spans(host, source, kept)
    if kept.all() or host.inputs.routes is not None:
        return batch
    index = torch.from_numpy(kept.nonzero()[0])
    source = (kept.cumsum() - 1)[source]
    found = _only(host, index, torch.from_numpy(source), spans)
    if batch.on_host is None:
        return found
    device = batch.labels.device
    return dataclasses.replace(
        _only(batch, to_device(index, device), to_device(torch.from_numpy(source), device), spans),
        on_host=found)


def _spans(host: MicroBatch, source: np.ndarray, kept: np.ndarray) -> list[Span]:
    """Return where each document begins, its first token that is kept, and its end.

    Args:
        host: the micro-batch on the host.
        source: [tokens]: gets the place of the token that stands for each.
        kept: [tokens] bool: gets False for those that another one stands for.
    """
    tokens, positions = host.inputs.tokens.numpy(), host.inputs.positions.numpy()
    is_learned = (host.weights > 0).numpy()
    begun: dict[tuple[int, bytes], int] = {}
    spans = []
    for start, stop in pairwise(host.inputs.cu_seqlens.tolist()):
        if start == stop:
            continue
        prompt = int(is_learned[start:stop].argmax())  # 0 where nothing is learned, as of padding
        first = begun.setdefault((int(positions[start]), tokens[start:start + prompt].tobytes()), start)
        if prompt and first != start:
            source[start:start + prompt] = np.arange(first, first + prompt)
            kept[start:start + prompt] = False
            spans.append((start, start + prompt, stop))
        else:
            spans.append((start, start, stop))
    return spans


def _only(batch: MicroBatch, index: torch.Tensor, source: torch.Tensor, spans: list[Span]) -> MicroBatch:
    """Return a micro-batch of some of its tokens.

    Args:
        index: [kept tokens] int64: which.
        source: see `SharedPrompts`.
        spans: see `SharedPrompts`.
    """
    inputs = batch.inputs
    bounds = list(accumulate((stop - first for _, first, stop in spans), initial=0))
    return dataclasses.replace(
        batch,
        inputs=dataclasses.replace(
            inputs, tokens=inputs.tokens[index], positions=inputs.positions[index],
            cu_seqlens=to_device(torch.tensor(bounds, dtype=torch.int32), inputs.tokens.device),
            padding=inputs.padding[index], host_bounds=bounds,
            shared=SharedPrompts(source, spans, inputs.padding)),
        labels=batch.labels[index], weights=batch.weights[index], types=batch.types[index],
        sources=batch.sources[index],
        columns={name: column[index] for name, column in batch.columns.items()})


@dataclass(frozen=True)
class PolicyObjective:
    """Makes the objective."""

    formats: tuple[str, ...]
    """See `train.objective.formats_of`."""
    columns: Mapping[str, NeededColumn]
    """See `train.objective.columns_of`."""

    def __call__(self, context: ObjectiveContext) -> PolicyLearning:
        return PolicyLearning(context)


def objective_of(config: RunConfig) -> PolicyObjective:
    """Return what makes the objective of a run's `policy`."""
    needed = NeededColumn("`megatron-sov rl train`", (ROLLOUTS,))
    columns = PolicyLoss(config.policy, config.rollout.max_new_tokens).columns
    return PolicyObjective((ROLLOUTS, *([TEXT] if config.policy.has_text else [])),
                           dict.fromkeys(columns, needed))


def texts_of(config: RunConfig) -> tuple[Source, ...]:
    """Return the packed data of a run: text, and where text is learned beside responses, chats as such.

    Raises:
        UserError: they cannot be read, are of another kind, or do not fit the model.
    """
    if not config.data.paths:
        return ()
    formats = TEXTS if config.policy.has_text else (TEXT,)
    return tuple(as_text(source) for source in
                 open_sources(config.data.paths, config.model.vocab_size, formats))


def check_sources(config: RunConfig, sources: list[Source]) -> None:
    """Refuse data that leave the term of text without targets, or are called as the run's own rounds are.

    Raises:
        UserError: there is no text, or a source has the rounds' name.
    """
    if [source.name for source in sources].count(SOURCE) > 1:
        raise UserError(f"--data: has a source {SOURCE!r}, as the run's own rounds are called; pack it under "
                        "another name")
    if config.policy.has_text and not any(source.format == TEXT and source.num_tokens["train"]
                                          and source.share > 0 for source in sources):
        raise UserError(f"policy.knowledge_coeff = {config.policy.parts.knowledge_coeff} needs text; add "
                        "--data with packed text to train on, or set it to 0")
