"""A call that is not served, and why."""

from __future__ import annotations

import grpc

__all__ = ["Refusal", "busy"]


class Refusal(Exception):  # noqa: N818 - it is no error of the server
    """A call that cannot be served, and the status that says so to the client."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def busy(text: str) -> Refusal:
    """Return the refusal of a call that may be served later."""
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{text}; try again later")
