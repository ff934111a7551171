"""An MCP server of a few lines: counts, echoes, and does what a bad server does.

Where it is given a file, it starts a process that would outlive it, and writes down which.
"""

import json
import os
import sys

count = 0
if sys.argv[1:] and os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    with open(sys.argv[1] + "~", "w") as written:
        written.write(str(os.getpid()))
    os.rename(sys.argv[1] + "~", sys.argv[1])
    os.execvp("sleep", ["sleep", "600"])


def send(**message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


for line in sys.stdin:
    asked = json.loads(line)
    method, params = asked["method"], asked.get("params", {})
    if method == "initialize":
        send(method="notifications/message", params={"level": "info", "data": "hello"})
        send(id=asked["id"], result={"protocolVersion": params["protocolVersion"], "capabilities": {},
                                     "serverInfo": {"name": "scripted", "version": "1"}})
    elif method == "tools/list":
        page = params.get("cursor")
        names = ["fail", "die"] if page else ["count", "echo"]
        schema = {"type": "object", "properties": {"text": {"type": "string"}}}
        send(id=99, method="ping")
        assert json.loads(sys.stdin.readline()) == {"jsonrpc": "2.0", "id": 99, "result": {}}
        send(id=asked["id"], result={"tools": [{"name": n, "description": n, "inputSchema": schema}
                                               for n in names]} | ({} if page else {"nextCursor": "2"}))
    elif method == "tools/call":
        name = params["name"]
        if name == "die":
            sys.exit(1)
        if name == "count":
            count += 1
        if name == "echo" and not isinstance(params["arguments"].get("text"), str):
            send(id=asked["id"], error={"code": -32602, "message": "text must be a string"})
            continue
        if params["arguments"].get("text") == "environment":
            params["arguments"]["text"] = "\0".join(f"{k}={v}" for k, v in os.environ.items())
        text = {"count": str(count), "echo": params["arguments"].get("text", ""), "fail": "it failed"}[name]
        parts = [{"type": "text", "text": text}, {"type": "image", "data": ""}]
        send(id=asked["id"], result={"content": parts, "isError": name == "fail"})
