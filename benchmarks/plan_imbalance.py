"""Memory of every recommended layout with experts that get more tokens than the mean, as `plan` predicts it.

Usage: python benchmarks/plan_imbalance.py > benchmarks/results/plan_imbalance.txt

The columns are those of docs/memory.md, which has the first layout of each recipe and GPU.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from generate_memory import TABLE_HEAD, iter_room_rows  # needs the path above

if __name__ == "__main__":
    print("Predicted GiB on the fullest process at loads of the busiest expert process, relative to the "
          "mean.\nNothing was measured. 30 November 2026.\n")
    print(TABLE_HEAD + "".join(iter_room_rows(sys.maxsize)), end="")
