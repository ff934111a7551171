"""Set up the library lm-eval: its downloads and output."""

import contextlib
import http.client
import importlib.util
import io
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

from megatron_sov.base.errors import UserError, escape_controls, format_install_command

MAX_WARNINGS = 10
"""Maximum number of lm-eval warnings printed in one `suppress_output` block."""
HUB, HUB_TIMEOUT_S = "https://huggingface.co", 10
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables, and constants in the libraries, that forbid downloads."""


def require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"eval lm: lm-eval is not installed; run `{format_install_command('eval')}`")


def forbid_downloads() -> None:
    """Let the Hugging Face libraries read their caches only."""
    for name in OFFLINE_VARIABLES:
        os.environ[name] = "1"
        # loaded libraries have read the environment already
        for module in ("datasets.config", "huggingface_hub.constants"):
            if hasattr(sys.modules.get(module), name):
                setattr(sys.modules[module], name, True)


def can_reach_hub() -> bool:
    """Return whether the Hugging Face hub answers within `HUB_TIMEOUT_S` seconds."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT") or HUB, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:  # a refusal is an answer too
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Discard the output of lm-eval and its libraries, except lm-eval's first `MAX_WARNINGS` warnings."""
    for name in ("datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    printed: set[str] = set()

    def should_print(record: logging.LogRecord) -> bool:
        record.msg, record.args = escape_controls(" ".join(record.getMessage().split()))[:300], ()
        # lm-eval's hint on `custom_dataset` names options that only its own command line has
        is_known = record.msg in printed or "Custom kwargs can be" in record.msg
        printed.add(record.msg)
        return not is_known and len(printed) <= MAX_WARNINGS

    logger, printer = logging.getLogger("lm_eval"), logging.StreamHandler(sys.stderr)
    printer.setFormatter(logging.Formatter("lm-eval: %(message)s"))
    printer.addFilter(should_print)
    logger.setLevel(logging.WARNING)
    logger.addHandler(printer)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeHandler(printer)
        logger.setLevel(logging.ERROR)
