"""The routes of the API: who may ask, how much, and how an answer is sent."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from checkpoints.harmony import DEFAULT_SETTING, Setting
from endpoint.errors import SERVER, ApiError
from endpoint.requests import ChatRequest, CompletionRequest, RequestType, parse
from endpoint.requests import Request as ApiRequest
from endpoint.responses import DONE, ChatForm, CompletionForm, ResponseForm, server_sent
from endpoint.translation import conversation_of, prompt_of, sampling_of, token_limit
from endpoint.worker import Job, Worker
from host.answers import Event, Finished, Order, chat_order, completion_order

CLIENT_GONE = 499  # a status that nobody receives
JSON = "application/json"
QUICK_BYTES = 1 << 14  # of a body that is parsed on the spot: a thread costs more, and others wait less than 1 ms

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Settings:
    """What a server serves, to whom, and how much at most."""

    model_name: str
    api_key: str | None = None
    max_request_bytes: int = 1 << 20
    max_messages: int = 1024
    body_seconds: float = 30.0  # that a request's body may take to arrive
    setting: Setting = DEFAULT_SETTING


class Endpoint:
    """Handles requests with one worker."""

    def __init__(self, worker: Worker, settings: Settings):
        self._worker, self._settings = worker, settings
        self._created = int(time.time())

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/v1/models", self._keyed(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._keyed(self.model), methods=["GET"]),
            Route("/v1/chat/completions", self._keyed(self.chat), methods=["POST"]),
            Route("/v1/completions", self._keyed(self.completion), methods=["POST"]),
        ]
        handlers = {
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_gone,
            Exception: _internal_error,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    def _keyed(self, handler: Handler) -> Handler:
        """Return a handler that refuses requests without the key, if there is one."""

        async def handle(request: Request) -> Response:
            self._check_key(request)
            return await handler(request)

        return handle

    def _check_key(self, request: Request) -> None:
        """Raise ApiError unless the request bears the key, if there is one."""
        if self._settings.api_key is None:
            return
        expected = f"Bearer {self._settings.api_key}".encode()
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = f"{scheme.capitalize()} {key.strip()}".encode("latin-1", "replace")
        if not hmac.compare_digest(given, expected):
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key", headers=headers)

    async def health(self, _request: Request) -> Response:
        """Say whether requests are taken."""
        is_closed = self._worker.is_closed
        return JSONResponse({"status": "ending" if is_closed else "ok"}, 503 if is_closed else 200)

    async def models(self, _request: Request) -> Response:
        """List the model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict:
        name = self._settings.model_name
        return {"id": name, "object": "model", "created": self._created, "owned_by": "local"}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._settings.model_name):
            raise ApiError(404, f"the model {name!r} is not served here", "model", "model_not_found")

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        form = ChatForm(self._settings.model_name)
        return await self._answer(request, *await self._read(request, ChatRequest, self._chat_order), form)

    def _chat_order(self, asked: ChatRequest) -> Order:
        if len(asked.messages) > self._settings.max_messages:
            message = f"{len(asked.messages)} messages are more than {self._settings.max_messages}"
            raise ApiError(400, message, "messages", "too_many_messages")
        setting, messages = conversation_of(asked, self._settings.setting)
        return chat_order(setting, messages, token_limit(asked), sampling_of(asked), asked.stop or ())

    async def completion(self, request: Request) -> Response:
        """Continue a prompt."""
        form = CompletionForm(self._settings.model_name)
        return await self._answer(request, *await self._read(request, CompletionRequest, _completion_order), form)

    async def _read(
        self, request: Request, kind: type[RequestType], order_of: Callable[[RequestType], Order]
    ) -> tuple[RequestType, Order]:
        """Return the request's checked body, and the order that it is."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != JSON:  # which a page of another site cannot make a browser send
            raise ApiError(415, f"the Content-Type must be {JSON}", code="unsupported_media_type")
        try:
            body = await asyncio.wait_for(
                read_body(request, self._settings.max_request_bytes), self._settings.body_seconds
            )
        except asyncio.TimeoutError:
            raise ApiError(408, "the request's body did not arrive in time") from None

        def read() -> tuple[RequestType, Order]:
            asked = parse(body, kind)
            self._check_model(asked.model)
            return asked, order_of(asked)

        return read() if len(body) <= QUICK_BYTES else await run_in_threadpool(read)

    async def _answer(self, request: Request, asked: ApiRequest, order: Order, form: ResponseForm) -> Response:
        events = self._events(request, order)
        if asked.stream:
            # The first event comes before the response begins, so that a refusal has a status of its own.
            first = await anext(events, None)
            return _client_gone() if first is None else EventStream(_chunks(first, events, form, asked.includes_usage))
        async with contextlib.aclosing(events):
            everything = [event async for event in events]
        is_whole = bool(everything) and isinstance(everything[-1], Finished)
        return JSONResponse(form.whole(everything)) if is_whole else _client_gone()

    async def _events(self, request: Request, order: Order) -> AsyncIterator[Event]:
        """Yield an answer's events, until its end or its client's. Raise ApiError if it fails."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        job = Job(order, _from_any_thread(loop, events.put_nowait))
        self._worker.submit(job)

        def end(_: asyncio.Task) -> None:
            self._worker.cancel(job)
            events.put_nowait(None)

        client = loop.create_task(_client_left(request))
        client.add_done_callback(end)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, ApiError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            client.cancel()  # which calls `end`


def _completion_order(asked: CompletionRequest) -> Order:
    return completion_order(prompt_of(asked), token_limit(asked), sampling_of(asked), asked.stop or ())


def _from_any_thread(loop: asyncio.AbstractEventLoop, put: Callable) -> Callable[[Event | ApiError], None]:
    def emit(event: Event | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(put, event)

    return emit


async def _client_left(request: Request) -> None:
    """Return once the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return a request's body. Raise ApiError as soon as it is too long."""
    too_long = ApiError(413, f"the request has more than {max_bytes} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_long
    return bytes(body)


async def _chunks(first: Event, events: AsyncIterator[Event], form: ResponseForm, usage: bool) -> AsyncIterator[bytes]:
    """Yield the server-sent events of an answer. One that fails ends with the error."""
    async with contextlib.aclosing(events):
        for content in [*form.first_chunks(usage), *form.chunks(first, usage)]:
            yield server_sent(content)
        try:
            async for event in events:
                for content in form.chunks(event, usage):
                    yield server_sent(content)
        except ApiError as error:
            yield server_sent(error.body())
            return
    yield DONE


class EventStream(Response):
    """A response of server-sent events, which end by themselves when the client leaves."""

    def __init__(self, chunks: AsyncIterator[bytes]):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _api_error(_request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _api_error(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _internal_error(request: Request, _error: Exception) -> Response:
    return await _api_error(request, ApiError(500, "internal error", kind=SERVER))


def _client_gone(*_) -> Response:
    return Response(status_code=CLIENT_GONE)
