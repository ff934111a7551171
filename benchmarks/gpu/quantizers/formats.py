"""Number formats with 8 and 4 bits: rounding to the nearest value, ties to even, saturating at the largest.

E4M3 and E5M2: "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1; E2M1 and E8M0: OCP Microscaling
Formats (MX) v1.0, sections 5.3.3 and 5.4.1.
"""

import torch

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
"""Format -> its largest finite value."""
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def round_to(values: torch.Tensor, form: str) -> torch.Tensor:
    """Return the nearest values of an 8-bit format, as float32."""
    limit = LARGEST[form]
    return values.clamp(-limit, limit).to(_DTYPES[form]).float()


def round_to_e2m1(values: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Return the nearest values of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives).

    Args:
        values: float32.
        noise: uniform in [0, 1), of the same shape, for stochastic rounding: each value becomes one of its
            two neighbours with the value as its expectation. None: the nearest, ties to even.
    """
    magnitude = values.abs().clamp(max=LARGEST["e2m1"])
    spacing = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    steps = magnitude / spacing
    rounded = torch.round(steps) if noise is None else torch.floor(steps + noise)
    return torch.copysign((rounded * spacing).clamp(max=LARGEST["e2m1"]), values)


def exponent_up(values: torch.Tensor) -> torch.Tensor:
    """Return the exponents of the smallest powers of two (E8M0: 2^-127 to 2^127) that are at least the given
    positive float32 values; -127 for zero."""
    mantissa, exponent = torch.frexp(values)  # values = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.where(values > 0, exponent - (mantissa == 0.5).int(), -127).clamp(-127, 127)
