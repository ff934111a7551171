"""The adapters of a run of layers: hung behind the library's linear layers and its embedding, which stay what
they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_sov.config import LoraConfig, ModelConfig
from megatron_sov.mcore.model.lora import OUTPUT_HEAD, Factors, LinearAdapter
from megatron_sov.mcore.model.lora_embedding import EmbeddingAdapter, behind_embedding
from megatron_sov.models.adapters import Adapted, adapted_modules

_EMBEDDING = "embedding.word_embeddings"


class Adapters(torch.nn.Module):
    """All adapters of a chunk, which is their owner; the layers know them by hooks alone."""

    def __init__(self, chunk: Any, model: ModelConfig, lora: LoraConfig) -> None:
        """Make adapters of what a chunk holds of the model, and hang them behind its layers."""
        super().__init__()
        self.linears = torch.nn.ModuleList()
        self.head: LinearAdapter | None = None
        """Of the output head, whose weight losses take."""
        self.embedding: EmbeddingAdapter | None = None
        by_linear: dict[str, list[Adapted]] = {}
        for of in adapted_modules(model, lora):
            by_linear.setdefault(of.linear, []).append(of)
        for layer in chunk.decoder.layers:
            prefix = f"decoder.layers.{layer.layer_number - 1}."
            for linear, modules in by_linear.items():
                if linear.startswith(prefix):
                    self._hang(layer, linear.removeprefix(prefix), modules, lora, chunk.config)
        if _EMBEDDING in by_linear and chunk.pre_process:
            words = chunk.embedding.word_embeddings
            self.embedding = EmbeddingAdapter(by_linear[_EMBEDDING][0], lora, chunk.config, len(words.weight))
            words.register_forward_hook(behind_embedding(self.embedding))
        if OUTPUT_HEAD in by_linear and chunk.post_process:
            self.head = LinearAdapter(by_linear[OUTPUT_HEAD], lora, chunk.config,
                                      rows=len(chunk.output_layer.weight))

    def _hang(self, layer: Any, path: str, modules: list[Adapted], lora: LoraConfig, config: Any) -> None:
        """Have adapters follow one of a layer's linears, or each expert's."""
        def made(expert: int | None = None) -> LinearAdapter:
            adapter = LinearAdapter(modules, lora, config, expert)
            self.linears.append(adapter)
            return adapter

        if not modules[0].num_experts:
            layer.get_submodule(path).register_forward_hook(_behind(made()))
            return
        experts, linear = layer.mlp.experts, path.rpartition(".")[2]
        count = experts.num_local_experts
        first = parallel_state.get_expert_model_parallel_rank() * count
        adapters = [made(first + i) for i in range(count)]
        if hasattr(experts, "local_experts"):
            for expert, adapter in zip(experts.local_experts, adapters, strict=True):
                expert.get_submodule(linear).register_forward_hook(_behind(adapter))
        else:
            experts.get_submodule(linear).register_forward_hook(_behind_grouped(adapters))

    def factors(self) -> Iterator[Factors]:
        """Yield the factors of all adapted modules."""
        yield from (module for module in self.modules() if isinstance(module, Factors))

    def set_magnitudes(self, chunk: Any) -> None:
        """Set the trained lengths (DoRA) of this owner's adapters to those of the frozen rows."""
        for module in chunk.modules():
            for hook in module._forward_hooks.values():
                if isinstance(adapter := getattr(hook, "adapter", None), LinearAdapter):
                    adapter.set_magnitudes(module.weight)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing: `local_shards` asks the factors themselves."""
        return {}


def _behind(adapter: LinearAdapter) -> Callable[..., Any]:
    """Return the hook that puts an adapter's output in the place of a linear's."""
    def hook(module: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> tuple[Any, Any]:
        output, skipped_bias = outputs
        bias = getattr(module, "bias", None)
        has_bias = bias is not None and bias.numel() > 0 and skipped_bias is None
        adapted = adapter.applied(module.weight, _normed(module, inputs[0]), output,
                                  bias if has_bias else None)
        return adapted, skipped_bias

    hook.adapter = adapter  # type: ignore[attr-defined]
    return hook


def _normed(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Return what a linear multiplies its weight with: Transformer Engine has the norm before it inside."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return inputs
    return torch.nn.functional.rms_norm(inputs, weight.shape, weight, module.eps)


def _behind_grouped(adapters: list[LinearAdapter]) -> Callable[..., Any]:
    """Return the hook of Transformer Engine's linear of all experts, whose tokens follow one another."""
    def hook(_: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> tuple[Any, Any]:
        tokens, counts = inputs[:2]
        output, skipped_bias = outputs
        added = [adapter(part) for adapter, part in zip(adapters, tokens.split(list(counts)), strict=True)]
        return output + torch.cat(added), skipped_bias

    return hook
