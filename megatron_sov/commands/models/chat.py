"""`megatron-sov chat TARGET`."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import Fix, UserError, escape_controls, stop_check, suggest_name
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag, ProblemCode, SettingsProblem
from megatron_sov.commands.models.serve import ServeOptions
from megatron_sov.commands.shared_options import AnyTarget, list_option_words
from megatron_sov.infer.request import RankOptions, SampleSeed, Temperature, TopP
from megatron_sov.model.recipes.requested import PluginOptions
from megatron_sov.runs.checkpoints import check_model
from megatron_sov.serve.chat_session import ChatModel, ChatSession, find_chat_model
from megatron_sov.serve.settings import ServeSettings
from megatron_sov.work.endpoints.answers import BadAnswer
from megatron_sov.work.endpoints.local_server import serve_model
from megatron_sov.work.endpoints.transport import find_address_problems, find_missing_libraries, is_url

HELP = """/think  show the thoughts of the last answer /clear  begin a new conversation /quit   end, as Ctrl-D
does Ctrl-C stops an answer. A line that ends with \\ continues on the next line."""


@dataclass(frozen=True)
class ChatSampling:
    """Sampling settings for answers."""

    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_tokens: Annotated[AtLeastOne | None, Flag("--max-new-tokens")] = None
    """Maximum tokens per answer (default: half the model's context)."""
    seed: SampleSeed | None = None
    """Random seed (default: a new seed per start)."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(PluginOptions, RankOptions):
    """Model and sampling for a chat."""

    target: AnyTarget
    system: Annotated[str, Flag(value="TEXT")] = ""
    """System prompt before the conversation."""
    sampling: ChatSampling = field(default_factory=ChatSampling)
    model: Annotated[str | None, Flag(value="NAME")] = None
    """Model name at an endpoint that serves several models."""
    api_key_env: Annotated[str, Flag(value="VARIABLE")] = ""
    """Environment variable with the endpoint's API key."""
    max_length: AtLeastOne | None = None
    """Maximum tokens in the conversation, including the answer (default: the model's limit, up to 8,192)."""

    def problems(self) -> list[SettingsProblem]:
        if not self.target:
            return [SettingsProblem(ProblemCode.TYPE, "target", "is empty; must name a model")]
        if not is_url(self.target):
            return []
        return list(find_address_problems("target", self.target.rstrip("/"), "--api-key-env"))


def chat(options: ChatOptions) -> None:
    """Answer lines from standard input until it ends."""
    if not is_url(options.target):
        if re.fullmatch(r"[\w.-]+:\d+(/.*)?", options.target) and not Path(options.target).exists():
            raise UserError(f"{options.target}: is an address without http://",
                            Fix(words={options.target: f"http://{options.target}"}))
        check_model(Path(options.target), options.settings, options.nproc)
    if missing := find_missing_libraries():
        raise UserError(missing[0])
    stop_check()
    with _serve_model(options) as model:
        settings = {"temperature": options.sampling.temperature, "top_p": options.sampling.top_p,
                    "seed": options.sampling.seed}
        sampling = {name: value for name, value in settings.items() if value is not None}
        session = ChatSession(model, sampling | _choose_max_tokens(options, model))
        session.system = options.system
        Terminal(session).talk()


CHAT = DeclaredCommand(ChatOptions, chat)


def _choose_max_tokens(options: ChatOptions, model: ChatModel) -> dict[str, int]:
    if options.sampling.max_tokens is not None:
        return {"max_tokens": options.sampling.max_tokens}
    # the second half of the context is for the conversation
    return {} if model.context_tokens is None else {"max_tokens": max(1, model.context_tokens // 2)}


@contextlib.contextmanager
def _serve_model(options: ChatOptions) -> Iterator[ChatModel]:
    """Yield the model: at its address, or served by a local process until the context ends."""
    if is_url(options.target):
        yield find_chat_model(options.target.rstrip("/"), options.api_key_env, options.model or "")
        return
    folder = Path(options.target)
    print(f"loading {folder.absolute().name}", file=sys.stderr, flush=True)
    words = list_option_words(ServeOptions(target=folder, nproc=options.nproc, settings=options.settings,
                                           plugins=options.plugins,
                                           serving=ServeSettings(max_length_tokens=options.max_length)))
    with serve_model(folder, "", options=words[1:]) as server:
        yield find_chat_model(server.url, "", server.model, server.key)


class Terminal:
    """Reads lines and prints answers; implements `ChatScreen`. Without a terminal, prints only answers."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._is_tty = sys.stdin.isatty() and sys.stdout.isatty()
        self._num_thought_chars, self._is_open = 0, False
        self._commands: dict[str, Callable[[], None]] = {
            "help": lambda: self.note(HELP), "think": self._show_thoughts, "clear": session.clear}

    def talk(self) -> None:
        """Read messages and commands until /quit or the end of the input, and answer each."""
        if self._is_tty:
            with contextlib.suppress(ImportError):
                # makes the line of `input` editable
                import readline  # noqa: F401  # missing in some builds of Python
            self.note(f"{self._session.model.name}: type a message; /help lists commands, Ctrl-D ends")
        for line in self._read_messages():
            if not line.strip():
                continue
            if not line.startswith("/"):
                self._answer(line)
                continue
            name = line[1:].strip()
            if name == "quit":
                return
            try:
                self._get_command(name)()
            except UserError as e:
                self.note(str(e))

    def _read_messages(self) -> Iterator[str]:
        """Yield typed messages; a line that ends with a backslash continues on the next line."""
        if not self._is_tty:
            yield from (line.rstrip("\n") for line in sys.stdin)
            return
        typed = ""
        while True:
            try:
                line = input("... " if typed else "\nyou> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # discards the typed lines
                typed = ""
                self.note("\nCtrl-D ends")
                continue
            if line.endswith("\\"):
                typed += line[:-1] + "\n"
                continue
            yield typed + line
            typed = ""

    def _get_command(self, name: str) -> Callable[[], None]:
        if name not in self._commands:
            raise UserError(f"/{name}: does not exist{suggest_name(name, self._commands)}; /help lists the "
                            "commands")
        return self._commands[name]

    def _answer(self, text: str) -> None:
        session = self._session
        self._num_thought_chars, self._is_open = 0, True
        try:
            session.ask(text, self)
            self._end_line()
            if not session.turns or session.turns[-1].user != text:
                self.note("the model returned an empty answer")
            elif not session.turns[-1].is_whole:
                self.note("the answer is truncated at --max-new-tokens")
        except KeyboardInterrupt:
            self._end_line()
            self.note("stopped")
        except (BadAnswer, TimeoutError) as e:
            self._end_line()
            self.note(str(e))

    def think(self, piece: str) -> None:
        self._num_thought_chars += len(piece)
        if self._is_tty:
            self._write(f"\r\033[2K\033[2mthinking: {self._num_thought_chars:,} characters (/think)\033[0m")

    def say(self, piece: str) -> None:
        if self._num_thought_chars and self._is_tty:
            self._write("\n")
        self._num_thought_chars = 0
        # a terminal executes control characters; files and pipes receive the text unchanged
        self._write(escape_controls(piece) if self._is_tty else piece)

    def note(self, text: str) -> None:
        print("\n".join(escape_controls(line) for line in text.split("\n")),
              file=sys.stdout if self._is_tty else sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)

    def _end_line(self) -> None:
        if self._is_open:
            self._write("\n")
        self._is_open = False

    def _show_thoughts(self) -> None:
        turns = self._session.turns
        if not turns:
            raise UserError("/think: the chat has no turns yet; type a message first")
        thoughts = [message.get("reasoning_content") for message in turns[-1].messages]
        self.note("\n".join(filter(None, thoughts)) or f"{self._session.model.name} has written no thoughts")
