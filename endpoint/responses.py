"""The JSON objects of responses."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from endpoint.answers import CONTENT, CallArguments, CallStart, Event, Finished, Text

DONE = b"data: [DONE]\n\n"


def server_sent(content: dict) -> bytes:
    """Return an object as a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def usage_of(finished: Finished) -> dict:
    """Return the tokens that an answer took."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.answer_tokens,
        "total_tokens": finished.prompt_tokens + finished.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": finished.reasoning_tokens},
    }


def _call_start(event: CallStart) -> dict:
    return {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}


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
        texts = {CONTENT: "", "reasoning_content": ""}
        calls: list[dict] = []
        for event in events:
            if isinstance(event, Text):
                texts[event.field] += event.text
            elif isinstance(event, CallStart):
                calls.append(_call_start(event))
            elif isinstance(event, CallArguments):
                calls[event.index]["function"]["arguments"] += event.text
        message = {"role": "assistant", "content": texts[CONTENT] or (None if calls else "")}
        message |= {"reasoning_content": texts["reasoning_content"] or None, "refusal": None}
        return {"message": message | ({"tool_calls": calls} if calls else {})}

    def _delta(self, event: Event | None) -> dict:
        if isinstance(event, Text):
            return {"delta": {event.field: event.text}}
        if isinstance(event, CallStart):
            return {"delta": {"tool_calls": [{"index": event.index, **_call_start(event)}]}}
        if isinstance(event, CallArguments):
            return {"delta": {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}}
        return {"delta": {}}


class CompletionForm(ResponseForm):
    """Responses of /v1/completions."""

    id_prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _content(self, events: Sequence[Event]) -> dict:
        return {"text": "".join(event.text for event in events if isinstance(event, Text))}

    def _delta(self, event: Event | None) -> dict:
        return {"text": event.text if isinstance(event, Text) else ""}
