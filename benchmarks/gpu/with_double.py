"""Our commands with the tests' double of Transformer Engine, on the CPU: what dry runs start.

Usage: python benchmarks/gpu/with_double.py pretrain ...     as `megatron-sov pretrain ...`
"""

from __future__ import annotations

import sys

from setting import DOUBLE, ROOT


def install() -> None:
    """Put the double in the place of Transformer Engine, and have models made of it in any dtype and under
    any `train.fp8`, whose products stay those of the dtype; call it before megatron-core is imported."""
    sys.path[:0] = [str(DOUBLE), str(ROOT)]
    from megatron_sov.engine.mcore.parallel import cpu_shims

    cpu_shims.prepare_megatron()
    from megatron_sov.engine.mcore.model import specs

    specs.on_gpu = lambda: True  # what configurations are made for
    specs.transformer_engine_serves = lambda dtype: True
    import transformer_engine.pytorch as te

    from megatron_sov.engine.mcore.parallel.device import FP8_FUNCTIONS

    for name in FP8_FUNCTIONS.values():  # as on a GPU that has every recipe
        setattr(te, name, lambda return_reason=False: (True, "") if return_reason else True)


if __name__ == "__main__":
    install()
    from megatron_sov.cli import main

    sys.exit(main())
