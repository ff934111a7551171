"""Write docs/llms.txt, a list of the pages for language models, from docs/index.md."""

import re
from pathlib import Path

from megatron_sov.base.artifacts import write_atomically

DOCS = Path(__file__).parent
PAGE = DOCS / "llms.txt"
HEAD = """# megatron-sov

> Train your own language model, from raw text to a Hugging Face folder, on NVIDIA Megatron-Core. Three
> programs: sov-tokenizer, sov-data, megatron-sov; `--help` of each lists its commands, and the help of a
> command ends with examples.

One H200 has run for nine minutes; all other figures come from CPUs and tiny models. Paths below are
relative to docs/.
"""


def build_page() -> str:
    """List the pages below the headings of docs/index.md, then the agents' skills."""
    lines = [HEAD]
    for line in (DOCS / "index.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            lines.append(f"\n{line}\n")
        elif row := re.match(r"\| \[([\w/]+\.md)\]\(\1\) \| (.+) \|$", line):
            lines.append(f"- [{row[1]}]({row[1]}): {row[2]}")
    lines.append("\n## Skills\n")
    for skill in sorted((DOCS.parent / "skills").glob("*/SKILL.md")):
        name, description = re.findall(r"^(?:name|description): (.+)$", skill.read_text(encoding="utf-8"),
                                       re.MULTILINE)[:2]
        lines.append(f"- [{name}](../skills/{name}/SKILL.md): {description}")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    write_atomically(PAGE, build_page())
    print(PAGE)
