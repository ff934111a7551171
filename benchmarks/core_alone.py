"""How large the core and its parts are, and the tests of the core where nothing else is installed.

    python benchmarks/core_alone.py [LOG]      of `make core`, which is run where no LOG of it is given
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build/core/env"


def printed(log: str) -> list[str]:
    """Return what `make core` says in the end: what was left out, and how many tests passed.

    Raises:
        SystemExit: it did not come to an end.
    """
    found = re.findall(r"^(?:the core alone: .*|(?:\d+ \w+(?:, )?)+ in .*s.*)$", log, re.MULTILINE)
    if len(found) != 2:
        raise SystemExit(f"make core has not ended: {log[-1000:]}")
    return found


def libraries() -> list[str]:
    """Return the distributions of the environment."""
    (site,) = (ENVIRONMENT / "lib").glob("python*/site-packages")
    return sorted({found.metadata["Name"] for found in importlib.metadata.distributions(path=[str(site)])})


def main() -> None:
    if sys.argv[1:]:
        log = Path(sys.argv[1]).read_text(encoding="utf-8")
    else:
        log = subprocess.run(["make", "core"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    counts = subprocess.run([sys.executable, "docs/generate_house.py", "--counts"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout
    there = libraries()
    print(f"python {platform.python_version()}, the core's wheel with what it needs and the extra test: "
          f"{len(there)} distributions\n")
    print(counts.partition("upwards\n\n")[2])
    print("\n".join(printed(log)))


if __name__ == "__main__":
    main()
