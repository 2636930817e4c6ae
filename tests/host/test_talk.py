"""MegaModel.chat and MegaModel.complete: with a model that says what it is told to, and with the shipped one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_models import loud_checkpoint, small_config
from prepared_model import PreparedModel, said
from shipped import FOLDER, SONNET_18_START
from threads import together

from checkpoints.harmony import Function, Message, Setting, chat_ids, encode, prompt_parts
from checkpoints.iris_writer import write_archive
from gpt_oss_megakernel import MegaModel
from host.answers import CallArguments, CallStart, Text, ToolCall, Usage
from host.sampling import GREEDY, Sampling
from host.talk import Answer, Talks
from load_model import open_checkpoint
from multi_gpu.ranks import RankModel
from reference import Reference
from system.errors import GenerationOvertaken, InputError, MegakernelAborted
from tokenizer_util import Tokenizer

ROOT = Path(__file__).parents[2]
QUESTION = "Recite sonnet 18."
CALL = Message("assistant", '{"of": "a"}', "commentary", "functions.f", content_type="json")
TOOL = {"type": "function", "function": {"name": "f", "description": "Says f."}}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


class Prepared(Talks, PreparedModel):
    """A prepared model that can be talked with."""


@pytest.fixture
def prepared(tokenizer):
    return Prepared(tokenizer)


def prompt(tokenizer, *messages: Message, **setting) -> list[int]:
    return encode(tokenizer, prompt_parts(Setting(**setting), messages))


# ---------------------------------------------------------------- what an answer holds


def test_an_answer(prepared, tokenizer):
    prepared.n_reused = 3
    prepared.say(*said("one two three", "let me see"))
    answer = prepared.chat([{"role": "user", "content": "Hello"}])
    assert prepared.prompts == [] and repr(answer) == "Answer(text='', finish_reason=None)"
    assert (answer.text, answer.reasoning, answer.tool_calls) == ("one two three", "let me see", [])
    assert (answer.finish_reason, answer.seed, str(answer)) == ("stop", None, "one two three")
    expected = prompt(tokenizer, Message("user", "Hello"))
    n_reasoning = len(tokenizer.encode_plain("let me see")) + 1  # <|end|>, too
    assert answer.usage == Usage(len(expected), 3, len(prepared.answers[0]), n_reasoning)
    assert answer.usage.total_tokens == len(expected) + len(prepared.answers[0])
    assert answer.message == {"role": "assistant", "content": "one two three", "reasoning_content": "let me see"}
    assert repr(answer) == "Answer(text='one two three', finish_reason='stop')"
    assert (prepared.prompts, prepared.samplings) == ([expected], [GREEDY])


def test_pieces_come_as_they_are_generated_and_again_from_the_beginning(prepared):
    prepared.say(*said("one two three", "let me see"))
    answer = prepared.chat("Hello")
    pieces, counts = [], []
    for piece in answer:
        pieces.append(piece)
        counts.append(prepared.n_tokens)
    assert len(pieces) > 2 and sorted(set(counts)) == counts
    assert "".join(pieces) == "one two three"
    assert list(answer) == pieces
    fields = {name: "" for name in ("reasoning_content", "content")}
    for event in answer.events():
        assert isinstance(event, Text)
        fields[event.field] += event.text
    assert fields == {"reasoning_content": "let me see", "content": "one two three"}
    assert prepared.n_tokens == len(prepared.answers[0])


def test_iterations_of_one_answer_may_interleave(prepared):
    prepared.say(*said("one two three four"))
    answer = prepared.chat("Hello")
    first, second = iter(answer), iter(answer)
    found = [next(first) + next(second) for _ in range(3)]
    assert "".join(found) == "".join(piece * 2 for piece in list(answer)[:3])
    assert "".join(first) == "".join(second) == "".join(list(answer)[3:])


def test_threads_may_read_one_answer(prepared):
    prepared.token_seconds = 0.002
    prepared.say(*said("one two three four " * 5))
    answer = prepared.chat("Hello")
    assert together(*[lambda: answer.text] * 4) == ["one two three four " * 5] * 4


def test_calls_and_the_next_turn(prepared, tokenizer):
    prepared.say(Message("assistant", "I must call f.", "analysis"), CALL)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "f of a?"}]
    answer = prepared.chat(messages, tools=[TOOL], reasoning="high", date="2025-01-02")
    start, *arguments = (event for event in answer.events() if not isinstance(event, Text))
    assert isinstance(start, CallStart) and all(isinstance(event, CallArguments) for event in arguments)
    assert (start.name, "".join(event.text for event in arguments)) == ("f", CALL.content)
    assert answer.tool_calls == [ToolCall(start.id, "f", CALL.content)]
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
    setting = dict(instructions="Be brief.", functions=(Function("f", "Says f."),), reasoning="high", date="2025-01-02")
    user = Message("user", "f of a?")
    assert prepared.prompts == [prompt(tokenizer, user, **setting)]

    prepared.say(*said("It is b."))
    messages += [answer.message, {"role": "tool", "tool_call_id": start.id, "content": "b"}]
    assert prepared.chat(messages, tools=[TOOL], reasoning="high", date="2025-01-02").text == "It is b."
    result = Message("tool", "b", "commentary", "assistant", "functions.f")
    thought = Message("assistant", "I must call f.", "analysis")
    assert prepared.prompts[1] == prompt(tokenizer, user, thought, CALL, result, **setting)


def test_a_message_and_its_answer_go_into_the_next_turn(prepared, tokenizer):
    messages = [{"role": "user", "content": "a"}]
    messages += [prepared.chat(messages).message, {"role": "user", "content": "d"}]
    assert prepared.chat(messages).text == "a b c"
    assert prepared.prompts[1] == prompt(tokenizer, Message("user", "a"), *said("a b c"), Message("user", "d"))


@pytest.mark.parametrize("stop", [" thr", ["never", " thr"], (" thr",)])
def test_a_stop_string_ends_an_answer_before_it(stop, prepared):
    prepared.say(*said("one two three four", "two three"))
    answer = prepared.chat("Hello", stop=stop)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("one two", "two three", "stop")
    assert answer.usage.completion_tokens == prepared.n_tokens < len(prepared.answers[0])


def test_limits(prepared, tokenizer):
    answer = prepared.chat("Hello", max_tokens=np.int64(6))
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 6)
    prepared.max_context = len(prompt(tokenizer, Message("user", "Hello"))) + 3
    answer = prepared.chat("Hello")
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 4)


def test_completions(prepared, tokenizer):
    prepared.answers = [[*tokenizer.encode_plain("one two three"), tokenizer.token_id("<|return|>")]]
    answer = prepared.complete("a <|end|>", stop="three")
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("one two ", "", "stop")
    assert prepared.complete([1, 2, 3]).text == "one two three"
    assert prepared.complete(torch.tensor([1, 2])).finish_reason == "stop"
    assert prepared.prompts == [tokenizer.encode_plain("a <|end|>"), [1, 2, 3], [1, 2]]


def test_how_tokens_are_drawn(prepared):
    options = dict(temperature=np.float32(0.5), top_k=5, top_p=0.9, min_p=0.1)
    answers = [prepared.chat("a", seed=7, **options), prepared.complete("a", seed=8, **options)]
    answers += [prepared.chat("a", temperature=1), prepared.chat("a", temperature=1), prepared.chat("a", seed=3)]
    assert [answer.text != "" for answer in answers] == [True] * 5
    assert prepared.samplings[:2] == [Sampling(0.5, seed, 5, 0.9, 0.1) for seed in (7, 8)]
    assert [sampling.temperature for sampling in prepared.samplings[2:]] == [1, 1, 0]
    assert prepared.samplings[2].seed != prepared.samplings[3].seed
    assert [answer.seed for answer in answers] == [7, 8, *(s.seed for s in prepared.samplings[2:4]), None]


# ---------------------------------------------------------------- answers that do not come to their end


def test_an_interrupt_ends_an_answer_and_what_came_stays(prepared):
    prepared.say(*said("one two three"))
    prepared.error = KeyboardInterrupt()
    answer = prepared.chat("Hello")
    with pytest.raises(KeyboardInterrupt):
        _ = answer.text
    assert (answer.text, answer.finish_reason, answer.usage.completion_tokens) == ("", "interrupted", 2)
    assert prepared.chat("Hello").text == "one two three"


def test_a_closed_answer(prepared):
    prepared.say(*said("one two three"))
    answer = prepared.chat("Hello")
    piece = next(iter(answer))
    answer.close()
    assert (answer.text, answer.finish_reason) == (piece, "interrupted")
    finished = prepared.chat("Hello")
    assert finished.finish_reason == "stop"
    finished.close()
    assert finished.finish_reason == "stop"


def test_an_error_is_raised_at_every_reading(prepared, tokenizer):
    prepared.answers = [[*tokenizer.encode_plain("one two three"), tokenizer.token_id("<|return|>")]]
    prepared.error = MegakernelAborted("no arrival")
    answer = prepared.complete("a")
    for _ in range(2):
        pieces = iter(answer)
        assert next(pieces) == "one"
        with pytest.raises(MegakernelAborted):
            list(pieces)
        with pytest.raises(MegakernelAborted):
            _ = answer.finish_reason


# ---------------------------------------------------------------- arguments

HELLO = [{"role": "user", "content": "Hello"}]
WRONG = [
    (dict(messages=3), TypeError, "messages must be a text or a sequence of dicts, not int 3"),
    (dict(messages=None), TypeError, "messages must be "),
    (dict(messages=HELLO[0]), TypeError, "messages must be .*, not dict"),
    (dict(messages=[]), InputError, "messages: at least one is needed"),
    (dict(messages=["Hello"]), InputError, "messages.0: expected a dict, not str"),
    (dict(messages=[{"content": "a"}]), InputError, "messages.0.role: is missing"),
    (dict(messages=[{"role": "wizard", "content": "a"}]), InputError, "messages.0.role: expected one of system, "),
    (
        dict(messages=[*HELLO, {"role": "user", "content": 3}]),
        InputError,
        "messages.1.content: expected text or a list",
    ),
    (dict(messages=[*HELLO, {"role": "user"}]), InputError, "messages.1.content: is missing"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), InputError, "messages.0.content.0.type"),
    (dict(messages=[{"role": "user", "content": [{"type": "text"}]}]), InputError, "messages.0.content.0.text: is"),
    (dict(messages=[{"role": "assistant"}]), InputError, "messages.0.content: there is neither"),
    (dict(messages=[{"role": "assistant", "tool_calls": [{}]}]), InputError, "messages.0.tool_calls.0.function: is"),
    (dict(messages=[{"role": "tool", "tool_call_id": "x", "content": "a"}]), InputError, "messages.0.tool_call_id:"),
    (dict(messages="\ud800"), InputError, "messages: the text is not valid UTF-8"),
    (dict(messages="one " * 2000), InputError, r"messages: the prompt has \d+ tokens: a context of 1000 has no room"),
    (dict(reasoning=3), TypeError, "reasoning must be a text, not int 3"),
    (dict(reasoning="huge"), InputError, "reasoning effort 'huge'"),
    (dict(date=2024), TypeError, "date must be a text"),
    (dict(date="June"), InputError, "date 'June': expected YYYY-MM-DD"),
    (dict(tools=TOOL), TypeError, "tools must be a sequence of dicts, not dict"),
    (dict(tools=[{"type": "retrieval"}]), InputError, "tools.0.type: expected 'function'"),
    (dict(tools=[{"type": "function", "function": {"name": "a b"}}]), InputError, "tools.0.function.name: expected 1"),
]
WRONG_IN_BOTH = [
    (dict(max_tokens=0), InputError, "max_tokens 0: at least 1"),
    (dict(max_tokens=1.5), TypeError, "max_tokens must be an integer"),
    (dict(temperature="1"), TypeError, "temperature must be a number, not str '1'"),
    (dict(temperature=True), TypeError, "temperature must be a number"),
    (dict(temperature=-1), InputError, "temperature -1.0: it must be 0, or 0.001 to 100"),
    (dict(temperature=float("nan")), InputError, "temperature nan"),
    (dict(temperature=10**400), InputError, "temperature inf"),
    (dict(seed="a"), TypeError, "seed must be an integer"),
    (dict(temperature=1, seed=2**63), InputError, "seed 9223372036854775808"),
    (dict(top_k=0.5), TypeError, "top_k must be an integer"),
    (dict(top_p=0), InputError, "top_p 0.0"),
    (dict(min_p=None), TypeError, "min_p must be a number"),
    (dict(stop=3), TypeError, "stop must be a text or a sequence of texts"),
    (dict(stop=["a", 3]), TypeError, r"stop\[1\] must be a text"),
    (dict(stop=""), InputError, "stop: a stop string is empty"),
]
WRONG_PROMPTS = [
    (dict(prompt=3), TypeError, "prompt must be a sequence of integers, not int 3"),
    (dict(prompt=[1, "a"]), TypeError, r"prompt\[1\] must be an integer"),
    (dict(prompt=""), InputError, "prompt: the prompt is empty"),
    (dict(prompt=[]), InputError, "prompt: the prompt is empty"),
    (dict(prompt=[10**6]), InputError, "prompt: .*1000000"),
    (dict(prompt=[1] * 1001), InputError, "prompt: the prompt has 1001 tokens"),
]
CASES = [("chat", dict(messages=HELLO) | options, *rest) for options, *rest in WRONG + WRONG_IN_BOTH]
CASES += [("complete", dict(prompt="a") | options, *rest) for options, *rest in WRONG_PROMPTS + WRONG_IN_BOTH]


@pytest.mark.parametrize(("method", "options", "error", "culprit"), CASES, ids=range(len(CASES)))
def test_a_wrong_argument_raises_at_the_call(method, options, error, culprit, prepared):
    with pytest.raises(error, match="^" + culprit) as caught:
        getattr(prepared, method)(**options)
    assert caught.value.__cause__ is None and prepared.prompts == []
    assert type(caught.value) is error or isinstance(caught.value, InputError)


# ---------------------------------------------------------------- the shipped model


@pytest.fixture(scope="module")
def model():
    return MegaModel.from_pretrained(FOLDER, max_context=256)


@pytest.fixture(scope="module")
def expected(tokenizer):
    """Return a function: the ids that the reference generates for a prompt."""
    reference = Reference(open_checkpoint(FOLDER), max_context=256)
    return lambda ids, n: list(reference.generate(ids, n))


def test_the_shipped_model_talks(model, tokenizer, expected):
    answer = model.chat(QUESTION, max_tokens=40)
    assert (answer.reasoning, answer.finish_reason) == ("The user asks for sonnet 18.", "length")
    assert SONNET_18_START.startswith(answer.text) and answer.text.startswith("Shall I compare thee")
    ids = chat_ids(tokenizer, QUESTION)
    assert answer.usage.prompt_tokens == len(ids)
    again = model.chat([{"role": "user", "content": QUESTION}], max_tokens=1)
    assert (again.usage.cached_tokens, again.usage.completion_tokens) == (len(ids) - 1, 1)
    ids = tokenizer.encode_plain("Shall I")
    assert model.complete("Shall I", max_tokens=9).text == tokenizer.decode(expected(ids, 9))


def test_a_seed_draws_an_answer_again(model):
    drawn = model.complete("Shall I", max_tokens=9, temperature=2)
    assert drawn.text and model.complete("Shall I", max_tokens=9, temperature=2, seed=drawn.seed).text == drawn.text
    assert model.complete("Shall I", max_tokens=9).text != drawn.text


def text_of(model, tokenizer, expected, words: str, n: int) -> str:
    return tokenizer.decode(expected(tokenizer.encode_plain(words), n))


def test_of_two_answers_that_interleave_the_first_is_overtaken(model, tokenizer, expected):
    first, second = model.complete("Shall I", max_tokens=9), model.complete("From fairest", max_tokens=9)
    came = next(iter(first))
    assert second.text == text_of(model, tokenizer, expected, "From fairest", 9)
    for _ in range(2):
        pieces = iter(first)
        assert next(pieces) == came
        with pytest.raises(GenerationOvertaken):
            next(pieces)
    assert model.complete("Shall I", max_tokens=9).text == text_of(model, tokenizer, expected, "Shall I", 9)


def test_an_answer_that_is_not_read_overtakes_nothing(model, tokenizer, expected):
    first = model.complete("Shall I", max_tokens=9)
    assert next(iter(first))
    model.chat("From fairest")
    assert first.text == text_of(model, tokenizer, expected, "Shall I", 9)


def test_threads_that_share_a_model_get_right_texts_or_are_overtaken(model, tokenizer, expected):
    texts = ("Shall I", "From fairest")
    found = together(*(lambda words=words: model.complete(words, max_tokens=9).text for words in texts))
    for words, text in zip(texts, found, strict=True):
        assert isinstance(text, GenerationOvertaken) or text == text_of(model, tokenizer, expected, words, 9)
    assert any(isinstance(text, str) for text in found)


# ---------------------------------------------------------------- tokenizers and documents


def test_a_model_without_a_tokenizer(tmp_path):
    checkpoint = loud_checkpoint(small_config(n_layers=1, layer_is_sliding=(True,)))
    write_archive(checkpoint, tmp_path / "small.iris")
    model = MegaModel.from_pretrained(tmp_path / "small.iris", max_context=16)
    for use in (lambda: model.chat("a"), lambda: model.complete("a"), lambda: MegaModel(checkpoint).complete([1])):
        with pytest.raises(InputError, match=r"^this model has no tokenizer: from_pretrained .* set model\.tokenizer$"):
            use()


def test_a_tokenizer_may_be_set(tokenizer):
    model = MegaModel(open_checkpoint(FOLDER), max_context=16)
    model.tokenizer = tokenizer
    assert isinstance(model.complete("Shall I", max_tokens=1), Answer)


def test_ranks_in_several_processes_need_a_seed():
    model = object.__new__(RankModel)
    model.shares, model.ranks = [None] * 2, [None] * 2
    assert isinstance(model._new_seed(), int)
    model.ranks = [None]
    with pytest.raises(InputError, match="seed: None would be another one in each process"):
        model._new_seed()


def test_the_lines_of_the_documentation(monkeypatch, capsys):
    """They are run as they stand, one block after another."""
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    lines = capsys.readouterr().out
    assert lines.startswith(SONNET_18_START) and "length Usage(prompt_tokens=61" in lines
    assert len(names["messages"]) == 4 and isinstance(names["next_id"], int)
