"""Text to token ids and back by a checkpoint's tokenizer.json, and the harmony chat prompt of GPT-OSS.

What the `tokenizers` package makes of the file is the truth, see docs/tokenizers.md.
"""

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from checkpoints.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_NAME, Checkpoint
from checkpoints.text_backend import BYTES, PIECES, RUNS, WHOLE, TextBackend
from checkpoints.text_process import TextProcess
from checkpoints.tokenizer_parts import is_known_good
from system.errors import InputError
from system.files import read_small

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
    """Decodes one token at a time, what the next token can still change being held back.

    All that it gives, `flush` included, is what Tokenizer.decode gives for all tokens. This one holds everything back,
    for a decoder whose text only the end decides.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty. Costs the token's own length, not the history's."""
        self._held.append(token_id)
        return ""

    def flush(self) -> str:
        """Ends the text, and returns what was held back. The stream can then be used afresh."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held)


class _ByteStream(TextStream):
    """A character whose bytes are not all there yet is held back; flush gives U+FFFD for it."""

    def __init__(self, tokenizer: "Tokenizer"):
        super().__init__(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return tail


class _PieceStream(TextStream):
    """Holds nothing back: the first token's text is one, a later one's may be another."""

    _is_first = True

    def push(self, token_id: int) -> str:
        if self._tokenizer.kept("token", token_id) is None:
            return ""
        method = "first_piece" if self._is_first else "later_piece"
        self._is_first = False
        return self._tokenizer.kept(method, token_id)

    def flush(self) -> str:
        self._is_first = True
        return ""


class _RunStream(TextStream):
    """Holds back tokens that spell bytes until another token follows, and at the beginning what may be stripped.

    A token that leaves text of its own ends what can be stripped: from then on the tokens held are decoded after it.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        super().__init__(tokenizer)
        self._last: list[int] = []  # the token that the held ones are decoded after, once there is one

    def push(self, token_id: int) -> str:
        kept = self._tokenizer.kept
        self._held.append(token_id)
        if kept("may_spell_byte", token_id) or kept("first_piece", token_id) == "":
            return ""
        piece = self._new_text()
        self._last, self._held = [token_id], []
        return piece

    def flush(self) -> str:
        tail = self._new_text()
        self._last, self._held = [], []
        return tail

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._last + self._held)[len(decode(self._last)) :] if self._held else ""


STREAMS = {BYTES: _ByteStream, PIECES: _PieceStream, RUNS: _RunStream, WHOLE: TextStream}


class Tokenizer:
    """The tokenizer stored in a checkpoint's tokenizer.json.

    Its `truncation` and `padding` sections are ignored, and so is every other file, as transformers does for a prompt.
    Any method raises InputError where the `tokenizers` package fails, or takes more time or memory than a tokenizer
    should: a file that is not made of the parts of GPT-OSS tokenizers is used in a process of its own.
    """

    def __init__(self, backend: tokenizers.Tokenizer | TextBackend | TextProcess, source: str = "tokenizer"):
        """Takes over the backend; `source` names it in errors."""
        self._backend = TextBackend(backend) if isinstance(backend, tokenizers.Tokenizer) else backend
        self._source = source
        self._kept: dict[tuple, object] = {}

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
        if len(data) > MAX_TOKENIZER_BYTES:
            raise InputError(f"{source}: has {len(data)} bytes, at most {MAX_TOKENIZER_BYTES} are expected")
        load = TextBackend.load if is_known_good(data) else TextProcess
        return cls(_answer(f"{source}: not a tokenizer file", load, data), source)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return _answer(self._source, self._backend.vocab_size)

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its spelling, None where the vocabulary has no such token."""
        return _answer(self._source, self._backend.token_id, token)

    def encode(self, text: str) -> list[int]:
        """Token ids; added tokens spelled out in the text become their ids, none are added.

        Raises InputError where the text holds bytes that are not UTF-8 (lone surrogates).
        """
        return self._encode(text, plain=False)

    def encode_plain(self, text: str) -> list[int]:
        """Like `encode`, but an added token spelled out in the text stays ordinary text, special or not.

        Raises InputError where the vocabulary itself has a control token as a word, and the text holds it.
        """
        return self._encode(text, plain=True)

    def _encode(self, text: str, plain: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid UTF-8 (character {error.start})") from error
        return _answer(f"{self._source}: cannot encode this text", self._backend.encode, text, plain)

    def encode_chat(self, user_text: str, reasoning: str = "medium", date: str | None = None) -> list[int]:
        """The harmony prompt as token ids; whatever the user wrote is encoded on its own, as plain text.

        Raises InputError as `render_chat` does, and where the vocabulary lacks the harmony tokens.
        """
        missing = [token for token in FRAME_TOKENS if self.token_id(token) is None]
        if missing:
            raise InputError(f"this checkpoint's tokenizer has no {', '.join(missing)}: it cannot take a chat prompt")
        before, after = _chat_frame(reasoning, date)
        return self.encode(before) + self.encode_plain(user_text) + self.encode(after)

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes where the decoder is ByteLevel; empty for an id without a token."""
        text = self.kept("first_piece", token_id)
        if "\ufffd" not in text:
            return text.encode()
        spelling = self.kept("token", token_id)
        if not all(character in BYTE_OF_CHARACTER for character in spelling):
            return text.encode()
        return bytes(BYTE_OF_CHARACTER[character] for character in spelling)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids: special tokens are kept visible, ids without a token are left out (a model's vocabulary
        may be padded), and bytes that are not UTF-8 are U+FFFD."""
        return _answer(f"{self._source}: cannot decode tokens", self._backend.decode, list(ids))

    def stream(self) -> TextStream:
        """A decoder for text that appears token by token."""
        return STREAMS[self.kept("stream_kind")](self)

    def kept(self, method: str, *arguments):
        """A backend's answer about one token, the same every time, so that it is asked once."""
        question = (method, *arguments)
        if question not in self._kept:
            failure = f"{self._source}: cannot decode tokens"
            self._kept[question] = _answer(failure, getattr(self._backend, method), *arguments)
        return self._kept[question]


def _answer(failure: str, method, *arguments):
    """Calls a method of a backend; whatever the package raises or panics with is an InputError."""
    try:
        return method(*arguments)
    except BaseException as error:  # a panic of the package is a BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{failure} ({reason})") from error


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
