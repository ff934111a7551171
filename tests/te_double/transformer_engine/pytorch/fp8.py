"""The old name of `quantization`, by which megatron-core imports it."""

from .quantization import FP8GlobalStateManager, fp8_autocast, fp8_model_init  # noqa: F401
