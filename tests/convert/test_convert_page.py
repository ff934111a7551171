"""Every command and snippet of docs/convert.md runs, in order."""

import re
import shlex
import shutil
from pathlib import Path

from megatron_sov.cli import main

PAGE = (Path(__file__).parents[2] / "docs/convert.md").read_text(encoding="utf-8")


def test_commands_of_the_page_run(exaone_dir: Path, one_rank: None, cwd: Path) -> None:
    shutil.copytree(exaone_dir, cwd / "my-model")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "bash", "bash", "python",
                                                    "python", "python"]
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "convert.md", "exec"), {})
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert (program, main(arguments)) == ("megatron-sov", 0), line
    assert (cwd / "my-export.verification.json").is_file()
