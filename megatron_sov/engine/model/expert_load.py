"""Count tokens per expert, and update the selection biases of `BalancedRouter` modules after each step."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.parallel.collectives import all_reduce_world
from megatron_sov.engine.quantile_bias import set_quantile_biases


class ExpertLoad:
    """Tokens per expert and layer, copied before Megatron-Core resets its counters, and selection biases."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        architecture = model.architecture
        # MTP layers follow the trunk's, with layer numbers of their own
        num_layers = architecture.num_layers + architecture.num_mtp_moe_layers()
        self._shape = num_layers + 1, architecture.num_experts
        self._counts: dict[int, torch.Tensor] = {}
        self._gathered: torch.Tensor | None = None
        self._biases_before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.before_sync: Callable[[], None] = lambda: None
        """Called once the local gradients are complete, before the wait for other processes."""

    def _list_routers(self) -> list[Any]:
        return [m for m in self._model.modules() if hasattr(m, "local_tokens_per_expert")]

    def finalize_gradients(self, chunks: list[Any], num_tokens: torch.Tensor | None = None,
                           pg_collection: Any = None, force_all_reduce: bool | None = False) -> None:
        """Reduce gradients and update router biases (Megatron-Core's `finalize_model_grads_func`).

        `num_tokens` is ignored: losses are already divided by their global denominators."""
        self.before_sync()
        self._gathered = None
        routers = self._list_routers()
        # before `finalize_model_grads`, which updates biases from the counts and zeroes the counts
        self._counts = {router.layer_number: router.local_tokens_per_expert.clone() for router in routers}
        self._biases_before = [(r.expert_bias, r.expert_bias.clone())
                               for r in routers if r.expert_bias is not None]
        finalize_model_grads(chunks, None, pg_collection, bool(force_all_reduce))
        if self._model.lora.on:
            self.restore_biases()  # a frozen model keeps its routing
        elif self._model.config.router_bias_update == "quantile":
            set_quantile_biases(routers)
        self.reset_counts()  # Megatron-Core zeroes only the counts of routers with a selection bias

    def restore_biases(self) -> None:
        """Restore the biases from before `finalize`, for a rejected step."""
        for bias, before in self._biases_before:
            bias.copy_(before)

    def reset_counts(self) -> None:
        for router in self._list_routers():
            router.local_tokens_per_expert.zero_()
            if router.config.router_bias_update == "quantile":
                router.required_biases.zero_()

    def gather(self) -> torch.Tensor:
        """Return the last step's token counts [layers, experts] float64, summed over all processes and
        cached. Dense layers have zero rows; the last row counts the MTP layer's experts, if any."""
        if self._gathered is None:
            self._gathered = self._sum_counts(self._counts)
        return self._gathered

    def count_during(self, action: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
        """Call `action` in evaluation mode; return its result and the token counts [layers, experts]."""
        step = self._model.config.routing_step
        self.reset_counts()
        step.counts_evaluation = True
        try:
            result = action()
        finally:
            step.counts_evaluation = False
        counts = {router.layer_number: router.local_tokens_per_expert.clone()
                  for router in self._list_routers()}
        self.reset_counts()
        return result, self._sum_counts(counts)

    def biases(self) -> torch.Tensor:
        """Return selection biases [layers, experts] float64; zero rows for layers without biases."""
        with_bias = {r.layer_number: r.expert_bias for r in self._list_routers() if r.expert_bias is not None}
        ones = {layer: torch.ones_like(bias) for layer, bias in with_bias.items()}
        biases_and_ones = torch.stack([self._stack_layers(with_bias), self._stack_layers(ones)])
        # every replica holds the same bias, but its own counts: average biases, sum counts
        total, holders = all_reduce_world(biases_and_ones)[:, 1:]
        return total / holders.clamp(min=1)

    def _sum_counts(self, counts: dict[int, torch.Tensor]) -> torch.Tensor:
        return all_reduce_world(self._stack_layers(counts))[1:]

    def _stack_layers(self, by_layer: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return [layers + 1, experts] float64; row 0 stays zero, since layer numbers start at 1."""
        rows = torch.zeros(self._shape, dtype=torch.float64)
        if by_layer:
            rows[list(by_layer)] = torch.stack(list(by_layer.values())).double().cpu()
        return rows
