"""A tokenizer.json in the `tokenizers` package: what tokenizer_util asks of it, in this process or in one of its own.

Imports nothing else of the project, so that a process which only tokenizes starts in milliseconds.
"""

import json
import re
import threading

import tokenizers

# How text that appears token by token is put together, see TextBackend.stream_kind.
BYTES, PIECES, RUNS, WHOLE = "bytes", "pieces", "runs", "whole"
MOST_TOKEN_CHARACTERS = 1 << 16
_CONTROL_SPELLING = re.compile(r"<\|[^\s|]+\|>")


class TextBackend:
    """A tokenizers.Tokenizer whose truncation and padding are off; it takes the object over.

    Every method may raise whatever the package raises, a panic (a BaseException) included.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # the package keeps "special tokens are text" as a state, not as an argument
        added = tokenizer.get_added_tokens_decoder()
        control = {i for i, token in added.items() if token.special or _CONTROL_SPELLING.fullmatch(token.content)}
        self._control_ids = control - {_unknown_id(tokenizer.model)}
        # The package can take special tokens as text, so all added ones are made special; nothing else depends on it.
        tokenizer.add_special_tokens([_as_special(token) for token in added.values() if not token.special])

    @classmethod
    def load(cls, data: bytes) -> "TextBackend":
        return cls(tokenizers.Tokenizer.from_buffer(data))

    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """A token's spelling in the vocabulary, None for an id without one."""
        return self._tokenizer.id_to_token(token_id)

    def encode(self, text: str, plain: bool) -> list[int]:
        """Token ids. In a plain text added tokens are not recognised.

        ValueError where the model's own vocabulary makes a control token of a plain text all the same.
        """
        with self._lock:
            self._tokenizer.encode_special_tokens = plain
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if plain and not self._control_ids.isdisjoint(ids):
            token = next(self.token(i) for i in ids if i in self._control_ids)
            raise ValueError(f"{token} can only be a control token in this vocabulary")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text, special tokens kept visible; ids without a token are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def later_piece(self, token_id: int) -> str:
        """What a token adds to a text that it does not begin, where `stream_kind` is PIECES."""
        return self._short(self.decode([token_id, token_id])[len(self.decode([token_id])) :])

    def first_piece(self, token_id: int) -> str:
        """A token's text where it stands alone, or first."""
        return self._short(self.decode([token_id]))

    def _short(self, piece: str) -> str:
        if len(piece) > MOST_TOKEN_CHARACTERS:
            raise ValueError(f"a token of {len(piece)} characters")
        return piece

    def stream_kind(self) -> str:
        """How the decoder's text grows with each token.

        BYTES: by the token's bytes, UTF-8 to be read across tokens.
        PIECES: by a text that depends on the token, and on whether it is the first.
        RUNS: like PIECES, but tokens that spell bytes are read as a whole once another token follows, and the
              beginning may be stripped.
        WHOLE: in ways that only the end decides.
        """
        decoder = self._tokenizer.decoder
        return PIECES if decoder is None else _stream_kind(_flat(json.loads(decoder.__getstate__())))

    def may_spell_byte(self, token_id: int) -> bool:
        """Whether a token could be one byte of several to a ByteFallback decoder, where `stream_kind` is RUNS."""
        token = self.token(token_id) or ""
        for part in _flat(json.loads(self._tokenizer.decoder.__getstate__())):
            if part["type"] == "ByteFallback":
                break
            token = token.replace(part["pattern"]["String"], part["content"])
        return token.startswith("<0x") and token.endswith(">")


def _unknown_id(model: tokenizers.models.Model) -> int | None:
    """The id that stands for text outside the vocabulary: a text may well have it."""
    if isinstance(model, tokenizers.models.Unigram):
        return json.loads(model.__getstate__())["unk_id"]
    return model.token_to_id(model.unk_token) if model.unk_token is not None else None


def _as_special(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _flat(decoder: dict) -> list[dict]:
    """The steps of a decoder, those of sequences within it one after another."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flat(part)]


def _stream_kind(steps: list[dict]) -> str:
    kinds = [step["type"] for step in steps]
    while kinds and kinds[-1] == "Fuse":  # which joins what is joined at the end anyway
        kinds.pop()
    if kinds == ["ByteLevel"]:
        return BYTES
    if {"WordPiece", "Metaspace", "Replace", "Strip"}.issuperset(kinds):
        return PIECES
    if kinds.count("ByteFallback") == 1 and _reads_runs(steps[: len(kinds)]):
        return RUNS
    return WHOLE


def _reads_runs(steps: list[dict]) -> bool:
    """Whether steps are replacements of strings, ByteFallback, steps on each token, and a strip of the beginning."""
    kinds = [step["type"] for step in steps]
    where = kinds.index("ByteFallback")
    if not all(step["type"] == "Replace" and step["pattern"].get("String") for step in steps[:where]):
        return False
    after = steps[where + 1 :]
    if "Fuse" in kinds:
        if after[-1]["type"] != "Strip" or after[-1]["stop"] != 0:
            return False
        after.pop()
        while after and after[-1]["type"] == "Fuse":
            after.pop()
    return all(step["type"] in ("Replace", "Strip") for step in after)
