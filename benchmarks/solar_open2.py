"""Solar Open 2 beside transformers' own classes of its attention, which the installed release does not have.

Usage: python benchmarks/solar_open2.py --theirs FILE, from the checkout

FILE is Python with the classes SolarOpen2Attention and SolarOpen2LinearAttention of transformers' pull
request 47585 (modular_solar_open2.py at 807cccec3b6d), without the cache.  They take the place of the
attention that `tests/solar_open2.py` writes out, in the model that it makes of transformers' Solar Open;
everything attends eagerly.  Models are the three odd ones of `tests/layouts/test_exactness.py`.

Printed are the largest differences, of the largest number each: in float32 of logits, and of gradients of a
sum of logits with random weights, theirs and the written one, then theirs and ours, read by `convert
from-hf`; in float64 of what single layers find for random states, and of the gradients of a sum of that.
Their classes compute states in float32 whatever the dtype: in float64 they are read with float64 in its
place, and whole models are not compared, since norms of transformers stay in float32.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from megatron_sov import convert, recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.engine.parallel.cpu_shims import prepare_megatron
from megatron_sov.model.families.count import num_params
from tests.layouts.test_exactness import LENGTH, documents, make, odd_config
from tests.solar_open2 import FAMILY, SolarOpen2ForCausalLM, known_to_transformers

NOISE = 1e-3
"""Of the largest gradient: a smaller one is measured by it.  One expert that is chosen alone has weight 1,
and its router a gradient of rounding."""


def attention_of(file: Path, wide: str) -> dict[str, Any]:
    """Return what the file defines, its float32 read as another dtype."""
    found: dict[str, Any] = {}
    exec(file.read_text().replace("torch.float32", f"torch.{wide}"), found)
    return found


def theirs(folder: Path, file: Path, dtype: torch.dtype) -> Any:
    """Return the model of a folder with their attention."""
    model = SolarOpen2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager",
                                                  experts_implementation="eager")
    classes = attention_of(file, str(dtype).removeprefix("torch."))
    # their configuration class has these two at their defaults
    model.config.attention_bias, model.config.hc_rate = False, 0
    for i, (layer, kind) in enumerate(zip(model.model.layers, model.config.layer_types, strict=True)):
        name = "SolarOpen2Attention" if kind == "full_attention" else "SolarOpen2LinearAttention"
        other = classes[name](model.config, i).to(dtype)
        other.load_state_dict(layer.self_attn.state_dict())
        if kind == "linear_attention":  # which takes a mask of padding alone, and there is none
            other.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True)
        layer.self_attn = other
    return model.eval()


def written(folder: Path, dtype: torch.dtype) -> Any:
    """Return the model of a folder with the attention that is written out."""
    return SolarOpen2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager",
                                                 experts_implementation="eager").eval()


def gradients(module: Any, found: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a sum of what was found with random weights."""
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(found.dtype)
    (found * weights).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def of_model(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a model's logits of the document, and the gradients of all parameters."""
    tokens = torch.tensor(documents(model.config.vocab_size)[1:])
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    return logits.detach(), gradients(model, logits)


def of_layer(layer: Any, hidden: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what a layer's attention finds for random states, and the gradients of its parameters."""
    states = torch.randn(1, LENGTH, hidden, generator=torch.Generator().manual_seed(4)).double()
    later = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    found = layer(hidden_states=states, position_embeddings=None, attention_mask=later)[0]
    return found.detach(), gradients(layer, found)


def ours(checkpoint: Path) -> torch.Tensor:
    """Return our logits of the document, which stands behind another one in its row."""
    from megatron_sov.checkpoint import load
    from megatron_sov.engine.decode.forward_only import ForwardModel, Inputs
    from megatron_sov.engine.model.language_model import build
    from megatron_sov.model.config import ParallelConfig, apply_settings, from_dict

    config = apply_settings(from_dict(read_manifest(checkpoint, "checkpoint").settings),
                            ["train.precision=fp32"])
    model = build(config.model, ParallelConfig(), config.train)
    load.load_model(checkpoint, model)
    before, asked = documents(config.model.vocab_size)
    row = Inputs([before, asked], torch.device("cpu"))
    return ForwardModel(model, 100).logits(row, torch.arange(len(before), len(before) + len(asked)))


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, of the largest number."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of gradients, of its parameter's largest one."""
    assert one.keys() == other.keys()
    least = NOISE * max(float(g.abs().max()) for g in other.values())
    return max(float((one[name] - g).abs().max()) / max(float(g.abs().max()), least)
               for name, g in other.items())


def compare(seed: int, file: Path, scratch: Path) -> None:
    """Print the differences of one odd model."""
    config = odd_config(FAMILY, seed)
    folder, checkpoint = scratch / "hf", scratch / "ckpt"
    folder.mkdir()
    make(config, folder, seed)
    convert.from_hf(folder, checkpoint)
    expected, of_theirs = of_model(theirs(folder, file, torch.float32))
    logits, of_written = of_model(written(folder, torch.float32))
    print(f"odd {seed}, float32: theirs and the written one: logits {largest(logits, expected):.1e}, "
          f"gradients {apart(of_written, of_theirs):.1e}; theirs and ours: logits "
          f"{largest(ours(checkpoint), expected):.1e}")
    hidden = config["hidden_size"]
    pairs = [(of_layer(one.self_attn, hidden), of_layer(other.self_attn, hidden))
             for one, other in zip(written(folder, torch.float64).model.layers,
                                   theirs(folder, file, torch.float64).model.layers, strict=True)]
    found = [(largest(one[0], other[0]), apart(one[1], other[1])) for one, other in pairs]
    for kind in ("full_attention", "linear_attention"):
        of_kind = [pair for pair, k in zip(found, kinds_of(folder), strict=True) if k == kind]
        print(f"odd {seed}, float64, {len(of_kind)} layers of {kind}: outputs "
              f"{max(out for out, _ in of_kind):.1e}, gradients {max(back for _, back in of_kind):.1e}",
              flush=True)


def kinds_of(folder: Path) -> list[str]:
    """Return the kind of each layer."""
    kinds: list[str] = AutoConfig.from_pretrained(folder).layer_types
    return kinds


def main() -> None:
    """Print the differences of each odd model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--theirs", type=Path, required=True)
    file = parser.parse_args().theirs
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    prepare_megatron()
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    known_to_transformers()
    world.join(ParallelConfig())
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    print(f"parameters of solar-open2-250b: {num_params(recipes.get('solar-open2-250b').model).total:,}")
    for seed in range(3):
        with tempfile.TemporaryDirectory() as scratch:
            compare(seed, file, Path(scratch))
    world.leave()


if __name__ == "__main__":
    main()
