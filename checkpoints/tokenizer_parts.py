"""Which tokenizer.json needs no guard: made of nothing but what GPT-OSS tokenizers are made of."""

import hashlib
import json

# SHA-256 of the tokenizer.json that openai/gpt-oss-20b and openai/gpt-oss-120b publish.
PUBLISHED = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Beyond these a file is not looked into: parsing it in Python would take as long as loading it.
MOST_BYTES = 1 << 20
MOST_ADDED_TOKENS = 4096
MOST_CHARACTERS = 256  # of a token


def is_known_good(data: bytes) -> bool:
    """Whether a tokenizer.json can do no harm: byte-level BPE, no normalizer, only the pattern of GPT-OSS.

    The published file is told by its checksum.
    """
    if hashlib.sha256(data).hexdigest() == PUBLISHED:
        return True
    if len(data) > MOST_BYTES:
        return False
    try:
        parts = json.loads(data, object_pairs_hook=_without_repeats)
        return (
            parts.get("normalizer") is None
            and _splits_as_gpt_oss(parts.get("pre_tokenizer"))
            and all(
                part is None or part["type"] == "ByteLevel" for part in map(parts.get, ("post_processor", "decoder"))
            )
            and _is_byte_level_bpe(parts["model"])
            and len(parts["added_tokens"]) <= MOST_ADDED_TOKENS
            and _are_short(token["content"] for token in parts["added_tokens"])
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """Of a key that is there twice, the package might take the other value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _splits_as_gpt_oss(part: dict | None) -> bool:
    """At most one split and one ByteLevel: each ByteLevel after another doubles a text."""
    steps = part["pretokenizers"] if part and part["type"] == "Sequence" else [part] if part else []
    kinds = [step["type"] for step in steps]
    patterns = [step["pattern"] for step in steps if step["type"] == "Split"]
    return kinds in ([], ["ByteLevel"], ["Split"], ["Split", "ByteLevel"]) and patterns in (
        [],
        [{"Regex": O200K_PATTERN}],
    )


def _is_byte_level_bpe(model: dict) -> bool:
    absent = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return model["type"] == "BPE" and not any(model.get(name) for name in absent) and _are_short(model["vocab"])


def _are_short(tokens) -> bool:
    return all(len(token) <= MOST_CHARACTERS for token in tokens)
