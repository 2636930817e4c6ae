"""Convert text to token ids and back with a checkpoint's tokenizer.json.

Results are those of the `tokenizers` package, see docs/tokenizers.md.
"""

import codecs
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from checkpoints.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_NAME, Checkpoint
from checkpoints.text_backend import BYTES, PIECES, RUNS, WHOLE, TextBackend
from checkpoints.text_process import TextProcess
from checkpoints.tokenizer_parts import is_known_good
from system.errors import InputError, first_line
from system.files import read_small


def _byte_level_alphabet() -> dict[str, int]:
    """Return character -> byte for the 256 printable characters that spell bytes in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_level_alphabet()


class TextStream:
    """Decodes one token at a time, holding back text that the next token can still change.

    The texts of all calls, `flush` included, add up to Tokenizer.decode of all tokens. This base class holds everything
    back, for decoders whose text is known only at the end.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, possibly "". The cost does not grow with the text before it."""
        self._held.append(token_id)
        return ""

    def flush(self) -> str:
        """End the text, and return what was held back. The stream can then decode another text."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held)


class _ByteStream(TextStream):
    """Holds back a character until all of its bytes have arrived; flush returns U+FFFD for an incomplete one."""

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
    """Holds nothing back, but gives the first token another text than later ones."""

    _is_first = True

    def push(self, token_id: int) -> str:
        if self._tokenizer.cached("token", token_id) is None:
            return ""
        method = "first_piece" if self._is_first else "later_piece"
        self._is_first = False
        return self._tokenizer.cached(method, token_id)

    def flush(self) -> str:
        self._is_first = True
        return ""


class _RunStream(TextStream):
    """Holds back tokens that spell bytes until another token follows, and text at the beginning that may be stripped.

    Nothing is stripped after a token with text of its own; later tokens are decoded together with that token.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        super().__init__(tokenizer)
        self._last: list[int] = []  # the last token with text of its own, which the held ones are decoded after

    def push(self, token_id: int) -> str:
        cached = self._tokenizer.cached
        self._held.append(token_id)
        if cached("may_spell_byte", token_id) or cached("first_piece", token_id) == "":
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
    """The tokenizer in a checkpoint's tokenizer.json.

    Its `truncation` and `padding` sections and all other files are ignored, as transformers does for a prompt. A file
    with other parts than those of GPT-OSS tokenizers is used in a separate process with limits. Every method raises
    InputError if the `tokenizers` package fails, or exceeds the limits on its time or memory.
    """

    def __init__(self, backend: tokenizers.Tokenizer | TextBackend | TextProcess, source: str = "tokenizer"):
        """Wrap a backend, which must not be used otherwise from then on; `source` names it in errors."""
        self._backend = TextBackend(backend) if isinstance(backend, tokenizers.Tokenizer) else backend
        self._source = source
        self._cache: dict[tuple, object] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read FOLDER/tokenizer.json. Raise InputError if it is missing or is no tokenizer."""
        path = Path(folder) / TOKENIZER_NAME
        if not path.exists():
            raise InputError(f"{path}: no such file; a checkpoint folder needs its tokenizer")
        return cls.from_json(read_small(path, MAX_TOKENIZER_BYTES), str(path))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Tokenizer | None":
        """Return a checkpoint's tokenizer, or None if it has none. Raise InputError if its file is no tokenizer."""
        data = checkpoint.document(TOKENIZER_NAME)
        return None if data is None else cls.from_json(data, f"{checkpoint.name}: {TOKENIZER_NAME}")

    @classmethod
    def from_json(cls, data: bytes, source: str) -> "Tokenizer":
        """Load the bytes of a tokenizer.json. Raise InputError, naming `source`, if they are no tokenizer."""
        if len(data) > MAX_TOKENIZER_BYTES:
            raise InputError(f"{source}: has {len(data)} bytes, at most {MAX_TOKENIZER_BYTES} are expected")
        load = TextBackend.load if is_known_good(data) else TextProcess
        return cls(_call_backend(f"{source}: not a tokenizer file", load, data), source)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including special ones."""
        return _call_backend(self._source, self._backend.vocab_size)

    def token_id(self, token: str) -> int | None:
        """Return the id of the token with this spelling, or None if the vocabulary has no such token."""
        return _call_backend(self._source, self._backend.token_id, token)

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids. Added tokens spelled out in the text become their ids; none are inserted.

        Raise InputError if the text is not valid Unicode because of a lone surrogate.
        """
        return self._encode(text, plain=False)

    def encode_plain(self, text: str) -> list[int]:
        """Return a text's token ids, taking added tokens spelled out in the text as ordinary text, special or not.

        Raise InputError if the text has a lone surrogate, or contains a control token that the vocabulary itself has as
        an ordinary word.
        """
        return self._encode(text, plain=True)

    def _encode(self, text: str, plain: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid UTF-8 (character {error.start})") from None
        return _call_backend(f"{self._source}: cannot encode this text", self._backend.encode, text, plain)

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes, for a ByteLevel decoder; b"" for an id without a token."""
        text = self.cached("first_piece", token_id)
        if "\ufffd" not in text:
            return text.encode()
        spelling = self.cached("token", token_id)
        if not all(character in BYTE_OF_CHARACTER for character in spelling):
            return text.encode()
        return bytes(BYTE_OF_CHARACTER[character] for character in spelling)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, including special tokens, with U+FFFD for bytes that are not UTF-8.

        Ids without a token are omitted, as a model's vocabulary may be padded.
        """
        return _call_backend(f"{self._source}: cannot decode tokens", self._backend.decode, list(ids))

    def stream(self) -> TextStream:
        """Return a decoder for text that arrives token by token."""
        return STREAMS[self.cached("stream_kind")](self)

    def cached(self, method: str, *arguments):
        """Return the result of a backend's method that always returns the same for these arguments, calling it once."""
        call = (method, *arguments)
        if call not in self._cache:
            failure = f"{self._source}: cannot decode tokens"
            self._cache[call] = _call_backend(failure, getattr(self._backend, method), *arguments)
        return self._cache[call]


def _call_backend(failure: str, method, *arguments):
    """Call a method of a backend, and turn what the package raises, panics included, into an InputError."""
    try:
        return method(*arguments)
    except BaseException as error:  # a panic of the package is a BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(f"{failure} ({first_line(error)})") from error
