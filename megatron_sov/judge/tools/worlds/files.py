"""Environment with a tree of text files in its state."""

import re
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.reward import Score
from megatron_sov.judge.tools.environment import Observation, Task, ToolRefused, World, tool

MAX_FILES, MAX_TREE_CHARS = 10_000, 8_000_000
MAX_MATCHES = 200
"""Lines per search."""
_FILES = {"app/main.py": "from app import greet\n\nprint(greet('Mina'))\n",
          "app/__init__.py": "def greet(name):\n    return 'Helo ' + name\n",
          "notes.txt": "Fix the greeting.\n"}


@dataclass
class Files(World):
    """File editing tasks; the goal defines final contents, and other files must stay unchanged."""

    SYSTEM = "You work in a tree of text files. Change what you are asked to change, and nothing else."
    EXAMPLES = ({"question": "The greeting is misspelt. Mend it.", "files": _FILES, "goal": {"files": {
        "app/__init__.py": "def greet(name):\n    return 'Hello ' + name\n"}}},
        {"question": "Rename notes.txt to NOTES.md.", "files": _FILES, "goal": {"files": {
            "notes.txt": None, "NOTES.md": "Fix the greeting.\n"}}})

    def reset(self, task: Task) -> Observation:
        """Begin an episode and compute the wanted files."""
        observation = super().reset(task)
        goal = task.get("goal")
        changed = goal.get("files") if isinstance(goal, dict) else None
        if not isinstance(changed, dict) or not all(
                text is None or isinstance(text, str) for text in changed.values()):
            raise UserError("the task has no goal: an object whose `files` holds path -> content in the end, "
                            "null for a file that must be gone")
        self._wanted = {path: text for path, text in {**self.files, **changed}.items() if text is not None}
        return observation

    def first_state(self, task: Task) -> dict[str, Any]:
        files = task.get("files", {})
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise UserError("the task's files must be an object of path -> text")
        for path in files:
            if (problem := _find_path_problem(path)) is not None:
                raise UserError(f"the task has a file {path[:80]!r}, which {problem}")
        return {"files": files}

    @property
    def files(self) -> dict[str, str]:
        files: dict[str, str] = self.state["files"]
        return files

    def score(self, answer: str) -> Score:
        """Return 1 if all files are as wanted, else 0."""
        paths = sorted({*self.files, *self._wanted})
        wrong = [path for path in paths if self.files.get(path) != self._wanted.get(path)]
        return Score(float(not wrong), {"wrong_files": len(wrong), "first_wrong": wrong[:5]})

    @tool
    def list_files(self, folder: str = "") -> list[str]:
        """List the paths of all files in a folder and below.

        Args:
            folder: where; the whole tree without.
        """
        inside = folder.rstrip("/") + "/" if folder not in ("", ".", "/") else ""
        return sorted(path for path in self.files if path.startswith(inside))

    @tool
    def read_file(self, path: str, first_line: int = 1, num_lines: int = 1000) -> str:
        """Read a file.

        Args:
            path: which.
            first_line: where to begin.
            num_lines: how much to read.
        """
        if first_line < 1 or num_lines < 1:
            raise ToolRefused("first_line and num_lines must be at least 1")
        lines = re.findall(r"[^\n]*\n|[^\n]+", self._get_file(path))
        return "".join(lines[first_line - 1:first_line - 1 + num_lines])

    @tool
    def write_file(self, path: str, text: str) -> str:
        """Write a file, new or in the place of the old one.

        Args:
            path: which.
            text: all that it holds then.
        """
        self._store_file(path, text)
        return f"wrote {len(text)} characters to {path}"

    @tool
    def replace_text(self, path: str, old: str, new: str) -> str:
        """Replace a text that stands once in a file.

        Args:
            path: which.
            old: what stands there, exactly.
            new: what stands there then.
        """
        text = self._get_file(path)
        if not old or text.count(old) != 1:
            raise ToolRefused(f"old stands {text.count(old) if old else 0} times in {path}, must be once")
        self._store_file(path, text.replace(old, new))
        return f"changed {path}"

    @tool
    def move_file(self, path: str, to: str) -> str:
        """Give a file another path.

        Args:
            path: which.
            to: its new path, where no file is yet.
        """
        text = self._get_file(path)
        if to in self.files:
            raise ToolRefused(f"there is a file {to[:80]!r} already")
        del self.files[path]
        self._store_file(to, text)
        return f"moved {path} to {to}"

    @tool
    def delete_file(self, path: str) -> str:
        """Remove a file.

        Args:
            path: which.
        """
        self._get_file(path)
        del self.files[path]
        return f"deleted {path}"

    @tool
    def search_text(self, text: str) -> list[str]:
        """Find the lines that hold a text, as path:line: content.

        Args:
            text: what to look for, case and all.
        """
        if not text:
            raise ToolRefused("there is nothing to look for")
        matches = [f"{path}:{number}: {line}" for path in sorted(self.files)
                   for number, line in enumerate(self.files[path].split("\n"), start=1) if text in line]
        return matches[:MAX_MATCHES]

    def _get_file(self, path: str) -> str:
        if path not in self.files:
            raise ToolRefused(f"there is no file {path[:80]!r}")
        return self.files[path]

    def _store_file(self, path: str, text: str) -> None:
        if (problem := _find_path_problem(path)) is not None:
            raise ToolRefused(f"the path {path[:80]!r} {problem}")
        if any(other_path.startswith(path + "/") or path.startswith(other_path + "/")
               for other_path in self.files):
            raise ToolRefused(f"the path {path[:80]!r} is a folder, or goes through a file")
        other_chars = sum(len(content) for other_path, content in self.files.items() if other_path != path)
        if other_chars + len(text) > MAX_TREE_CHARS or len({*self.files, path}) > MAX_FILES:
            raise ToolRefused(f"the tree would have more than {MAX_TREE_CHARS:,} characters or "
                              f"{MAX_FILES:,} files")
        self.files[path] = text


def _find_path_problem(path: str) -> str | None:
    parts = path.split("/")
    if not path or len(path) > 400 or any(part in ("", ".", "..") for part in parts) or "\0" in path:
        return "is no path of names with / between them"
    return None
