"""What a request may ask for. Bodies are checked here; endpoint.translation gives them their meaning."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from checkpoints.harmony import REASONING_EFFORTS
from endpoint.errors import ApiError
from host.sampling import SEEDS
from system.errors import printable

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 1000
MAX_TOOLS = 128
MAX_INTEGER = 2**31 - 1
MAX_PARAM_CHARACTERS = 100

# Fields that would change the answer, and the values that ask for no change. Other unknown fields are ignored.
NEUTRAL_VALUES: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


class Fields(BaseModel):
    """An object of a request: no value is converted to another type."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Fields):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenLimit = Annotated[int, Field(ge=1, le=MAX_INTEGER)]


class Request(Fields):
    """The fields that both kinds of request have."""

    model_config = ConfigDict(extra="allow")  # so that fields of NEUTRAL_VALUES are seen

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=SEEDS.start, lt=SEEDS.stop)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_as_list)] | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk about tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: list[Any]  # checkpoints.openai_messages checks them and the tools
    max_completion_tokens: TokenLimit | None = None
    reasoning_effort: Literal[REASONING_EFFORTS] | None = None
    tools: Annotated[list[Any], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Any = None


class CompletionRequest(Request):
    """The body of POST /v1/completions. A prompt is text or token ids; a list of one prompt counts as the prompt."""

    prompt: str | list[Any]


RequestType = TypeVar("RequestType", bound=Request)


def parse(body: bytes, kind: type[RequestType]) -> RequestType:
    """Return a body's request. Raise ApiError, naming a field, if it is malformed or asks for what is not supported."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    _check_supported(request)
    return request


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = printable(".".join(map(str, first["loc"])), MAX_PARAM_CHARACTERS)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param or None)


def _check_supported(request: Request) -> None:
    for name, neutral in NEUTRAL_VALUES.items():
        value = (request.model_extra or {}).get(name, getattr(request, name, None))
        if value is not None and value not in neutral:
            but = f", but for {' and '.join(map(json.dumps, neutral))}" if neutral else ""
            raise ApiError(400, f"{name} is not supported{but}", name, "unsupported_value")
