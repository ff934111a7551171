"""A training step on a GPU without memory: correct steps pass, and steps that a GPU would reject fail."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
GPU = str(ROOT / "benchmarks/gpu")
SMALL = ("train.precision=bf16", "train.micro_batch_size=1", "parallel.zero1=true", "parallel.ep=2",
         "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
SELECTIVE = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
STAGES = ("model.num_layers=2", "parallel.pp=2", "parallel.tp=2", "parallel.sp=true", *SELECTIVE)
BIG = ("train.micro_batch_size=1", "train.fp8=none", *SELECTIVE, "parallel.ep=64", "parallel.pp=1",
       "parallel.vpp=1", "parallel.pipeline_layout=[]", "parallel.expert_overlap=none",
       "parallel.expert_dispatcher=alltoall")
COUNTED = ("solar-open-102b", "h200", 64, (*BIG, "model.num_layers=4"), 0)
"""A rank at full size whose allocated bytes are counted, with the saved activations of four layers."""
COUNTED_WITH = {"counted graphs": ('gpu.cuda_graphs=["moe_router"]',),
                "counted overlap": ("parallel.expert_overlap=micro_batches",)}
ONE_LAYER = ("tiny-solar-open", "h100", 2, (*SMALL, "model.num_layers=1"), 0)
GRAPHS = (*ONE_LAYER[:3], (*ONE_LAYER[3], *SELECTIVE, 'gpu.cuda_graphs=["moe_router", "moe_preprocess"]'), 0)
CASES = {"last": ("tiny-solar-open", "b200", 8, (*SMALL, *STAGES, "train.fp8=mxfp8"), 1), "graphs": GRAPHS,
         "overlapped graphs": (*GRAPHS[:3], (*GRAPHS[3], "parallel.expert_overlap=micro_batches",
                                             "parallel.delay_weight_grads=true"), 0)}


def run_cases() -> None:
    """Run valid steps and steps with planted errors, and print name -> result as JSON.

    It runs in its own process, since `fake_rank.prepare` patches torch for good.
    """
    sys.path.append(GPU)
    import fake_rank

    fake_rank.prepare()
    from megatron_sov.engine.model import graphs
    from megatron_sov.train.objectives import microbatch

    results: dict[str, Any] = {name: fake_rank.run_case(*case) for name, case in CASES.items()}
    results["counted"] = fake_rank.run_case(*COUNTED)
    for name, settings in COUNTED_WITH.items():
        results[name] = fake_rank.run_case(*COUNTED[:3], (*COUNTED[3], *settings), 0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(microbatch, "get_local_device", lambda: torch.device("cpu"))
        results["rows on the host"] = fake_rank.run_case(*ONE_LAYER)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(microbatch, "to_device", lambda values, device: values.to(device))
        results["rows waited for"] = fake_rank.run_case(*ONE_LAYER)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(graphs, "use_side_stream", lambda config: contextlib.nullcontext())
        results["the default stream"] = fake_rank.run_case(*GRAPHS)
    print(json.dumps(results))


def run_in_own_process(module: str, function: str, names: Collection[str]) -> dict[str, Any]:
    """Run a function of a test module in its own process, and return the JSON of its last line.

    Asserts that the results in `names` have no problem.
    """
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c",
         f"import {module} as t; t.{function}()"],
        cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-3000:]
    results: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    problems = {name: results[name].get("trace", results[name].get("problem")) for name in names}
    assert problems == dict.fromkeys(names)
    return results


@pytest.mark.deep
def test_a_valid_step_passes_and_gpu_only_errors_are_detected() -> None:
    result = run_in_own_process(__name__, "run_cases", [*CASES, "counted", *COUNTED_WITH])
    for name, error in (("counted", 0.005), ("counted overlap", 0.005), ("counted graphs", 0.03)):
        assert result[name]["account bytes"] == pytest.approx(result[name]["peak bytes"], rel=error)
    waits = result["last"]["waits"]
    # the stage's one layer, in two micro-batches
    assert waits.pop("token_dispatcher.py:_maybe_dtoh_and_synchronize") == 2
    assert all(count <= 3 for count in waits.values()), waits
    assert "same device" in result["rows on the host"]["problem"]
    assert result["rows waited for"]["problem"] == "waits for the device in microbatch.py:build_micro_batch"
    error = "CUDA error: operation not permitted when stream is capturing"
    why = "the default stream waits for a captured one"
    assert result["the default stream"]["problem"] == f"RuntimeError: {error} ({why})"
