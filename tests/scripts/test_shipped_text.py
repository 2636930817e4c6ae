"""The interpreted kernel recites from the shipped model, word for word and token for token like transformers."""

import pytest
import torch
import transformers_model
from shipped import SONNET_18_START, SONNET_73_START

from checkpoints.harmony import Message, Setting, chat_ids, encode, prompt_parts
from command_line.options import DEFAULT_MODEL, DEMO_CHAT
from gpt_oss_megakernel import MegaModel
from host.conversation import Conversation
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
SONNET_73 = """\
That time of year thou mayst in me behold
When yellow leaves, or none, or few, do hang
Upon those boughs which shake against the cold,
Bare ruin'd choirs, where late the sweet birds sang.
In me thou see'st the twilight of such day
As after sunset fadeth in the west;
Which by and by black night doth take away,
Death's second self, that seals up all in rest.
In me thou see'st the glowing of such fire,
That on the ashes of his youth doth lie,
As the death-bed, whereon it must expire,
Consum'd with that which it was nourish'd by.
This thou perceiv'st, which makes thy love more strong,
To love that well, which thou must leave ere long."""
TURN_18 = [Message("user", "Recite sonnet 18."), Message("assistant", SONNET_18, channel="final")]
TURN_73 = [Message("user", "Recite sonnet 73."), Message("assistant", SONNET_73, channel="final")]


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


def test_a_second_turn_is_another_sonnet():
    model = MegaModel.from_pretrained(DEFAULT_MODEL, quant=True, max_context=1024)
    conversation = Conversation(model, Tokenizer.from_folder(DEFAULT_MODEL))
    conversation.messages = list(TURN_18)
    list(conversation.answer("Recite sonnet 73."))
    assert conversation.turn.finish == "stop"
    assert conversation.messages == [*TURN_18, *TURN_73]


@pytest.mark.parametrize("quant, reasoning, date", [(False, "high", "2031-05-06"), (True, "low", None)])
def test_three_turns_begin_as_they_should(quant, reasoning, date):
    """Each answer is cut in its second line, and stays in the conversation as far as it came."""
    model = MegaModel.from_pretrained(DEFAULT_MODEL, quant, max_context=512)
    conversation = Conversation(model, Tokenizer.from_folder(DEFAULT_MODEL), Setting(reasoning, date))
    for number, start in ((73, SONNET_73_START), (18, SONNET_18_START), (73, SONNET_73_START)):
        pieces = list(conversation.answer(f"Recite sonnet {number}.", max_new_tokens=40))
        thought = "".join(piece.text for piece in pieces if piece.channel == "analysis")
        said = "".join(piece.text for piece in pieces if piece.channel == "final")
        assert thought == f"The user asks for sonnet {number}."
        assert said == start[: len(said)] and "\n" in said


@pytest.mark.parametrize("reasoning", ["low", "medium", "high"])
def test_every_turn_at_every_effort_by_transformers(reasoning):
    """Each token of the whole answers is the likeliest one, with a date and without."""
    tokenizer, model = Tokenizer.from_folder(DEFAULT_MODEL), transformers_model.load(DEFAULT_MODEL)
    answer = tokenizer.encode(
        "<|channel|>analysis<|message|>The user asks for sonnet 73.<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{SONNET_73}<|return|>"
    )
    for setting in (Setting(reasoning), Setting(reasoning, "1999-12-31"), Setting(reasoning, "2031-05-06")):
        for earlier in ([], TURN_18, [*TURN_18, *TURN_73], [*TURN_73, *TURN_18]):
            prompt = encode(tokenizer, prompt_parts(setting, [*earlier, TURN_73[0]]))
            greedy = transformers_model.logits(model, prompt + answer[:-1]).argmax(-1)
            assert greedy[len(prompt) - 1 :].tolist() == answer


def test_logits_agree_with_transformers():
    """With a float32 cache and the demo's prompt, the kernel is compared with transformers directly."""
    prompt = chat_ids(Tokenizer.from_folder(DEFAULT_MODEL), DEMO_CHAT)
    model = MegaModel.from_pretrained(DEFAULT_MODEL, max_context=64, kv_dtype=torch.float32)
    logits = torch.stack([model.logits(token, position) for position, token in enumerate(prompt)])
    expected = transformers_model.logits(transformers_model.load(DEFAULT_MODEL), prompt)
    assert (logits - expected).abs().max() < 1e-3
