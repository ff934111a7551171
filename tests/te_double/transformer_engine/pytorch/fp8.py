"""Previous module name of `quantization`, which megatron-core still imports."""

from .quantization import FP8GlobalStateManager, fp8_autocast, fp8_model_init  # noqa: F401
