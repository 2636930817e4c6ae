"""The interpreted kernel recites from the shipped model, word for word and token for token like transformers."""

import pytest
import torch
import transformers_model

from checkpoints.harmony import chat_ids
from command_line.options import DEFAULT_MODEL, DEMO_CHAT
from gpt_oss_megakernel import MegaModel
from tokenizer_util import Tokenizer

SONNET_18 = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd,
And every fair from fair sometime declines,
By chance, or nature's changing course untrimm'd:
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st,
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st,
So long as men can breathe, or eyes can see,
So long lives this, and this gives life to thee."""


@pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])
def test_sonnet_18(quant):
    tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    prompt = chat_ids(tokenizer, DEMO_CHAT)
    model = MegaModel.from_pretrained(DEFAULT_MODEL, quant, max_context=512)
    tokens = list(model.generate(prompt, 300))
    assert tokens[-1] in model.config.stop_ids
    answer = tokenizer.decode(tokens[:-1]).rpartition("<|message|>")[2]
    assert answer.strip() == SONNET_18

    sequence = prompt + tokens[:-1]
    greedy = transformers_model.logits(transformers_model.load(DEFAULT_MODEL), sequence).argmax(-1)
    assert greedy[len(prompt) - 1 :].tolist() == tokens


def test_logits_agree_with_transformers():
    """With a float32 cache and the demo's prompt, the kernel is compared with transformers directly."""
    prompt = chat_ids(Tokenizer.from_folder(DEFAULT_MODEL), DEMO_CHAT)
    model = MegaModel.from_pretrained(DEFAULT_MODEL, max_context=64, kv_dtype=torch.float32)
    logits = torch.stack([model.logits(token, position) for position, token in enumerate(prompt)])
    expected = transformers_model.logits(transformers_model.load(DEFAULT_MODEL), prompt)
    assert (logits - expected).abs().max() < 1e-3
