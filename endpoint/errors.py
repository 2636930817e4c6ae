"""Errors in the shape of the API."""

from system.errors import printable

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer that refuses a request or says why it failed: a status, and what the error's object holds."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ):
        """Make the message one printable line. kind: the error's type; param: the request's field that is at fault."""
        super().__init__(printable(message))
        self.status, self.param, self.code, self.kind = status, param, code, kind
        self.headers = headers or {}

    def body(self) -> dict:
        """Return the body of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def draining() -> ApiError:
    """Return the error of a request that comes while the server ends."""
    return ApiError(503, "the server is ending", code="server_ending", kind=SERVER)
