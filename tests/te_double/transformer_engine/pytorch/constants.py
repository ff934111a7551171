"""Enumerations in arguments of megatron-core."""

from enum import Enum


class CPLoadBalancingStrategy(Enum):
    """Split of a row over a context-parallel group."""

    DUAL_CHUNK_SWAP = 0


class RoutingMapFormat(Enum):
    """Format of the selected experts."""

    BYTEMAP = 0
