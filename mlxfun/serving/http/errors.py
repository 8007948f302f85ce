"""What is wrong with a request, for its sender: a status and one sentence."""

from __future__ import annotations

from typing import Any

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Bad(Exception):
    """A request that is refused. param: the field that is to blame."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


def kind_of(status: int) -> str:
    """What clients call an error of that status."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def openai_error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind_of(status), "param": param, "code": status}}


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    kind = "api_error" if status == 500 else kind_of(status)
    return {"type": "error", "error": {"type": kind, "message": message}}
