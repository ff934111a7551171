"""The library lm-eval in this process: offline, quiet, and with templates that cannot reach Python."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_sov.base.errors import UserError, escape_controls, format_install_command

MAX_WARNINGS = 10
"""Warnings of lm-eval that are printed at most while tasks are loaded, built or scored."""


def require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"eval lm: lm-eval is not installed; run `{format_install_command('eval')}`")


def offline(allow_download: bool, cache: Path) -> Path:
    """Have the libraries fetch nothing unless allowed, and keep their caches in a folder that nobody else
    writes to, which is returned; before they are imported."""
    if not allow_download:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ[name] = "1"
    private = cache / "datasets"
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Private, since `datasets` reads back what lies in its cache.
    os.environ["HF_DATASETS_CACHE"] = str(private)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not allow_download:  # of libraries that have read it already
        for module in ("datasets.config", "huggingface_hub.constants"):
            for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
                if hasattr(sys.modules.get(module), name):
                    setattr(sys.modules[module], name, True)
    return private


def cage_templates() -> None:
    """Have lm-eval render the templates of tasks where they cannot reach Python."""
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    caged = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined,
                                          keep_trailing_newline=True)
    caged.filters |= lm_eval.utils.env.filters
    lm_eval.utils.env = caged


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the output of lm-eval and its libraries off the terminal, except lm-eval's first warnings."""
    for name in ("datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    shown: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        record.msg, record.args = escape_controls(" ".join(record.getMessage().split()))[:300], ()
        # lm-eval warns of every `custom_dataset`, with options of its own command line.
        is_known = record.msg in shown or "Custom kwargs can be" in record.msg
        shown.add(record.msg)
        return not is_known and len(shown) <= MAX_WARNINGS

    logger, printer = logging.getLogger("lm_eval"), logging.StreamHandler(sys.stderr)
    printer.setFormatter(logging.Formatter("lm-eval: %(message)s"))
    printer.addFilter(is_new)
    logger.setLevel(logging.WARNING)
    logger.addHandler(printer)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeHandler(printer)
        logger.setLevel(logging.ERROR)
