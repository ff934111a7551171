"""Names of choices."""

from enum import Enum


class CPLoadBalancingStrategy(Enum):
    """How a row is cut over a context-parallel group."""

    DUAL_CHUNK_SWAP = 0


class RoutingMapFormat(Enum):
    """How a choice of experts is written."""

    BYTEMAP = 0
