"""The adapters of a run of layers: hung behind the library's linear layers and its embedding, which stay what
they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_sov.config import LoraConfig, ModelConfig
from megatron_sov.mcore.model.lora import OUTPUT_HEAD, Factors, LinearAdapter
from megatron_sov.models.adapters import Adapted, adapted_modules

_EMBEDDING = "embedding.word_embeddings"


# A low-rank adapter of the token embedding, at any layout: row t of E becomes that of E + alpha / rank B A.
# B has a row per token id and is cut as the embedding is; all of A is on every process. What travels
# between processes is [tokens, rank]. A's gradient is, as a norm's, that of the process's own tokens under
# sequence parallelism, and else the same on all of them.


class EmbeddingAdapter(torch.nn.Module):
    """The adapter of a chunk's embedding."""

    def __init__(self, of: Adapted, lora: LoraConfig, config: Any, rows: int) -> None:
        """Make the factors; their values are set by `init`.

        Args:
            of: the embedding.
            lora: rank and scale.
            config: the library's TransformerConfig.
            rows: this process's rows with those that belong to no token.
        """
        super().__init__()
        self.scale = lora.alpha / lora.rank
        self.factors = Factors(of, lora, config, None, rows)

    def forward(self, tokens: torch.Tensor, embedding: Any) -> torch.Tensor:
        """Return what is added to the output of the library's embedding of tokens [1, n] (or more rows)."""
        b, group = self.factors.B, embedding.tp_group
        places = tokens - embedding.vocab_start_index
        elsewhere = (places < 0) | (places >= len(b))
        places = places.masked_fill(elsewhere, 0)
        low = b[places] if embedding.deterministic_mode else torch.nn.functional.embedding(places, b)
        low = low.masked_fill(elsewhere[..., None], 0)
        if embedding.reduce_scatter_embeddings:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                low.transpose(0, 1).contiguous(), group=group)
        elif group.size() > 1:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group)
        return low @ self.factors.A * self.scale


def behind_embedding(adapter: EmbeddingAdapter) -> Callable[..., torch.Tensor]:
    """Return the hook that adds an adapter's output to an embedding's."""
    def hook(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + adapter(inputs[0], module)

    return hook


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
