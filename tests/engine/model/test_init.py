"""Initial weights depend on (seed, name, index) only, and are equal at every layout."""

import hashlib
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov.checkpoint import initial_weights
from megatron_sov.checkpoint.initial_weights import find_init_rule, generate_normals
from megatron_sov.engine.model.local_shards import list_local_shards
from tests.tiny import tiny_model


def compare_normals() -> dict[str, Any]:
    """Return statistics of generated normals, and whether generated ranges equal slices of the whole tensor.

    "with_itself" and "with_other": correlation with the next value and with another tensor's values; "seeds":
    number of values that are equal for another seed.
    """
    values = generate_normals(5, "w", 0, 200_003)
    ranges = [(0, 1), (1, 1), (7, 2), (8, 8), (1001, 50_000), (199_990, 13)]
    with_itself = float(np.corrcoef(values[:-1], values[1:])[0, 1])
    with_other = float(np.corrcoef(values, generate_normals(5, "v", 0, 200_003))[0, 1])
    return {"slices": all((generate_normals(5, "w", a, n) == values[a:a + n]).all() for a, n in ranges),
            "dtype": str(values.dtype), "mean": float(values.mean()), "std": float(values.std()),
            "kurtosis": float((values.astype(float) ** 4).mean()),
            "beyond_2": float((abs(values) > 2).mean()),
            "with_itself": with_itself, "with_other": with_other,
            "same": bool((generate_normals(5, "w", 0, 99) == generate_normals(5, "w", 0, 99)).all()),
            "seeds": int((generate_normals(5, "w", 0, 99) == generate_normals(6, "w", 0, 99)).sum())}


def initialize_model(recipe: str, layout: dict[str, Any], folder: str, *,
                     reference: bool = False) -> dict[str, Any]:
    """Inside ranks: initialize a model and compare its shards with the tensors of the reference layout.

    With `reference`, this rank has the whole model, and writes its tensors to a file in `folder`.
    """
    config, model = tiny_model(recipe, layout=layout)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    initial_weights.initialize_weights(model, config.model, 11)
    local = list_local_shards(model)
    file = Path(folder) / f"{recipe}.safetensors"
    if reference:
        tensors: dict[str, torch.Tensor] = {}
        for b in local:
            tensor = tensors.setdefault(b.key, torch.full(b.global_shape, torch.nan))
            tensor[get_slices(b)] = b.data.reshape(b.shape)
        save_file(tensors, file)
    expected = load_file(file)
    differing = [b.key for b in local if not b.data.reshape(b.shape).equal(expected[b.key][get_slices(b)])]
    return {"blocks": len(local), "differing": differing,
            "unset": [n for n, p in model.named_parameters() if not p.isfinite().all()],
            "std": {k: float(t.std()) for k, t in expected.items() if t.dim() > 1} if reference else {}}


def initialize_with_threads(num_threads: int) -> dict[str, Any]:
    """Return a hash of a model's initial weights, and the number of threads that generated them."""
    torch.set_num_threads(num_threads)
    threads, normals = set(), initial_weights.generate_normals
    calls, barrier = itertools.count(), threading.Barrier(num_threads)

    def record_thread(*args: Any) -> Any:
        threads.add(threading.get_ident())
        if next(calls) < num_threads:
            barrier.wait(600)  # else one fast thread could generate all tensors
        return normals(*args)

    initial_weights.generate_normals, initial_weights._PART_VALUES = record_thread, 1000
    _, model = tiny_model("tiny-k-exaone", layout={}, seed=11)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    return {"digest": digest, "threads": len(threads)}


def test_threads_make_the_same_weights(ranks: Any, job: Any) -> None:
    (one_thread,), (four_threads,) = ranks(*(job(__file__, "initialize_with_threads", 1, {"num_threads": n})
                                             for n in (1, 4)))
    assert one_thread["threads"] == 1 and four_threads["threads"] == 4
    assert four_threads["digest"] == one_thread["digest"]


def get_slices(block: Any) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))


def find_unknown_rule() -> str:
    """Return the error for a tensor without an initialization rule."""
    try:
        return find_init_rule("decoder.layers.0.mystery.weight")
    except ValueError as e:
        return str(e)


@pytest.mark.distributed
def test_weights_are_functions_of_seed_name_and_index(ranks, job, tmp_path: Path) -> None:
    """Tests the generated normals, models at several layouts, and the error for a tensor without a rule."""
    sp = {"tp": 2, "sp": True}
    layouts = [(2, sp), (2, {"ep": 2}), (2, {"pp": 2}), (2, {**sp, "etp": 2}), (4, {**sp, "pp": 2, "ep": 2})]
    arguments = {"recipe": "tiny-k-exaone", "folder": str(tmp_path)}
    (statistics,), (error,), (reference,), *results = ranks(
        job(__file__, "compare_normals"), job(__file__, "find_unknown_rule"),
        job(__file__, "initialize_model", 1, {**arguments, "layout": {}, "reference": True}),
        *(job(__file__, "initialize_model", n, {**arguments, "layout": x}) for n, x in layouts))

    assert statistics["slices"] and statistics["same"] and statistics["seeds"] == 0
    assert statistics["dtype"] == "float32"
    # four standard errors of each statistic of 200,003 normals
    assert abs(statistics["mean"]) < 4 / 200_003 ** 0.5
    assert statistics["std"] == pytest.approx(1, abs=4 * (2 * 200_003) ** -0.5)
    assert statistics["kurtosis"] == pytest.approx(3, abs=4 * (96 / 200_003) ** 0.5)
    assert statistics["beyond_2"] == pytest.approx(0.0455, abs=0.002)
    assert max(abs(statistics["with_itself"]), abs(statistics["with_other"])) < 4 / 200_003 ** 0.5

    assert reference["unset"] == [] and reference["blocks"] > 40
    for key, std in reference["std"].items():
        into_residual = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        assert std == pytest.approx(0.04 / 8 ** 0.5 if into_residual else 0.04, rel=0.1), key
    for layout, per_rank in zip(layouts, results, strict=True):
        for result in per_rank:
            assert result["differing"] == [] and result["unset"] == [], layout

    assert error == ("decoder.layers.0.mystery.weight: 0 rules of checkpoint/initial_weights.py match this "
                     "name, needs exactly one")
