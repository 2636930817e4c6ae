"""Recognize a tokenizer.json that is safe to load because it consists only of the parts of GPT-OSS tokenizers."""

import hashlib
import json

# SHA-256 of the tokenizer.json that openai/gpt-oss-20b and openai/gpt-oss-120b publish.
PUBLISHED = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Larger files are not examined, as parsing them in Python would take as long as loading them.
MAX_BYTES = 1 << 20
MAX_ADDED_TOKENS = 4096
MAX_TOKEN_CHARACTERS = 256


def is_known_good(data: bytes) -> bool:
    """Return whether a tokenizer.json is harmless: byte-level BPE without a normalizer, with only GPT-OSS's pattern.

    The published file is recognized by its checksum.
    """
    if hashlib.sha256(data).hexdigest() == PUBLISHED:
        return True
    if len(data) > MAX_BYTES:
        return False
    try:
        parts = json.loads(data, object_pairs_hook=_unique_keys)
        return (
            parts.get("normalizer") is None
            and _splits_as_gpt_oss(parts.get("pre_tokenizer"))
            and all(
                part is None or part["type"] == "ByteLevel" for part in map(parts.get, ("post_processor", "decoder"))
            )
            and _is_byte_level_bpe(parts["model"])
            and len(parts["added_tokens"]) <= MAX_ADDED_TOKENS
            and _are_short(token["content"] for token in parts["added_tokens"])
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return a JSON object as a dict. Raise ValueError for a repeated key, whose other value the package might use."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _splits_as_gpt_oss(part: dict | None) -> bool:
    """Return whether a pre-tokenizer is at most one split and one ByteLevel; each further ByteLevel doubles a text."""
    steps = part["pretokenizers"] if part and part["type"] == "Sequence" else [part] if part else []
    types = [step["type"] for step in steps]
    patterns = [step["pattern"] for step in steps if step["type"] == "Split"]
    return types in ([], ["ByteLevel"], ["Split"], ["Split", "ByteLevel"]) and patterns in (
        [],
        [{"Regex": O200K_PATTERN}],
    )


def _is_byte_level_bpe(model: dict) -> bool:
    absent = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return model["type"] == "BPE" and not any(model.get(name) for name in absent) and _are_short(model["vocab"])


def _are_short(tokens) -> bool:
    return all(len(token) <= MAX_TOKEN_CHARACTERS for token in tokens)
