"""model.chat and model.complete: with a prepared model, whose answers are known, and with the shipped one."""

import pytest
from prepared_model import PreparedModel, answer_ids, said
from shipped import FOLDER, SONNET_18_START
from small_model import write_model

from checkpoints.harmony import Message
from gpt_oss_megakernel import MegaModel
from host.answers import Text
from host.decoder import Decoder
from host.sampling import Sampling
from host.talk import Usage, drawing, harmony_messages
from system.errors import GenerationOvertaken, InputError
from tokenizer_util import Tokenizer

USER = [{"role": "user", "content": "Recite sonnet 18."}]


class Prepared(PreparedModel):
    """A prepared model with the methods for Python."""

    chat, complete = Decoder.chat, Decoder.complete
    _limit, _known_tokenizer = staticmethod(Decoder._limit), Decoder._known_tokenizer


@pytest.fixture
def model():
    return Prepared(Tokenizer.from_folder(FOLDER))


@pytest.fixture(scope="module")
def shipped():
    return MegaModel.from_pretrained(FOLDER, max_context=256, device="cpu")


def test_text_comes_in_pieces_without_reasoning(model):
    model.say(*said("a b c", "hm"))
    answer = model.chat(USER)
    pieces = list(answer)
    assert len(pieces) > 1 and "".join(pieces) == answer.text == "a b c"
    assert answer.reasoning == "hm"
    assert answer.finish_reason == "stop"


def test_the_whole_is_read_when_it_is_asked_for(model):
    model.say(*said("a b c", "hm"))
    answer = model.chat(USER)
    assert not model.prompts  # nothing was generated yet
    assert answer.reasoning == "hm"
    assert answer.text == "a b c"
    assert len(model.prompts) == 1


def test_parts_say_what_is_reasoning(model):
    model.say(*said("a", "hm"))
    fields = [part.field for part in model.chat(USER).parts()]
    assert fields == sorted(fields, reverse=True) and set(fields) == {"reasoning_content", "content"}
    assert all(isinstance(part, Text) for part in model.chat(USER).parts())


def test_usage_counts_tokens(model):
    messages = said("a b c", "hm")
    model.say(*messages)
    n = len(answer_ids(model.tokenizer, *messages))
    answer = model.chat(USER)
    n_prompt, usage = None, answer.usage
    n_prompt = len(model.prompts[0])
    assert usage == Usage(n_prompt, 0, n, usage.reasoning_tokens)
    assert 0 < usage.reasoning_tokens < n


def test_limits_and_stop_texts_end_an_answer(model):
    model.say(*said("a b c d"))
    answer = model.chat(USER, max_tokens=6)
    assert (answer.finish_reason, answer.usage.answer_tokens) == ("length", 6)
    answer = model.chat(USER, stop="c")
    assert (answer.text, answer.finish_reason) == ("a b ", "stop")
    assert model.chat(USER, stop=["x", "b"]).text == "a "


def test_what_is_drawn_reaches_the_model(model):
    model.chat(USER, temperature=0.5, seed=7, top_k=3, top_p=0.9, min_p=0.1).text  # noqa: B018
    model.complete("a", temperature=0.5, seed=8).text  # noqa: B018
    assert model.samplings == [Sampling(0.5, 7, 3, 0.9, 0.1), Sampling(0.5, 8)]
    assert drawing(0.5).seed != drawing(0.5).seed


def test_messages_become_harmony(model):
    system, developer = {"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Rhyme."}
    turns = [*USER, {"role": "assistant", "content": "Yes."}, *USER]
    instructions, messages = harmony_messages([system, developer, *turns])
    assert instructions == "Be brief.\n\nRhyme."
    assert messages == [Message("user", "Recite sonnet 18."), Message("assistant", "Yes.", "final"), messages[0]]
    model.chat([system, *turns], reasoning="high", date="2026-01-02").text  # noqa: B018
    prompt = model.tokenizer.decode(model.prompts[-1])
    assert all(text in prompt for text in ("Be brief.", "Reasoning: high", "2026-01-02", "Yes."))


@pytest.mark.parametrize(
    "error, said, options",
    [
        (TypeError, r"messages\[0\]", {"messages": ["Hello"]}),
        (TypeError, r"messages\[0\]", {"messages": [{"role": "user", "content": None}]}),
        (InputError, r"messages\[0\]: role 'robot'", {"messages": [{"role": "robot", "content": ""}]}),
        (InputError, r"messages\[1\]: role 'system'", {"messages": [*USER, {"role": "system", "content": ""}]}),
        (InputError, "reasoning effort", {"reasoning": "none"}),
        (InputError, "date", {"date": "today"}),
        (InputError, "temperature", {"temperature": -1}),
        (InputError, "max_tokens 0", {"max_tokens": 0}),
        (TypeError, "max_tokens", {"max_tokens": 1.5}),
        (TypeError, "stop", {"stop": [3]}),
        (InputError, "stop", {"stop": ""}),
        (InputError, "the context is", {"messages": [{"role": "user", "content": "word " * 2000}]}),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_call(error, said, options, model):
    with pytest.raises(error, match=said):
        model.chat(**({"messages": USER} | options))
    assert not model.prompts


def test_a_text_must_be_one(model):
    with pytest.raises(TypeError, match="text must be a str, not list"):
        model.complete([1, 2])
    with pytest.raises(InputError, match="the prompt is empty"):
        model.complete("")


def test_a_model_without_a_tokenizer_says_so(model):
    model.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        model.chat(USER)


def test_a_folder_without_a_tokenizer_makes_a_model(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    model = MegaModel.from_pretrained(folder, max_context=16, device="cpu")
    assert len(list(model.generate([1, 2], 2))) == 2
    with pytest.raises(InputError, match="no tokenizer"):
        model.complete("a")


def test_the_shipped_model_talks(shipped):
    answer = shipped.chat(USER, max_tokens=24)
    assert "".join(answer) and SONNET_18_START.startswith(answer.text)
    assert answer.reasoning == "The user asks for sonnet 18."
    again = shipped.chat(USER, max_tokens=2)
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1


def test_another_use_ends_an_answer(shipped):
    first, second = shipped.complete("Shall I", max_tokens=4), shipped.complete("So long", max_tokens=2)
    iterator = iter(first)
    next(iterator)
    expected = second.text
    with pytest.raises(GenerationOvertaken):
        list(iterator)
    assert shipped.complete("So long", max_tokens=2).text == expected
    with pytest.raises(InputError, match="cannot be read on"):
        first.text  # noqa: B018
