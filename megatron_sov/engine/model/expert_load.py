"""What the routers of a model did: tokens per expert, and the biases by which experts are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.parallel.collectives import all_reduce_world


class ExpertLoad:
    """Tokens per expert and layer, collected before the library resets its counters,
    and the routers' selection biases."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        architecture = model.architecture
        # behind the trunk's layers stand those for prediction, whose routers have numbers of their own
        num_layers = architecture.num_layers + architecture.num_mtp_moe_layers()
        self._shape = num_layers + 1, architecture.num_experts
        self._counts: dict[int, torch.Tensor] = {}
        self._gathered: torch.Tensor | None = None
        self._biases_before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.before_sync: Callable[[], None] = lambda: None
        """Called when this process has its gradients, before it waits for those of others."""

    def _routers(self) -> list[Any]:
        return [m for m in self._model.modules() if hasattr(m, "local_tokens_per_expert")]

    def finalize(self, chunks: list[Any], num_tokens: torch.Tensor | None = None, pg_collection: Any = None,
                 force_all_reduce: bool | None = False) -> None:
        """Sum gradients over processes and update router biases (the library's `finalize_model_grads_func`).

        The division by a token count is left out: losses arrive divided by their own global denominators.
        """
        self.before_sync()
        self._gathered = None
        routers = self._routers()
        # before the library's own finalize, which updates biases by these counts and sets them to zero
        self._counts = {router.layer_number: router.local_tokens_per_expert.clone() for router in routers}
        self._biases_before = [(r.expert_bias, r.expert_bias.clone())
                               for r in routers if r.expert_bias is not None]
        finalize_model_grads(chunks, None, pg_collection, bool(force_all_reduce))
        if self._model.lora.on:
            self.undo()  # a frozen model's routers choose as they did
        self.forget()  # the library forgets the counts of routers with a selection bias only

    def undo(self) -> None:
        """Take back what `finalize` did to the biases, since the step is refused."""
        for bias, before in self._biases_before:
            bias.copy_(before)

    def forget(self) -> None:
        for router in self._routers():
            router.local_tokens_per_expert.zero_()

    def gather(self) -> torch.Tensor:
        """Return [layers, experts] token counts of the last step, summed over all processes once (zero
        rows: dense layers); the last row is the prediction layer's, where it has experts."""
        if self._gathered is None:
            self._gathered = self._sum(self._counts)
        return self._gathered

    def during(self, action: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
        """Do something with the model in evaluation mode; returns its result and the [layers,
        experts] token counts of it."""
        step = self._model.config.routing_step
        self.forget()
        step.counts_evaluation = True
        try:
            result = action()
        finally:
            step.counts_evaluation = False
        counts = {router.layer_number: router.local_tokens_per_expert.clone() for router in self._routers()}
        self.forget()
        return result, self._sum(counts)

    def biases(self) -> torch.Tensor:
        """Return [layers, experts] selection biases; zero rows where a layer has none."""
        with_bias = {r.layer_number: r.expert_bias for r in self._routers() if r.expert_bias is not None}
        ones = {layer: torch.ones_like(bias) for layer, bias in with_bias.items()}
        both = torch.stack([self._rows(with_bias), self._rows(ones)])
        # a bias is on every replica, and counts on each process are its own: biases are a mean over holders,
        # counts a sum
        total, holders = all_reduce_world(both)[:, 1:]
        return total / holders.clamp(min=1)

    def _sum(self, counts: dict[int, torch.Tensor]) -> torch.Tensor:
        return all_reduce_world(self._rows(counts))[1:]

    def _rows(self, by_layer: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return [layers + 1, experts] float64; the first row belongs to no layer,
        since layers count from 1."""
        rows = torch.zeros(self._shape, dtype=torch.float64)
        if by_layer:
            rows[list(by_layer)] = torch.stack(list(by_layer.values())).double().cpu()
        return rows
