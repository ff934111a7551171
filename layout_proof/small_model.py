"""A user's model builder with small widths: a layout's errors do not depend on widths."""

import dataclasses
import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from layout_proof import te_layers  # noqa: F401  (first, before any import of megatron)
from layout_proof.layout import CannotPlay, Layout
from layout_proof.simulated_messages import format_failure
from layout_proof.simulated_world import SimulatedRanks

# after `te_layers`
from megatron.core import parallel_state, tensor_parallel  # isort: skip
from megatron.core.models.gpt.gpt_model import GPTModel  # isort: skip
from megatron.core.models.hybrid.hybrid_model import HybridModel  # isort: skip
from megatron.core.transformer.utils import is_layer_window_attention  # isort: skip

HEAD_DIM, HIDDEN_SIZE, MOE_WIDTH = 8, 32, 8
MAX_LAYERS_PER_CHUNK = 4
STOCK_MODELS: Any = (GPTModel, HybridModel)
Builder = Callable[..., Any]
"""`build(config=None, pre_process=True, post_process=True, vp_stage=None)` -> model, or (model, loss)."""
SWITCHED_OFF = (
    "bf16", "fp16", "enable_autocast", "apply_rope_fusion", "bias_activation_fusion",
    "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion",
    "cross_entropy_loss_fusion", "moe_permute_fusion", "moe_router_fusion", "moe_grouped_gemm",
    "use_te_op_fuser", "tp_comm_overlap", "cpu_offloading", "enable_cuda_graph", "external_cuda_graph",
    "overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "moe_shared_expert_overlap",
    "fine_grained_activation_offloading", "barrier_with_L1_time", "hidden_dropout", "attention_dropout",
    "use_mamba_mem_eff_path", "moe_paged_stash", "persist_layer_norm", "memory_efficient_layer_norm")
"""Fields set to False, 0 or None: kernels, low precision, overlap and random masks."""

UNEVEN_STAGES = ("pipeline_model_parallel_layout", "num_layers_in_first_pipeline_stage",
                 "num_layers_in_last_pipeline_stage", "account_for_embedding_in_pipeline_split",
                 "account_for_loss_in_pipeline_split")


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """The builder, with small arguments for ranks."""

    builder: Builder
    config: Any  # `TransformerConfig` with small widths, for one rank
    arguments: dict[str, Any]  # small values for the arguments of `GPTModel` or `HybridModel`
    row_tokens: int

    def use_small_arguments(self) -> Any:
        """Context manager: models get `arguments`; a single stage has the pattern without `|`."""
        def replace_arguments(arguments: dict[str, Any]) -> None:
            arguments.update(self.arguments)
            if arguments["config"].pipeline_model_parallel_size == 1 and "hybrid_layer_pattern" in arguments:
                arguments["hybrid_layer_pattern"] = arguments["hybrid_layer_pattern"].replace("|", "")

        return _intercept(replace_arguments)

    def build_chunks(self, layout: Layout, pre_process: Sequence[bool], post_process: Sequence[bool]
                     ) -> tuple[list[Any], Any]:
        """Build a rank's model chunks; return also the builder's loss, or None."""
        config = set_layout(self.config, layout)
        chunks, loss = [], None
        for stage, (first, last) in enumerate(zip(pre_process, post_process, strict=True)):
            built = call_builder(self.builder, config=config, pre_process=first, post_process=last,
                                 vp_stage=stage if layout.vpp > 1 else None)
            model, loss = built if isinstance(built, tuple) else (built, None)
            if not isinstance(model, STOCK_MODELS):
                raise TypeError(f"the builder returns {type(model).__name__}, not GPTModel or HybridModel")
            chunks.append(model)
        return chunks, loss


def load_builder(target: str) -> Builder:
    """Import `FILE.py:NAME`; the file is the user's own code. Raises `CannotPlay`."""
    file, separator, name = target.rpartition(":")
    path = Path(file)
    if not separator or path.suffix != ".py" or not path.is_file():
        raise CannotPlay(f"{target}: must be FILE.py:NAME with an existing file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise CannotPlay(f"{file}: the import fails: {format_failure(e)}") from e
    builder = getattr(module, name, None)
    if not callable(builder):
        raise CannotPlay(f"{target}: {file} has no function {name}")
    return builder


def call_builder(builder: Builder, **arguments: Any) -> Any:
    """Call a builder with the `arguments` in its signature."""
    parameters = inspect.signature(builder).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return builder(**{name: value for name, value in arguments.items() if takes_all or name in parameters})


def shrink_model(builder: Builder, layout: Layout) -> SmallModel:
    """Read the builder's config without building weights, and choose small widths that the layout divides."""
    parameters = inspect.signature(builder).parameters
    if "config" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise CannotPlay("the builder: must have a parameter `config=None`, for a small config")
    config, arguments = _read_arguments(builder)
    if max(config.gtp_weight_remat_size, config.expert_gtp_weight_remat_size) > 1:
        raise CannotPlay("tensor_parallel_num_weight_shards: generalized tensor parallelism is not simulated")
    row_tokens = math.lcm(16, 2 * layout.cp * layout.tp)
    small: dict[str, Any] = {"vocab_size": 16 * layout.tp, "max_sequence_length": row_tokens}
    if arguments.get("hybrid_layer_pattern"):
        small["hybrid_layer_pattern"] = shrink_pattern(arguments["hybrid_layer_pattern"], layout)
    changes = _choose_widths(config, layout) | _choose_layers(config, layout, small)
    names = {field.name for field in dataclasses.fields(config) if field.init}
    try:
        shrunk = dataclasses.replace(config, **{k: v for k, v in changes.items() if k in names})
    except (ValueError, AssertionError, TypeError) as e:
        raise CannotPlay(f"the config does not allow small widths: {e}") from e
    return SmallModel(builder, shrunk, small, row_tokens)


def form_groups(layout: Layout) -> Callable[[int, int], int]:
    """Return a function of (rank, number of ranks) that creates the layout's groups and returns the rank."""
    def join(rank: int, size: int) -> int:
        parallel_state.initialize_model_parallel(
            layout.tp, layout.pp, layout.vpp if layout.vpp > 1 else None, context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.expert_tp,
            create_gloo_process_groups=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        return rank

    return join


class _ArgumentsRead(Exception):
    """Ends a builder at the model's constructor."""


def _read_arguments(builder: Builder) -> tuple[Any, dict[str, Any]]:
    """Return the config and arguments with which a builder calls `GPTModel` or `HybridModel`."""
    found: list[dict[str, Any]] = []

    def read(arguments: dict[str, Any]) -> None:
        found.append(arguments)
        raise _ArgumentsRead

    try:
        with _intercept(read):
            SimulatedRanks(1).run(form_groups(Layout()), lambda _: call_builder(
                builder, pre_process=True, post_process=True))
    except _ArgumentsRead:
        return found[0]["config"], found[0]
    except (Exception, SystemExit) as e:
        raise CannotPlay(f"the builder fails: {format_failure(e)}") from e
    raise CannotPlay("the builder: builds neither a GPTModel nor a HybridModel of megatron.core")


@contextmanager
def _intercept(change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `change(arguments)` before the constructor of a stock model, which gets the arguments."""
    def intercept_constructor(construct: Callable[..., None]) -> Callable[..., None]:
        def change_and_construct(*args: Any, **options: Any) -> None:
            arguments = inspect.signature(construct).bind(*args, **options).arguments
            change(arguments)
            construct(**arguments)
        return change_and_construct

    with ExitStack() as stack:
        for cls in STOCK_MODELS:
            stack.enter_context(mock.patch.object(cls, "__init__", intercept_constructor(cls.__init__)))
        yield


def set_layout(config: Any, layout: Layout) -> Any:
    """Return the config with a layout's sizes; its own checks run again."""
    return dataclasses.replace(
        config, tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp, expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp, sequence_parallel=layout.sp,
        tensor_parallel_num_weight_shards=None, expert_tensor_parallel_num_weight_shards=None,
        microbatch_group_size_per_vp_stage=layout.pp,
        overlap_p2p_comm=config.overlap_p2p_comm and layout.vpp > 1)


def _choose_widths(config: Any, layout: Layout) -> dict[str, Any]:
    """Return config field -> smallest value that the layout divides."""
    tp, groups = layout.tp, config.num_query_groups or config.num_attention_heads
    fitting = [n for n in range(1, groups + 1) if groups % n == 0 and n % tp == 0]
    kv_heads = next((n for n in fitting if n >= 2 * tp), fitting[-1] if fitting else groups)
    heads = kv_heads * min(config.num_attention_heads // groups, 2) if fitting else math.lcm(groups, tp)
    changes: dict[str, Any] = {name: type(getattr(config, name))() for name in SWITCHED_OFF
                               if getattr(config, name, None) is not None}
    changes |= dict.fromkeys(("fp8", "fp4", "autocast_dtype"))
    changes |= {
        "params_dtype": torch.float64, "pipeline_dtype": torch.float64, "use_cpu_initialization": True,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None, "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1, "sequence_parallel": False,
        "hidden_size": HIDDEN_SIZE, "num_query_groups": kv_heads, "num_attention_heads": heads,
        "kv_channels": HEAD_DIM, "ffn_hidden_size": 4 * tp, "cuda_graph_impl": "none",
        "mamba_num_heads": 2 * tp * layout.cp, "mamba_num_groups": tp * layout.cp, "mamba_head_dim": 8,
        "mamba_state_dim": 8, "q_lora_rank": 16 if getattr(config, "q_lora_rank", None) else None,
        "kv_lora_rank": 16, "qk_head_dim": HEAD_DIM, "qk_pos_emb_head_dim": 4, "v_head_dim": HEAD_DIM}
    if config.window_size:
        changes["window_size"] = (5, 0)
    if config.num_moe_experts:
        step = math.lcm(layout.ep, config.moe_router_num_groups or 1)
        wanted = max(2 * layout.ep, 2 * config.moe_router_topk, 2 * (config.moe_router_num_groups or 1))
        changes |= {"num_moe_experts": min(config.num_moe_experts, -(-wanted // step) * step),
                    "moe_ffn_hidden_size": MOE_WIDTH * layout.expert_tp, "moe_router_dtype": "fp64"}
        if config.moe_token_dispatcher_type == "flex":
            changes["moe_token_dispatcher_type"] = "alltoall"
        if config.moe_shared_expert_intermediate_size:
            changes["moe_shared_expert_intermediate_size"] = 4 * tp
    return changes


def _choose_layers(config: Any, layout: Layout, small: dict[str, Any]) -> dict[str, Any]:
    """Choose as few layers per chunk as show each kind of layer (experts, window)."""
    for name in UNEVEN_STAGES:
        if getattr(config, name, None):
            raise CannotPlay(f"{name}: only even stages are played; leave it out")
    chunks = layout.pp * layout.vpp
    if "hybrid_layer_pattern" in small:
        return {"num_layers": len(small["hybrid_layer_pattern"].partition("/")[0].replace("|", ""))}
    if config.num_layers < chunks:
        raise CannotPlay(f"--pp {layout.pp} x --vpp {layout.vpp}: needs {chunks} layers, the model has "
                         f"{config.num_layers}")
    kinds = [_get_layer_kind(config, i) for i in range(config.num_layers)]
    for per_chunk in range(1, MAX_LAYERS_PER_CHUNK + 1):
        count = min(chunks * per_chunk, config.num_layers)
        chosen = [kinds[round(i * (len(kinds) - 1) / max(count - 1, 1))] for i in range(count)]
        if set(chosen) == set(kinds):
            break
    else:
        # rare kinds lie between the evenly chosen layers
        chosen[:len(set(kinds))] = dict.fromkeys(kinds)
    changes: dict[str, Any] = {"num_layers": len(chosen)}
    if config.num_moe_experts:
        changes["moe_layer_freq"] = [int(has_experts) for has_experts, _ in chosen]
    if config.window_size and config.window_attn_skip_freq:
        changes["window_attn_skip_freq"] = [int(has_window) for _, has_window in chosen]
    return changes


def _get_layer_kind(config: Any, layer: int) -> tuple[bool, bool]:
    """Return whether a layer (from 0) has experts, and a window."""
    frequency = config.moe_layer_freq
    has_experts = layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])
    has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer + 1)
    return bool(config.num_moe_experts) and has_experts, bool(has_window)


def shrink_pattern(pattern: str, layout: Layout) -> str:
    """Return a `hybrid_layer_pattern` with a layer per kind in each pipeline segment."""
    main, *predictions = pattern.split("/")
    chunks = layout.pp * layout.vpp
    segments = main.split("|")
    if len(segments) != chunks:
        layers = main.replace("|", "")
        if len(layers) < chunks:
            raise CannotPlay(f"hybrid_layer_pattern {pattern}: needs a layer for each of {chunks} stages")
        bounds = [round(i * len(layers) / chunks) for i in range(chunks + 1)]
        segments = [layers[i:j] for i, j in itertools.pairwise(bounds)]
    short = "|".join("".join(dict.fromkeys(segment)) for segment in segments)
    return "/".join([short, *("".join(dict.fromkeys(part)) for part in predictions)])
