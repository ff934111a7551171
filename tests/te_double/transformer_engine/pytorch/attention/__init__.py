"""Attention and rotary embeddings."""

from . import rope  # noqa: F401
from .dot_product_attention import DotProductAttention  # noqa: F401
