"""CPU shims change what their docstrings say."""

import json
import subprocess
import sys

import pytest


def opened() -> dict:
    """Return the state of a process with the shims."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_sov.engine.parallel import cpu_shims
    from megatron_sov.engine.parallel.device import get_local_device, on_gpu

    before = torch.zeros
    cpu_shims.prepare_megatron()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm")
    config.sequence_parallel = True
    norm = WrappedTorchNorm(config, 8)
    torch.cuda.manual_seed(3)
    first = torch.rand(2)
    torch.manual_seed(3)
    asked = (torch.zeros(1, device="cuda"), torch.tensor([1], device="cuda:0"), torch.ones(1).cuda(),
             torch.ones(1).to("cuda"), torch.empty(1, pin_memory=True),
             torch.ones(1, device=torch.cuda.current_device()))
    return {"once": torch.zeros is before, "device": str(get_local_device()), "on_gpu": on_gpu(),
            "landed": [str(t.device) for t in asked], "meta": str(torch.zeros(1, device="meta").device),
            "type": torch.ones(1).type(), "cast": str(torch.ones(1).type(torch.int64).dtype),
            "marked": norm.weight.sequence_parallel, "flag": config.sequence_parallel,
            "split": moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True).tolist(),
            "hidden": sys.modules["transformer_engine"] is None,
            "same_generator": bool(torch.rand(2).equal(first)),
            "compiled": torch.compile.__module__}


def marks() -> dict[str, list[str]]:
    """Return the weights that Megatron-Core leaves without attributes for reduction and counting."""
    from unittest import mock

    from megatron_sov import recipes
    from megatron_sov.engine.model import language_model
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    config = recipes.get("tiny-solar-open")
    world.join_world(ParallelConfig())
    with mock.patch.object(language_model, "mark_parameters"):
        network = language_model.build_model(config.model, ParallelConfig(), config.train)
    named = list(network.named_parameters())
    return {"expert": [n for n, p in named if ".mlp.experts." in n and getattr(p, "allreduce", True)],
            "split": [n for n, p in named if "linear" in n and not hasattr(p, "tensor_model_parallel")]}


@pytest.mark.distributed
def test_cpu_shims_put_everything_on_the_cpu(ranks, job) -> None:
    (seen,), (unmarked,) = ranks(job(__file__, "opened"), job(__file__, "marks"))
    assert seen["once"] and not seen["on_gpu"] and seen["device"] == "cpu"
    assert set(seen["landed"]) == {"cpu"} and seen["meta"] == "meta"
    assert (seen["type"], seen["cast"]) == ("torch.cuda.FloatTensor", "torch.int64")
    assert seen["marked"] and seen["flag"]
    assert seen["split"] == [1.0, 1.0] and seen["same_generator"] and seen["compiled"] == "torch"
    assert unmarked["expert"], "the library marks experts itself now: so much of mark_parameters can go"
    # except the weights of Transformer Engine's grouped layers
    assert not unmarked["split"], "the library no longer marks split weights: mark_parameters has to"


# The library's defects still exist, and are fixed on any device, without the CPU shims.


LIBRARY = """
import json, torch
torch.cuda.is_available = lambda: True  # as on a GPU: nothing but the defects is touched
from megatron_sov.engine.parallel import library_patches
import megatron.core.transformer.moe.moe_utils as moe_utils
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm

config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm")
config.sequence_parallel = True

def look():
    try:
        norms = not WrappedTorchNorm(config, 8).weight.sequence_parallel
    except AssertionError:
        norms = True
    return {"norms": norms,
            "split sizes": torch.is_tensor(moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True))}

before = look()
library_patches.patch_defects()
library_patches.patch_defects()
print(json.dumps([before, look(), config.sequence_parallel]))
"""


@pytest.fixture(scope="module")
def looks() -> list[dict[str, bool]]:
    """Return a process's state before and after, with a library without Transformer Engine."""
    completed = subprocess.run([sys.executable, "-W", "ignore", "-c", LIBRARY], capture_output=True,
                               text=True, check=True)
    before, after, flag = json.loads(completed.stdout)
    assert flag is True
    return [before, after]


@pytest.mark.deep
@pytest.mark.parametrize("defect", ["norms", "split sizes"])
def test_the_library_still_needs_the_patch(defect: str, looks: list[dict[str, bool]]) -> None:
    assert looks[0][defect], f"{defect}: the library is mended; its patch in library_patches.py can go"


@pytest.mark.deep
def test_the_defects_are_mended_where_the_cpu_shims_are_not_in_place(looks: list[dict[str, bool]]) -> None:
    assert looks[1] == {"norms": False, "split sizes": True}
