"""Tokenizer against the tokenizers package and transformers, for tokenizer.json files of every kind."""

import json
import os
import random

import pytest
import tokenizers
from made_up_tokenizers import ADDED, TEXTS, WORDS, made_up
from transformers import PreTrainedTokenizerFast

from checkpoints.text_process import TextProcess
from system.errors import InputError
from tokenizer_util import Tokenizer

os.environ["RUST_BACKTRACE"] = "0"  # a backtrace takes longer than all the rest
SEEDS = range(240)
FAILED = "failed"


def package(raw: dict) -> tokenizers.Tokenizer:
    """Return the package's tokenizer without the sections that transformers ignores."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(raw))
    backend.no_truncation()
    backend.no_padding()
    return backend


def ours(raw: dict) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(raw)))


def encoded(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def attempt(function, *arguments, **options):
    """Return a call's result, or FAILED: the package raises and panics on parts that do not fit together."""
    try:
        return function(*arguments, **options)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return FAILED


def some_ids(seed: int, backend: tokenizers.Tokenizer) -> list[list[int]]:
    """Make sequences of ids: of tokens that decoders look at, of any tokens, and a few beyond the vocabulary."""
    draw = random.Random(seed)
    known = [token_id for token in WORDS + ADDED if (token_id := backend.token_to_id(token)) is not None]
    n_ids = backend.get_vocab_size() + 3
    return [
        [draw.choice(known) if draw.random() < 0.6 else draw.randrange(n_ids) for _ in range(length)]
        for length in (0, 1, 2, 3, 8, 30)
    ]


@pytest.mark.parametrize("block", range(8))
def test_encoding_and_decoding_agree_with_the_tokenizers_package_and_transformers(tmp_path, block):
    n_failed = 0
    for seed in SEEDS[block::8]:
        raw = made_up(seed)
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        truths = package(raw), PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        tokenizer = ours(raw)
        for text in TEXTS:
            ids = attempt(tokenizer.encode, text)
            assert ids == attempt(encoded, truths[0], text), (seed, text)
            assert ids == attempt(truths[1].encode, text, add_special_tokens=False), (seed, text)
            n_failed += ids == FAILED
        for ids in some_ids(seed, truths[0]):
            decoded = attempt(tokenizer.decode, ids)
            for truth in truths:
                assert decoded == attempt(truth.decode, ids, skip_special_tokens=False), (seed, ids)
            n_failed += decoded == FAILED
    assert n_failed < len(SEEDS) // 8 * 3  # of 14 a tokenizer: most of what is compared is text and ids


@pytest.mark.parametrize("block", range(4))
def test_streamed_text_is_the_decoded_text(block):
    n_compared = 0
    for seed in SEEDS[block::4]:
        raw = made_up(seed)
        truth, tokenizer = package(raw), ours(raw)
        stream = tokenizer.stream()
        for ids in some_ids(seed, truth):
            expected = attempt(truth.decode, ids, skip_special_tokens=False)
            if expected == FAILED:
                stream = tokenizer.stream()
                continue
            assert "".join(map(stream.push, ids)) + stream.flush() == expected, (seed, raw["decoder"], ids)
            n_compared += 1
    assert n_compared > len(SEEDS) // 4 * 4


@pytest.mark.parametrize("block", range(4))
def test_plain_text_is_encoded_as_if_there_were_no_added_tokens(block):
    n_refused = 0
    for seed in SEEDS[block::4]:
        raw = made_up(seed)
        bare, tokenizer = package(raw | {"added_tokens": []}), ours(raw)
        control = {
            tokenizer.token_id(token["content"])
            for token in raw["added_tokens"]
            if token["special"] or token["content"].startswith("<|")
        }
        for text in TEXTS:
            expected = attempt(encoded, bare, text)
            ids = attempt(tokenizer.encode_plain, text)
            if ids == FAILED and expected != FAILED:
                assert control & set(expected), (seed, text)  # words of the model's own vocabulary
                n_refused += 1
            else:
                assert ids == expected, (seed, text)
    assert n_refused < len(SEEDS) // 4 * 2  # of 8 a tokenizer


def test_a_process_of_its_own_gives_what_the_package_gives():
    for seed in SEEDS[:12]:
        raw = made_up(seed)
        truth, process = package(raw), TextProcess(json.dumps(raw).encode())
        tokenizer = Tokenizer(process)
        assert tokenizer.vocab_size == truth.get_vocab_size()
        assert tokenizer.token_id("ab") == truth.token_to_id("ab")
        for text in TEXTS:
            expected = attempt(encoded, truth, text)
            assert attempt(tokenizer.encode, text) == expected
        stream = tokenizer.stream()
        for ids in some_ids(seed, truth):
            expected = attempt(truth.decode, ids, skip_special_tokens=False)
            assert attempt(tokenizer.decode, ids) == expected
            if expected != FAILED:
                assert "".join(map(stream.push, ids)) + stream.flush() == expected


LLAMA = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def test_usual_decoders_show_text_before_it_ends():
    raw = made_up(0) | {"added_tokens": []}
    for decoder, tokens, pieces in (
        (None, ["ab", "a"], ["ab", " a"]),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, ["ab", "##b", "a"], ["ab", "b", " a"]),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}, ["▁a", "▁a"], ["a", " a"]),
        (
            {"type": "Sequence", "decoders": LLAMA},
            ["▁", "▁a", "<0xE6>", "<0x97>", "<0xA5>", "b", "<0xFF>", "ab"],
            ["", " a", "", "", "", "日b", "", "\ufffdab"],
        ),
    ):
        tokenizer = ours(raw | {"decoder": decoder})
        stream = tokenizer.stream()
        assert [stream.push(tokenizer.token_id(token)) for token in tokens] == pieces
        assert stream.flush() == ""


def test_ids_that_no_token_can_have_are_input_errors():
    for token_id in (-1, 2**32):
        with pytest.raises(InputError, match="cannot decode tokens"):
            ours(made_up(0)).decode([token_id])
