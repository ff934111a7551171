"""`megatron-sov chat TARGET [TARGET2]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.base.errors import ExitCode, UserError, nearest, visible
from megatron_sov.base.settings import (
    AtLeastOne, Flag, ProblemCode, SettingsProblem, add_options, parse_nested, read_options)
from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.commands.models.serve import ServeOptions, distinct_names
from megatron_sov.commands.shared_options import AnyTarget
from megatron_sov.infer.request import RankOptions, SampleSeed, Temperature, TopP
from megatron_sov.model.recipes.requested import PluginOptions
from megatron_sov.runs.checkpoints import refuse_missing, refuse_no_model
from megatron_sov.serve.chat_session import ChatModel, ChatSession, ChatTurn, models_at
from megatron_sov.serve.settings import ServeSettings
from megatron_sov.work.endpoints.answers import BadAnswer
from megatron_sov.work.endpoints.local_server import serving
from megatron_sov.work.endpoints.transport import address_problems, is_address, missing_libraries

MAX_TARGETS = 4
HELP = """/system TEXT  set the system prompt; without TEXT: show it
/temp T       set the temperature
/undo         forget the last question and its answer
/retry        ask the last question again
/think        show the thoughts of the last answer
/save FILE    add the conversation to FILE as a row that `sov-data pack --format chat` reads
/clear        begin a new conversation
/quit         end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."""


@dataclass(frozen=True)
class ChatSampling:
    """How each next token is chosen."""

    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: Annotated[AtLeastOne | None, Flag("--max-new-tokens")] = None
    """Longest answer (default: half of the model's context)."""
    seed: SampleSeed | None = None
    """Of the samples (default: other ones each time)."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(PluginOptions, RankOptions):
    """With whom you talk, and how it answers."""

    targets: Annotated[tuple[AnyTarget, ...], Flag("TARGET")]
    system: Annotated[str, Flag(value="TEXT")] = ""
    """System prompt, which goes before the conversation."""
    sampling: ChatSampling = field(default_factory=ChatSampling)
    tools: Annotated[str | None, Flag(value="ENV")] = None
    """Tool environment that answers the model's calls (see `tools list`), or FILE.py:NAME."""
    tool_settings: Annotated[tuple[str, ...], Flag("--tool-set", "key=value")] = ()
    """A setting of the environment; repeat it."""
    model: Annotated[str | None, Flag(value="NAME")] = None
    """The model's name at an address that has several."""
    api_key_env: Annotated[str, Flag(value="VARIABLE")] = ""
    """Variable of the environment with the key of an address."""
    max_length: AtLeastOne | None = None
    """Tokens of the longest conversation with its answer (default: as the model takes, up to 8,192)."""

    def problems(self) -> list[SettingsProblem]:
        """Return addresses that cannot be asked, and too many targets."""
        found = [SettingsProblem(ProblemCode.TYPE, "targets", "is empty, where a model is to be named")
                 for target in self.targets if not target]
        found += [p for target in self.targets if is_address(target)
                 for p in address_problems("targets", target.rstrip("/"), "--api-key-env")]
        if len(self.targets) > MAX_TARGETS:
            found.append(SettingsProblem(ProblemCode.BOUND, "targets", f"at most {MAX_TARGETS} models answer "
                                         "beside each other", len(self.targets)))
        return found


add_arguments = partial(add_options, cls=ChatOptions)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    options = read_options(ChatOptions, args)
    for target in options.targets:
        if not is_address(target):
            refuse_missing(Path(target))
            refuse_no_model(Path(target))
    if missing := missing_libraries():
        raise UserError(missing[0])
    with contextlib.ExitStack() as stack:
        asked = None
        if options.tools is not None:
            from megatron_sov.judge.tools.registry import order

            asked = order(options.tools, parse_nested(options.tool_settings))
        tools = [None if asked is None else stack.enter_context(EnvironmentTools(asked))
                 for _ in options.targets]
        models = stack.enter_context(_models(options))
        given = {"temperature": options.sampling.temperature, "top_p": options.sampling.top_p,
                 "seed": options.sampling.seed}
        sampling = {name: value for name, value in given.items() if value is not None}
        sessions = [ChatSession(model, sampling | _longest(options, model), tool)
                    for model, tool in zip(models, tools, strict=True)]
        for session, tool in zip(sessions, tools, strict=True):
            session.system = options.system or (tool.system if tool else "")
        Terminal(sessions).talk()
    return ExitCode.OK


def _longest(options: ChatOptions, model: ChatModel) -> dict[str, int]:
    if options.sampling.max_tokens is not None:
        return {"max_tokens": options.sampling.max_tokens}
    # room for the conversation is left, however long the model would go on
    return {} if model.context_tokens is None else {"max_tokens": max(1, model.context_tokens // 2)}


@contextlib.contextmanager
def _models(options: ChatOptions) -> Iterator[list[ChatModel]]:
    """Give the models in the order of the targets; those of this machine run until the context ends."""
    folders = [Path(target) for target in options.targets if not is_address(target)]
    with contextlib.ExitStack() as stack:
        local: Iterator[ChatModel] = iter(())
        if folders:
            names = distinct_names(folders)
            print(f"loading {', '.join(names)}", file=sys.stderr, flush=True)
            words = ServeOptions(
                targets=(), nproc=options.nproc, settings=options.settings, plugins=options.plugins,
                serving=ServeSettings(max_length_tokens=options.max_length)).of_every_model
            server = stack.enter_context(serving(folders, "", names=names, options=words))
            local = iter(models_at(server.url, "", server.models, server.key))
        yield [next(local) if not is_address(target) else
               models_at(target.rstrip("/"), options.api_key_env, [options.model] if options.model else ())[0]
               for target in options.targets]


class EnvironmentTools:
    """A tool environment that answers calls, in a process of its own; a context."""

    def __init__(self, asked: Any) -> None:
        """Begin its first task.

        Raises:
            UserError: there is none, or the environment cannot be made.
        """
        from megatron_sov.judge.tools.environment import LIMITS, Task
        from megatron_sov.judge.tools.host import EnvironmentHost
        from megatron_sov.judge.tools.registry import make, tasks_of

        self._host = EnvironmentHost(asked, LIMITS["test"])
        self._task: Task = tasks_of(make(asked)[0], asked.name, None)[0]
        self._opening = self._host.reset(self._task)

    def __enter__(self) -> EnvironmentTools:
        return self

    def __exit__(self, *error: object) -> None:
        self._host.__exit__(*error)

    @property
    def system(self) -> str:
        """What the environment says to a model first."""
        return self._opening.observation.system or ""

    @property
    def tools(self) -> Sequence[dict[str, Any]]:
        return self._opening.tools

    @property
    def state(self) -> str:
        return self._host.state

    def call(self, call: ToolCall) -> str:
        return self._host.call(call).text

    def restore(self, state: str) -> None:
        if state != self._host.state:
            self._host.resume(self._task, state)


class Terminal:
    """Reads lines and shows answers; without a terminal each line of the input gets an answer, and nothing
    else is printed."""

    def __init__(self, sessions: Sequence[ChatSession]) -> None:
        self._sessions = sessions
        self._is_tty = sys.stdin.isatty() and sys.stdout.isatty()
        self._num_thought, self._is_open = 0, False
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.note(HELP), "system": self._system, "temp": self._temp,
            "undo": self._undo, "retry": self._retry, "think": self._think, "save": self._save,
            "clear": self._clear}

    def talk(self) -> None:
        """Answer until the input ends."""
        if self._is_tty:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # which gives `input` a line that can be edited
            self.note(f"{', '.join(session.model.name for session in self._sessions)}: ask something, "
                      "/help shows what else can be typed, Ctrl-D ends")
        for line in self._lines():
            if not line.strip():
                continue
            if not line.startswith("/"):
                self._ask(line)
                continue
            name, _, rest = line[1:].partition(" ")
            if name == "quit":
                return
            try:
                self._command(name)(rest.strip())
            except UserError as e:
                self.note(str(e))

    def _lines(self) -> Iterator[str]:
        """Yield what the user types, with its continued lines."""
        if not self._is_tty:
            yield from (line.rstrip("\n") for line in sys.stdin)
            return
        begun = ""
        while True:
            try:
                line = input("... " if begun else "\nyou> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # which stops answers, and here takes back what was typed
                begun = ""
                self.note("\nCtrl-D ends")
                continue
            if line.endswith("\\"):
                begun += line[:-1] + "\n"
                continue
            yield begun + line
            begun = ""

    def _command(self, name: str) -> Callable[[str], None]:
        if name not in self._commands:
            raise UserError(f"/{name}: does not exist{nearest(name, self._commands)}; /help shows what does")
        return self._commands[name]

    def _ask(self, text: str) -> None:
        for session in self._sessions:
            if len(self._sessions) > 1:
                self._write(f"{session.model.name}: " if not self._is_tty else f"{session.model.name}>\n")
            self._num_thought, self._is_open = 0, True
            try:
                session.ask(text, self)
                self._close()
                if not session.turns or session.turns[-1].user != text:
                    self.note("the model has ended its answer without a word")
                elif not session.turns[-1].is_whole:
                    self.note("the answer is cut at the longest that it may be (--max-new-tokens)")
            except KeyboardInterrupt:
                self._close()
                self.note("stopped")
            except (BadAnswer, TimeoutError) as e:
                self._close()
                self.note(str(e))

    # what `ChatScreen` asks for

    def think(self, piece: str) -> None:
        self._num_thought += len(piece)
        if self._is_tty:
            self._write(f"\r\033[2K\033[2mthinking: {self._num_thought:,} characters (/think)\033[0m")

    def say(self, piece: str) -> None:
        if self._num_thought and self._is_tty:
            self._write("\n")
        self._num_thought = 0
        # a terminal obeys control characters; a file or pipe gets the text as it is
        self._write(visible(piece) if self._is_tty else piece)

    def call(self, name: str, arguments: str) -> None:
        self.note(f"calls {name}({arguments})")

    def result(self, text: str) -> None:
        self.note(f"  {text}")

    def note(self, text: str) -> None:
        print("\n".join(visible(line) for line in text.split("\n")),
              file=sys.stdout if self._is_tty else sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)

    def _close(self) -> None:
        if self._is_open:
            self._write("\n")
        self._is_open = False

    # commands

    def _system(self, text: str) -> None:
        if not text:
            self.note(self._sessions[0].system or "there is no system prompt")
        for session in self._sessions:
            session.system = text or session.system

    def _temp(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UserError(f"/temp {text}: must be a number from 0 on, such as 0.7")
        for session in self._sessions:
            session.sampling["temperature"] = value

    def _with_turns(self) -> list[ChatSession]:
        found = [session for session in self._sessions if session.turns]
        if not found:
            raise UserError("the chat has no turn yet; ask something first, then use /undo, /retry or /think")
        return found

    def _undo(self, _: str) -> None:
        for session in self._with_turns():
            session.undo()

    def _retry(self, _: str) -> None:
        (text, *_rest) = [session.undo() for session in self._with_turns()]
        self._ask(text)

    def _think(self, _: str) -> None:
        for session in self._with_turns():
            thoughts = _thoughts_of(session.turns[-1])
            self.note(thoughts or f"{session.model.name} has written no thoughts")

    def _clear(self, _: str) -> None:
        for session in self._sessions:
            session.clear()

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save: needs a file, such as /save chats.jsonl")
        rows = [row for row in (session.row() for session in self._sessions) if row is not None]
        if not rows:
            raise UserError(f"/save {name}: no answer has ended by itself yet, so there is nothing to learn "
                            "from")
        file = Path(os.path.expanduser(name))
        try:
            # at the end: a file gathers conversations
            with open(file, "a", encoding="utf-8") as out:
                out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as e:
            raise UserError(f"/save {file}: cannot be written ({e.strerror or e}); name "
                            "another file") from None
        self.note(f"{file}: {len(rows)} {'row' if len(rows) == 1 else 'rows'} added")


def _thoughts_of(turn: ChatTurn) -> str:
    return "\n".join(message["reasoning_content"] for message in turn.messages
                     if message.get("reasoning_content"))
