"""Published config.json files with small sizes: imported and exported, each time compared with transformers.

    python benchmarks/published_configs.py > benchmarks/results/published_configs.txt
"""

import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from measurement import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.convert.test_hub_configs import (
    ENTRIES, PUBLISHED_CONFIGS, convert_round_trip, find_exclusion, load_example_families, shrink_config)

ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def measure_config(config: dict[str, Any]) -> tuple[str, str, str]:
    """Return outcome, reason or ignored fields, and the largest difference of a logit after import and after
    export, as shares of the limit."""
    if reason := find_exclusion(config):
        return ("refused" if reason.startswith("refused") else "not compared", reason, "-")
    with tempfile.TemporaryDirectory() as folder:
        warnings, checks = convert_round_trip(shrink_config(config), Path(folder))
    passed = all(check.passed for pair in checks for check in pair)
    shares = ", ".join(f"{difference.value / difference.limit:.4f}" for difference, _ in checks)
    fields = ", ".join(re.sub(".*unchanged: ", "", warning) for warning in warnings)
    if len(fields) > 80:
        fields = f"{fields.count(',') + 1} fields: {fields[:60]}..."
    outcome = "DIFFERS"
    if passed:
        outcome = "warned" if warnings else "imported"
    return outcome, fields or "-", shares


def main() -> None:
    os.environ |= ONE_RANK
    load_example_families()
    print(f"{describe_machine()}, transformers {transformers.__version__}\n")
    outcomes: Counter[str] = Counter()
    from_memory = 0
    for name, config in PUBLISHED_CONFIGS.items():
        source = ENTRIES.get(name, {}).get("from", "docs/families.md")
        outcome, detail, shares = measure_config(config)
        outcomes[outcome] += 1
        from_memory += "memory" in source
        print(f"{config['model_type']} | {name} | {outcome} | {detail} | {shares} | {source}", flush=True)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    num_equal, num_configs = outcomes["imported"] + outcomes["warned"], len(PUBLISHED_CONFIGS)
    print(f"\n{num_equal} of {num_configs} configs equal transformers: {counts}; {from_memory} are from "
          f"memory, {len(PUBLISHED_CONFIGS.keys() - ENTRIES)} have their sources in docs/families.md")
    print("columns: model_type, model, outcome, ignored fields or reason, largest difference of a logit from "
          "transformers\nafter import and after export as a share of the limit, source. All exported tensors "
          "have the bits of the folder.")


if __name__ == "__main__":
    main()
