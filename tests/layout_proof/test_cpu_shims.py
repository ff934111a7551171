"""CPU shims change what their docstrings say."""

import json
import subprocess
import sys

import pytest


def inspect_shims() -> dict:
    """Return the effects of the CPU shims on torch and Megatron-Core in this process."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from layout_proof import cpu_shims
    from megatron_sov.engine.parallel.device import get_local_device, on_gpu

    original_zeros = torch.zeros
    cpu_shims.prepare_without_gpu()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm")
    config.sequence_parallel = True
    norm = WrappedTorchNorm(config, 8)
    torch.cuda.manual_seed(3)
    expected_draw = torch.rand(2)
    torch.manual_seed(3)
    tensors = (torch.zeros(1, device="cuda"), torch.tensor([1], device="cuda:0"), torch.ones(1).cuda(),
               torch.ones(1).to("cuda"), torch.empty(1, pin_memory=True),
               torch.ones(1, device=torch.cuda.current_device()))
    return {"is_patched_once": torch.zeros is original_zeros, "device": str(get_local_device()),
            "on_gpu": on_gpu(),
            "devices": [str(t.device) for t in tensors], "meta": str(torch.zeros(1, device="meta").device),
            "type": torch.ones(1).type(), "cast": str(torch.ones(1).type(torch.int64).dtype),
            "norm_is_marked": norm.weight.sequence_parallel, "config_is_unchanged": config.sequence_parallel,
            "split_sizes": moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True).tolist(),
            "hidden": sys.modules["transformer_engine"] is None,
            "same_generator": bool(torch.rand(2).equal(expected_draw)),
            "compiled": torch.compile.__module__}


@pytest.mark.distributed
def test_cpu_shims_create_all_tensors_on_the_cpu(ranks, job) -> None:
    [(state,)] = ranks(job(__file__, "inspect_shims"))
    assert state["is_patched_once"] and not state["on_gpu"] and state["device"] == "cpu"
    assert set(state["devices"]) == {"cpu"} and state["meta"] == "meta"
    assert (state["type"], state["cast"]) == ("torch.cuda.FloatTensor", "torch.int64")
    assert state["norm_is_marked"] and state["config_is_unchanged"]
    assert state["split_sizes"] == [1.0, 1.0] and state["same_generator"] and state["compiled"] == "torch"


# Megatron-Core's defects still exist, and `patch_defects` fixes them without the CPU shims.

DEFECTS_PROGRAM = """
import json, torch
torch.cuda.is_available = lambda: True  # as on a GPU, where only the defects are patched
import megatron_sov.engine
from layout_proof import library_patches
import megatron.core.transformer.moe.moe_utils as moe_utils
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm

config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm")
config.sequence_parallel = True

def find_defects():
    try:
        norms = not WrappedTorchNorm(config, 8).weight.sequence_parallel
    except AssertionError:
        norms = True
    return {"norms": norms,
            "split sizes": torch.is_tensor(moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True))}

before = find_defects()
library_patches.patch_defects()
library_patches.patch_defects()
print(json.dumps([before, find_defects(), config.sequence_parallel]))
"""


@pytest.fixture(scope="module")
def defects() -> list[dict[str, bool]]:
    """Return the defects of Megatron-Core without Transformer Engine, before and after `patch_defects`."""
    completed = subprocess.run([sys.executable, "-W", "ignore", "-c", DEFECTS_PROGRAM], capture_output=True,
                               text=True, check=True)
    before, after, flag = json.loads(completed.stdout)
    assert flag is True
    return [before, after]


@pytest.mark.deep
@pytest.mark.parametrize("defect", ["norms", "split sizes"])
def test_megatron_core_still_needs_the_patch(defect: str, defects: list[dict[str, bool]]) -> None:
    assert defects[0][defect], f"{defect}: Megatron-Core is fixed; remove the patch in library_patches.py"


@pytest.mark.deep
def test_defects_are_patched_without_the_cpu_shims(defects: list[dict[str, bool]]) -> None:
    # Only `patch_for_cpus` converts split sizes of CPU tensors to numbers.
    assert defects[1] == {"norms": False, "split sizes": True}
