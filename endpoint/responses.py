"""The JSON objects of responses."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from host.answers import CallArguments, CallStart, Event, Finished, Text, ToolCall, whole_of

DONE = b"data: [DONE]\n\n"


def server_sent(content: dict) -> bytes:
    """Return an object as a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def usage_of(finished: Finished) -> dict:
    """Return the tokens that an answer took."""
    usage = finished.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


@dataclass
class ResponseForm(ABC):
    """How an answer becomes a response, whole or in chunks."""

    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    id_prefix = whole_object = chunk_object = ""

    def _object(self, kind: str, choices: list[dict], **more) -> dict:
        head = {"id": self.id_prefix + self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices} | more

    def whole(self, events: Sequence[Event]) -> dict:
        """Return the response for all events of an answer."""
        finished = events[-1]
        choice = {"index": 0, **self._content(events), "logprobs": None, "finish_reason": finished.reason}
        return self._object(self.whole_object, [choice], usage=usage_of(finished))

    def first_chunks(self, includes_usage: bool) -> list[dict]:
        """Return the chunks before the first event."""
        return []

    def chunks(self, event: Event, includes_usage: bool) -> list[dict]:
        """Return the chunks of an event."""
        if not isinstance(event, Finished):
            return [self._chunk(self._delta(event), None, includes_usage)]
        last = [self._chunk(self._delta(None), event.reason, includes_usage)]
        return last + ([self._object(self.chunk_object, [], usage=usage_of(event))] if includes_usage else [])

    def _chunk(self, delta: dict, reason: str | None, includes_usage: bool) -> dict:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": reason}
        return self._object(self.chunk_object, [choice], **({"usage": None} if includes_usage else {}))

    @abstractmethod
    def _content(self, events: Sequence[Event]) -> dict:
        """Return a choice's field for a whole answer."""

    @abstractmethod
    def _delta(self, event: Event | None) -> dict:
        """Return a chunk's field for an event, or for none."""


class ChatForm(ResponseForm):
    """Responses of /v1/chat/completions."""

    id_prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first_chunks(self, includes_usage: bool) -> list[dict]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None, includes_usage)]

    def _content(self, events: Sequence[Event]) -> dict:
        return {"message": whole_of(events).as_message() | {"refusal": None}}

    def _delta(self, event: Event | None) -> dict:
        if isinstance(event, Text):
            return {"delta": {event.field: event.text}}
        if isinstance(event, CallStart):
            return {"delta": {"tool_calls": [{"index": event.index, **ToolCall(event.id, event.name).as_dict()}]}}
        if isinstance(event, CallArguments):
            return {"delta": {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}}
        return {"delta": {}}


class CompletionForm(ResponseForm):
    """Responses of /v1/completions."""

    id_prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _content(self, events: Sequence[Event]) -> dict:
        return {"text": whole_of(events).text}

    def _delta(self, event: Event | None) -> dict:
        return {"text": event.text if isinstance(event, Text) else ""}
