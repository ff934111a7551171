"""Low-rank adapters: the first gradient follows from the full weight's; training is equal at all layouts."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.checkpoint import initial_weights
from megatron_sov.checkpoint.gather import TensorGatherer
from megatron_sov.engine.decode import forward_only
from megatron_sov.engine.model.adapters import LinearAdapter
from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.model.local_shards import ParameterLookup, list_local_shards
from megatron_sov.engine.model.logprobs import build_head
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import apply_settings
from megatron_sov.model.families.adapters import A, B, find_adapted_modules
from megatron_sov.train.objectives.microbatch import MicroBatch

RANK, ALPHA = 3, 7
SMALL_SETTINGS = ["model.vocab_size=95", "model.hidden_size=32", "model.head_dim=8", "model.num_layers=2",
                  "model.init_std=0.2", "train.precision=fp64", "optim.clip_grad=0.05",
                  "optim.weight_decay=0.1", f"lora.rank={RANK}", f"lora.alpha={ALPHA}"]
EXPERT_SETTINGS = ["model.expert_ffn_dim=16", "model.num_experts=4"]
TP2, EP2, PP2 = {"tp": 2, "sp": True}, {"ep": 2}, {"pp": 2}
ETP2 = {"tp": 2, "sp": True, "etp": 2}
DELTA_SETTINGS = ["model.attention_pattern=GD",
                  'model.linear_attention={"num_key_heads": 4, "num_value_heads": 4, "key_head_dim": 6, '
                  '"value_head_dim": 6, "gate_rank": 6}']
LATENT_SETTINGS = ["model.head_dim=20", "model.num_dense_layers=1", "model.num_expert_groups=2",
                   "model.num_groups_per_token=1",
                   'model.latent_attention={"q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 12, '
                   '"qk_rope_head_dim": 8, "v_head_dim": 10}']
ROW_TOKENS, ROWS = 24, 4


def build_config(recipe: str, layout: dict[str, Any], settings: list[str]) -> Any:
    """Return a recipe's config with tiny sizes, a layout, and further settings."""
    base = recipes.get(recipe)
    sizes = [*SMALL_SETTINGS, *(EXPERT_SETTINGS if base.model.num_experts else ())]
    parallel_settings = [f"parallel.{name}={str(value).lower()}" for name, value in layout.items()]
    return apply_settings(base, [*sizes, *settings, *parallel_settings])


def build_micro_batches(vocab_size: int) -> list[Any]:
    """Return this data-parallel rank's share of four rows with two documents each."""
    from megatron.core import parallel_state

    batches = []
    for row in range(ROWS):
        generator = torch.Generator().manual_seed(row)
        tokens = torch.randint(vocab_size, (ROW_TOKENS,), generator=generator)
        first_length = 5 + row
        inputs = ModelInputs(
            tokens=tokens,
            positions=torch.cat([torch.arange(first_length), torch.arange(ROW_TOKENS - first_length)]),
            cu_seqlens=torch.tensor([0, first_length, ROW_TOKENS], dtype=torch.int32),
            max_document_tokens=ROW_TOKENS - first_length, padding=torch.zeros(ROW_TOKENS, dtype=torch.bool))
        labels = torch.randint(vocab_size, (ROW_TOKENS,), generator=generator)
        zeros = torch.zeros(ROW_TOKENS, dtype=torch.int64)
        batches.append(MicroBatch(inputs, labels, torch.ones(ROW_TOKENS), zeros.to(torch.uint8), zeros))
    return batches[parallel_state.get_data_parallel_rank()::parallel_state.get_data_parallel_world_size()]


class AdapterTraining:
    """A model with adapters, and its optimizer, without a run folder or data."""

    def __init__(self, config: Any, seed: int = 1) -> None:
        self.config = config
        self.model = build_model(config.model, config.parallel, config.train, config.gpu, config.lora)
        initial_weights.initialize_weights(self.model, config.model, seed)
        if config.lora.dora:
            for chunk in self.model.chunks:
                chunk.adapters.set_magnitudes(chunk)
        self.optimizer = Optimizer(self.model, config.optim, config.parallel)
        self.model.config.finalize_model_grads_func = ExpertLoad(self.model).finalize_gradients

    def compute_gradients(self) -> float:
        """Compute the gradients of all rows; return the loss on the last stage."""
        routing = self.model.config.routing_step
        routing.seq_len, routing.num_sequences, routing.aux_loss = ROW_TOKENS, ROWS, {}

        def loss(hidden: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            trunk = hidden.chunk(1 + self.config.model.num_mtp_layers)[0]
            sums, _ = build_head(self.model, 16).cross_entropy(trunk, batch.labels, {"lm": batch.weights})
            total = sums["lm"] / (ROWS * ROW_TOKENS)
            return total, total.detach()

        self.optimizer.zero_grad()
        micro_batches = build_micro_batches(self.config.model.vocab_size)
        result = forward_only.run_pipeline(self.optimizer.wrapped, micro_batches, loss, ROW_TOKENS,
                                           forward_only=False)
        return float(sum(result))

    def gather_tensors(self, prefix: str = "adapter.") -> dict[str, Any]:
        """Gather whole tensors as nested lists on rank 0."""
        shards = [shard for shard in list_local_shards(self.model) if shard.key.startswith(prefix)]
        gatherer = TensorGatherer(shards)
        tensors = {key: gatherer.gather(key) for key in gatherer.get_shapes()}
        return {key: t.tolist() for key, t in tensors.items() if t is not None}


def train_adapter(recipe: str, layout: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Train three steps. Return the adapter, the gradient norms, the names of frozen tensors that changed,
    and the number of local elements of optimizer state."""
    config = build_config(recipe, layout, settings)
    world.join_world(config.parallel)
    training = AdapterTraining(config)
    frozen = {(shard.key, shard.offset): shard.data.clone() for shard in list_local_shards(training.model)
              if not shard.key.startswith("adapter.")}
    norms = []
    for _ in range(3):
        training.compute_gradients()
        norms.append(training.optimizer.step(0.02))
    changed = []
    for shard in list_local_shards(training.model):
        before = frozen.get((shard.key, shard.offset))
        if before is not None and not shard.data.equal(before):
            changed.append(shard.key)
    state = sum(shard.data.numel() for shard in training.optimizer.state_shards())
    return {"adapter": training.gather_tensors(), "norms": norms, "changed": changed, "state": state}


def compare_first_gradients(recipe: str, settings: list[str]) -> dict[str, Any]:
    """Compare the first gradients of adapters with those of the adapted weights under full training.

    With W + scale * B A and B = 0, the gradient of B is scale * gradient(W) A^T, and that of A is 0.

    Returns:
        "largest_error": relative to the largest gradient of a module; "losses": with adapters and under full
        training; "names": adapted modules; "of A": largest gradient of A; "deviation": mean standard
        deviation of A relative to that of PEFT.
    """
    config = build_config(recipe, {}, settings)
    full_config = build_config(recipe, {}, [*settings, "lora.rank=0"])
    world.join_world(config.parallel)
    gradients_by_run: dict[str, dict[str, torch.Tensor]] = {}
    adapter_weights: dict[str, torch.Tensor] = {}
    losses = []
    for name, run_config in (("adapter", config), ("full", full_config)):
        training = AdapterTraining(run_config)
        losses.append(training.compute_gradients())
        lookup = ParameterLookup(training.model)
        gradients: dict[str, Any] = {}
        for block in list_local_shards(training.model):
            parameter = lookup.find_parameter(block)
            if parameter is None or not parameter.requires_grad:
                continue
            start = block.data.storage_offset() - parameter.storage_offset()
            flat_gradient = parameter.main_grad.reshape(-1)[start:start + block.data.numel()]
            local_gradient = flat_gradient.reshape(block.shape)
            gradient = gradients.setdefault(block.key,
                                            torch.zeros(block.global_shape, dtype=local_gradient.dtype))
            slices = tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))
            gradient[slices] = local_gradient
            if block.key.endswith(A):
                adapter_weights.setdefault(block.key, torch.zeros_like(gradient))[slices] = block.data
        gradients_by_run[name] = gradients
    largest_error, compared_names, largest_gradient_of_a = 0.0, [], 0.0
    for module in find_adapted_modules(config.model, config.lora):
        gradient, scale = gradients_by_run["full"][module.link.key], ALPHA / RANK
        if module.num_experts:
            weight = gradient
        else:
            weight = module.link.split(gradient)[f"{module.name}.weight"]
        expected = scale * weight @ adapter_weights[module.key(A)].mT
        gradient_of_b = gradients_by_run["adapter"][module.key(B)].reshape(expected.shape)
        error = float((gradient_of_b - expected).abs().max() / expected.abs().max())
        gradient_of_a = gradients_by_run["adapter"][module.key(A)]
        largest_error = max(largest_error, error)
        largest_gradient_of_a = max(largest_gradient_of_a, float(gradient_of_a.abs().max()))
        compared_names.append(module.name)
    # PEFT's Kaiming-uniform A has the variance 1 / (3 inputs)
    initial_deviations = [float(a.std()) * (3 * a.shape[-1]) ** 0.5 for key, a in adapter_weights.items()
                          if "embed" not in key]
    return {"largest_error": largest_error, "losses": losses, "names": compared_names,
            "of A": largest_gradient_of_a,
            "deviation": sum(initial_deviations) / len(initial_deviations)}


@pytest.mark.parametrize(("recipe", "settings", "names"), [
    ("tiny-qwen3", ['lora.targets=["all-linear", "embed_tokens"]'],
     ["model.embed_tokens", "model.layers.1.mlp.gate_proj", "model.layers.0.self_attn.k_proj"]),
    ("tiny-k-exaone", ['lora.targets=["all-linear", "lm_head"]'],
     ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.gate_up_proj",
      "model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.experts.down_proj"]),
])
def test_first_gradient_of_b_is_full_gradient_times_a_transposed(recipe: str, settings: list[str],
                                                                 names: list[str], ranks: Any,
                                                                 job: Any) -> None:
    ((result,),) = ranks(job(__file__, "compare_first_gradients", 1,
                             {"recipe": recipe, "settings": settings}))
    assert result["losses"][0] == result["losses"][1], "B is 0: nothing is added"
    assert result["largest_error"] < 1e-12 and result["of A"] == 0
    assert result["deviation"] == pytest.approx(1, abs=0.1), "variance 1 / (3 inputs), as in PEFT"
    assert set(names) <= set(result["names"])


def count_wrong_lengths() -> dict[str, int]:
    """Count the DoRA row lengths of a bf16 model that differ from the exact lengths, rounded once to bf16.

    Returns "wrong": how many differ, and "all": their number.
    """
    config = build_config("tiny-qwen2", {}, ["lora.dora=true", "train.precision=bf16"])
    world.join_world(config.parallel)
    training = AdapterTraining(config)
    counts = {"wrong": 0, "all": 0}
    for module in training.model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(adapter := getattr(hook, "adapter", None), LinearAdapter):
                expected = torch.linalg.vector_norm(module.weight.double(), dim=1).bfloat16()
                counts["wrong"] += int((adapter.compute_row_lengths(module.weight) != expected).sum())
                counts["all"] += len(expected)
    return counts


def test_lengths_of_rows_are_rounded_once(ranks: Any, job: Any) -> None:
    ((counts,),) = ranks(job(__file__, "count_wrong_lengths", 1, {}))
    assert counts["all"] > 100 and counts["wrong"] == 0


def compute_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return the largest difference between two adapters."""
    assert first.keys() == second.keys()
    return max(float(np.abs(np.array(first[key]) - np.array(second[key])).max()) for key in first)


@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "layouts", "settings"), [
    ("tiny-qwen3", [PP2, {"cp": 2}], ['lora.targets=["all-linear", "embed_tokens"]']),
    pytest.param("tiny-qwen3", [TP2, {"tp": 2}], ["lora.dora=true"], marks=pytest.mark.deep),
    pytest.param("tiny-solar-open", [ETP2, EP2], ['lora.targets=["all-linear", "lm_head"]'],
                 marks=pytest.mark.deep),
    # latent projections, which every process replicates; gates fused with queries, keys and values
    pytest.param("tiny-solar-open2", [{**TP2, "ep": 2}, {"cp": 2}, PP2], DELTA_SETTINGS,
                 marks=pytest.mark.deep),
    pytest.param("tiny-deepseek-v3", [{**TP2, "ep": 2}, {"cp": 2}, PP2], LATENT_SETTINGS,
                 marks=pytest.mark.deep),
    pytest.param("tiny-solar-open2", [TP2], [
        *DELTA_SETTINGS, "lora.dora=true",
        'lora.targets=["q_proj", "g_proj", "b_proj", "f_a_proj", "g_b_proj", "o_proj"]'],
                 marks=pytest.mark.deep),
    pytest.param("tiny-deepseek-v3", [TP2], [
        *LATENT_SETTINGS, "lora.dora=true", 'lora.targets=["kv_a_proj_with_mqa", "kv_b_proj"]'],
                 marks=pytest.mark.deep),
    ("tiny-k-exaone", [EP2], ['lora.targets=["q_proj", "v_proj", "up_proj", "experts"]']),
])
def test_the_same_adapter_at_every_layout(recipe: str, layouts: list[dict[str, Any]], settings: list[str],
                                          ranks: Any, job: Any) -> None:
    arguments = {"recipe": recipe, "settings": settings}
    results = ranks(job(__file__, "train_adapter", 1, {"layout": {}, **arguments}),
                    *(job(__file__, "train_adapter", 2, {"layout": layout, **arguments})
                      for layout in layouts))
    (one_rank,), *split_results = results
    assert not one_rank["changed"]
    largest_weight = max(float(np.abs(np.array(weight)).max()) for key, weight in one_rank["adapter"].items()
                         if key.endswith("lora_B"))
    assert largest_weight > 0.01, "three steps of AdamW"
    for layout, (result, *_) in zip(layouts, split_results, strict=True):
        assert not result["changed"], layout
        assert result["norms"] == pytest.approx(one_rank["norms"], rel=1e-11), layout
        assert compute_difference(result["adapter"], one_rank["adapter"]) < 1e-12, layout


def build_arguments(layout: dict[str, Any], num_layers: int, *settings: str) -> dict[str, Any]:
    return {"recipe": "tiny-solar-open", "layout": layout, "settings": [
        f"model.num_layers={num_layers}", 'lora.targets=["all-linear", "lm_head"]', *settings]}


ZERO1 = {"zero1": True, "overlap_grad_reduce": True}
RECOMPUTE = "train.recompute=true"


@pytest.mark.distributed
def test_the_same_adapter_under_zero1_and_recomputation(ranks: Any, job: Any) -> None:
    (one_rank,), (sharded, _) = ranks(
        job(__file__, "train_adapter", 1, build_arguments({}, 2, "train.recompute=false")),
        job(__file__, "train_adapter", 2, build_arguments({**ZERO1, **EP2}, 2, RECOMPUTE)))
    assert not sharded["changed"] and sharded["norms"] == pytest.approx(one_rank["norms"], rel=1e-11)
    assert compute_difference(sharded["adapter"], one_rank["adapter"]) < 1e-12
    assert sharded["state"] < 0.7 * one_rank["state"], (
        "ZeRO-1 splits the state of dense adapters, and ep=2 that of expert adapters")


@pytest.mark.deep
@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "layout", "nproc", "settings"), [
    ("tiny-k-exaone", {**TP2, **EP2}, 2, ['lora.targets=["all-linear"]']),
    ("tiny-qwen2", {}, 1, ["lora.dora=true"]),
])
def test_adapters_of_transformer_engine_layers_are_equal(recipe: str, layout: dict[str, Any], nproc: int,
                                                         settings: list[str], ranks: Any, te_ranks: Any,
                                                         job: Any) -> None:
    """With the double's fused norm-and-linear layers, and one grouped layer for all local experts."""
    arguments = {"recipe": recipe, "settings": settings}
    ((local,),) = ranks(job(__file__, "train_adapter", 1, {"layout": {}, **arguments}))
    ((te, *_),) = te_ranks(job(__file__, "train_adapter", nproc, {"layout": layout, **arguments}))
    assert not te["changed"] and te["norms"] == pytest.approx(local["norms"], rel=1e-11)
    assert compute_difference(te["adapter"], local["adapter"]) < 1e-12
