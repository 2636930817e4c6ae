"""The operations that tokenizer_util needs from the `tokenizers` package, for use in this or in a separate process.

This module imports nothing else from the project, so that a process that only tokenizes starts in milliseconds.
"""

import json
import re
import threading

import tokenizers

# Ways in which text grows token by token, see TextBackend.stream_kind.
BYTES, PIECES, RUNS, WHOLE = "bytes", "pieces", "runs", "whole"
MAX_TOKEN_CHARACTERS = 1 << 16
_CONTROL_SPELLING = re.compile(r"<\|[^\s|]+\|>")


class TextBackend:
    """A tokenizers.Tokenizer, modified in place, with truncation and padding off.

    Every method may raise whatever the package raises, including a panic, which is a BaseException.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # encode_special_tokens is a property of the tokenizer, not an argument
        added = tokenizer.get_added_tokens_decoder()
        control = {i for i, token in added.items() if token.special or _CONTROL_SPELLING.fullmatch(token.content)}
        self._control_ids = control - {_unknown_id(tokenizer.model)}
        # The package encodes only special tokens as text, so all added tokens become special; nothing else uses that.
        tokenizer.add_special_tokens([_as_special(token) for token in added.values() if not token.special])

    @classmethod
    def load(cls, data: bytes) -> "TextBackend":
        return cls(tokenizers.Tokenizer.from_buffer(data))

    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """Return a token's spelling in the vocabulary, or None for an id without a token."""
        return self._tokenizer.id_to_token(token_id)

    def encode(self, text: str, plain: bool) -> list[int]:
        """Return a text's token ids. With `plain`, added tokens in the text are not recognised.

        Raise ValueError if the vocabulary of the model itself turns plain text into a control token.
        """
        with self._lock:
            self._tokenizer.encode_special_tokens = plain
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if plain and not self._control_ids.isdisjoint(ids):
            token = next(self.token(i) for i in ids if i in self._control_ids)
            raise ValueError(f"{token} can only be a control token in this vocabulary")
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids, including special tokens; ids without a token are omitted."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def later_piece(self, token_id: int) -> str:
        """Return what a token adds to a text after its first token, if `stream_kind` is PIECES."""
        return self._check_length(self.decode([token_id, token_id])[len(self.decode([token_id])) :])

    def first_piece(self, token_id: int) -> str:
        """Return a token's text if it is the first or only one."""
        return self._check_length(self.decode([token_id]))

    def _check_length(self, piece: str) -> str:
        if len(piece) > MAX_TOKEN_CHARACTERS:
            raise ValueError(f"a token of {len(piece)} characters")
        return piece

    def stream_kind(self) -> str:
        """Return how the decoded text grows with each token.

        BYTES: by the token's bytes, which together are UTF-8.
        PIECES: by a text that depends only on the token, and on whether it is the first.
        RUNS: as with PIECES, but a run of tokens that spell bytes is decoded once another token follows, and the
              beginning of the text may be stripped.
        WHOLE: unpredictably; the text is known only at the end.
        """
        decoder = self._tokenizer.decoder
        return PIECES if decoder is None else _stream_kind(_flat(json.loads(decoder.__getstate__())))

    def may_spell_byte(self, token_id: int) -> bool:
        """Return whether a ByteFallback decoder may take a token for one byte of a run, if `stream_kind` is RUNS."""
        token = self.token(token_id) or ""
        for step in _flat(json.loads(self._tokenizer.decoder.__getstate__())):
            if step["type"] == "ByteFallback":
                break
            token = token.replace(step["pattern"]["String"], step["content"])
        return token.startswith("<0x") and token.endswith(">")


def _unknown_id(model: tokenizers.models.Model) -> int | None:
    """Return the id for text outside the vocabulary, which plain text may contain."""
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
    """Return the steps of a decoder, with nested sequences flattened."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flat(part)]


def _stream_kind(steps: list[dict]) -> str:
    types = [step["type"] for step in steps]
    while types and types[-1] == "Fuse":  # the texts are joined at the end in any case
        types.pop()
    if types == ["ByteLevel"]:
        return BYTES
    if {"WordPiece", "Metaspace", "Replace", "Strip"}.issuperset(types):
        return PIECES
    if types.count("ByteFallback") == 1 and _decodes_runs(steps[: len(types)]):
        return RUNS
    return WHOLE


def _decodes_runs(steps: list[dict]) -> bool:
    """Return whether the steps replace strings, apply ByteFallback, change single tokens, and strip the beginning."""
    types = [step["type"] for step in steps]
    fallback = types.index("ByteFallback")
    if not all(step["type"] == "Replace" and step["pattern"].get("String") for step in steps[:fallback]):
        return False
    after = steps[fallback + 1 :]
    if "Fuse" in types:
        if after[-1]["type"] != "Strip" or after[-1]["stop"] != 0:
            return False
        after.pop()
        while after and after[-1]["type"] == "Fuse":
            after.pop()
    return all(step["type"] in ("Replace", "Strip") for step in after)
