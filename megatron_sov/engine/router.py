"""Top-k routing with layout-independent expert counts and balancing loss; `ExpertLoad` updates the biases.

`BalancedRouter` replaces the router of Megatron-Core 0.19.2 for three reasons. With per-token losses
Megatron-Core multiplies auxiliary losses by the tokens of the micro-batch, for a division by all tokens that
our losses do not make; its expert counts cannot take a padding mask (shapes [tokens] and [tokens, experts]
do not broadcast); and it does not normalize the weight of a single chosen expert. Test:
`test_router.py::test_routing_is_the_formula_at_every_layout_without_padding`."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_sov.engine.fused_routing import (
    choose_experts_fused, compute_balancing_scores, uses_fused_routing)
from megatron_sov.engine.model.attention import SharedPrompts
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.engine.quantile_bias import count_required_biases
from megatron_sov.engine.route_replay import LayerRoutes, RouteTable
from megatron_sov.model.config.model import QUANTILE_BINS

EPSILON = 1e-20
"""Added to the sum of weights before division, as in transformers."""
_original_combine = MoEAlltoAllTokenDispatcher.combine_postprocess


class BalancedRouter(TopKRouter):
    """Top-k router with expert counts and balancing loss that ignore padding and do not depend on the layout.

    The balancing loss is DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, eq. 17-20): for each sequence
    ``coeff * sum_i f_i P_i`` with ``f_i = E / (K T) * (number of tokens with expert i in the top K)`` and
    ``P_i`` the mean normalized score, averaged over the sequences of the global batch."""

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(config, pg_collection, **kwargs)
        if self.local_tokens_per_expert is None:  # Megatron-Core counts only for a selection bias
            del self.local_tokens_per_expert
            zeros = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=get_local_device())
            self.register_buffer("local_tokens_per_expert", zeros, persistent=False)
        if config.router_bias_update == "quantile":
            zeros = torch.zeros(config.num_moe_experts, QUANTILE_BINS, dtype=torch.int32,
                                device=get_local_device())
            self.register_buffer("required_biases", zeros, persistent=False)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits. Transformer Engine accumulates bf16 products in float32, but multiplies float32 in
        TF32 if available, so float32 models use torch."""
        if input.dtype == torch.float32 and moe_utils.te_general_gemm is not None:
            return torch.nn.functional.linear(input, self.weight, self.bias)
        logits: torch.Tensor = super().gating(input)
        return logits

    def routing(self, logits: torch.Tensor,
                padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts.

        Args:
            logits: [tokens, 1, experts] float32 (float64 under fp64) of the local tokens.
            padding_mask: [tokens, 1] bool, True = padding. None: `routing_step.padding`, if set. With a route
                table, more columns hold the bits of each token's index (`RouteTable`).

        Returns:
            Weights [tokens, experts] (zero if not chosen) and the choice [tokens, experts] bool.
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        if padding_mask is None and self.config.routing_step.padding is not None:
            # Megatron-Core transposes the mask that layers receive, see `_local_padding`
            padding_mask = self.config.routing_step.padding.T
        mask = None if padding_mask is None else padding_mask.reshape(len(logits), -1)
        valid = None if mask is None else ~mask[:, 0]
        recorded = self._find_recorded(mask)
        probs, routing_map = self._choose_experts(logits, recorded)
        # a recomputed layer runs forward twice, first without gradients: only the second pass counts tokens
        learns = self.training and torch.is_grad_enabled()
        if learns or self.config.routing_step.counts_evaluation:
            shared = self.config.routing_step.shared
            if shared is not None:
                valid = ~shared.padding
            if learns:
                probs = self._attach_balancing_loss(probs, logits, valid, recorded)
                if self.config.router_bias_update == "quantile":
                    scores = _expand_documents(self._compute_scores(logits.detach()), shared)
                    self.required_biases += count_required_biases(scores, self.expert_bias, self.topk, valid)
            self._count_tokens(_expand_documents(routing_map, shared), valid)
        return probs, routing_map

    def _find_recorded(self, mask: torch.Tensor | None) -> LayerRoutes | None:
        """Return the recorded routes in this layer for a mask [tokens, ...], or None without indices."""
        table = self.config.routing_step.table
        if table is None or mask is None or mask.shape[1] == 1:
            return None
        layer: Any = self.layer_number
        return table.decode_routes(mask, layer)

    def _choose_experts(self, logits: torch.Tensor,
                        recorded: LayerRoutes | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and choice of the top K experts by score plus bias (arXiv 2412.19437, eq. 12-16), or
        of the recorded experts; weights use the scores without bias.

        Megatron-Core's `topk_routing_with_score_function` rounds scores to float32, does not normalize a
        single expert's weight, and computes a group's score from as many experts as each chosen group
        contributes; DeepSeek-V3 uses two.
        Test: `test_router.py::test_experts_are_chosen_within_the_best_groups_as_in_transformers`."""
        record = self.config.routing_step.record
        # the kernels neither replay nor return the experts' order
        if recorded is None and record is None and uses_fused_routing(self.config, logits):
            return choose_experts_fused(self.config, logits, self.expert_bias)
        scores = self._compute_scores(logits)
        biased = scores if self.expert_bias is None else scores + self.expert_bias
        groups, num_kept_groups = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        if groups is not None:
            biased = _limit_to_groups(biased, groups, num_kept_groups)
        _, chosen = torch.topk(biased, self.topk, dim=1)
        if recorded is not None:
            # tokens without a record keep the router's choice
            chosen = torch.where(recorded.is_recorded[:, None], recorded.experts, chosen)
        if record is not None:
            layer: Any = self.layer_number
            record.setdefault(layer, []).append(chosen.detach())
        # the bias affects the choice, not the weights
        weights = scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
        probs = torch.zeros_like(logits).scatter(1, chosen,
                                                 weights * self.config.moe_router_topk_scaling_factor)
        return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)

    def _compute_scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(dim=-1) if self.score_function == "softmax" else logits.sigmoid()

    def _count_tokens(self, routing_map: torch.Tensor, valid: torch.Tensor | None) -> None:
        with torch.no_grad():
            chosen = routing_map if valid is None else routing_map & valid[:, None]
            self.local_tokens_per_expert += chosen.sum(dim=0)

    def _attach_balancing_loss(self, probs: torch.Tensor, logits: torch.Tensor, valid: torch.Tensor | None,
                               recorded: LayerRoutes | None) -> torch.Tensor:
        coeff = self.get_aux_loss_coeff("seq_aux_loss")
        step: RoutingStep = self.config.routing_step
        if coeff == 0:
            return probs
        if valid is None:
            valid = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        index, num_local = self._get_sequence_index(len(valid), step, logits.device)
        scores, counts = self._compute_balancing_terms(logits, valid, index, num_local, recorded)
        tokens = _sum_by_sequence(valid[:, None].to(scores.dtype), index, num_local)
        if self.tp_cp_group.size() > 1:
            # counts have no gradient, so the group may sum them; scores have a gradient and stay local
            counts_and_tokens = torch.cat([counts, tokens], dim=1)
            torch.distributed.all_reduce(counts_and_tokens, group=self.tp_cp_group)
            counts, tokens = counts_and_tokens[:, :-1], counts_and_tokens[:, -1:]
        tokens = tokens.clamp(min=1)  # a sequence of padding only has no tokens and no loss
        frequency = counts * (logits.shape[1] / self.topk) / tokens
        # linear in the local scores: each process contributes its tokens' part, and gradients add up
        mean_score = _sum_by_sequence(scores * valid[:, None], index, num_local) / tokens
        loss = coeff * (frequency * mean_score).sum() / step.num_sequences
        layer: Any = self.layer_number
        if layer not in step.aux_loss:
            step.aux_loss[layer] = torch.zeros_like(loss)
        step.aux_loss[layer] += loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def _compute_balancing_terms(self, logits: torch.Tensor, valid: torch.Tensor,
                                 index: torch.Tensor | None, num_local: int,
                                 recorded: LayerRoutes | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores [tokens, experts] that sum to 1, and counts [sequences, experts] of local tokens with
        the expert in their top K.

        Without selection bias and groups the top K by score are the choice, so recorded routes replace them.
        With bias or groups the formula uses scores that did not decide the choice, and records do not apply.
        """
        is_choice = self.expert_bias is None and self.config.moe_router_num_groups is None
        replayed = recorded if is_choice else None
        if replayed is None and uses_fused_routing(self.config, logits):
            scores, chosen = (_expand_documents(values, self.config.routing_step.shared)
                              for values in compute_balancing_scores(self.config, logits))
            return scores, _sum_by_sequence((chosen & valid[:, None]).to(scores.dtype), index, num_local)
        scores = self._compute_scores(logits)
        scores = scores / (scores.sum(dim=-1, keepdim=True) + EPSILON)  # no effect after a softmax
        top = scores.topk(self.topk, dim=-1).indices
        if replayed is not None:
            top = torch.where(replayed.is_recorded[:, None], replayed.experts, top)
        scores, top = (_expand_documents(values, self.config.routing_step.shared) for values in (scores, top))
        counted = torch.zeros_like(scores).scatter(1, top, valid[:, None].expand(top.shape).to(scores.dtype))
        return scores, _sum_by_sequence(counted, index, num_local)

    def _get_sequence_index(self, num_tokens: int, step: "RoutingStep",
                            device: torch.device) -> tuple[torch.Tensor | None, int]:
        """Return the local index of each local token's sequence, [tokens] int64 (None: all local sequences
        are whole), and the number of local sequences."""
        split = context.get_cp_size() * (self.tp_group.size() if self.config.sequence_parallel else 1)
        num_rows, rest = divmod(num_tokens * split, step.seq_len)
        if not rest and (num_rows == 1 or split == 1):
            return None, num_rows
        if (key := (num_tokens, step.seq_len)) not in step.rows:
            step.rows[key] = context.compute_row_index(num_tokens * split, self.config.sequence_parallel,
                                                       device) // step.seq_len
        return step.rows[key], max(1, num_rows)


def _sum_by_sequence(values: torch.Tensor, index: torch.Tensor | None, num_local: int) -> torch.Tensor:
    """Sum values [tokens, columns] by sequence -> [num_local, columns]; see `_get_sequence_index`. Sums of
    whole sequences are bitwise repeatable on GPUs, unlike `index_add`."""
    if index is None:
        return values.view(num_local, -1, values.shape[1]).sum(dim=1)
    return values.new_zeros(num_local, values.shape[1]).index_add(0, index, values)


class ExpertSpill:
    """Moves saved activations of overloaded routed experts to host memory until the backward pass.

    An expert layer's pass keeps its activations on the device while all pending passes of this process hold
    at most `limit` times the mean tokens per expert-parallel process there. Results keep their bits. The
    paged stash of Megatron-Core 0.19.2 (`moe_paged_stash`) has the same purpose, but needs
    `moe_expert_rank_capacity_factor`: HybridEP with fused experts, which drops tokens above the capacity, or
    NCCL EP, which fails above it."""

    def __init__(self, limit: float) -> None:
        """Create the spill; `limit` is `gpu.expert_spill`."""
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget passes without a backward pass, at the start of a step."""
        self._num_pending, self._stored_load = 0, 0.0
        self.num_spilled = 0
        """Layer passes whose activations went to host memory in this step."""

    def attach(self, layer: Any) -> None:
        """Wrap the routed experts' forward pass of a Megatron-Core `MoELayer`."""
        experts, config, compute = layer.experts, layer.config, layer.experts.forward
        copies = config.moe_router_topk * config.expert_tensor_parallel_size
        weight_shapes = {shape for weight in experts.parameters()
                         for shape in (weight.shape, weight.shape[::-1])}

        def compute_experts(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """[routed tokens, hidden] -> ([routed tokens, hidden], bias)."""
            if not torch.is_grad_enabled():
                return compute(tokens, *args, **kwargs)
            # 1: as many routed tokens as each process gets if all experts are equally loaded
            load = len(tokens) / (layer.token_dispatcher.hidden_shape[:-1].numel() * copies)
            spills = self._stored_load + load > self._limit * (self._num_pending + 1)
            with _store_on_host(weight_shapes) if spills else contextlib.nullcontext():
                output, bias = compute(tokens, *args, **kwargs)
            stored_load = 0.0 if spills else load
            self._count_pass(1, stored_load)
            self.num_spilled += spills
            output.register_hook(lambda gradient: self._count_pass(-1, -stored_load))
            return output, bias

        experts.forward = compute_experts

    def _count_pass(self, num_passes: int, load: float) -> None:
        """Add a pending pass and its load on the device; both are negative after its backward pass."""
        self._num_pending += num_passes
        self._stored_load += load


def _store_on_host(weight_shapes: set[torch.Size]) -> Any:
    """Return a context in which autograd saves tensors in pinned host memory, except weights and tensors with
    a shape in `weight_shapes` (quantized weights)."""
    def copy_to_host(tensor: torch.Tensor) -> tuple[torch.device | None, torch.Tensor]:
        if isinstance(tensor, torch.nn.Parameter) or tensor.shape in weight_shapes or hasattr(
                tensor, "_quantizer"):
            return None, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        if tensor.is_cuda:  # a tensor from the exchange's stream must live until this stream has copied it
            tensor.record_stream(torch.cuda.current_stream())
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def copy_to_device(stored: tuple[torch.device | None, torch.Tensor]) -> torch.Tensor:
        device, tensor = stored
        return tensor if device is None else tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(copy_to_host, copy_to_device)


@dataclass
class RoutingStep:
    """Optimizer step state, shared by the process's `BalancedRouter` modules.

    The config holds it as `routing_step`. Inputs are constant within a step, so recomputation in the backward
    pass sees the values of the forward pass."""

    seq_len: int = 0
    """Tokens per sequence; a micro-batch is a row of whole sequences."""
    num_sequences: int | torch.Tensor = 1
    """Sequences in the global batch, over which the balancing loss is averaged."""
    aux_loss: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer number -> local part of the step's balancing loss, always in the same memory."""
    counts_evaluation: bool = False
    """Whether routers count tokens in evaluation mode as well."""
    rows: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """(local tokens, sequence tokens) -> [local tokens] int64 sequence index, shared by all layers."""
    padding: torch.Tensor | None = None
    """Current row's padding mask, for routers without a mask argument."""
    shared: SharedPrompts | None = None
    """Current row's `SharedPrompts`; requires a model without pipeline stages."""
    table: RouteTable | None = None
    """Routes that the step replays. None: routers choose."""
    record: dict[int, list[torch.Tensor]] | None = None
    """Layer number -> [local tokens, top_k] int64 per row read, in order. None: no recording."""
    has_graphs: bool = False
    """Whether the current passes use the captured CUDA graphs."""
    spill: ExpertSpill | None = None
    """Moves activations of overloaded experts to host memory; None: they stay on the device."""

    def begin(self, seq_len: int, num_sequences: int) -> None:
        """Start a step. Values that change are written to tensors: CUDA graphs replay Python numbers from
        their capture."""
        self.seq_len = seq_len
        if not isinstance(self.num_sequences, torch.Tensor):
            self.num_sequences = torch.empty((), dtype=torch.float32, device=get_local_device())
        self.num_sequences.fill_(num_sequences)
        self.reset_losses()
        if self.spill is not None:
            self.spill.reset()

    def reset_losses(self) -> None:
        for loss in self.aux_loss.values():
            loss.zero_()

    @property
    def is_plain(self) -> bool:
        """Whether routers read only hidden states and padding."""
        return self.table is None and self.shared is None and self.record is None


def patch_dispatcher_combine() -> None:
    """Make the all-to-all dispatcher free a micro-batch's routes after the combine.

    Megatron-Core keeps the routes, and with them the router's graph, until the layer's next forward pass.
    With recomputation that graph ends in the layer's input, which stays with its gradient: for 48 layers,
    4,096 tokens and hidden size 4,096 the backward pass leaves 1.9 GB more. Test:
    `test_router.py::test_a_pass_leaves_no_routes_and_so_no_inputs_of_recomputed_layers`."""
    MoEAlltoAllTokenDispatcher.combine_postprocess = _combine_and_free_routes


def _combine_and_free_routes(dispatcher: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    output: torch.Tensor = _original_combine(dispatcher, *args, **kwargs)
    # a graph replay does not set the weights again, and Megatron-Core reads their dtype
    dispatcher.probs = dispatcher.probs.new_empty(0)
    dispatcher.routing_map = dispatcher.reversed_local_input_permutation_mapping = None
    return output


def _limit_to_groups(scores: torch.Tensor, num_groups: int, num_kept: int) -> torch.Tensor:
    """Set scores [tokens, experts] outside each token's best groups to -inf (node-limited routing).

    A group's score is the sum of its two best experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; the
    number two is from its published code and transformers)."""
    grouped = scores.unflatten(1, (num_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(num_kept, dim=-1).indices
    is_outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(is_outside[..., None], -torch.inf).flatten(1)


def _expand_documents(values: torch.Tensor, shared: SharedPrompts | None) -> torch.Tensor:
    """Expand values [tokens, ...] so that `SharedPrompts` tokens appear once per document."""
    return values if shared is None else values[shared.source]
