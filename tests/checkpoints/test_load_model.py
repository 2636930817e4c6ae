"""load_model: which reader opens a path, and the flags that all scripts take for it."""

import os

import pytest
from small_model import assert_rejected, run_script, small_checkpoint, write_model

import bench_tpot
import gpt_oss_megakernel
import run_reference
import run_triton_phased
from checkpoints.config import checkpoint_bytes
from checkpoints.iris_writer import write_archive
from load_hf import HFCheckpoint
from load_hf import open_checkpoint as open_folder
from load_iris import IrisArchive, open_archive
from load_model import is_archive, open_checkpoint, open_tokenizer
from system.errors import InputError

SCRIPTS = [gpt_oss_megakernel, run_reference, run_triton_phased]
WORDS = ["--prompt", "Hi", "--max-new-tokens", 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def archive(folder):
    write_archive(open_folder(folder), folder.parent / "m.iris")
    return folder.parent / "m.iris"


@pytest.fixture
def damaged(archive, tmp_path):
    """Flip a bit of the last weight."""
    data = bytearray(archive.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.iris").write_bytes(data)
    return tmp_path / "damaged.iris"


@pytest.mark.parametrize("as_given", [str, lambda path: path])
def test_a_file_is_an_archive_and_a_folder_is_not(folder, archive, as_given):
    assert isinstance(open_checkpoint(as_given(archive)), IrisArchive)
    assert isinstance(open_checkpoint(as_given(folder)), HFCheckpoint)


def test_the_name_of_an_archive_does_not_matter(archive, tmp_path):
    (tmp_path / "model").write_bytes(archive.read_bytes())
    assert isinstance(open_checkpoint(tmp_path / "model"), IrisArchive)


def test_a_folder_may_end_like_an_archive(folder, tmp_path):
    (tmp_path / "x.iris").symlink_to(folder)
    assert isinstance(open_checkpoint(tmp_path / "x.iris"), HFCheckpoint)


@pytest.mark.parametrize("make", ["nothing", "folder", "pipe"])
def test_what_ends_like_an_archive_and_is_none(tmp_path, make):
    path = tmp_path / "x.iris"
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    reason = {"nothing": "No such file", "folder": "a directory", "pipe": "not a regular file"}[make]
    with pytest.raises(InputError, match=reason):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["org/name", "no-such-folder", "x" * 5000, "nul\0"])
def test_other_names_are_for_the_folder_reader(name, monkeypatch):
    monkeypatch.setattr("load_hf._download", lambda repo: (_ for _ in ()).throw(InputError("asked the hub")))
    with pytest.raises(InputError):
        open_checkpoint(name)


def test_a_repository_is_no_archive():
    assert not is_archive("openai/gpt-oss-120b")


def test_an_empty_name_is_not_this_folder(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for use in (open_checkpoint, is_archive, open_archive, gpt_oss_megakernel.MegaModel.from_pretrained):
        with pytest.raises(InputError, match="model is ''"):
            use("")
    for script in SCRIPTS:
        result = run_script(script.main, ["--model", "", "--prompt-ids", "1"], monkeypatch, capsys)
        assert_rejected(result, "model is ''")


@pytest.mark.parametrize("model", [None, b"x.iris", 3, ["x"], object()], ids=lambda model: type(model).__name__)
def test_what_is_no_path(model):
    for use in (open_checkpoint, is_archive, open_archive, gpt_oss_megakernel.MegaModel.from_pretrained):
        with pytest.raises(TypeError, match="model is .*: a str or a Path is expected"):
            use(model)
    with pytest.raises(TypeError, match="checkpoint is .*, not what open_checkpoint gives"):
        open_tokenizer(model)


def test_cut_archives(archive):
    assert open_checkpoint(archive, 1).config.n_layers == 1
    with pytest.raises(InputError, match="--layers 3"):
        open_checkpoint(archive, 3)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("quant", [[], ["--quant"]], ids=["default", "quant"])
def test_scripts_say_the_same_from_an_archive(script, quant, folder, archive, monkeypatch, capsys):
    def ids(model):
        words = ["--model", model, "--prompt-ids", "65,66,67", "--max-new-tokens", 5, "--json", *quant]
        code, out, _ = run_script(script.main, words, monkeypatch, capsys)
        assert code == 0
        return out.partition('"token_ids": ')[2].partition("]")[0]

    assert ids(archive) == ids(folder) != ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_verify_finds_damage_that_is_else_not_seen(script, archive, damaged, monkeypatch, capsys):
    assert run_script(script.main, ["--model", damaged, *WORDS], monkeypatch, capsys)[0] == 0
    assert run_script(script.main, ["--model", archive, "--verify", *WORDS], monkeypatch, capsys)[0] == 0
    result = run_script(script.main, ["--model", damaged, "--verify", *WORDS], monkeypatch, capsys)
    assert_rejected(result, "damaged.iris", "checksum", "L1.down_b")


def test_the_benchmark_takes_an_archive(archive, damaged, monkeypatch, capsys):
    words = ["--contexts", "8", "--steps", 2, "--repeats", 1]
    code, out, _ = run_script(bench_tpot.main, ["--model", archive, *words], monkeypatch, capsys)
    assert code == 0
    assert "m.iris, 2 layers" in out
    assert run_script(bench_tpot.main, ["--model", damaged, "--verify", *words], monkeypatch, capsys)[0] == 2


def test_verify_needs_checksums(folder, monkeypatch, capsys):
    for words in (["--model", folder], ["--random-weights", "20b", "--layers", 1]):
        result = run_script(gpt_oss_megakernel.main, [*words, "--verify"], monkeypatch, capsys)
        assert_rejected(result, "--verify")


def test_load_rate_is_one_line(archive, monkeypatch, capsys):
    words = ["--model", archive, "--load-rate", *WORDS]
    code, _, err = run_script(gpt_oss_megakernel.main, words, monkeypatch, capsys)
    assert code == 0
    gigabytes = checkpoint_bytes(small_checkpoint().config) / 1e9
    assert err.startswith(f"weights: {gigabytes:.3f} GB in ")
    rate, summary, *_ = err.splitlines()
    assert rate.endswith(" GB/s")
    assert summary.startswith("[2 prompt + 2 new tokens")


def test_an_archive_without_a_tokenizer_takes_token_ids_only(tmp_path, monkeypatch, capsys):
    write_archive(small_checkpoint(), tmp_path / "m.iris")
    words = ["--model", tmp_path / "m.iris", "--max-new-tokens", 2]
    assert run_script(gpt_oss_megakernel.main, [*words, "--prompt-ids", "1,2"], monkeypatch, capsys)[0] == 0
    for prompt in (["--prompt", "Hi"], ["--chat", "Hi"]):
        result = run_script(gpt_oss_megakernel.main, [*words, *prompt], monkeypatch, capsys)
        assert_rejected(result, prompt[0], "tokenizer", "--prompt-ids")
