"""The whole model: documents of a row do not see each other, at any layout, and positions restart."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from megatron_sov.engine.model.language_model import refuse_elsewhere
from tests.tiny import tiny_model

# Every weight is on the device of its process; a device without memory shows what is made elsewhere.

def devices(recipe: str, precision: str) -> dict[str, list[str]]:
    """Build as on a GPU whose place the meta device takes; returns the device of every weight, and of the
    frequencies of rotations."""
    from unittest import mock

    import torch

    from megatron_sov import recipes
    from megatron_sov.engine import router
    from megatron_sov.engine.model import language_model, specs
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig, apply_settings

    meta = torch.device("meta")
    config = apply_settings(recipes.get(recipe), [f"train.precision={precision}"])
    world.join(ParallelConfig())
    with (mock.patch.object(torch.cuda, "current_device", lambda: meta),
          mock.patch.object(specs, "on_gpu", lambda: True),
          mock.patch.object(specs, "uses_transformer_engine", lambda dtype: False),
          mock.patch.object(language_model, "uses_transformer_engine", lambda dtype: False),
          mock.patch.object(language_model, "on_gpu", lambda: True),
          mock.patch.object(language_model, "local_device", lambda: meta),
          mock.patch.object(router, "local_device", lambda: meta)):
        model = language_model.build(config.model, ParallelConfig(), config.train)
    found: dict[str, list[str]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(str(tensor.device), []).append(name)
    found.setdefault(str(model.chunks[0].rotary_pos_emb.inv_freq.device), []).append("rotations")
    return found


@pytest.mark.distributed
def test_nothing_stays_on_the_cpu(ranks: Any, job: Any) -> None:
    results = ranks(*(job(__file__, "devices", 1, {"recipe": recipe, "precision": precision})
                      for recipe in ("tiny-solar-open", "tiny-k-exaone") for precision in ("fp32", "bf16")))
    for (found,) in results:
        assert set(found) == {"meta"}, found
        assert any("router" in name for name in found["meta"]) and len(found["meta"]) > 20


def test_a_weight_elsewhere_is_named() -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(RuntimeError, match=r"^1\.weight is on meta and the model on cpu: it would get no gr"):
        refuse_elsewhere(module, torch.device("cpu"))


# A stage is built without memory wherever one plans: on a machine with a GPU CUDA is not started.


PLANS = """
import torch

def starts() -> None:
    raise RuntimeError("CUDA was started")

torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = starts
from megatron_sov import recipes
from megatron_sov.engine.optimizer.meta import built_stage
from megatron_sov.plan.footprint.held import stage_params

config = recipes.get("tiny-k-exaone")
assert [built_stage(config, 8, 0).params] == stage_params(config)
assert not torch.cuda.is_initialized()
"""


@pytest.mark.deep
def test_a_stage_is_built_on_a_machine_with_a_gpu_that_is_not_asked() -> None:
    """A double of a GPU that cannot be started."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLANS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The gate of a feed-forward block against the library's own line, to the bit.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_are_autograds(dtype: torch.dtype, weighted: bool) -> None:
    from megatron_sov.engine.parallel.cpu_shims import prepare_without_gpu

    prepare_without_gpu()
    from megatron_sov.engine.model.language_model import _gated, _weighted

    generator = torch.Generator().manual_seed(3)
    values, bias = (torch.randn(shape, generator=generator).to(dtype).requires_grad_()
                    for shape in ((21, 38), (38,)))
    weights = torch.rand(21, 1, generator=generator).requires_grad_()
    upstream = torch.randn(21, 19, generator=generator).to(dtype)
    inputs = (values, bias, weights) if weighted else (values, bias)

    gate, up = (values + bias).chunk(2, dim=-1)
    expected = silu(gate) * (up + 0.0)
    found = _weighted(values, bias, weights) if weighted else _gated(values, bias)
    if weighted:
        expected = (expected * weights).to(dtype)
    assert torch.equal(found, expected) and found.dtype == dtype
    for ours, autograds in zip(torch.autograd.grad(found, inputs, upstream),
                               torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert torch.equal(ours, autograds)


# The output head beside fused accumulation of weight gradients, which the library's own would refuse.

def heads() -> list[Any]:
    """Return the fusion's value in a head and in the model's config, and the library's refusal of its own."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer import TransformerConfig

    from megatron_sov.engine.model import language_model
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig())
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1,
                               use_cpu_initialization=True, perform_initialization=False,
                               gradient_accumulation_fusion=True)

    def make() -> Any:
        return tensor_parallel.ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.zeros_,
                                                    bias=False, skip_bias_add=False)

    with language_model.without_fusion():
        head = make()
    try:
        make()
    except RuntimeError as e:
        return [head.gradient_accumulation_fusion, config.gradient_accumulation_fusion, str(e)]
    return []


def built_head() -> list[Any]:
    """Return the type of a model's output head, as it is built."""
    from megatron_sov import recipes
    from megatron_sov.engine.model.language_model import build
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    config = recipes.get("tiny-qwen3")
    world.join(ParallelConfig())
    return [type(build(config.model, ParallelConfig(), config.train).chunks[0].output_layer).__name__]


@pytest.mark.distributed
def test_the_head_of_a_model_has_a_config_of_its_own(ranks: Any, job: Any) -> None:
    ((of_head, of_model, refusal),), ((built,),) = ranks(job(__file__, "heads", 1, {}),
                                                        job(__file__, "built_head", 1, {}))
    assert (of_head, of_model, built) == (False, True, "OutputHead")
    assert "gradient_accumulation_fusion" in refusal and "APEX" in refusal


SMALL = ["model.init_std=0.3", "model.seq_aux_loss_coeff=0"]
DOCUMENT = [(7 * i + 3) % 96 for i in range(41)]  # longer than the window of 32
BEFORE = [[(5 * i + 1) % 96 for i in range(n)] for n in (1, 38)]


def hidden(recipe: str, layout: dict[str, Any], documents: list[list[int]]) -> list[list[float]] | None:
    """Return the hidden states of the last document of a row, trunk then prediction depths (None
    before the last stage)."""
    import torch

    from megatron_sov import recipes
    from megatron_sov.checkpoint import load
    from megatron_sov.engine.decode.forward_only import ForwardModel, Inputs
    from megatron_sov.engine.model.language_model import build, gather_sequence
    from megatron_sov.engine.parallel import context, world
    from megatron_sov.model.config import ParallelConfig, apply_settings

    config = apply_settings(recipes.get(recipe), SMALL)
    place = world.join(ParallelConfig(**layout))
    model = build(config.model, ParallelConfig(**layout), config.train)
    load.initialise(model, config.model, 1)
    row = Inputs(documents, torch.device("cpu"))
    first, last = (int(row.inputs.cu_seqlens[len(documents) - 1]), int(row.inputs.cu_seqlens[len(documents)]))
    found = ForwardModel(model, 64).map([row], lambda depths, *_: [
        context.gather(gather_sequence(d, model.config))[first:last] for d in depths])
    if not place.last_stage:
        return None
    trunk, *depths = found[0]
    # a depth's last place sees what follows, and is never learned
    return torch.cat([trunk, *(d[:-1] for d in depths)]).tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", [
    "tiny-k-exaone", pytest.param("tiny-solar-open", marks=pytest.mark.deep)])
def test_a_document_is_the_same_alone_and_behind_others(ranks, job, recipe: str) -> None:
    cases = [(recipe, *case) for case in [(1, {}, [DOCUMENT]), (1, {}, [*BEFORE, DOCUMENT]),
                          (2, {"tp": 2, "sp": True}, [*BEFORE, DOCUMENT]),
                          (2, {"pp": 2}, [*BEFORE, DOCUMENT]), (2, {"pp": 2, "vpp": 2}, [*BEFORE, DOCUMENT]),
                          (2, {"cp": 2}, [*BEFORE, DOCUMENT])]]
    results = ranks(*(job(__file__, "hidden", n, {"recipe": recipe, "layout": x, "documents": d})
                      for recipe, n, x, d in cases))
    for (recipe, _, layout, documents), per_rank in zip(cases, results, strict=True):
        states = [[x for row in s for x in row] for s in per_rank if s is not None]
        assert len(states) == (1 if "pp" in layout else len(per_rank))
        if documents == [DOCUMENT]:
            alone = states[0]
            assert max(map(abs, alone)) > 0.5
        for state in states:
            assert state == pytest.approx(alone, abs=5e-5), (recipe, layout)


def leak(recipe: str, layout: dict[str, Any]) -> dict[str, float]:
    """Return the largest gradient of one document's log-probabilities at the embeddings of that document,
    and of the others."""
    import torch

    from megatron_sov.engine.decode.forward_only import Inputs, split_depths
    from megatron_sov.engine.model.logprobs import head_of
    from megatron_sov.engine.parallel import context

    config, model = tiny_model(recipe, *SMALL, layout=layout)
    row = Inputs([BEFORE[1], DOCUMENT, BEFORE[1]], torch.device("cpu"), min_tokens=125).inputs
    chunk, embedded = model.chunks[0], []

    def keep(module: Any, arguments: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    chunk.embedding.register_forward_hook(keep)
    labels = torch.arange(len(row.tokens)) % 96
    total = sum(head_of(model, 64).logprobs(states, labels)[38:79].sum()
                for states in split_depths(chunk(row), config.model.num_mtp_layers))
    total.backward()
    index = context.row_index(len(labels), model.config.sequence_parallel, labels.device)
    inside = (index >= 38) & (index < 79)
    gradients = torch.stack([e.grad[:, 0].abs().amax(dim=1) for e in embedded]).amax(dim=0)
    return {"own": float((gradients * inside).max()), "others": float((gradients * ~inside).max()),
            "calls": len(embedded)}


@pytest.mark.distributed
def test_no_gradient_reaches_another_document(ranks, job) -> None:
    cases = [(recipe, n, x) for recipe in ("tiny-k-exaone", "tiny-solar-open")
             for n, x in ((1, {}), (2, {"cp": 2}), (4, {"cp": 2, "tp": 2, "sp": True}))]
    results = ranks(*(job(__file__, "leak", n, {"recipe": recipe, "layout": x}) for recipe, n, x in cases))
    for case, per_rank in zip(cases, results, strict=True):
        assert [r["others"] for r in per_rank] == [0.0] * len(per_rank), case
        assert max(r["own"] for r in per_rank) > 0.01, case
        assert {r["calls"] for r in per_rank} == {2 if case[0] == "tiny-k-exaone" else 1}, (
            "the prediction layer embeds as well")
