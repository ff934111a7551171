"""GPUs as data: peaks, memory, links, power and price, each with its source, read from `slurm/chips.yaml`."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_sov.base.errors import UserError, nearest
from megatron_sov.work.clusters.units import GIB

INSIDE_LATENCY_S = 3.3e-6
"""One small message between two GPUs over NVLink and a switch (DeepSeek-V3, arXiv 2505.09343, table 5)."""
INFINIBAND_LATENCY_S = 3.7e-6
"""One small message between two nodes over InfiniBand, across leaves (the same table)."""
PRECISIONS = ("bf16", "fp8", "fp4")
"""What tensor cores multiply in, widest first."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as a run's memory check sees it: one of the table, or the one that CUDA finds."""

    name: str
    """As people call it, or as CUDA does."""
    memory_bytes: int
    """What CUDA reports, which is less than its name says."""


@dataclass(frozen=True)
class Price:
    """What an hour of one GPU costs, in USD, network and host included."""

    typical: float
    """What a plan takes where the profile says nothing."""
    low: float
    """The cheapest that was listed: small providers, or long contracts."""
    high: float
    """The dearest that was listed: large clouds, on demand."""
    date: str
    """When: YYYY-MM.  Prices halve and double within a year."""
    guess: bool = False
    """Whether few or no listings were found."""


@dataclass(frozen=True)
class Chip(Gpu):
    """A kind of GPU with what its maker publishes; rates are those of one GPU."""

    key: str
    """Name in cluster profiles and recommended layouts."""
    generation: str
    """Chips of one reach the same shares of their peaks (`plan.speed.parameters`)."""
    hbm_bytes_per_s: float
    """Peak of its own memory."""
    bf16_flops_per_s: float
    """Dense peak of products in bfloat16."""
    fp8_flops_per_s: float
    """Dense peak of products in FP8; 0: has none."""
    fp4_flops_per_s: float
    """Dense peak of products in FP4; 0: has none."""
    nvlink_bytes_per_s: float
    """NVLink (or Infinity Fabric) to all others of its domain together, one direction."""
    nvlink_domain: int
    """GPUs that NVLink joins."""
    network_bytes_per_s: float
    """Adapter to other domains in the maker's own server, one direction."""
    power_w: float
    """Most that the GPU draws."""
    server_power_w: float
    """Most that its share of the maker's own server draws: itself, CPUs, memory, fans, network."""
    price: Price
    """What it rents for."""
    sources: dict[str, str] = field(hash=False)
    """tflops, hbm, nvlink, memory, network, power, server_power, price -> where the figure stands."""

    def flops_per_s(self, precision: str) -> float:
        """Return the dense peak of products in "bf16", "fp8" or "fp4".

        Raises:
            UserError: it has no such products.
        """
        peak = {"bf16": self.bf16_flops_per_s, "fp8": self.fp8_flops_per_s, "fp4": self.fp4_flops_per_s}
        if not peak.get(precision):
            can = [name for name in PRECISIONS if peak[name]]
            others = [chip.key for chip in CHIPS.values() if getattr(chip, f"{precision}_flops_per_s", 0)]
            raise UserError(f"{precision} on {self.name}: its tensor cores have none, they multiply in "
                            f"{' and '.join(can)}; plan with {can[-1]}"
                            + (f", or with one of {', '.join(others)}" if others else ""))
        return peak[precision]


@dataclass(frozen=True)
class Links:
    """What joins the GPUs of a cluster; rates are one direction of one GPU, without any loss."""

    domain: int
    """GPUs that NVLink joins; the next one is reached over the network."""
    inside_bytes_per_s: float
    """Between GPUs of a domain."""
    between_bytes_per_s: float
    """Between GPUs of different domains; 0: there are no others."""
    inside_latency_s: float
    """Of one small message inside a domain."""
    between_latency_s: float
    """Of one small message between domains."""


def _read() -> dict[str, Chip]:
    """Return the chips of the packaged table."""
    text = importlib.resources.files("slurm").joinpath("chips.yaml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    # all spellings lead to one key: the table's own, the maker's, CUDA's
    _aliases.update({_folded(name): key for key, row in rows.items()
                     for name in (key, row["name"], *row["aliases"])})
    chips: dict[str, Chip] = {}
    for key, row in rows.items():
        rates = {f"{name}_flops_per_s": row["tflops"].get(name, 0) * 1e12 for name in PRECISIONS}
        chips[key] = Chip(
            name=row["name"], memory_bytes=row["memory_gib"] * GIB, key=key, generation=row["generation"],
            hbm_bytes_per_s=row["hbm_gbytes_per_s"] * 1e9, **rates,
            nvlink_bytes_per_s=row["nvlink_gbytes_per_s"] * 1e9, nvlink_domain=row["nvlink_domain"],
            # networks are sold in decimal bits, links inside a server in bytes
            network_bytes_per_s=row["network_gbits_per_s"] * 1e9 / 8,
            power_w=row["power_w"], server_power_w=row["server_power_w"], price=Price(**row["price"]),
            sources={of: source for fields, source in row["sources"].items() for of in fields.split(", ")})
    return chips


def _folded(name: str) -> str:
    """Return a name without what people write in many ways: case, the maker, all but letters and digits."""
    return re.sub(r"[^a-z0-9]|nvidia|amd|instinct", "", name.lower())


_aliases: dict[str, str] = {}
CHIPS = _read()
"""Name in cluster profiles and recommended layouts -> GPU."""


def chip(name: str) -> Chip:
    """Return a chip by its key, its name or another name of it, however these are written.

    Raises:
        UserError: there is none; the nearest is named.
    """
    found = of_device(name)
    if found is None:
        raise UserError(f"GPU {name!r}: is not in the table{nearest(name.lower(), CHIPS)} "
                        f"(GPUs: {', '.join(sorted(CHIPS))})")
    return found


def of_device(name: str) -> Chip | None:
    """Return the chip that CUDA calls so; None: it is not in the table, as variants for PCIe are not."""
    key = _aliases.get(_folded(name))
    return CHIPS[key] if key else None


def default_links(chip: Chip) -> Links:
    """Return the links of the maker's own servers: its NVLink domain, one adapter of InfiniBand for each
    GPU."""
    return Links(chip.nvlink_domain, chip.nvlink_bytes_per_s, chip.network_bytes_per_s,
                 INSIDE_LATENCY_S, INFINIBAND_LATENCY_S)
