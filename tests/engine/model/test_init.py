"""Initial weights depend on (seed, name, index) only, and are equal at every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import recipes
from megatron_sov.checkpoint import initial_weights
from megatron_sov.checkpoint.initial_weights import find_init_rule, generate_normals
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, apply_settings

SETTINGS = ["model.vocab_size=96", "model.hidden_size=32", "model.head_dim=8", "model.expert_ffn_dim=16"]


def numbers() -> dict[str, Any]:
    """Return statistics of the normal distribution, and whether ranges equal slices of the whole."""
    whole = generate_normals(5, "w", 0, 200_003)
    ranges = [(0, 1), (1, 1), (7, 2), (8, 8), (1001, 50_000), (199_990, 13)]
    with_itself = float(np.corrcoef(whole[:-1], whole[1:])[0, 1])
    with_other = float(np.corrcoef(whole, generate_normals(5, "v", 0, 200_003))[0, 1])
    return {"slices": all((generate_normals(5, "w", a, n) == whole[a:a + n]).all() for a, n in ranges),
            "dtype": str(whole.dtype), "mean": float(whole.mean()), "std": float(whole.std()),
            "kurtosis": float((whole.astype(float) ** 4).mean()), "beyond_2": float((abs(whole) > 2).mean()),
            "with_itself": with_itself, "with_other": with_other,
            "same": bool((generate_normals(5, "w", 0, 99) == generate_normals(5, "w", 0, 99)).all()),
            "seeds": int((generate_normals(5, "w", 0, 99) == generate_normals(6, "w", 0, 99)).sum())}


def initial(recipe: str, layout: dict[str, Any], folder: str, *, reference: bool = False) -> dict[str, Any]:
    """Initialize a model. The reference writes its tensors; other layouts count differing blocks."""
    config = apply_settings(recipes.get(recipe), SETTINGS)
    world.join_world(ParallelConfig(**layout))
    model = build_model(config.model, ParallelConfig(**layout), config.train)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    initial_weights.initialize_weights(model, config.model, 11)
    local = list_local_shards(model)
    file = Path(folder) / f"{recipe}.safetensors"
    if reference:
        whole: dict[str, torch.Tensor] = {}
        for b in local:
            whole.setdefault(b.key,
                             torch.full(b.global_shape, torch.nan))[_place(b)] = b.data.reshape(b.shape)
        save_file(whole, file)
    expected = load_file(file)
    differing = [b.key for b in local if not b.data.reshape(b.shape).equal(expected[b.key][_place(b)])]
    return {"blocks": len(local), "differing": differing,
            "unset": [n for n, p in model.named_parameters() if not p.isfinite().all()],
            "std": {k: float(t.std()) for k, t in expected.items() if t.dim() > 1} if reference else {}}


def with_threads(num_threads: int) -> dict[str, Any]:
    """Return a hash of a model's initial weights, and the number of threads that generated them."""
    import hashlib
    import itertools
    import threading

    config = apply_settings(recipes.get("tiny-k-exaone"), SETTINGS)
    world.join_world(ParallelConfig())
    torch.set_num_threads(num_threads)
    threads, normals = set(), initial_weights.generate_normals
    calls, meeting = itertools.count(), threading.Barrier(num_threads)

    def noted(*args: Any) -> Any:
        threads.add(threading.get_ident())
        if next(calls) < num_threads:
            meeting.wait(600)  # otherwise one fast thread might generate all
        return normals(*args)

    initial_weights.generate_normals, initial_weights._PART_VALUES = noted, 1000
    model = build_model(config.model, ParallelConfig(), config.train)
    initial_weights.initialize_weights(model, config.model, 11)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    return {"digest": digest, "threads": len(threads)}


def test_threads_make_the_same_weights(ranks: Any, job: Any) -> None:
    (alone,), (together,) = ranks(*(job(__file__, "with_threads", 1, {"num_threads": n}) for n in (1, 4)))
    assert alone["threads"] == 1 and together["threads"] == 4
    assert together["digest"] == alone["digest"]


def _place(block: Any) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))


def unknown() -> str:
    """Return the error for a tensor without an initialization rule."""
    try:
        return find_init_rule("decoder.layers.0.mystery.weight")
    except ValueError as e:
        return str(e)


@pytest.mark.distributed
def test_weights_are_functions_of_seed_name_and_index(ranks, job, tmp_path: Path) -> None:
    """Numbers first, then whole models at several layouts, then a tensor without a rule."""
    sp = {"tp": 2, "sp": True}
    layouts = [(2, sp), (2, {"ep": 2}), (2, {"pp": 2}), (2, {**sp, "etp": 2}), (4, {**sp, "pp": 2, "ep": 2})]
    arguments = {"recipe": "tiny-k-exaone", "folder": str(tmp_path)}
    (normal,), (said,), (reference,), *results = ranks(
        job(__file__, "numbers"), job(__file__, "unknown"),
        job(__file__, "initial", 1, {**arguments, "layout": {}, "reference": True}),
        *(job(__file__, "initial", n, {**arguments, "layout": x}) for n, x in layouts))

    assert normal["slices"] and normal["same"] and normal["seeds"] == 0
    assert normal["dtype"] == "float32"
    assert abs(normal["mean"]) < 4 / 200_003 ** 0.5
    assert normal["std"] == pytest.approx(1, abs=4 * (2 * 200_003) ** -0.5)
    assert normal["kurtosis"] == pytest.approx(3, abs=4 * (96 / 200_003) ** 0.5)
    assert normal["beyond_2"] == pytest.approx(0.0455, abs=0.002)
    assert max(abs(normal["with_itself"]), abs(normal["with_other"])) < 4 / 200_003 ** 0.5

    assert reference["unset"] == [] and reference["blocks"] > 40
    for key, std in reference["std"].items():
        into_residual = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        assert std == pytest.approx(0.04 / 8 ** 0.5 if into_residual else 0.04, rel=0.1), key
    for layout, per_rank in zip(layouts, results, strict=True):
        for result in per_rank:
            assert result["differing"] == [] and result["unset"] == [], layout

    assert said == ("decoder.layers.0.mystery.weight: 0 rules of checkpoint/initial_weights.py match this "
                    "name, needs exactly one")
