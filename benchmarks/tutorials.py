"""Run the laptop commands of the tutorials one by one, and print the time of each.

    python benchmarks/tutorials.py [--folder DIR] [--steps 2] [--pages cluster language]

Every command runs as a process in DIR, as a user would type it. A command that two pages share runs once, and
commands in DIR/typed.jsonl are skipped, so the benchmark continues after a kill. `--steps` replaces
`train.steps` in all commands.
"""

import argparse
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.pages_typed import ENTRIES, iter_command_lines, shell_blocks  # noqa: E402

PAGES = ("cluster", "language")


def replace_steps(line: str, num_steps: int | None) -> str:
    """Return a command with `train.steps` replaced by `num_steps`; None: unchanged."""
    if num_steps is None:
        return line
    return re.sub(r"train\.steps=\d+", f"train.steps={num_steps}", line)


def type_line(line: str, folder: Path) -> dict[str, object]:
    """Run a command in the folder; return the command, its exit code and its seconds."""
    program, *argv = shlex.split(line)
    began_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    completed = subprocess.run([sys.executable, "-m", ENTRIES[program], *argv], cwd=folder, check=False,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if completed.returncode:
        print(completed.stdout[-2000:])
    return {"line": line, "code": completed.returncode, "s": round(time.monotonic() - began_s, 1),
            "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)}


def main() -> int:
    """Run the commands of all pages; return 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("work-tutorials"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=PAGES)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    journal = args.folder / "typed.jsonl"
    typed = {row["line"]: row for row in map(json.loads, journal.read_text().splitlines())
             } if journal.is_file() else {}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"{'as it stands there' if args.steps is None else f'{args.steps} steps a run'}")
    for page in args.pages:
        text = (ROOT / f"docs/tutorials/{page}.md").read_text(encoding="utf-8")
        for name, content in re.findall(r"^`([a-z]+\.jsonl)`:\n\n```json\n(.*?)^```", text,
                                        re.MULTILINE | re.DOTALL):
            (args.folder / name).write_text(content, encoding="utf-8")
        print(f"\n{page}\n   code  seconds  CPU seconds")
        section = text.partition("\n## On a laptop\n")[2].partition("\n## ")[0]
        for shown in iter_command_lines(shell_blocks(section)):
            line = replace_steps(shown, args.steps)
            if line not in typed:
                typed[line] = type_line(line, args.folder)
                if typed[line]["code"]:
                    print(f"failed: {line}")
                    return 1
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(typed[line]) + "\n")
            row = typed[line]
            print(f"   {row['code']:4}  {row['s']:7}  {row['cpu_s']:11}  {shown[:100]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
