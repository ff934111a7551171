"""Prompt templates: Jinja files with a version, whose `system` and `user` blocks are rendered each by itself.

What a field holds goes into the text of one message: however a document is written, it opens no turn of its
own and is never read as a template.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_sov.base.errors import UserError, list_problems, nearest

PROMPTS = Path(__file__).parent / "prompts"
"""The templates of the generators that come with the program."""
ENDING = ".j2"
MAX_TEMPLATE_BYTES = 1 << 20
_VERSION = re.compile(r"\{# version: ([1-9][0-9]{0,5}) #\}")
_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*")
_ROLES = ("system", "user")
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@dataclass(frozen=True)
class PromptTemplate:
    """One template."""

    name: str
    """Its path below the folder of prompts, without ending."""
    version: int
    """Of its first line."""
    digest: str
    """Hash of its text."""
    compiled: Template
    """Its blocks."""
    fields: frozenset[str] | None = None
    """What it is given, exactly; None: whatever comes."""

    def messages(self, fields: Mapping[str, Any]) -> list[dict[str, str]]:
        """Return the messages that it makes of fields.

        Raises:
            UserError: it cannot be rendered with these.
            TypeError: they are not those that its generator declares.
        """
        if self.fields is not None and self.fields != fields.keys():
            raise TypeError(f"template {self.name} is declared with {sorted(self.fields)}, and is given "
                            f"{sorted(fields)}")
        try:
            context = self.compiled.new_context(dict(fields))
            return [{"role": role, "content": "".join(self.compiled.blocks[role](context)).strip()}
                    for role in _ROLES if role in self.compiled.blocks]
        except UndefinedError as e:
            raise UserError(f"template {self.name}: {e.message}; it is given "
                            f"{', '.join(sorted(fields)) or 'no field'}") from None
        except Exception as e:  # whatever its expressions do to the values that they meet
            raise UserError(f"template {self.name}: cannot be rendered ({type(e).__name__}: {e})") from None


def load_prompt(name: str, fields: Sequence[str] | None,
                folders: Sequence[Path] = (PROMPTS,)) -> PromptTemplate:
    """Return a template of the first folder that has it.

    Args:
        name: its path below a folder of prompts, without ending.
        fields: what it will be given, of which it may use some; None: it is not known.
        folders: of prompts.

    Raises:
        UserError: there is none, or it is none that can be used with these fields.
    """
    files = [folder / (name + ENDING) for folder in folders] if _NAME.fullmatch(name) else []
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        known = {str(found.relative_to(folder))[:-len(ENDING)] for folder in folders
                 for found in folder.glob(f"**/*{ENDING}")}
        raise UserError(f"template {name}: there is no such file in "
                        f"{' or '.join(map(str, folders))}{nearest(name, sorted(known))}")
    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise UserError(f"{file}: is longer than {MAX_TEMPLATE_BYTES >> 20} MiB; a template is a page")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: cannot be read as UTF-8 ({e})") from None
    version = _VERSION.fullmatch(text.partition("\n")[0].rstrip())
    try:
        # the tree shows which fields it names: a wrong one is found before anything is paid
        tree = _ENVIRONMENT.parse(text)
        compiled = _ENVIRONMENT.from_string(text)
    except TemplateError as e:
        raise UserError(f"{file}: is no Jinja template, line {getattr(e, 'lineno', '?')}: {e.message}; "
                        "mend it") from None
    problems = [] if version else ["the first line must be {# version: N #}, N counting from 1"]
    problems += _problems_of_form(tree)
    if fields is not None:
        problems += [f"names {unknown!r}, which it is not given{nearest(unknown, fields)}; it is given "
                     f"{', '.join(fields) or 'no field'}"
                     for unknown in sorted(meta.find_undeclared_variables(tree)
                                           - {*fields, *_ENVIRONMENT.globals})]
    if problems or version is None:
        raise UserError(list_problems(str(file), problems))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return PromptTemplate(name, int(version[1]), digest, compiled,
                          None if fields is None else frozenset(fields))


def load_prompts(templates: Mapping[str, Sequence[str]],
                 folders: Sequence[Path] = (PROMPTS,)) -> dict[str, PromptTemplate]:
    """Return all templates of a generator.

    Raises:
        UserError: some cannot be used; all of them are told.
    """
    prompts, problems = {}, []
    for name, fields in templates.items():
        try:
            prompts[name] = load_prompt(name, fields, folders)
        except UserError as e:
            problems.append(str(e))
    # the last folder is the packaged one; a folder of the user that replaces nothing is a slip
    for folder in folders[:-1]:
        if not any((folder / (name + ENDING)).is_file() for name in templates):
            problems.append(f"--prompts {folder}: has no template of this generator; they are named "
                            f"{', '.join(name + ENDING for name in templates)}")
    if problems:
        raise UserError("\n".join(problems))
    return prompts


def _problems_of_form(tree: nodes.Template) -> list[str]:
    """Return what a template has besides a block `user` and perhaps one `system`."""
    blocks = [node.name for node in tree.body if isinstance(node, nodes.Block)]
    problems = [f"has a block {name!r}; only system and user are known"
                for name in sorted({block.name for block in tree.find_all(nodes.Block)} - set(_ROLES))]
    if "user" not in blocks:
        problems.append("has no block user: {% block user %} ... {% endblock %}")
    for node in tree.body:
        outside = not isinstance(node, nodes.Block) and not (
            isinstance(node, nodes.Output) and all(
                isinstance(part, nodes.TemplateData) and not part.data.strip() for part in node.nodes))
        if outside:
            problems.append(f"line {node.lineno} stands outside of the blocks system and user, where it "
                            "would be lost; move it into one")
    if any(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))):
        problems.append("includes another file; a template is one file")
    return problems
