"""Text to token ids and back for a checkpoint folder, and the harmony chat prompt that GPT-OSS was trained on."""

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from host.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_NAME, Checkpoint
from host.errors import InputError
from host.files import read_small

REASONING_EFFORTS = ("low", "medium", "high")
# What one chat prompt is framed with; a vocabulary that lacks one of these cannot chat.
FRAME_TOKENS = ("<|start|>", "<|message|>", "<|end|>")


def _byte_level_alphabet() -> dict[str, int]:
    """The 256 printable characters that a byte-level vocabulary writes bytes with: character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_level_alphabet()


class TextStream:
    """Decodes one token at a time; a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty. Costs the token's own length, not the history's."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Ends the text: an unfinished character comes out as U+FFFD. The stream can then be used afresh."""
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return tail


class Tokenizer:
    """A byte-level BPE tokenizer as stored in a checkpoint's tokenizer.json."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads FOLDER/tokenizer.json. Raises InputError where it is missing or is no tokenizer."""
        path = Path(folder) / TOKENIZER_NAME
        if not path.exists():
            raise InputError(f"{path}: no such file; a checkpoint folder needs its tokenizer")
        return cls.from_json(read_small(path, MAX_TOKENIZER_BYTES), str(path))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Tokenizer | None":
        """A checkpoint's tokenizer, None if it has none. Raises InputError where that is no tokenizer."""
        data = checkpoint.document(TOKENIZER_NAME)
        return None if data is None else cls.from_json(data, f"{checkpoint.name}: {TOKENIZER_NAME}")

    @classmethod
    def from_json(cls, data: bytes, source: str) -> "Tokenizer":
        """Reads the bytes of a tokenizer.json, which `source` names in errors. InputError where they are none."""
        try:
            return cls(tokenizers.Tokenizer.from_buffer(data))
        except BaseException as error:  # the package raises bare Exception and, where it panics, a BaseException
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{source}: not a tokenizer file ({reason})") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its spelling, None where the vocabulary has no such token."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens spelled out in the text become their ids, none are added.

        Raises InputError where the text holds bytes that are not UTF-8 (lone surrogates).
        """
        return self._encode(text, special_as_text=False)

    def encode_plain(self, text: str) -> list[int]:
        """Like `encode`, but a special token spelled out in the text stays ordinary text."""
        return self._encode(text, special_as_text=True)

    def _encode(self, text: str, special_as_text: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid UTF-8 (character {error.start})") from error
        self._backend.encode_special_tokens = special_as_text
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_chat(self, user_text: str, reasoning: str = "medium", date: str | None = None) -> list[int]:
        """The harmony prompt as token ids; whatever the user wrote is encoded as plain text.

        Raises InputError as `render_chat` does, and where the vocabulary lacks the harmony tokens.
        """
        missing = [token for token in FRAME_TOKENS if self.token_id(token) is None]
        if missing:
            raise InputError(f"this checkpoint's tokenizer has no {', '.join(missing)}: it cannot take a chat prompt")
        before, after = _chat_frame(reasoning, date)
        return self.encode(before) + self.encode_plain(user_text) + self.encode(after)

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes; empty for an id without a token (a model's vocabulary may be padded)."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if all(character in BYTE_OF_CHARACTER for character in token):
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        return token.encode("utf-8")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens kept visible, bytes that are not UTF-8 as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        """A decoder for text that appears token by token."""
        return TextStream(self)


def _chat_frame(reasoning: str, date: str | None) -> tuple[str, str]:
    """What stands before and after the user's text in a prompt for the assistant's completion.

    Raises InputError for an unknown reasoning effort or a date that is not YYYY-MM-DD.
    """
    if reasoning not in REASONING_EFFORTS:
        raise InputError(f"reasoning effort {reasoning!r}: expected one of {', '.join(REASONING_EFFORTS)}")
    if date is not None and not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", date):
        raise InputError(f"date {date!r}: expected YYYY-MM-DD")
    system = (
        "You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\n" + (f"Current date: {date}\n" if date else "") + f"\nReasoning: {reasoning}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    before = f"<|start|>system<|message|>{system}<|end|><|start|>user<|message|>"
    return before, "<|end|><|start|>assistant"


def render_chat(user_text: str, reasoning: str = "medium", date: str | None = None) -> str:
    """The harmony prompt as text: system message, one user message, start of the assistant's answer.

    Special tokens spelled out in `user_text` are indistinguishable from the frame's here: text that is not
    one's own goes through `Tokenizer.encode_chat`. Raises InputError for an unknown effort or a malformed date.
    """
    before, after = _chat_frame(reasoning, date)
    return before + user_text + after
