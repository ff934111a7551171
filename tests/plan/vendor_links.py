"""Interconnects of the vendor's servers, for tests that price a step."""

from megatron_sov.work.clusters.chips import INFINIBAND_LATENCY_S, INSIDE_LATENCY_S, Chip, Links


def build_links(chip: Chip) -> Links:
    """Return NVLink within a domain, and an InfiniBand adapter per GPU."""
    return Links(chip.nvlink_domain, chip.nvlink_bytes_per_s, chip.network_bytes_per_s, INSIDE_LATENCY_S,
                 INFINIBAND_LATENCY_S)
