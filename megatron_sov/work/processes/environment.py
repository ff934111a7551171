"""What processes that judge, and foreign programs, get of the environment: what they need to run, and no key
of the user's.

A reward is handed responses that a model wrote, and runs verifiers over them: what it does not know it cannot
give away.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

KEPT_VARIABLES = frozenset((
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "TMPDIR", "TEMP", "TMP", "TZ", "TERM", "LANG",
    "LANGUAGE", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX",
    "TOKENIZERS_PARALLELISM", "NLTK_DATA", "SSL_CERT_FILE", "SSL_CERT_DIR", "no_proxy", "NO_PROXY",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE"))
"""Names of variables."""
BEGINNINGS_OF_VARIABLES = ("LC_", "PYTHON", "XDG_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "CUDA_", "CUBLAS_",
                   "TORCH_", "TRITON_",
                   "COVERAGE_", "COV_CORE_")
"""Beginnings of names."""

VARIABLES_OF_FOREIGN = ("HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER")
"""What a foreign program is given, as the client of the MCP SDK has it."""


def variables_for_foreign(more: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment that a foreign program is started with.

    Args:
        more: names that the settings give it besides.
    """
    # what an old shell would run as a function is passed on only where it is asked for by name
    kept = [name for name in VARIABLES_OF_FOREIGN if not os.environ.get(name, "").startswith("()")]
    return {name: os.environ[name] for name in (*kept, *more) if name in os.environ}


def forget_other_variables(more: Iterable[str] = ()) -> None:
    """Remove every variable of this process's environment that is not kept.

    Args:
        more: names that the reward asks for.
    """
    kept = KEPT_VARIABLES.union(more)
    for name in [*os.environ]:
        if name not in kept and not name.startswith(BEGINNINGS_OF_VARIABLES):
            del os.environ[name]
