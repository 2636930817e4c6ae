"""What the API calls a request, in the model's terms: a setting, harmony messages, and how tokens are drawn."""

from collections.abc import Sequence

from checkpoints.harmony import TOOLS_PREFIX, Function, Message, Setting
from endpoint.errors import ApiError
from endpoint.requests import ChatMessage, ChatRequest, CompletionRequest, Request
from host.sampling import GREEDY, MIN_TEMPERATURE, Sampling, new_seed
from system.errors import InputError

INSTRUCTING = ("system", "developer")  # roles
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16


def sampling_of(request: Request) -> Sampling:
    """Return how a request's tokens are drawn, with a new seed if it names none. Raise ApiError if it cannot be."""
    temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
    if temperature < MIN_TEMPERATURE:
        return GREEDY
    seed = new_seed() if request.seed is None else request.seed
    top_p = 1.0 if request.top_p is None else request.top_p
    try:
        return Sampling(temperature, seed, max(request.top_k or 0, 0), top_p, request.min_p or 0.0)
    except InputError as error:
        raise ApiError(400, str(error)) from None


def token_limit(request: Request) -> int | None:
    """Return the most tokens that a request wants, None for as many as there is room for."""
    if isinstance(request, ChatRequest):
        return request.max_completion_tokens or request.max_tokens
    return request.max_tokens or DEFAULT_COMPLETION_TOKENS


def setting_of(request: ChatRequest, default: Setting) -> Setting:
    """Return a conversation's setting: its first system and developer messages are the developer's instructions."""
    texts = [message.text for message in request.messages[: _n_instructing(request.messages)]]
    tools = request.tools if request.tools and request.tool_choice != "none" else ()
    functions = [Function(t.function.name, t.function.description or "", t.function.parameters) for t in tools]
    instructions = "\n\n".join(text for text in texts if text) or default.instructions
    try:
        return Setting(
            request.reasoning_effort or default.reasoning,
            default.date,
            instructions,
            tuple(functions),
            default.identity,
        )
    except InputError as error:
        raise ApiError(400, str(error), "messages") from None


def messages_of(request: ChatRequest) -> list[Message]:
    """Return the messages behind the instructions. Raise ApiError, naming the field, for one that makes no sense."""
    start = _n_instructing(request.messages)
    name_of: dict[str, str] = {}  # of the function behind a call's id
    messages = []
    for n, message in enumerate(request.messages[start:], start):
        param = f"messages.{n}"
        if message.role == "assistant":
            messages += _said(message, param)
            name_of |= {call.id: call.function.name for call in message.tool_calls or ()}
        elif message.role == "tool":
            messages.append(_result(message, name_of, param))
        elif message.content is None:
            raise ApiError(400, f"{param}.content is missing", f"{param}.content")
        elif message.role in INSTRUCTING:
            messages.append(Message("developer", f"# Instructions\n\n{message.text}"))
        else:
            messages.append(Message("user", message.text))
    return messages


def _n_instructing(messages: Sequence[ChatMessage]) -> int:
    return next((n for n, message in enumerate(messages) if message.role not in INSTRUCTING), len(messages))


def _said(message: ChatMessage, param: str) -> list[Message]:
    """Return an earlier answer's reasoning, text and calls. Text before calls is commentary."""
    said = [Message("assistant", message.reasoning_content, "analysis")] if message.reasoning_content else []
    if message.content is not None:
        said.append(Message("assistant", message.text, "commentary" if message.tool_calls else "final"))
    said += [
        Message("assistant", call.function.arguments, "commentary", TOOLS_PREFIX + call.function.name, None, "json")
        for call in message.tool_calls or ()
    ]
    if not said:
        raise ApiError(400, f"{param} has neither content nor tool_calls", f"{param}.content")
    return said


def _result(message: ChatMessage, name_of: dict[str, str], param: str) -> Message:
    if message.tool_call_id not in name_of:
        raise ApiError(400, f"{param}.tool_call_id names no earlier tool call", f"{param}.tool_call_id")
    if message.content is None:
        raise ApiError(400, f"{param}.content is missing", f"{param}.content")
    name = TOOLS_PREFIX + name_of[message.tool_call_id]
    return Message("tool", message.text, "commentary", "assistant", name)


def prompt_of(request: CompletionRequest) -> str | list[int]:
    """Return a completion's prompt, as text or as token ids. Raise ApiError if it is neither, or several."""
    prompt = request.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not _is_id(prompt[0]):
        prompt = prompt[0]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_id, prompt))):
        return prompt
    raise ApiError(400, "prompt: expected one text, or one list of token ids", "prompt")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
