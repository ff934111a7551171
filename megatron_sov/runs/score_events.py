"""Events of a run that tell what `eval lm` found of its checkpoints and exports, made of a results file.

The file is that of `eval.lm.results`, as plain JSON: the trainer and the report read it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError

EVENT = "eval_lm"


def score_events(results: Mapping[str, Any], step: int | None, output: Path) -> list[dict[str, Any]]:
    """Return the fields of one event for each metric of each task.

    Args:
        results: what the file holds.
        step: optimizer steps of the model that was measured; None where nobody knows.
        output: the file.

    Raises:
        UserError: it is of another kind or damaged.
    """
    try:
        return [{"step": step, "model_hash": results["model"]["hash"], "task": name,
                 "task_hash": task["task_hash"], "metric": metric["name"], "filter": metric["filter"],
                 "k": metric["k"], "value": metric["value"],
                 "interval": metric["interval"] and list(metric["interval"]), "items": task["items"],
                 "failed": task["failed"], "at_limit": task["at_limit"], "sampling": task["sampling"],
                 "mode": task["mode"], "contamination": None, "published_as": task["published_as"],
                 "output": str(output.absolute())}
                for name, task in results["tasks"].items() for metric in task["metrics"]]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{output}: holds no results of `megatron-sov eval lm`, or is damaged ({e!r:.200}); "
                        "evaluate again") from None


def is_told(event: Mapping[str, Any], known: list[dict[str, Any]]) -> bool:
    """Return whether events of a run tell a score already, wherever its file lies now."""
    said = {name: value for name, value in event.items() if name != "output"}
    return any(all(name in one and one[name] == value for name, value in said.items()) for one in known)
