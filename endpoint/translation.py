"""What the API calls a request, in the model's terms: a setting, harmony messages, and how tokens are drawn."""

from dataclasses import replace

from checkpoints import openai_messages
from checkpoints.harmony import Message, Setting
from endpoint.errors import ApiError
from endpoint.requests import ChatRequest, CompletionRequest, Request
from host.sampling import GREEDY, MIN_TEMPERATURE, Sampling, new_seed
from system.errors import InputError

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


def conversation_of(request: ChatRequest, default: Setting) -> tuple[Setting, list[Message]]:
    """Return a conversation's setting and messages. Raise ApiError, naming the field, for what makes no sense."""
    try:
        instructions, messages = openai_messages.conversation_of(request.messages)
        functions = openai_messages.functions_of(request.tools or ())
        setting = replace(
            default,
            reasoning=request.reasoning_effort or default.reasoning,
            instructions=instructions or default.instructions,
            functions=() if request.tool_choice == "none" else functions,
        )
    except InputError as error:
        raise ApiError(400, str(error), getattr(error, "field", "messages")) from None
    return setting, messages


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
