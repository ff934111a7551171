"""Calls match the interfaces of the real libraries in contract.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.te_double import contract
from tests.te_double.library_shapes import CONTRACT, Sources, describe, find_deprecation, is_same

TE_RUN = str(Path(__file__).with_name("te_run.py"))
THEIRS = json.loads(CONTRACT.read_text())
TE: dict[str, Any] = THEIRS[contract.TE]["symbols"]
OURS = Sources(Path(__file__).parent)
RENEW = "make contract renews contract.json; read its difference first"
NOT_DOUBLED = {
    "attention.rope.apply_fused_qkv_rotary_pos_emb", "constants.TE_DType", "cpp_extensions.cast_to_fp8",
    "cpp_extensions.rmsnorm_fwd", "cpu_offload",
    "cpu_offload.get_cpu_offload_context", "cpu_offload_v1", "cross_entropy.parallel_cross_entropy",
    "distributed.gather_along_first_dim", "distributed.reduce_scatter_along_first_dim",
    "float8_tensor.Float8Tensor.make_like", "fp8.FP8GlobalStateManager.add_fp8_tensors_to_global_buffer",
    "fp8.FP8GlobalStateManager.reduce_and_update_fp8_tensors",
    "fp8.FP8GlobalStateManager.set_skip_fp8_weight_update_tensor",
}
"""Names of unused features: inference, Megatron-Core's CUDA graphs, offloading, delayed scaling."""
UNREACHED = {
    "constants.MXFP8_BLOCK_SCALING_SIZE", "constants.NVFP4_BLOCK_SCALING_SIZE",
    "distributed._NVFP4AllGatherAsyncHandle", "ep", "ep.EpBuffer", "ep._BOOTSTRAPPED", "ep.ep_bootstrap",
    "ep.ep_combine", "ep.ep_dispatch", "ep.ep_finalize", "ep.is_symm_backed", "ep.symm_mem_alloc",
    "optimizers.multi_tensor_scale_tensor", "permutation.moe_permute_and_pad_with_probs",
    "tensor.MXFP8TensorStorage", "tensor.NVFP4TensorStorage",
    "tensor.grouped_tensor.GroupedTensor", "tensor.mxfp8_tensor.MXFP8Quantizer",
    "utils.nvtx_range_pop", "utils.nvtx_range_push",
    "utils.round_up_to_nearest_multiple",
}
"""Names in code that no setting reaches: NCCL's expert dispatcher, weights in grouped storage."""

REASONS = {
    "architecture": "no supported model family has it",
    "default": "the library's own choice is right",
    "dropless": "experts process every token that is routed to them",
    "fp16": "no model is trained in fp16",
    "inference": "this project has its own code to generate text",
    "internal": "the library's own state",
    "own": "this project's own code does it",
    "precision": "a lower precision that no setting offers",
    "sums": "the loss is already divided by its weights, so gradients are only summed",
    "unserved": "an optimization that no setting offers",
}
"""Reasons in reviewed_fields.json for leaving fields of the library's configs unset."""


@pytest.mark.each("name", sorted(TE))
def test_the_double_has_the_real_signatures(name: str) -> None:
    ours, theirs = describe(OURS, name), TE[name]
    if ours is None:
        assert theirs is None or name.removeprefix(f"{contract.TE}.pytorch.") in (NOT_DOUBLED | UNREACHED)
    elif isinstance(theirs, dict):
        wrong = {method: (text, theirs.get(method)) for method, text in ours.items()
                 if method not in theirs or not is_same(text, theirs[method])}
        assert not wrong, "(signature in the double, signature in the library)"
    elif theirs != "extension":  # compiled: no signature in Python sources
        assert theirs is not None, "the real library has no such name, so megatron-core does not call it"
        assert is_same(ours, theirs)


@pytest.mark.distributed
def test_calls_of_a_training_step_bind_to_the_real_signatures(te_ranks: Any, job: Any,
                                                              packed_data: Any) -> None:
    (calls,), = te_ranks(job(TE_RUN, "record_calls", 1, {
        "recipe": "tiny-k-exaone", "settings": ["model.num_layers=4", "model.num_experts=4"],
        "paths": [str(packed_data.text)]}))
    for name, method, positional, names in calls:
        text = TE[name] if method is None else TE[name][method]
        if text != "extension":  # compiled: no signature in Python sources
            contract.parse_signature(text).bind(*[None] * positional, **dict.fromkeys(names))
    reached = {name.rpartition(".")[2] for name, *_ in calls}
    assert reached >= {"Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "DotProductAttention",
                       "apply_rotary_pos_emb", "moe_permute_with_probs", "moe_unpermute",
                       "moe_sort_chunks_by_index", "FusedAdam"}


@pytest.mark.deep
def test_the_contract_lists_exactly_the_used_interfaces() -> None:
    assert set(TE) == contract.find_te_names(), RENEW
    assert OURS.module(contract.TE) is not None
    assert [THEIRS[part]["version"] for part in (contract.TE, contract.VLLM, contract.DEEP_EP)] == [
        contract.TE_VERSION, contract.VLLM_VERSION, contract.DEEP_EP_COMMIT], RENEW
    version = (Path(__file__).parent / "transformer_engine/__init__.py").read_text()
    assert f'__version__ = "{THEIRS[contract.TE]["version"]}"' in version


def test_the_installed_megatron_core_has_the_contracts_shape() -> None:
    installed, theirs = contract.describe_megatron(), THEIRS[contract.MEGATRON]
    assert installed["version"] == theirs["version"]
    for part in ("symbols", "fields"):
        changed = {name: (found, theirs[part].get(name)) for name, found in installed[part].items()
                   if found != theirs[part].get(name)}
        assert not changed, f"{RENEW} (installed, in the contract)"
        assert set(installed[part]) == set(theirs[part]), RENEW
    assert None not in theirs["symbols"].values(), "megatron-core lacks the name"


@pytest.mark.each("config", contract.CONFIGS)
def test_every_field_is_set_or_was_reviewed(config: str) -> None:
    """A field of a new version may change training. reviewed_fields.json lists only unset fields."""
    fields = set(THEIRS[contract.MEGATRON]["fields"][config])
    reviewed = json.loads(contract.REVIEWED.read_text())[config]
    set_fields = contract.find_set_fields()
    assert not fields - set_fields - set(reviewed), "set it, or write into reviewed_fields.json why not"
    stale = set(reviewed) & set_fields | set(reviewed) - fields
    assert not stale, "python tests/te_double/contract.py --installed removes them from the list"
    assert set(reviewed.values()) <= set(REASONS)


@pytest.mark.parametrize("part", [contract.MEGATRON, contract.VLLM])
def test_our_calls_bind_to_the_real_signatures(part: str) -> None:
    symbols, num_bound = THEIRS[part]["symbols"], 0
    for name, num_positional, keywords in contract.list_calls(part):
        home, _, method = name.rpartition(".")
        owner = symbols.get(home)
        # the entry of a class's member describes the class, so the member's own signature comes first
        shape = (owner.get(method) if isinstance(owner, dict) else None) or symbols.get(name)
        text = shape.get("__init__") if isinstance(shape, dict) else shape
        if text and text.startswith("("):
            contract.parse_signature(text).bind(*[None] * num_positional, **dict.fromkeys(keywords))
            num_bound += 1
    # of vLLM, only the worker extension that loads weights is called by name
    assert num_bound > (2 if part == contract.VLLM else 5)


GPT_MODEL = "megatron.core.models.gpt.gpt_model.GPTModel"


def test_no_deprecated_library_interface_is_used() -> None:
    sources = Sources(contract.site_folder("megatron"))
    names = contract.find_megatron_names() - {GPT_MODEL}  # layout-proof also takes users' GPT models
    deprecated = {name: mark for name in sorted(names) if (mark := find_deprecation(sources, name))}
    assert not deprecated, "the library will remove them: use the replacement that its message names"
    assert GPT_MODEL not in contract.find_used_names(contract.ROOT / "megatron_sov", "megatron")
    assert find_deprecation(sources, GPT_MODEL).startswith("GPTModel IS DEPRECATED")
