"""Low-rank adapters: their first gradient follows from the full weight's, and they are equal at every
layout."""

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

SMALL = ["model.vocab_size=95", "model.hidden_size=32", "model.head_dim=8", "model.num_layers=2",
         "model.init_std=0.2", "train.precision=fp64", "optim.clip_grad=0.05", "optim.weight_decay=0.1",
         "lora.rank=3", "lora.alpha=7"]
EXPERTS = ["model.expert_ffn_dim=16", "model.num_experts=4"]
TP2, EP2, PP2 = {"tp": 2, "sp": True}, {"ep": 2}, {"pp": 2}
ETP2 = {"tp": 2, "sp": True, "etp": 2}
DELTA = ["model.attention_pattern=GD",
         'model.linear_attention={"num_key_heads": 4, "num_value_heads": 4, "key_head_dim": 6, '
         '"value_head_dim": 6, "gate_rank": 6}']
LATENT = ["model.head_dim=20", "model.num_dense_layers=1", "model.num_expert_groups=2",
          "model.num_groups_per_token=1",
          'model.latent_attention={"q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 12, '
          '"qk_rope_head_dim": 8, "v_head_dim": 10}']
ROW_TOKENS, ROWS = 24, 4


def build_config(recipe: str, layout: dict[str, Any], settings: list[str]) -> Any:
    """Return a tiny config."""
    base = recipes.get(recipe)
    sizes = [*SMALL, *(EXPERTS if base.model.num_experts else ())]
    places = [f"parallel.{name}={str(value).lower()}" for name, value in layout.items()]
    return apply_settings(base, [*sizes, *settings, *places])


def micro_batches(vocab_size: int) -> list[Any]:
    """Return this data-parallel rank's share of four rows with two documents each."""
    from megatron.core import parallel_state

    found = []
    for row in range(ROWS):
        generator = torch.Generator().manual_seed(row)
        tokens = torch.randint(vocab_size, (ROW_TOKENS,), generator=generator)
        cut = 5 + row
        inputs = ModelInputs(
            tokens=tokens, positions=torch.cat([torch.arange(cut), torch.arange(ROW_TOKENS - cut)]),
            cu_seqlens=torch.tensor([0, cut, ROW_TOKENS], dtype=torch.int32),
            max_document_tokens=ROW_TOKENS - cut, padding=torch.zeros(ROW_TOKENS, dtype=torch.bool))
        labels = torch.randint(vocab_size, (ROW_TOKENS,), generator=generator)
        zeros = torch.zeros(ROW_TOKENS, dtype=torch.int64)
        found.append(MicroBatch(inputs, labels, torch.ones(ROW_TOKENS), zeros.to(torch.uint8), zeros))
    return found[parallel_state.get_data_parallel_rank()::parallel_state.get_data_parallel_world_size()]


class Learning:
    """A model, its optimizer and its objective, without a run."""

    def __init__(self, config: Any, seed: int = 1) -> None:
        self.config = config
        self.model = build_model(config.model, config.parallel, config.train, config.gpu, config.lora)
        initial_weights.initialize_weights(self.model, config.model, seed)
        if config.lora.dora:
            for chunk in self.model.chunks:
                chunk.adapters.set_magnitudes(chunk)
        self.optimizer = Optimizer(self.model, config.optim, config.parallel)
        self.model.config.finalize_model_grads_func = ExpertLoad(self.model).finalize_gradients

    def gradients(self) -> float:
        """Compute the gradients of all rows; return the loss on the last stage."""
        routing = self.model.config.routing_step
        routing.seq_len, routing.num_sequences, routing.aux_loss = ROW_TOKENS, ROWS, {}

        def loss(hidden: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            trunk = hidden.chunk(1 + self.config.model.num_mtp_layers)[0]
            sums, _ = build_head(self.model, 16).cross_entropy(trunk, batch.labels, {"lm": batch.weights})
            total = sums["lm"] / (ROWS * ROW_TOKENS)
            return total, total.detach()

        self.optimizer.zero_grad()
        result = forward_only.run_pipeline(self.optimizer.wrapped,
                                           micro_batches(self.config.model.vocab_size), loss, ROW_TOKENS,
                                           forward_only=False)
        return float(sum(result))

    def tensors(self, prefix: str = "adapter.") -> dict[str, Any]:
        """Gather whole tensors as nested lists on rank 0."""
        gatherer = TensorGatherer([b for b in list_local_shards(self.model) if b.key.startswith(prefix)])
        whole = {key: gatherer.gather(key) for key in gatherer.get_shapes()}
        return {key: t.tolist() for key, t in whole.items() if t is not None}


def train_adapter(recipe: str, layout: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Train three steps; return the adapter, its norms, and the frozen tensors that changed."""
    config = build_config(recipe, layout, settings)
    world.join_world(config.parallel)
    learning = Learning(config)
    frozen = {(b.key, b.offset): b.data.clone() for b in list_local_shards(learning.model)
              if not b.key.startswith("adapter.")}
    norms = []
    for _ in range(3):
        learning.gradients()
        norms.append(learning.optimizer.step(0.02))
    changed = [b.key for b in list_local_shards(learning.model)
               if (b.key, b.offset) in frozen and not b.data.equal(frozen[b.key, b.offset])]
    state = sum(b.data.numel() for b in learning.optimizer.state_shards())
    found = {"adapter": learning.tensors(), "norms": norms, "changed": changed, "state": state}
    world.leave_world()
    return found


def full_gradients(recipe: str, settings: list[str]) -> dict[str, Any]:
    """Return the first gradients of B, and the gradients of the adapted weights under full training."""
    config = build_config(recipe, {}, settings)
    full = build_config(recipe, {}, [*settings, "lora.rank=0"])
    world.join_world(config.parallel)
    found: dict[str, dict[str, torch.Tensor]] = {}
    values: dict[str, torch.Tensor] = {}
    losses = []
    for name, own in (("adapter", config), ("full", full)):
        learning = Learning(own)
        losses.append(learning.gradients())
        lookup = ParameterLookup(learning.model)
        gradients: dict[str, Any] = {}
        for block in list_local_shards(learning.model):
            parameter = lookup.find_parameter(block)
            if parameter is None or not parameter.requires_grad:
                continue
            first = block.data.storage_offset() - parameter.storage_offset()
            part = parameter.main_grad.reshape(-1)[first:first + block.data.numel()].reshape(block.shape)
            whole = gradients.setdefault(block.key, torch.zeros(block.global_shape, dtype=part.dtype))
            place = tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))
            whole[place] = part
            if block.key.endswith(A):
                values.setdefault(block.key, torch.zeros_like(whole))[place] = block.data
        found[name] = gradients
    worst, compared, grew = 0.0, [], 0.0
    for of in find_adapted_modules(config.model, config.lora):
        whole, scale = found["full"][of.link.key], 7 / 3
        if of.num_experts:
            weight = whole
        else:
            weight = of.link.split(whole)[f"{of.name}.weight"]
        expected = scale * weight @ values[of.key(A)].mT
        got = found["adapter"][of.key(B)].reshape(expected.shape)
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
        grew = max(grew, float(found["adapter"][of.key(A)].abs().max()))
        compared.append(of.name)
    world.leave_world()
    spreads = [float(a.std()) * (3 * a.shape[-1]) ** 0.5 for key, a in values.items() if "embed" not in key]
    return {"worst": worst, "losses": losses, "compared": compared, "of A": grew,
            "spread": sum(spreads) / len(spreads)}


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
    ((found,),) = ranks(job(__file__, "full_gradients", 1, {"recipe": recipe, "settings": settings}))
    assert found["losses"][0] == found["losses"][1], "B is 0: nothing is added"
    assert found["worst"] < 1e-12 and found["of A"] == 0
    assert found["spread"] == pytest.approx(1, abs=0.1), "variance 1 / (3 inputs), as in PEFT"
    assert set(names) <= set(found["compared"])


def wrong_lengths() -> dict[str, int]:
    """Return the number of trained lengths of a bf16 model that differ from the rounded row lengths, and the
    total.
    """
    config = build_config("tiny-qwen2", {}, ["lora.dora=true", "train.precision=bf16"])
    world.join_world(config.parallel)
    learning = Learning(config)
    found = {"wrong": 0, "all": 0}
    for module in learning.model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(adapter := getattr(hook, "adapter", None), LinearAdapter):
                right = torch.linalg.vector_norm(module.weight.double(), dim=1).bfloat16()
                found["wrong"] += int((adapter.compute_row_lengths(module.weight) != right).sum())
                found["all"] += len(right)
    world.leave_world()
    return found


def test_lengths_of_rows_are_rounded_once(ranks: Any, job: Any) -> None:
    ((found,),) = ranks(job(__file__, "wrong_lengths", 1, {}))
    assert found["all"] > 100 and found["wrong"] == 0


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference between two adapters."""
    assert one.keys() == other.keys()
    return max(float(np.abs(np.array(one[key]) - np.array(other[key])).max()) for key in one)


@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "layouts", "settings"), [
    ("tiny-qwen3", [PP2, {"cp": 2}], ['lora.targets=["all-linear", "embed_tokens"]']),
    pytest.param("tiny-qwen3", [TP2, {"tp": 2}], ["lora.dora=true"], marks=pytest.mark.deep),
    pytest.param("tiny-solar-open", [ETP2, EP2], ['lora.targets=["all-linear", "lm_head"]'],
                 marks=pytest.mark.deep),
    # latent projections, which every process replicates; gates fused with queries, keys and values
    pytest.param("tiny-solar-open2", [{**TP2, "ep": 2}, {"cp": 2}, PP2], DELTA, marks=pytest.mark.deep),
    pytest.param("tiny-deepseek-v3", [{**TP2, "ep": 2}, {"cp": 2}, PP2], LATENT, marks=pytest.mark.deep),
    pytest.param("tiny-solar-open2", [TP2], [
        *DELTA, "lora.dora=true",
        'lora.targets=["q_proj", "g_proj", "b_proj", "f_a_proj", "g_b_proj", "o_proj"]'],
                 marks=pytest.mark.deep),
    pytest.param("tiny-deepseek-v3", [TP2], [
        *LATENT, "lora.dora=true", 'lora.targets=["kv_a_proj_with_mqa", "kv_b_proj"]'],
                 marks=pytest.mark.deep),
    ("tiny-k-exaone", [EP2], ['lora.targets=["q_proj", "v_proj", "up_proj", "experts"]']),
])
def test_the_same_adapter_at_every_layout(recipe: str, layouts: list[dict[str, Any]], settings: list[str],
                                          ranks: Any, job: Any) -> None:
    asked = {"recipe": recipe, "settings": settings}
    results = ranks(job(__file__, "train_adapter", 1, {"layout": {}, **asked}),
                    *(job(__file__, "train_adapter", 2, {"layout": layout, **asked}) for layout in layouts))
    (one,), *others = results
    assert not one["changed"]
    moved = max(float(np.abs(np.array(v)).max()) for k, v in one["adapter"].items() if k.endswith("lora_B"))
    assert moved > 0.01, "three steps of AdamW"
    for layout, (first, *_) in zip(layouts, others, strict=True):
        assert not first["changed"], layout
        assert first["norms"] == pytest.approx(one["norms"], rel=1e-11), layout
        assert difference(first["adapter"], one["adapter"]) < 1e-12, layout


def of_all_linears(layout: dict[str, Any], num_layers: int, *settings: str) -> dict[str, Any]:
    return {"recipe": "tiny-solar-open", "layout": layout, "settings": [
        f"model.num_layers={num_layers}", 'lora.targets=["all-linear", "lm_head"]', *settings]}


ZERO1 = {"zero1": True, "overlap_grad_reduce": True}
RECOMPUTE = "train.recompute=true"


@pytest.mark.distributed
def test_the_same_adapter_under_zero1_and_recomputation(ranks: Any, job: Any) -> None:
    (one,), (sharded, _) = ranks(
        job(__file__, "train_adapter", 1, of_all_linears({}, 2, "train.recompute=false")),
        job(__file__, "train_adapter", 2, of_all_linears({**ZERO1, **EP2}, 2, RECOMPUTE)))
    assert not sharded["changed"] and sharded["norms"] == pytest.approx(one["norms"], rel=1e-11)
    assert difference(sharded["adapter"], one["adapter"]) < 1e-12
    assert sharded["state"] < 0.7 * one["state"], "dense adapters' state is cut in two, experts' was"


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
    asked = {"recipe": recipe, "settings": settings}
    ((local,),) = ranks(job(__file__, "train_adapter", 1, {"layout": {}, **asked}))
    ((te, *_),) = te_ranks(job(__file__, "train_adapter", nproc, {"layout": layout, **asked}))
    assert not te["changed"] and te["norms"] == pytest.approx(local["norms"], rel=1e-11)
    assert difference(te["adapter"], local["adapter"]) < 1e-12
