"""Prompt templates: Jinja texts with a version, whose `system` and `user` blocks become one message each.

A field is text inside one message: a document opens no turn of its own and is never read as a template.
Templates run in Jinja's sandbox; attributes with a leading underscore are refused when the file is read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_sov.base.errors import UserError, list_problems, nearest

PROMPTS = Path(__file__).parent / "prompts"
"""Templates of the packaged generators that are written in Python."""
ENDING = ".j2"
MAX_TEMPLATE_BYTES = 1 << 20
_VERSION = re.compile(r"\{# version: ([1-9][0-9]{0,5}) #\}")
_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*")
_ROLES = ("system", "user")


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a product is one of numbers: `'x' * 10**10` would fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, *, is_trimmed: bool = True) -> None:
        """`is_trimmed`: whether a line end after a `{% ... %}` is no part of the text."""
        super().__init__(undefined=StrictUndefined, trim_blocks=is_trimmed, lstrip_blocks=is_trimmed)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(one, (int, float)) for one in (left, right)):
            raise TypeError(f"{operator} takes two numbers, and ** is not there")
        return left * right

    def unsafe_parts(self, tree: nodes.Template) -> list[str]:
        """Return a sentence for each part that reaches for other files or the inside of Python's objects."""
        found = [(node.lineno, node.attr) for node in tree.find_all(nodes.Getattr)]
        found += [(node.lineno, node.arg.value) for node in tree.find_all(nodes.Getitem)
                  if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)]
        found += [(node.lineno, f"_{node.name}") for node in tree.find_all(nodes.Filter)
                  if node.name == "attr"]
        others = tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))
        return [*(f"line {line} reads the attribute {name!r}; templates may read fields alone, remove it"
                  for line, name in found if name.startswith("_")),
                *(f"line {node.lineno} includes another file; a template is one file" for node in others)]


ENVIRONMENT = PromptEnvironment()


@dataclass(frozen=True)
class PromptTemplate:
    """One template."""

    name: str
    """Its path below the folder of prompts, without ending."""
    version: int
    digest: str
    """Hash of its text."""
    compiled: Template
    fields: frozenset[str] | None = None
    """Fields that it must be given, exactly; None: any."""

    def messages(self, fields: Mapping[str, Any]) -> list[dict[str, str]]:
        """Render the blocks with these fields as messages.

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


def parse_prompt(text: str, name: str, where: str, fields: Collection[str] | None, *, exact: bool = True,
                 environment: PromptEnvironment = ENVIRONMENT) -> PromptTemplate:
    """Return the template of a text.

    Args:
        text: first line with the version, then the blocks.
        name: of the template.
        where: the file, for messages.
        fields: that it may name; None: any.
        exact: whether it must be given all of these fields when it is rendered.
        environment: with the functions that it may call.

    Raises:
        UserError: it is not a template of these fields.
    """
    version = _VERSION.fullmatch(text.partition("\n")[0].rstrip())
    try:
        tree = environment.parse(text)
        compiled = environment.from_string(text)
    except TemplateError as e:
        raise UserError(f"{where}: is no Jinja template, line {getattr(e, 'lineno', '?')}: {e.message}; "
                        "mend it") from None
    problems = [] if version else ["the first line must be {# version: N #}, N counting from 1"]
    problems += _problems_of_form(tree) + environment.unsafe_parts(tree)
    if fields is not None:
        problems += [f"names {unknown!r}, which it is not given{nearest(unknown, fields)}; it is given "
                     f"{', '.join(fields) or 'no field'}"
                     for unknown in sorted(meta.find_undeclared_variables(tree)
                                           - {*fields, *environment.globals})]
    if problems or version is None:
        raise UserError(list_problems(where, problems))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return PromptTemplate(name, int(version[1]), digest, compiled,
                          frozenset(fields) if exact and fields is not None else None)


def load_prompt(name: str, fields: Collection[str] | None, folders: Sequence[Path] = (PROMPTS,),
                texts: Mapping[str, str] | None = None, environment: PromptEnvironment = ENVIRONMENT
                ) -> PromptTemplate:
    """Load a template from the first folder that has it, else from `texts`, those of a generator's file.

    Raises:
        UserError: there is none, or it cannot be used with these fields.
    """
    files = [folder / (name + ENDING) for folder in folders] if _NAME.fullmatch(name) else []
    file = next((file for file in files if file.is_file()), None)
    if file is None and texts and name in texts:
        return parse_prompt(texts[name], name, f"prompt {name}", fields, exact=False, environment=environment)
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
    return parse_prompt(text, name, str(file), fields, exact=texts is None, environment=environment)


def load_prompts(templates: Mapping[str, Collection[str]], folders: Sequence[Path] = (PROMPTS,),
                 texts: Mapping[str, str] | None = None, environment: PromptEnvironment = ENVIRONMENT
                 ) -> dict[str, PromptTemplate]:
    """Load all templates of a generator; `texts`: those that stand in its own file, by name.

    Raises:
        UserError: some cannot be used; all of them are named.
    """
    prompts, problems = {}, []
    for name, fields in templates.items():
        try:
            prompts[name] = load_prompt(name, fields, folders, texts, environment)
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
    return problems
