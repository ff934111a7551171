"""The recipes of `train.fp8`: products against their emulation, training against bf16, resuming."""

from __future__ import annotations

from typing import Any

import torch
from part_losses import as_after, train
from quantizers.products import product
from setting import Failed, Setting, largest, relative

RECIPES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling",
           "mxfp8": "MXFP8BlockScaling", "nvfp4": "NVFP4BlockScaling"}
"""`train.fp8` -> the class of Transformer Engine's recipe."""
LIMIT = 5e-3
"""Largest relative difference of a product from its emulation: both round to bf16 in the end.  nvfp4 draws
other random numbers than its emulation, and is only shown."""
DRY_LIMIT = 0.1
"""Of a dry run, whose double multiplies in bf16: what is apart is all of the quantisation."""
LOSS_LIMIT = 1e-2
MODEL = ("model.hidden_size=1024", "model.num_layers=8", "model.num_heads=16", "model.num_kv_heads=4",
         "model.head_dim=64", "model.num_experts=16", "model.num_experts_per_token=2",
         "model.expert_ffn_dim=1024", 'data.phases=[{"name": "main", "seq_len": 1024}]', "optim.lr=5e-4")
"""About half a billion parameters."""
TINY = ('data.phases=[{"name": "main", "seq_len": 256}]', "model.num_layers=2")


def available(setting: Setting) -> dict[str, str]:
    """Return recipe -> why this chip has not got it; empty: it has."""
    from megatron_sov.mcore.model.quantization import lacking

    return dict.fromkeys(RECIPES, "") if setting.dry else lacking()


def products(setting: Setting, fp8: str) -> dict[str, float]:
    """Return how far the three products of a linear layer are from their emulation."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    torch.manual_seed(0)
    tokens, width, out = (256, 128, 256) if setting.dry else (2048, 1024, 1536)
    kind = {} if fp8 == "nvfp4" else {"fp8_format": recipes.Format.E4M3}
    x, gradient = (torch.randn(tokens, n, device=setting.device, dtype=torch.bfloat16) for n in (width, out))
    layer = te.Linear(width, out, bias=False, params_dtype=torch.bfloat16, device=setting.device)
    torch.nn.init.normal_(layer.weight, std=0.02)
    x.requires_grad_()
    with te.autocast(enabled=True, recipe=getattr(recipes, RECIPES[fp8])(**kind)):
        y = layer(x)
    y.backward(gradient)
    w = layer.weight.detach()
    emulated = {"fprop": (y, product(x.detach(), w.t(), "fprop", fp8)),
                "dgrad": (x.grad, product(gradient, w, "dgrad", fp8)),
                "wgrad": (layer.weight.grad, product(gradient.t(), x.detach(), "wgrad", fp8))}
    return {name: relative(found, expected) for name, (found, expected) in emulated.items()}


def training(setting: Setting, fp8: str) -> dict[str, Any]:
    """Return the last losses of a recipe and of bf16, and whether a resumed run has the same ones.

    Raises:
        Failed: they are further apart than the limit, or a resumed run differs.
    """
    sizes, steps = (TINY, 4) if setting.dry else (MODEL, 50)
    common = (*sizes, "train.precision=bf16", f"train.checkpoint_every_steps={steps // 2}")
    bf16 = train(setting, "tiny-solar-open", setting.work / "fp8-none", steps, *common, resume=True)
    run = setting.work / f"fp8-{fp8}"
    whole = train(setting, "tiny-solar-open", run, steps, *common, f"train.fp8={fp8}",
                  "train.deterministic=true")
    again = as_after(run, steps // 2, setting.work / f"fp8-{fp8}-resumed")
    resumed = train(setting, "tiny-solar-open", again, steps, *common, f"train.fp8={fp8}",
                    "train.deterministic=true", resume=True)
    last = max(1, steps // 10)
    apart = sum(whole[-last:]) / sum(bf16[-last:]) - 1
    figures = {"last loss": whole[-1], "of bf16": bf16[-1], "apart": apart,
               "resumed the same": resumed == whole}
    if not abs(apart) <= LOSS_LIMIT and fp8 != "nvfp4":
        raise Failed(f"{fp8}: the loss is {apart:+.1%} from bf16's", **figures)
    if resumed != whole:
        raise Failed(f"{fp8}: a resumed run has other losses", **figures)
    return figures


def measure(setting: Setting) -> dict[str, Any]:
    """Return what there is of each recipe.

    Raises:
        Failed: a product is not its emulation's, or training differs.
    """
    figures: dict[str, Any] = {}
    for fp8, reason in available(setting).items():
        if reason:
            figures[fp8] = f"not on this chip: {reason}"
            continue
        errors = products(setting, fp8)
        figures[fp8] = {"products": errors}
        if fp8 != "nvfp4" and not largest(errors.values()) <= (DRY_LIMIT if setting.dry else LIMIT):
            raise Failed(f"{fp8}: products differ from their emulation: {errors}", **figures)
        if not setting.dry:
            figures[fp8] |= training(setting, fp8)
    return figures
