"""tokenizer.json files made up at random, of every kind of part that the `tokenizers` package has."""

import random

import tokenizers

LETTERS = ["a", "b", "é", "ß", "日", "😀", "▁", " ", "Ġ", "Ã", "<", ">", "|", "0", "x", "4", "1", "#", "\n", "E"]
WORDS = [
    "ab",
    "▁a",
    "##b",
    "a</w>",
    "b</w>",
    "<0x41>",
    "<0xE6>",
    "<0x97>",
    "<0xA5>",
    "<0xFF>",
    "日",
    " a",
    "aa",
    "<pad>",
    "|",
]
ADDED = ["<|start|>", "<|end|>", "éß", "straße", "日本", "ab", "\n\n", "É", "[X]", "a b", "Ġé", " ", "<0xC3>", "\ufffd"]
TEXTS = [
    "",
    "ab aab",
    "straße éß É ab",
    " <|end|> <|start|>ab",
    "日本 日\n\n😀",
    "a b [X]  [X]ab x",
    "ABÉ É ab\tab",
    "\ufffdé#b",
]


def made_up(seed: int) -> dict:
    """Make up the content of a tokenizer.json; the package accepts most, not all."""
    draw = random.Random(seed)
    raw = {
        "version": "1.0",
        "truncation": draw.choice([None, _truncation(draw)]),
        "padding": None,
        "added_tokens": [],
        "normalizer": _maybe(draw, _normalizer),
        "pre_tokenizer": _maybe(draw, _pre_tokenizer),
        "post_processor": draw.choice(
            [None, None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}]
        ),
        "decoder": _maybe(draw, _decoder),
        "model": _model(draw),
    }
    n_vocabulary = len(raw["model"]["vocab"])
    raw["added_tokens"] = [
        {"id": n_vocabulary + i, "content": content}
        | {flag: draw.random() < 0.3 for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        for i, content in enumerate(draw.sample(ADDED, draw.randint(0, 6)))
    ]
    for token in raw["added_tokens"]:
        if token["content"].isspace():  # a normalizer that strips leaves nothing of it, and the package never ends
            token["normalized"] = False
    if raw["added_tokens"] and draw.random() < 0.5:
        raw["padding"] = _padding(draw, draw.choice(raw["added_tokens"]))
    return raw


def _maybe(draw: random.Random, part) -> dict | None:
    return None if draw.random() < 0.15 else part(draw)


def _truncation(draw: random.Random) -> dict:
    return {"direction": "Right", "max_length": draw.randint(1, 4), "strategy": "LongestFirst", "stride": 0}


def _padding(draw: random.Random, token: dict) -> dict:
    """Make a padding section with an added token; transformers would give any other token an id of its own."""
    strategy = draw.choice(["BatchLongest", {"Fixed": 12}])
    return {
        "strategy": strategy,
        "direction": draw.choice(["Left", "Right"]),
        "pad_to_multiple_of": draw.choice([None, 8]),
        "pad_id": token["id"],
        "pad_type_id": 0,
        "pad_token": token["content"],
    }


def _model(draw: random.Random) -> dict:
    tokens = list(dict.fromkeys([*LETTERS, *WORDS, *tokenizers.pre_tokenizers.ByteLevel.alphabet(), "<unk>"]))
    draw.shuffle(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    kind = draw.choice(["BPE", "BPE", "WordLevel", "WordPiece", "Unigram"])
    if kind == "BPE":
        merges = [["a", "b"], [" ", "a"], ["a", "a"], ["▁", "a"]]
        model = {"merges": draw.sample(merges, draw.randint(0, 4)), "unk_token": draw.choice([None, "<unk>"])}
        model |= {"byte_fallback": draw.random() < 0.3, "ignore_merges": draw.random() < 0.3, "fuse_unk": False}
        return {"type": "BPE", "vocab": vocabulary, "dropout": None} | model
    if kind == "Unigram":
        scores = [[token, -draw.random() * 9] for token in tokens]
        return {
            "type": "Unigram",
            "vocab": scores,
            "unk_id": tokens.index("<unk>"),
            "byte_fallback": draw.random() < 0.3,
        }
    more = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} if kind == "WordPiece" else {}
    return {"type": kind, "vocab": vocabulary, "unk_token": "<unk>"} | more


def _normalizer(draw: random.Random) -> dict:
    kinds = [{"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "ByteLevel", "Nmt")]
    kinds += [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "Replace", "pattern": {"Regex": "[a-c]+"}, "content": "a"},
        {"type": "Strip", "strip_left": True, "strip_right": draw.random() < 0.5},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
        | {"lowercase": draw.random() < 0.5},
    ]
    if draw.random() < 0.3:
        return {"type": "Sequence", "normalizers": draw.sample(kinds, draw.randint(0, 3))}
    return draw.choice(kinds)


def _pre_tokenizer(draw: random.Random) -> dict:
    behavior = draw.choice(["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"])
    kinds = [
        {"type": "ByteLevel", "add_prefix_space": draw.random() < 0.5, "trim_offsets": True}
        | {"use_regex": draw.random() < 0.5},
        {"type": "Metaspace", "replacement": "▁", "split": draw.random() < 0.5}
        | {"prepend_scheme": draw.choice(["always", "never", "first"])},
        {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"}, "behavior": behavior, "invert": draw.random() < 0.5},
        {"type": "Split", "pattern": {"String": "a"}, "behavior": behavior, "invert": False},
        {"type": "Whitespace"},
        {"type": "WhitespaceSplit"},
        {"type": "BertPreTokenizer"},
        {"type": "Punctuation", "behavior": behavior},
        {"type": "Digits", "individual_digits": draw.random() < 0.5},
        {"type": "CharDelimiterSplit", "delimiter": " "},
        {"type": "UnicodeScripts"},
        {"type": "FixedLength", "length": 3},
    ]
    if draw.random() < 0.3:
        return {"type": "Sequence", "pretokenizers": draw.sample(kinds, draw.randint(0, 3))}
    return draw.choice(kinds)


def _decoder(draw: random.Random) -> dict:
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {
        "type": "Strip",
        "content": draw.choice([" ", "a"]),
        "start": draw.randint(0, 2),
        "stop": draw.randint(0, 1),
    }
    kinds = [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Metaspace", "replacement": "▁", "split": True}
        | {"prepend_scheme": draw.choice(["always", "never", "first"])},
        {"type": "WordPiece", "prefix": "##", "cleanup": draw.random() < 0.5},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": draw.random() < 0.5},
        {"type": "Replace", "pattern": {"Regex": "^a|b$"}, "content": "ab"},
        {"type": "Replace", "pattern": {"String": "<0x41>"}, "content": draw.choice(["", "<0x42>", "x"])},
        space,
        strip,
    ]
    if draw.random() < 0.3:
        tail = draw.choice([[], [{"type": "Fuse"}], [{"type": "Fuse"}, strip | {"stop": 0}], [{"type": "Fuse"}, strip]])
        return {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, *tail]}
    if draw.random() < 0.4:
        return {"type": "Sequence", "decoders": draw.choices(kinds, k=draw.randint(0, 4))}
    return draw.choice(kinds)
