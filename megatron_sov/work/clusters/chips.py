"""GPU specifications with sources (peaks, memory, links, power, price), read from `slurm/chips.yaml`."""

import importlib.resources
import re
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.work.clusters.units import GIB

INSIDE_LATENCY_S = 3.3e-6
"""Latency of a small message over NVLink and a switch (DeepSeek-V3, arXiv 2505.09343, table 5)."""
INFINIBAND_LATENCY_S = 3.7e-6
"""Latency of a small message between two nodes over InfiniBand across leaves (same table)."""
PRECISIONS = ("bf16", "fp8", "fp4")
"""Precisions of tensor core products, widest first."""
_aliases: dict[str, str] = {}
"""Normalized name of a GPU -> key in `CHIPS`; `_read_chips` fills it."""


@dataclass(frozen=True)
class Gpu:
    """Name and memory of a GPU, from the table or from CUDA."""

    name: str
    """Marketing name, or CUDA's device name."""
    memory_bytes: int
    """Memory that CUDA reports, which is less than the nominal size."""


@dataclass(frozen=True)
class Price:
    """Price per GPU hour in USD, including network and host."""

    typical: float
    """Default for plans whose profile states no price."""
    low: float
    """Lowest listed price: small providers or long contracts."""
    high: float
    """Highest listed price: large clouds, on demand."""
    date: str
    """Month of the listing, YYYY-MM; prices can halve or double within a year."""
    guess: bool = False
    """Whether the price rests on few or no listings."""


@dataclass(frozen=True)
class Chip(Gpu):
    """Published specifications of a GPU model; rates are per GPU."""

    key: str
    """Name in cluster profiles and recommended layouts."""
    generation: str
    """Chips of the same generation reach similar shares of their peaks (`plan.speed.parameters`)."""
    hbm_bytes_per_s: float
    """Peak bandwidth of GPU memory."""
    bf16_flops_per_s: float
    """Dense bfloat16 peak."""
    fp8_flops_per_s: float
    """Dense FP8 peak; 0 if unsupported."""
    fp4_flops_per_s: float
    """Dense FP4 peak; 0 if unsupported."""
    nvlink_bytes_per_s: float
    """NVLink (or Infinity Fabric) bandwidth of a GPU, one direction."""
    nvlink_domain: int
    """Number of GPUs connected by NVLink."""
    network_bytes_per_s: float
    """Bandwidth of the network adapter in the vendor's own server, one direction."""
    power_w: float
    """Maximum power of the GPU."""
    price: Price
    """Rental price."""
    sources: dict[str, str] = field(hash=False)
    """Group of fields (tflops, hbm, nvlink, memory, network, power, price) -> source."""

    def flops_per_s(self, precision: str) -> float:
        """Return the dense peak for "bf16", "fp8" or "fp4". Raises `UserError`: the chip lacks it."""
        peaks = {"bf16": self.bf16_flops_per_s, "fp8": self.fp8_flops_per_s, "fp4": self.fp4_flops_per_s}
        if not peaks.get(precision):
            supported = [name for name in PRECISIONS if peaks[name]]
            alternatives = [chip.key for chip in CHIPS.values()
                            if getattr(chip, f"{precision}_flops_per_s", 0)]
            raise UserError(f"{precision} on {self.name}: is not supported by its tensor cores (they support "
                            f"{' and '.join(supported)}); plan with {supported[-1]}"
                            + (f", or with one of {', '.join(alternatives)}" if alternatives else ""))
        return peaks[precision]


@dataclass(frozen=True)
class Links:
    """Interconnects of a cluster; rates per GPU and direction, without losses."""

    domain: int
    """Number of GPUs connected by NVLink; beyond them traffic uses the network."""
    inside_bytes_per_s: float
    """Bandwidth within an NVLink domain."""
    between_bytes_per_s: float
    """Bandwidth between domains; 0 if there is a single domain."""
    inside_latency_s: float
    """Latency of a small message within a domain."""
    between_latency_s: float
    """Latency of a small message between domains."""


def _read_chips() -> dict[str, Chip]:
    """Return key -> chip of the table `chips.yaml`, with SI units, and fill `_aliases`."""
    rows: dict[str, dict[str, Any]] = load_package_table(
        importlib.resources.files("slurm").joinpath("chips.yaml"))
    # map every spelling to a key: the table's, the vendor's, CUDA's
    _aliases.update({_normalize_name(name): key for key, row in rows.items()
                     for name in (key, row["name"], *row["aliases"])})
    chips: dict[str, Chip] = {}
    for key, row in rows.items():
        rates = {f"{name}_flops_per_s": row["tflops"].get(name, 0) * 1e12 for name in PRECISIONS}
        chips[key] = Chip(
            name=row["name"], memory_bytes=row["memory_gib"] * GIB, key=key, generation=row["generation"],
            hbm_bytes_per_s=row["hbm_gbytes_per_s"] * 1e9, **rates,
            nvlink_bytes_per_s=row["nvlink_gbytes_per_s"] * 1e9, nvlink_domain=row["nvlink_domain"],
            # networks are specified in decimal bits, links inside a server in bytes
            network_bytes_per_s=row["network_gbits_per_s"] * 1e9 / 8,
            power_w=row["power_w"], price=Price(**row["price"]),
            # a source for several fields has the key "tflops, hbm"
            sources={name: source for names, source in row["sources"].items() for name in names.split(", ")})
    return chips


def _normalize_name(name: str) -> str:
    """Normalize a GPU name: lower case, letters and digits only, without the vendor."""
    return re.sub(r"[^a-z0-9]|nvidia|amd|instinct", "", name.lower())


CHIPS = _read_chips()
"""Name in cluster profiles and recommended layouts -> GPU."""


def find_device_chip(name: str) -> Chip | None:
    """Return the `Chip` for CUDA's device name; None for unknown devices, e.g. PCIe variants."""
    key = _aliases.get(_normalize_name(name))
    return CHIPS[key] if key else None


def default_links(chip: Chip) -> Links:
    """Return the `Links` of the vendor's servers: NVLink within a domain, an InfiniBand adapter per GPU."""
    return Links(chip.nvlink_domain, chip.nvlink_bytes_per_s, chip.network_bytes_per_s,
                 INSIDE_LATENCY_S, INFINIBAND_LATENCY_S)
