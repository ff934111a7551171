"""What a server says where it does not answer: OpenAI's object of an error, with its HTTP status."""

from __future__ import annotations

import json

MAX_CHARS = 2000
"""Of a sentence: it may quote what a client has sent."""


class Refused(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """Take what is said.

        Args:
            status: of HTTP.
            message: one sentence: what is wrong, and what to do.
            param: the field that it is about.
            code: OpenAI's word for it, where there is one.
        """
        super().__init__(message if len(message) <= MAX_CHARS else f"{message[:MAX_CHARS]}...")
        self.status, self.param, self.code = status, param, code

    def body(self) -> str:
        """Return the JSON of it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return json.dumps({"error": {"message": str(self), "type": kind, "param": self.param,
                                     "code": self.code}})
