"""Matrix products of each `train.fp8` recipe, compared with their emulation in `quantizers/`."""

import torch
from quantizers.products import product
from setting import Figures, Setting, compute_relative_error, fail_on

RECIPES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling",
           "mxfp8": "MXFP8BlockScaling", "nvfp4": "NVFP4BlockScaling"}
"""`train.fp8` -> the class of Transformer Engine's recipe."""
LIMIT = 5e-3
"""Largest relative difference between a product and its emulation, which both round the result to bf16. nvfp4
is printed without a limit: it draws other random numbers than its emulation."""
FAST_LIMIT = 2e-2
"""Limit for products without promoted accumulation: Hopper accumulates FP8 products with about 14 bits, and
`Float8CurrentScaling` leaves it so in the forward product (`use_split_accumulator=False`). DeepSeek-V3
(arXiv 2412.19437, section 3.3.2) reports errors of up to 2 % at 4,096 summands; here 1,024 are added."""
DRY_LIMIT = 0.1
"""Limit of a dry run: its double multiplies in bf16, so the whole quantization error remains."""


def find_recipe_problems(setting: Setting) -> dict[str, str]:
    """Return recipe -> reason that this chip lacks it; empty if the chip has it."""
    from megatron_sov.engine.parallel.gpu_libraries import find_fp8_problems

    return dict.fromkeys(RECIPES, "") if setting.dry else find_fp8_problems()


def compare_products(setting: Setting, fp8: str) -> dict[str, float]:
    """Return product (fprop, dgrad, wgrad) of a linear layer -> relative difference from its emulation."""
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
    return {name: compute_relative_error(found, expected) for name, (found, expected) in emulated.items()}


def get_limit(setting: Setting, fp8: str, product: str) -> float:
    """Return the largest allowed relative difference between a product and its emulation on this chip."""
    if setting.dry:
        return DRY_LIMIT
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    return FAST_LIMIT if is_hopper and fp8 == "tensorwise" and product == "fprop" else LIMIT


def measure(setting: Setting) -> Figures:
    """Yield the figures of each recipe.

    Raises:
        Failed: a product differs from its emulation.
    """
    problems = []
    for fp8, reason in find_recipe_problems(setting).items():
        if reason:
            yield fp8, f"not on this chip: {reason}"
            continue
        try:
            errors = compare_products(setting, fp8)
        except Exception as e:  # report this recipe as a problem and continue with the others
            problems.append(f"{fp8}: {type(e).__name__}: {str(e)[:500]}")
            continue
        yield fp8, {"products": errors}
        far = {name: error for name, error in errors.items() if not error <= get_limit(setting, fp8, name)}
        if far and fp8 != "nvfp4":
            problems.append(f"{fp8}: products differ from their emulation: {far}")
    if setting.dry:
        yield "not in a dry run", ["products in 8 bits: the double multiplies in bf16"]
    fail_on(problems)
