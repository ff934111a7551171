"""Bridge that runs a `verifiers` (0.4) environment in the library's own Python, for `worlds.verifiers`.

The argument is a settings file. Messages are JSON lines. Input: `task` begins an episode, `answer` is a model
turn, `stop` ends the turns. Output: `request` asks for a model turn, `end` has the result, `error` reports a
failed episode, `problem` a failed start. The environment requests turns from a chat endpoint in this process.
"""

import asyncio
import contextlib
import json
import os
import secrets
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any

MODEL = "policy"
KEY = "POLICY_API_KEY"
"""Variable with the endpoint's key, which `verifiers` passes to no program."""
MAX_BODY_BYTES = 64 << 20
REFUSAL = {"error": {"message": "the model may write no more: maximum context length", "type":
                     "invalid_request_error", "code": "context_length_exceeded"}}
"""A server's error for a full context, after which harnesses stop and are scored."""
Answer = dict[str, Any]


class ChatEndpoint:
    """Chat endpoint whose requests are answered by another process, one at a time."""

    def __init__(self) -> None:
        self.start_episode()

    def start_episode(self) -> None:
        """Reset for a new episode."""
        self.requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        self._turn = asyncio.Lock()
        self._is_closed = False
        """Requests are refused."""

    @contextlib.asynccontextmanager
    async def serve_requests(self) -> AsyncIterator[str]:
        """Serve requests; yield the address."""
        from aiohttp import web  # installed with `verifiers`; a failure is reported as a problem

        self._web = web
        os.environ[KEY] = secrets.token_urlsafe()
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/chat/completions", self._handle_chat)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()

    def answer_request(self, message: Answer | None) -> None:
        """Answer the waiting request; None: refuse this and all later requests."""
        self._is_closed = message is None
        self._answers.put_nowait(message)

    async def _handle_chat(self, request: Any) -> Any:
        web = self._web
        if request.headers.get("Authorization") != f"Bearer {os.environ[KEY]}":
            return web.json_response({"error": {"message": "unauthorized"}}, status=401)
        body = await request.json()
        async with self._turn:
            if not self._is_closed:
                self.requests.put_nowait(body)
            message = None if self._is_closed else await self._answers.get()
        if message is None:
            return web.json_response(REFUSAL, status=400)
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        head = {"id": f"chatcmpl-{secrets.token_hex(8)}", "created": 0, "model": MODEL}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": reason}
            return web.json_response({**head, "object": "chat.completion", "choices": [choice]})
        calls = [{**call, "index": place} for place, call in enumerate(message.get("tool_calls", []))]
        delta = {**message, **({"tool_calls": calls} if calls else {})}
        chunks = [{**head, "object": "chat.completion.chunk",
                   "choices": [{"index": 0, "delta": part, "finish_reason": finish_reason}]}
                  for part, finish_reason in ((delta, None), ({}, reason))]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")


class VerifiersBridge:
    """Runs an environment from the library, one episode at a time."""

    def __init__(self, environment: Any, context: Any, endpoint: ChatEndpoint) -> None:
        self._environment, self._context, self._endpoint = environment, context, endpoint
        self._stream: Iterator[Any] = iter(environment.taskset)
        self._tasks: list[Any] = []
        self._run: asyncio.Task[Any] | None = None

    async def handle_message(self, line: dict[str, Any]) -> dict[str, Any]:
        """Execute a message and return the reply."""
        if "task" in line:
            await self.cancel_episode()
            if (task := self._get_task(line["task"])) is None:
                return {"error": f"there is no task {line['task']}: the taskset has {len(self._tasks)}"}
            self._endpoint.start_episode()
            self._run = asyncio.create_task(self._environment.run_episode(task, self._context))
        else:
            self._endpoint.answer_request(line.get("answer"))
        assert self._run is not None
        request = asyncio.create_task(self._endpoint.requests.get())
        await asyncio.wait((request, self._run), return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            body = request.result()
            return {"request": {"messages": body.get("messages"), "tools": body.get("tools") or []}}
        request.cancel()
        return self._describe_result(self._run.result())

    async def cancel_episode(self) -> None:
        """Cancel the running episode."""
        if self._run is not None:
            self._run.cancel()
            await asyncio.wait((self._run,))
            self._run = None

    def _get_task(self, number: int) -> Any:
        while len(self._tasks) <= number and (task := next(self._stream, None)) is not None:
            self._tasks.append(task)
        return self._tasks[number] if number < len(self._tasks) else None

    def _describe_result(self, episode: Any) -> dict[str, Any]:
        """Return the reward of the model's trace."""
        traces = [trace for trace in episode.traces if trace.agent.config.client == self._context.client]
        if not self._environment.complete(episode):
            errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
            return {"error": f"{errors[-1].type}: {errors[-1].message}" if errors else "it did not complete"}
        if len(traces) != 1:
            return {"error": f"the model played {len(traces)} runs in the episode, and not one"}
        rewards = {name: reward.value for name, reward in traces[0].rewards.items() if reward is not None}
        metrics = {name: value for name, value in traces[0].metrics.items() if value is not None}
        return {"end": {"reward": traces[0].reward, "components": {**metrics, **rewards},
                        "stop": traces[0].stop_condition}}


def read_settings(path: Path) -> dict[str, Any]:
    """Return the `env` table from a TOML or JSON settings file for `vf-eval`."""
    text = path.read_text(encoding="utf-8")
    settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    return dict(settings["env"])


@contextlib.asynccontextmanager
async def open_bridge(path: Path) -> AsyncIterator[VerifiersBridge]:
    """Load the environment from a settings file and start the endpoint."""
    from verifiers.v1 import EvalClientConfig, ModelContext  # a failure is reported as a problem
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config

    environment = load_environment(resolve_env_config(read_settings(path)))
    seats = [name for name, agent in agent_config_fields(environment.config).items() if agent.client is None]
    if len(seats) != 1:
        raise ValueError(f"the seats without a client are {', '.join(seats) or 'none'}: the model plays one, "
                         "so give each other one `client` and `model`")
    endpoint = ChatEndpoint()
    async with endpoint.serve_requests() as url, environment.serving():
        bridge = VerifiersBridge(environment, ModelContext(model=MODEL, client=EvalClientConfig(
            base_url=url, api_key_var=KEY)), endpoint)
        try:
            yield bridge
        finally:
            await bridge.cancel_episode()


async def main(path: Path, source: IO[bytes], target: IO[bytes]) -> None:
    """Handle messages until standard input ends."""
    def say(line: dict[str, Any]) -> None:
        target.write(json.dumps(line).encode() + b"\n")
        target.flush()

    async with contextlib.AsyncExitStack() as stack:
        try:
            bridge = await stack.enter_async_context(open_bridge(path))
        except Exception as e:
            return say({"problem": f"{type(e).__name__}: {e}"})
        say({"ready": True})
        while line := await asyncio.to_thread(source.readline):
            try:
                reply = await bridge.handle_message(json.loads(line))
            except Exception as e:
                reply = {"error": f"{type(e).__name__}: {e}"}
            say(reply)


if __name__ == "__main__":
    # Keep the environment's prints and reads apart from the bridge's messages.
    ours_in, ours_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    asyncio.run(main(Path(sys.argv[1]), ours_in, ours_out))
