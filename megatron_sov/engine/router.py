"""The router: top-k routing as in transformers, with padding left out and the balancing loss normalised
over the global batch; and the choice of a generator again, where the step has a table of routes.

Three properties of the library's router make an own class necessary: with per-token losses its auxiliary
losses are divided by the sequence- and context-parallel sizes (a result that depends on the layout); its
expert counts cannot take a padding mask (shapes [tokens] and [tokens, experts] do not broadcast); and it does
not normalise the weight of a single chosen expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_sov.engine.model.attention import SharedPrompts
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import local_device, to_device
from megatron_sov.model.config import ModelConfig

# Replaying routes: the choice of experts of a step's tokens is looked up in one table of the step.
#
# What reaches a router of a micro-batch's tokens, at any layout, under pipelines and when a layer is
# computed again, is the library's padding mask, and nothing else. So each token's place in the table
# travels in it: one row of the mask says what is padding, as ever, and the rows behind it hold the
# bits of the place, since the library turns its mask into bool. No router keeps count of where it is,
# as the library's own `RouterReplay` does, which an interleaved pipeline or a recomputation out of
# order would lead astray.

WIDE_MARK = -1
"""65535 as int16, which torch can index and uint16 it cannot."""


@dataclass(frozen=True)
class Recorded:
    """What the table says of a process's tokens in one layer."""

    experts: torch.Tensor
    """[tokens, top_k] int64; any number where there is none."""
    there: torch.Tensor
    """[tokens] bool: whether the choice was recorded."""


class RouteTable:
    """The routes of all tokens of this process's micro-batches of a step, one after the other."""

    def __init__(self, routes: np.ndarray, first_layer: int) -> None:
        """Send routes to the device.

        Args:
            routes: [tokens, layers, top_k] uint8 or uint16, see `documents.shard_files`.
            first_layer: the library's number, from 1, of the first layer that has experts.
        """
        self._first_layer = first_layer
        self._mark = np.iinfo(np.uint8).max if routes.dtype == np.uint8 else WIDE_MARK
        held = routes if routes.dtype == np.uint8 else routes.view(np.int16)
        self._experts = to_device(torch.from_numpy(np.ascontiguousarray(held)), local_device())
        self._num_bits = max(1, (len(routes) - 1).bit_length())

    def mask(self, padding: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return a padding mask that holds places.

        Args:
            padding: [tokens] bool, True where a token is padding.
            places: [tokens] int64, each token's place in the table; padding's is never looked up.

        Returns:
            [1 + bits, tokens] bool.
        """
        bits = torch.arange(self._num_bits, device=places.device)[:, None]
        return torch.cat([padding[None], (places >> bits) & 1 == 1])

    def find(self, mask: torch.Tensor, layer: int) -> Recorded:
        """Return what is recorded of tokens by their part of a mask, [tokens, 1 + bits] bool."""
        bits = torch.arange(self._num_bits, device=mask.device)
        # the bits of the place again; padding's are any, and it is masked out below
        places = (mask[:, 1:].long() << bits).sum(dim=1)
        experts = self._experts[places, layer - self._first_layer]
        return Recorded(experts.long(), (experts[:, 0] != self._mark) & ~mask[:, 0])


@contextlib.contextmanager
def replay_routes(config: Any, rows: Sequence[np.ndarray | None]) -> Iterator[list[int | None]]:
    """Have a model's routers choose as was recorded, within.

    Args:
        config: the library's, which holds the `RoutingStep`.
        rows: routes of each row that the model will read; None: routers choose for it.

    Yields:
        The place of each row's first token in the table; None where it has no routes.
    """
    known = [row for row in rows if row is not None]
    firsts = iter(accumulate((len(row) for row in known), initial=0))
    step = config.routing_step
    if known:
        step.table = RouteTable(np.concatenate(known), 1 + config.moe_layer_freq.index(1))
    try:
        yield [None if row is None else next(firsts) for row in rows]
    finally:
        step.table = None


# Choosing experts by Transformer Engine's fused kernels (2.7 or newer), where their formula is the
# router's.
#
# Read for it: the Python side of Transformer Engine 2.20.2, and the simple forward kernels
# (`common/fused_router/*.cu`) of its development branch at 2.20.0.dev0. They compute in float32, add
# the bias to sigmoid scores for the choice alone, and divide sigmoid weights by their sum (plus 1e-20) where
# more than one expert is chosen. The weight of a chosen expert is its biased score less the bias, so it may
# differ from the score in the last bits. A group's score is the sum of its best K / (kept groups) experts,
# which is the router's sum of two where twice as many experts as groups are chosen.

def problem(model: ModelConfig) -> str:
    """Return why the kernels cannot choose experts for a model here; empty: they can."""
    from megatron.core.extensions import transformer_engine as te

    if te.fused_topk_with_score_function is None:
        return ("needs the routing kernels of Transformer Engine 2.7 or newer, and the one here has none; "
                "install a newer one, or leave it out")
    if not _formula_serves(model.router_score, model.norm_topk_prob, model.num_experts_per_token):
        return (f"does not go with model.norm_topk_prob = {model.norm_topk_prob} and "
                f"model.num_experts_per_token = {model.num_experts_per_token}: the kernels divide several "
                "sigmoid weights by their sum, and never a single one; leave it out")
    if model.num_expert_groups > 1 and not _groups_serve(model.num_experts_per_token,
                                                         model.num_groups_per_token):
        return (f"does not go with model.num_experts_per_token = {model.num_experts_per_token} and "
                f"model.num_groups_per_token = {model.num_groups_per_token}: of a group the kernels add up "
                "as many scores as experts are chosen in a kept one, and the router two; leave it out")
    return ""


def serves(config: Any, logits: torch.Tensor) -> bool:
    """Return whether the kernels are wanted (`moe_router_fusion`), are there, and compute what
    the router does."""
    from megatron.core.extensions import transformer_engine as te

    if not config.moe_router_fusion or te.fused_topk_with_score_function is None:
        return False
    if logits.dtype == torch.float64:
        return False
    if config.moe_router_num_groups is not None and not _groups_serve(config.moe_router_topk,
                                                                      config.moe_router_group_topk):
        return False
    return _formula_serves(config.moe_router_score_function, config.norm_topk_prob, config.moe_router_topk)


def _formula_serves(score: str, normalised: bool, num_chosen: int) -> bool:
    """Return whether the kernels compute a router's weights: those of a softmax may be divided by their sum
    or not, one sigmoid weight is never divided, several always are."""
    return score == "softmax" or normalised == (num_chosen > 1)


def _groups_serve(num_chosen: int, num_groups: int) -> bool:
    """Return whether the kernels' score of a group is the router's, the sum of two."""
    return num_chosen // num_groups == 2


def choose(config: Any, logits: torch.Tensor,
           bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [tokens, experts] (zero where not chosen) and the choice [tokens, experts] bool."""
    from megatron.core.extensions import transformer_engine as te

    weights, chosen = te.fused_topk_with_score_function(
        logits=logits.contiguous(), topk=config.moe_router_topk,
        # a softmax over the chosen ones alone is one over all, divided by the sum of the chosen ones
        use_pre_softmax=not config.norm_topk_prob, num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=config.moe_router_score_function, expert_bias=bias)
    # the kernels keep their map for the backward pass, and the library's dispatcher pads it in place
    return weights, chosen.clone() if config.moe_router_padding_for_quantization else chosen


def balancing_scores(config: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores [tokens, experts] that sum to 1, and which are the largest K [tokens, experts] bool."""
    from megatron.core.extensions import transformer_engine as te

    chosen, scores = te.fused_compute_score_for_moe_aux_loss(
        logits=logits.contiguous(), topk=config.moe_router_topk,
        score_function=config.moe_router_score_function)
    return scores, chosen


EPSILON = 1e-20
"""Added to the sum that weights are divided by, as in transformers."""


@dataclass
class RoutingStep:
    """What routers need to know about the current optimizer step, and what they measured in it.

    One object is shared by all routers of a process (`TransformerConfig.routing_step`).  It holds step
    constants only, so recomputation in the backward pass sees the same values as the forward pass.
    """

    seq_len: int = 0
    """Tokens of one sequence; a micro-batch is a row of whole sequences."""
    num_sequences: int | torch.Tensor = 1
    """Sequences of the global batch: the balancing loss is their mean."""
    aux_loss: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer number -> this process's part of the balancing loss of the step, always in one place."""
    counts_evaluation: bool = False
    """Whether tokens are counted in evaluation mode too."""
    rows: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """(local tokens, tokens of a sequence) -> sequence of each local token: the same in every layer."""
    padding: torch.Tensor | None = None
    """Mask of the row whose layers are computed, for routers that are handed none."""
    shared: SharedPrompts | None = None
    """What documents of the row share that is computed now; with it nothing is cut over stages."""
    table: RouteTable | None = None
    """Routes that the step replays; None: every router chooses."""
    record: dict[int, list[torch.Tensor]] | None = None
    """Layer number -> [local tokens, top_k] int64 of each row that was read, in order; None: nothing is
    recorded."""
    has_graphs: bool = False
    """Whether the passes that are computed now are those that CUDA graphs were captured of."""

    def begin(self, seq_len: int, num_sequences: int) -> None:
        """Begin a step.  What differs between steps is written where CUDA graphs read it: they see no number
        of Python but the one of their capture."""
        self.seq_len = seq_len
        if not isinstance(self.num_sequences, torch.Tensor):
            self.num_sequences = torch.empty((), dtype=torch.float32, device=local_device())
        self.num_sequences.fill_(num_sequences)
        self.forget_losses()

    def forget_losses(self) -> None:
        for loss in self.aux_loss.values():
            loss.zero_()

    @property
    def is_plain(self) -> bool:
        """Whether routers see nothing of the row but its states and its padding."""
        return self.table is None and self.shared is None and self.record is None


def let_routes_go() -> None:
    """Have the all-to-all dispatcher let go what it has of a micro-batch's routes when the tokens are back.

    Defect of the library: it keeps them until the layer's next forward pass, and with the weights the graph
    of the router.  Where layers are computed again that graph ends in the layer's input, which stays with its
    gradient: of 48 layers, 4,096 tokens and a width of 4,096 the backward pass leaves 1.9 GB more behind.
    """
    MoEAlltoAllTokenDispatcher.combine_postprocess = _combined


_combine = MoEAlltoAllTokenDispatcher.combine_postprocess


def _combined(dispatcher: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    found: torch.Tensor = _combine(dispatcher, *args, **kwargs)
    # a replay of a graph does not set the weights again, and the library asks them for their dtype
    dispatcher.probs = dispatcher.probs.new_empty(0)
    dispatcher.routing_map = dispatcher.reversed_local_input_permutation_mapping = None
    return found


class BalancedRouter(TopKRouter):
    """Top-k router whose balancing loss and expert counts ignore padding and do not depend on the layout.

    The balancing loss is DeepSeek-V3's sequence-wise one (arXiv 2412.19437, eq. 17-20): for each sequence
    ``coeff * sum_i f_i P_i`` with ``f_i = E / (K T) * (times expert i is among the top K)`` and ``P_i`` the
    mean normalised score, averaged over the sequences of the global batch.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(config, pg_collection, **kwargs)
        if self.local_tokens_per_expert is None:  # the library counts for its selection bias only
            del self.local_tokens_per_expert
            zeros = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=local_device())
            self.register_buffer("local_tokens_per_expert", zeros, persistent=False)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits: of a bf16 model by Transformer Engine, which adds up in float32, and multiplies
        gradients of float32 in TF32, as the library does where it finds the product; so a model in float32 is
        multiplied by torch."""
        if input.dtype == torch.float32 and moe_utils.te_general_gemm is not None:
            return torch.nn.functional.linear(input, self.weight, self.bias)
        logits: torch.Tensor = super().gating(input)
        return logits

    def routing(self, logits: torch.Tensor,
                padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts.

        Args:
            logits: [tokens, 1, experts] float32 (float64 under fp64), this process's part of the micro-batch.
            padding_mask: [tokens, 1] bool, True = padding; None = the step's, where it has one.  With a table
                of routes, more columns may hold each token's place in it (`RouteTable`).

        Returns:
            weights [tokens, experts] (zero where not chosen) and the choice [tokens, experts] bool.
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        if padding_mask is None and self.config.routing_step.padding is not None:
            # the library transposes what layers are handed, see `_local_padding`
            padding_mask = self.config.routing_step.padding.T
        mask = None if padding_mask is None else padding_mask.reshape(len(logits), -1)
        valid = None if mask is None else ~mask[:, 0]
        recorded = self._recorded(mask)
        probs, routing_map = self._choose(logits, recorded)
        # a recomputed layer runs forward twice, first without gradients: only the second counts, so nothing
        # is counted double
        learns = self.training and torch.is_grad_enabled()
        if learns or self.config.routing_step.counts_evaluation:
            shared = self.config.routing_step.shared
            if shared is not None:
                valid = ~shared.padding
            if learns:
                probs = self._with_balancing_loss(probs, logits, valid, recorded)
            self._count_tokens(_of_documents(routing_map, shared), valid)
        return probs, routing_map

    def _recorded(self, mask: torch.Tensor | None) -> Recorded | None:
        """Return the routes of the tokens of a mask [tokens, ...] in this layer, where it holds places."""
        table = self.config.routing_step.table
        if table is None or mask is None or mask.shape[1] == 1:
            return None
        layer: Any = self.layer_number
        return table.find(mask, layer)

    def _choose(self, logits: torch.Tensor,
                recorded: Recorded | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and choice of the top K experts by score, plus bias where there is one (arXiv
        2412.19437, eq. 12-16), or of those that were recorded; weights are of these scores either way.

        The library's `topk_routing_with_score_function` rounds scores to float32, leaves a single expert's
        weight as it is, and takes for a group's score as many experts as each kept group would give, where
        DeepSeek-V3 takes two.
        """
        record = self.config.routing_step.record
        # kernels choose by themselves, and tell no order
        if recorded is None and record is None and serves(self.config, logits):
            return choose(self.config, logits, self.expert_bias)
        scores = self._scores(logits)
        biased = scores if self.expert_bias is None else scores + self.expert_bias
        groups, kept = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        _, chosen = torch.topk(biased if groups is None else _within_groups(biased, groups, kept),
                               self.topk, dim=1)
        if recorded is not None:
            # where nothing was recorded the router's own choice stays
            chosen = torch.where(recorded.there[:, None], recorded.experts, chosen)
        if record is not None:
            layer: Any = self.layer_number
            record.setdefault(layer, []).append(chosen.detach())
        # weights come from the scores without the bias: it moves the choice, and no output
        weights = scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
        probs = torch.zeros_like(logits).scatter(1, chosen,
                                                 weights * self.config.moe_router_topk_scaling_factor)
        return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(dim=-1) if self.score_function == "softmax" else logits.sigmoid()

    def _count_tokens(self, routing_map: torch.Tensor, valid: torch.Tensor | None) -> None:
        with torch.no_grad():
            chosen = routing_map if valid is None else routing_map & valid[:, None]
            self.local_tokens_per_expert += chosen.sum(dim=0)

    def _with_balancing_loss(self, probs: torch.Tensor, logits: torch.Tensor, valid: torch.Tensor | None,
                             recorded: Recorded | None) -> torch.Tensor:
        coeff = self.get_aux_loss_coeff("seq_aux_loss")
        step: RoutingStep = self.config.routing_step
        if coeff == 0:
            return probs
        if valid is None:
            valid = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        row, num_rows = self._rows(len(valid), step, logits.device)
        scores, counts = self._normalised(logits, valid, row, num_rows, recorded)
        scores = scores * valid[:, None]
        tokens = scores.new_zeros(num_rows).index_add_(0, row, valid.to(scores.dtype))
        if self.tp_cp_group.size() > 1:
            # counts have no gradient and may be summed over the group; scores have one and are not
            both = torch.cat([counts, tokens[:, None]], dim=1)
            torch.distributed.all_reduce(both, group=self.tp_cp_group)
            counts, tokens = both[:, :-1], both[:, -1]
        # a sequence of padding alone has no tokens, and then no loss either
        tokens = tokens.clamp(min=1)[:, None]
        frequency = counts * (logits.shape[1] / self.topk) / tokens
        # linear in the local scores, so each process contributes its own tokens' part and gradients simply
        # add up
        mean_score = scores.new_zeros(num_rows, logits.shape[1]).index_add(0, row, scores) / tokens
        loss = coeff * (frequency * mean_score).sum() / step.num_sequences
        layer: Any = self.layer_number
        if layer not in step.aux_loss:
            step.aux_loss[layer] = torch.zeros_like(loss)
        step.aux_loss[layer] += loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def _normalised(self, logits: torch.Tensor, valid: torch.Tensor, row: torch.Tensor, num_rows: int,
                    recorded: Recorded | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores [tokens, experts] that sum to 1, and how often each expert is among the top K of a
        sequence's local tokens, [sequences, experts].

        The top K by score are the choice where there are neither selection bias nor groups, and then a
        recorded choice stands in their place.  Else the formula looks at scores which did not choose, and a
        record tells nothing of them.
        """
        experts = logits.shape[1]
        is_choice = self.expert_bias is None and self.config.moe_router_num_groups is None
        replayed = recorded if is_choice else None
        if replayed is None and serves(self.config, logits):
            scores, chosen = (_of_documents(found, self.config.routing_step.shared)
                              for found in balancing_scores(self.config, logits))
            counted = (chosen & valid[:, None]).to(scores.dtype)
            return scores, scores.new_zeros(num_rows, experts).index_add_(0, row, counted)
        scores = self._scores(logits)
        scores = scores / (scores.sum(dim=-1, keepdim=True) + EPSILON)  # a softmax sums to 1 already
        top = scores.topk(self.topk, dim=-1).indices
        if replayed is not None:
            top = torch.where(replayed.there[:, None], replayed.experts, top)
        scores, top = (_of_documents(found, self.config.routing_step.shared) for found in (scores, top))
        # one scatter for all sequences: bin = sequence x experts + expert
        bins = row[:, None] * experts + top
        counted = valid[:, None].expand(bins.shape).to(scores.dtype)
        counts = scores.new_zeros(num_rows * experts).index_add_(0, bins.flatten(), counted.flatten())
        return scores, counts.view(num_rows, experts)

    def _rows(self, num_tokens: int, step: RoutingStep, device: torch.device) -> tuple[torch.Tensor, int]:
        """Return each local token's sequence within the micro-batch, and the number of sequences."""
        split = context.size() * (self.tp_group.size() if self.config.sequence_parallel else 1)
        key = num_tokens, step.seq_len
        if key not in step.rows:
            step.rows[key] = context.row_index(num_tokens * split, self.config.sequence_parallel,
                                               device) // step.seq_len
        return step.rows[key], max(1, num_tokens * split // step.seq_len)


def _within_groups(scores: torch.Tensor, num_groups: int, num_kept: int) -> torch.Tensor:
    """Return scores [tokens, experts] with -infinity outside of each token's best groups, of which a group's
    score is the sum of its two best experts' (node-limited routing, DeepSeek-V3, arXiv 2412.19437, section
    2.1.2; the two are of its published code and of transformers')."""
    grouped = scores.unflatten(1, (num_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(num_kept, dim=-1).indices
    is_outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(is_outside[..., None], -torch.inf).flatten(1)


def _of_documents(numbers: torch.Tensor, shared: SharedPrompts | None) -> torch.Tensor:
    """Return numbers [tokens, ...] of each document's tokens: what documents share counts for each."""
    return numbers if shared is None else numbers[shared.source]
