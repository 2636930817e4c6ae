"""acc_eval.py: what it feeds, reports and refuses, and that it finds mistakes and nothing else."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers_model
from checkpoint_mutations import CHECKPOINT_MUTATIONS
from made_up_models import MemoryCheckpoint
from small_model import assert_rejected, byte_tokenizer, run_script, small_checkpoint
from torch.nn.functional import cross_entropy

import acc_eval
import gpt_oss_megakernel
from acc_eval import OpenSide, Plan, Stream, Window, cut, cut_all, evaluate, greedy_stream, open_side
from checkpoints.checkpoint import write_checkpoint
from checkpoints.config import PRESETS, DenseFormats
from checkpoints.harmony import chat_ids
from command_line.comparison import METRICS, SIDE_NAMES, Side
from command_line.options import DEFAULT_MODEL, DEMO_CHAT
from host import decoder
from reference import Reference
from tokenizer_util import Tokenizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SONNET_1_START = "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die,"
TEXT = "How far is the kernel from the reference? Naïvely: a few roundings, and no more than those.\n" * 3
IDS = list(TEXT.encode())
# Far above what a cache in bfloat16 does to the small model, far below what a mistake does.
GATE = "top1=0.9,kl=0.03,cosine=0.99"
# A position costs the kernel 0.1 s. The small model's sliding window is 2.
SHORT = ("--window", 5, "--max-windows", 4)


@pytest.fixture(autouse=True)
def one_thread():
    with acc_eval.one_thread():
        yield


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return small_checkpoint().with_config(sliding_window=2)


def write(checkpoint: MemoryCheckpoint, folder: Path) -> Path:
    write_checkpoint(checkpoint, folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    return write(checkpoint, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command line in this process; return (exit code, stdout, stderr)."""

    def run(*words, model: Path | None = folder) -> tuple[int, str, str]:
        source = [] if model is None else ["--model", model]
        try:
            return run_script(acc_eval.main, [*source, *words], monkeypatch, capsys)
        except SystemExit as end:
            return end.code, *capsys.readouterr()

    return run


@pytest.fixture
def run_json(run, tmp_path):
    """Return the report of a run without complaints."""

    def run_json(*words, **options) -> dict:
        code, _, err = run(*words, "--json", tmp_path / "report.json", **options)
        assert (code, err) == (0, "")
        return json.loads((tmp_path / "report.json").read_text())

    return run_json


@pytest.fixture
def fed(monkeypatch):
    """Return the windows that a run compares."""
    seen, evaluate = [], acc_eval.evaluate
    monkeypatch.setattr(
        acc_eval, "evaluate", lambda r, t, windows, *rest: (seen.extend(windows), evaluate(r, t, windows, *rest))[1]
    )
    return seen


# What it finds


@pytest.mark.parametrize("side", ["reference", "reference-quant", "default", "quant"])
def test_identical_sides_agree_in_everything(run_json, text, side):
    report = run_json("--text", text, "--ref", side, "--test", side, *SHORT)
    for values in (report["metrics"], *report["windows"]):
        assert [values[key] for key in ("top1", "top5", "top10", "cosine", "rank", "ppl_ratio")] == [1] * 6
        assert [values[key] for key in ("kl", "rms", "nll_difference")] == [0] * 3
        assert values["ppl_ref"] == values["ppl_test"] > 1
    assert report["nll_difference"] == {"mean": 0, "low": 0, "high": 0, "n": 4}
    assert report["failures"] == []


# All but alpha, which is not in config.json.
@pytest.mark.parametrize("name", [name for name in CHECKPOINT_MUTATIONS if name != "alpha 1"])
def test_every_mistake_turns_the_verdict_red(run, text, checkpoint, tmp_path, name):
    """YaRN with truncation moves a logit by 1e-2 at most: a gate for equal arithmetic can be that narrow."""
    broken = write(CHECKPOINT_MUTATIONS[name](checkpoint), tmp_path / "broken")
    words = ["--text", text, "--test", "reference", "--window", 60, "--fail-under", "kl=1e-6"]
    code, out, err = run(*words, "--test-model", broken)
    assert code == 1
    assert err.startswith("acc_eval: kl ")
    assert err.endswith(" is above 1e-06\n")
    assert err.count("\n") == 1
    assert "- verdict: red: kl " in out
    assert "| top1 |" in out


def test_without_a_mistake_the_same_gate_is_green(run, text, folder):
    words = ["--text", text, "--test", "reference", "--window", 60, "--fail-under", "kl=1e-6"]
    code, out, err = run(*words, "--test-model", folder)
    assert (code, err) == (0, "")
    assert "- verdict: green: kl=1e-06" in out


@pytest.mark.parametrize("name", [None, "sinks dropped", "window one too small", "nibbles swapped"])
def test_a_gate_for_the_kernel(run, text, checkpoint, tmp_path, name):
    words = ["--text", text, *SHORT, "--fail-under", GATE]
    if name is None:
        assert run(*words)[0] == 0
        return
    broken = write(CHECKPOINT_MUTATIONS[name](checkpoint), tmp_path / "broken")
    code, _, err = run(*words, "--test-model", broken)
    assert code == 1
    assert all(line.startswith("acc_eval: ") for line in err.splitlines())
    assert "acc_eval: kl " in err


def test_a_line_for_each_threshold_that_fails(run, text, tmp_path):
    words = ["--text", text, "--test", "reference-quant", "--json", tmp_path / "report.json", "--window", 60]
    code, out, err = run(*words, "--fail-under", "top1=1, kl=1e-9,rms=5,rank=1,ppl_test=1e9,top1_confident=0")
    report = json.loads((tmp_path / "report.json").read_text())
    values = report["metrics"]
    assert code == 1
    assert err.splitlines() == [
        f"acc_eval: top1 {values['top1']:.9g} is below 1",
        f"acc_eval: kl {values['kl']:.9g} is above 1e-09",
        f"acc_eval: rank {values['rank']:.9g} is above 1",
    ]
    assert [f"acc_eval: {line}" for line in report["failures"]] == err.splitlines()
    assert report["thresholds"]["rms"] == 5
    assert "| top1 |" in out


def test_not_a_number_is_red_without_any_threshold(run, text, checkpoint, tmp_path):
    def spoil(name, tensor):
        return torch.full_like(tensor, math.nan) if name == "model.norm.weight" else tensor

    broken = write(checkpoint.with_tensors(spoil), tmp_path / "broken")
    words = ["--text", text, "--test", "reference", "--window", 60, "--test-model", broken]
    code, out, err = run(*words, "--json", tmp_path / "report.json")
    assert (code, err) == (1, "acc_eval: test reference: logits that are not finite at 240 of 240 positions\n")
    assert "| kl | nan |" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["metrics"].values()) == {None}
    assert [(row["ref_not_finite"], row["test_not_finite"]) for row in report["windows"]] == [(0, 60)] * 4
    assert "acc_eval: kl is undefined, and 1 was asked for" in run(*words, "--fail-under", "kl=1")[2]


def test_perplexity_is_transformers(run_json, text, folder):
    report = run_json("--text", text, "--test", "reference-quant", "--window", 60)
    model = transformers_model.load(folder)
    nll = [
        cross_entropy(transformers_model.logits(model, ids[:-1]).double(), torch.tensor(ids[1:])).item()
        for ids in (IDS[start : start + 61] for start in range(0, 240, 60))
    ]
    assert report["metrics"]["ppl_ref"] == pytest.approx(math.exp(sum(nll) / 4), rel=1e-4)
    assert [row["ppl_ref"] for row in report["windows"]] == pytest.approx([math.exp(x) for x in nll], rel=1e-4)


def test_values_of_the_report_are_those_of_both_sides_logits(run_json, text, checkpoint):
    """The values are computed again, from all positions of a window at once."""
    report = run_json("--text", text, "--test", "reference-quant", "--window", 60)
    expected = {"kl": [], "top1": [], "rank": [], "difference": []}
    for start in range(0, 240, 60):
        r, t = (
            Reference(checkpoint, quant, torch.float32, max_context=60).forward(IDS[start : start + 60]).double()
            for quant in (False, True)
        )
        log_p, log_q, next_ids = r.log_softmax(-1), t.log_softmax(-1), torch.tensor(IDS[start + 1 : start + 61])
        expected["kl"].append(torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
        expected["top1"].append((r.argmax(-1) == t.argmax(-1)).double().mean())
        expected["rank"].append((t > t.gather(1, r.argmax(-1, keepdim=True))).sum(-1).double().mean() + 1)
        expected["difference"].append(cross_entropy(t, next_ids) - cross_entropy(r, next_ids))
    expected = {name: torch.stack(values) for name, values in expected.items()}
    for key in ("kl", "top1", "rank"):
        assert report["metrics"][key] == pytest.approx(expected[key].mean().item(), rel=1e-3), key
        assert [row[key] for row in report["windows"]] == pytest.approx(expected[key].tolist(), rel=1e-3), key
    mean, half = expected["difference"].mean(), 3.1824 * expected["difference"].std() / 2  # t of 3 degrees, sqrt(4)
    interval = report["nll_difference"]
    assert (interval["mean"], interval["low"], interval["high"]) == pytest.approx(
        (mean.item(), (mean - half).item(), (mean + half).item()), rel=1e-3
    )
    assert report["ppl_ratio"]["high"] == pytest.approx(math.exp(interval["high"]))


def test_two_runs_write_the_same(run_json, run, text, tmp_path):
    words = ["--text", text, "--test", "quant", "--window", 2, "--max-windows", 4]
    first, _ = run_json(*words), (tmp_path / "report.json").rename(tmp_path / "first.json")
    assert run_json(*words) == first
    assert (tmp_path / "report.json").read_bytes() == (tmp_path / "first.json").read_bytes()
    words[3] = "reference"
    assert run(*words)[1] == run(*words)[1]


# What it feeds


@pytest.mark.parametrize(
    ("n_tokens", "n_context", "length", "expected"),
    [
        (9, 1, 4, [(0, 5, 0), (4, 9, 0)]),
        (8, 1, 4, [(0, 5, 0)]),
        (12, 1, 4, [(0, 5, 0), (4, 9, 0)]),
        (4, 1, 4, []),
        (9, 3, 4, [(0, 5, 2), (4, 9, 0)]),
        (9, 5, 4, [(4, 9, 0)]),
        (9, 6, 4, [(4, 9, 1)]),
        (9, 9, 8, []),
        (9, 5, 8, [(0, 9, 4)]),
        (9, 6, 8, []),
        (9, 5, None, [(0, 9, 4)]),
        (10, 5, None, [(0, 10, 4)]),
        (9, 4, 4, [(4, 9, 0)]),
        (2, 1, None, [(0, 2, 0)]),
        (1, 1, None, []),
        (0, 1, None, []),
        (0, 1, 4, []),
        (4, 1, 1, [(0, 2, 0), (1, 3, 0), (2, 4, 0)]),
    ],
)
def test_windows_of_a_stream(n_tokens, n_context, length, expected):
    """A window is (first token, end, number skipped) and ends with the token that its last position predicts."""
    windows = list(cut(Stream(list(range(n_tokens)), n_context), length))
    assert windows == [Window(list(range(start, end)), n_skipped) for start, end, n_skipped in expected]


def test_windows_of_several_streams_come_in_order_and_no_further_stream_is_asked_for(checkpoint):
    def streams():
        for first in (0, 20, 40):
            yield Stream(list(range(first, first + 9)))
        raise AssertionError

    windows = cut_all(streams(), Plan("streams", 4, 5, 0, 32), checkpoint.config)
    assert [window.token_ids[0] for window in windows] == [0, 4, 20, 24, 40]


def test_a_text_is_tokenized_whole_and_cut(run_json, fed, text):
    report = run_json("--text", text, "--test", "reference", "--window", 60)
    assert [window.token_ids for window in fed] == [IDS[start : start + 61] for start in range(0, 240, 60)]
    assert all(window.n_skipped == 0 for window in fed)
    assert (report["positions_fed"], report["positions"], len(report["windows"])) == (240, 240, 4)
    assert report["source"] == f"--text {text}"


def test_special_tokens_in_a_text_are_tokens(run_json, fed, tmp_path):
    (tmp_path / "chat.txt").write_text("<|start|>user<|message|>Hi!")
    run_json("--text", tmp_path / "chat.txt", "--test", "reference", "--window", 1)
    assert [window.token_ids for window in fed][:2] == [[256, ord("u")], [ord("u"), ord("s")]]


def test_at_most_so_many_windows(run_json, run, text):
    assert len(run_json("--text", text, "--test", "reference", "--window", 10)["windows"]) == acc_eval.CPU_WINDOWS
    assert len(run_json("--text", text, "--test", "reference", "--window", 10, "--max-windows", 5)["windows"]) == 5
    assert len(run_json("--text", text, "--test", "reference", "--window", 10, "--max-windows", 99)["windows"]) == 27


def test_the_shipped_texts_are_answers_in_a_chat():
    tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    prompt = chat_ids(tokenizer, "Recite sonnet 1.")
    stream = next(acc_eval.shipped_streams(tokenizer, CPU))
    assert stream.token_ids[: stream.n_context] == prompt
    answer = tokenizer.decode(stream.token_ids[stream.n_context :])
    assert answer.startswith("<|channel|>analysis<|message|>The user asks for sonnet 1.<|end|>")
    assert answer.rpartition("<|message|>")[2].startswith(SONNET_1_START)
    assert answer.endswith("<|return|>")


def test_threads_come_back(one_thread):
    torch.set_num_threads(2)
    with acc_eval.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("device", "reciter"), [("cpu", "Reference"), ("cuda", "MegaModel")])
def test_the_shipped_texts_in_another_vocabulary(folder, monkeypatch, device, reciter):
    """reference.py stands here for the kernel, which recites on a GPU."""
    for name in ("Reference", "MegaModel"):
        monkeypatch.setattr(acc_eval, name, Reference if name == reciter else None)
    monkeypatch.setattr(acc_eval, "LONGEST_ANSWER", 60)
    tokenizer = Tokenizer.from_folder(folder)
    stream = next(acc_eval.shipped_streams(tokenizer, torch.device(device)))
    assert stream.token_ids[: stream.n_context] == chat_ids(tokenizer, "Recite sonnet 1.")
    assert (
        tokenizer.decode(stream.token_ids[stream.n_context :]).rpartition("<|message|>")[2].startswith(SONNET_1_START)
    )


def shorter_texts(tokenizer: Tokenizer, device: torch.device, show_progress: bool):
    """Yield four streams of different lengths, whose questions are context."""
    for n in range(4):
        prompt = chat_ids(tokenizer, "Hi")[-8:]
        yield Stream(prompt + list(range(65, 75 + n)), len(prompt))


def test_shipped_is_the_default_each_text_a_window(run_json, fed, monkeypatch):
    monkeypatch.setattr(acc_eval, "shipped_streams", shorter_texts)
    report = run_json("--test", "reference-quant")
    assert [window.n_positions for window in fed] == [17, 18, 19, 20]
    assert {window.n_skipped for window in fed} == {7}
    assert (report["source"], report["positions_fed"], report["positions"]) == ("--streams shipped", 74, 46)
    assert [row["positions"] for row in report["windows"]] == [10, 11, 12, 13]


@pytest.mark.parametrize("side", ["reference", "reference-quant"])
def test_greedy_is_the_reference_sides_own_answer(run_json, fed, checkpoint, side):
    endless = checkpoint.with_config(stop_ids=())
    words = ["--window", 6, "--tokens", 24]
    report = run_json("--streams", "greedy", "--prompt", "Why?", "--ref", side, "--test", "reference", *words)
    prompt = list(b"Why?")
    answer = list(Reference(endless, side == "reference-quant", torch.float32).generate(prompt, 24))
    ids = prompt + answer
    assert [window.token_ids for window in fed] == [ids[start : start + 7] for start in range(0, 24, 6)]
    assert [window.n_skipped for window in fed] == [3, 0, 0, 0]
    assert report["positions"] == 21


def test_greedy_goes_on_after_a_stop_id(folder, checkpoint):
    open_reference = open_side(Side.parse("reference"), checkpoint, 64, CPU)
    answer = greedy_stream(open_reference, [65, 66], 9, 32).token_ids[2:]
    assert answer == list(Reference(checkpoint.with_config(stop_ids=()), False, torch.float32).generate([65, 66], 9))
    stopping = checkpoint.with_config(stop_ids=(answer[2],))
    again = greedy_stream(open_side(Side.parse("reference"), stopping, 64, CPU), [65, 66], 9, 32)
    assert again.token_ids[2:] == answer


def test_greedy_feeds_a_long_prompt_in_chunks(checkpoint):
    side = open_side(Side.parse("reference"), checkpoint, 64, CPU)
    lengths = []
    counting = OpenSide(side.reset, lambda ids, at: (lengths.append((len(ids), at)), side.logits(ids, at))[1])
    assert greedy_stream(counting, IDS[:21], 3, 8) == greedy_stream(side, IDS[:21], 3, 64)
    assert lengths == [(8, 0), (8, 8), (5, 16), (1, 21), (1, 22)]


def test_greedy_answers_the_demo(run_json, fed, folder):
    run_json("--streams", "greedy", "--test", "reference", "--window", 100)
    prompt = chat_ids(Tokenizer.from_folder(folder), DEMO_CHAT)
    assert (len(prompt) - 1) // 100 == 2  # so many windows hold nothing that counts
    assert fed[0].token_ids[: fed[0].n_skipped + 1] == prompt[200:]
    assert [window.n_positions for window in fed] == [100] * 5


def test_random_weights_take_random_tokens_of_a_seed(run_json, fed, monkeypatch):
    monkeypatch.setitem(PRESETS, "20b", small_checkpoint().config)
    words = ["--random-weights", "20b", "--layers", 1, "--test", "reference-quant", "--window", 8]
    report = run_json(*words, model=None)
    assert (report["source"], report["model"]) == ("--streams random", "random 20b, 1 layers")
    ids = torch.randint(264, (41,), generator=torch.Generator().manual_seed(0)).tolist()
    assert [window.token_ids for window in fed] == [ids[start : start + 9] for start in range(0, 40, 8)]
    fed.clear()
    run_json(*words, "--streams", "greedy", model=None)
    assert fed[0].token_ids[0] == 0


# How it feeds


def made_up(vocab_size: int = 6, spoil: tuple[int, int] | None = None) -> OpenSide:
    """Make logits that depend on all tokens since reset(), with NaN at one position of one sequence."""
    history, sequence = [], [-1]

    def reset() -> None:
        history.clear()
        sequence[0] += 1

    def logits(token_ids: list[int], position: int) -> torch.Tensor:
        assert len(history) == position
        rows = []
        for token_id in token_ids:
            history.append(token_id)
            seed = sum((i + 1) * x for i, x in enumerate(history))
            rows.append(torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)))
            if (sequence[0], len(history) - 1) == spoil:
                rows[-1][2] = math.nan
        return torch.stack(rows)

    return OpenSide(reset, logits)


WINDOWS = [Window([1, 2, 3, 4, 5, 0], 3), Window([5, 4, 3]), Window([2, 2, 2, 1], 2)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_make_no_difference(chunk):
    """Earlier windows make no difference either: each starts anew."""
    whole = evaluate(made_up(), made_up(), WINDOWS, 100)
    results = evaluate(made_up(), made_up(), WINDOWS, chunk)
    assert [len(result.positions.kl) for result in results] == [2, 2, 1]
    assert [result.n_fed for result in results] == [5, 2, 3]
    for result, expected, window in zip(results, whole, WINDOWS):
        (alone,) = evaluate(made_up(), made_up(), [window], chunk)
        for values in zip(result.positions, expected.positions, alone.positions):
            assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("spoil", [(0, 0), (0, 4), (1, 1)])
def test_not_a_number_where_nothing_counts_is_seen_too(chunk, spoil):
    results = evaluate(made_up(), made_up(spoil=spoil), WINDOWS, chunk)
    assert [result.test_not_finite for result in results] == [int(number == spoil[0]) for number in range(3)]
    assert [result.ref_not_finite for result in results] == [0, 0, 0]
    counts = spoil[1] >= WINDOWS[spoil[0]].n_skipped
    assert any(result.positions.kl.isnan().any() for result in results) == counts


def test_targets_are_the_next_tokens():
    side = made_up()
    (result,) = evaluate(side, made_up(), WINDOWS[:1], 2)
    side.reset()
    log_p = side.logits([1, 2, 3, 4, 5], 0).double().log_softmax(-1)
    assert result.positions.ref_nll.tolist() == [-log_p[3, 5].item(), -log_p[4, 0].item()]


@pytest.mark.parametrize(
    ("words", "loads"),
    [(["--ref", "default"], 1), (["--ref", "reference"], 1), (["--ref", "default+fp8-head"], 2), ([], 2)],
)
def test_kernel_sides_of_one_checkpoint_share_its_weights(run, text, folder, monkeypatch, words, loads):
    calls, load = [], decoder.load_weights
    monkeypatch.setattr("host.decoder.load_weights", lambda *args: (calls.append(args), load(*args))[1])
    other = [] if words else ["--ref", "default", "--test-model", folder]
    assert run("--text", text, "--test", "quant", "--window", 1, "--max-windows", 4, *words, *other)[0] == 0
    assert len(calls) == loads


FP8_SIDES = ["reference-quant+fp8-head", "default+fp8-attn", "quant+fp8-attn+fp8-head+scale-32", "default+fp8-router"]


def test_sides_with_fp8():
    dense = Side.parse("quant+fp8-attn+fp8-head+scale-32").dense
    assert dense == DenseFormats(qkv="fp8-32", o="fp8-32", head="fp8-32")
    assert Side.parse("default+fp8-qkv+fp8-router").dense == DenseFormats(qkv="fp8-row", router="fp8-row")
    assert Side.parse("default").dense == DenseFormats()
    for text in ("default+fp8", "default+scale-32", "default+", "fp8-attn", "quant+fp8-attn+x", "+fp8-attn", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not one of the sides"):
            Side.parse(text)


@pytest.mark.parametrize("name", [*SIDE_NAMES, *FP8_SIDES])
def test_sides_are_what_their_names_say(checkpoint, name):
    side = Side.parse(name)
    opened = open_side(side, checkpoint, 16, CPU)
    quant = "quant" in name
    if "reference" in name:
        assert opened.weights is None
        reference = Reference(checkpoint, quant, torch.float32, max_context=16, dense=side.dense)
        expected = reference.forward(IDS[:5])
    else:
        model = gpt_oss_megakernel.MegaModel(checkpoint, quant, max_context=16, dense=side.dense)
        expected = torch.stack([model.logits(token_id, position) for position, token_id in enumerate(IDS[:5])])
    logits = torch.cat([opened.logits(IDS[:3], 0), opened.logits(IDS[3:5], 3)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    opened.reset()
    assert torch.equal(opened.logits(IDS[:3], 0), logits[:3])


# What it says


def test_the_table_holds_the_values_of_the_json(run, text, tmp_path):
    words = ["--text", text, "--test", "reference-quant", "--window", 60]
    code, out, err = run(*words, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"reference-quant against reference: {report['model']}"
    assert "4 windows, each from an empty cache; 240 tokens fed, 240 positions compared, 60 to 60 a window" in out
    assert "verdict" not in out
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert {len(row) for row in table} == {3}
    assert {line.count("|") for line in lines if line.startswith("|")} == {4}
    assert [row[0] for row in table[2:]] == [metric.key for metric in METRICS]
    for key, value, _ in table[2:]:
        number, _, rest = value.partition(" (")
        assert float(number) == pytest.approx(report["metrics"][key], rel=1e-5)
        if rest:
            ends = [float(word) for word in rest.removesuffix(")").split(" to ")]
            assert ends == pytest.approx([report[key]["low"], report[key]["high"]], rel=1e-5)


def test_json_has_everything(run_json, text, folder):
    report = run_json("--text", text, "--test", "reference-quant", "--window", 60, "--fail-under", "kl=9")
    assert list(report) == [
        "model", "test_model", "ref", "test", "source", "conditions", "positions_fed", "positions", "metrics",
        "confidence", "nll_difference", "ppl_ratio", "bins", "windows", "thresholds", "failures",
    ]  # fmt: skip
    assert report["model"] == report["test_model"] == f"{folder.name}, 2 layers"
    assert (report["ref"], report["test"], report["thresholds"]) == ("reference", "reference-quant", {"kl": 9})
    assert report["conditions"]["device"] == "cpu"
    assert sum(row["n"] for row in report["bins"]) == 240
    for row in report["windows"]:
        assert set(row) == {"positions", "ref_not_finite", "test_not_finite", *report["metrics"]}
    for key in ("kl", "cosine", "nll_difference"):
        mean = sum(row[key] for row in report["windows"]) / 4
        assert report["metrics"][key] == pytest.approx(mean, rel=1e-9)


def test_another_models_name_is_told(run, text, folder, checkpoint, tmp_path):
    write(checkpoint, tmp_path / "other")
    code, out, _ = run("--text", text, "--test", "reference", "--window", 60, "--test-model", tmp_path / "other")
    assert code == 0
    assert out.startswith(f"reference of other, 2 layers against reference: {folder.name}, 2 layers\n")


def test_layers_are_those_of_both_sides(run_json, text, checkpoint, folder, tmp_path):
    write(checkpoint, tmp_path / "other")
    words = ["--text", text, "--test", "reference", "--window", 60, "--layers", 1]
    report = run_json(*words, "--test-model", tmp_path / "other")
    assert report["model"] == f"{folder.name}, 1 layers"
    assert (report["test_model"], report["metrics"]["kl"]) == ("other, 1 layers", 0)


def test_progress_is_for_a_terminal(run, text, monkeypatch):
    words = ["--text", text, "--test", "reference", "--window", 60]
    assert run(*words)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, err = run(*words)
    assert code == 0
    assert "comparing: 100%" in err
    assert "240/240" in err


def plot_of(run, tmp_path, *words) -> None:
    pytest.importorskip("matplotlib")
    code, _, _ = run(*words, "--plot", tmp_path / "plot")
    assert code in (0, 1)
    assert (tmp_path / "plot").read_bytes().startswith(b"\x89PNG")


def test_plot(run, text, tmp_path):
    plot_of(run, tmp_path, "--text", text, "--test", "reference-quant", "--window", 60)


def test_plot_of_nothing_to_see(run, text, tmp_path):
    plot_of(run, tmp_path, "--text", text, "--test", "reference", "--window", 60)


def test_plot_of_windows_of_several_lengths(run, tmp_path, monkeypatch):
    monkeypatch.setattr(acc_eval, "shipped_streams", shorter_texts)
    plot_of(run, tmp_path, "--test", "reference-quant")


def test_what_the_plot_shows_of_each_position():
    windows = [torch.tensor(values).double() for values in ([1.0, 0.0], [2.0], [3.0, 4.0], [5.0, math.nan], [4.0, 6.0])]
    ranks = acc_eval.kl_by_position(windows)
    assert ranks[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert ranks[:, 1].tolist() == pytest.approx([1e-12, 2, 4, 5, 6])


def test_a_plot_without_matplotlib_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_rejected(run("--plot", tmp_path / "plot.png"), "--plot", "plot.png: matplotlib is not installed")


# What it refuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ref", "fp4"], "'fp4' is not one of the sides reference, reference-quant, default, quant"),
        (["--test", "default+fp8"], "'default+fp8' is not one of the sides"),
        (["--fail-under", "top2=1"], "'top2' is not one of top1, top1_confident, top5"),
        (["--fail-under", "top1"], "'top1' is not of the form KEY=VALUE"),
        (["--fail-under", "kl=nan"], "'kl=nan' is not of the form KEY=VALUE"),
        (["--fail-under", "kl=1e999"], "'kl=1e999' is not of the form KEY=VALUE"),
        (["--fail-under", "kl=1,,rms=1"], "'' is not one of"),
        (["--fail-under", "kl=1,kl=2"], "kl is there twice"),
        (["--streams", "mine"], "invalid choice: 'mine'"),
        (["--streams", "greedy", "--text", "a"], "not allowed with"),
        (["--prompt", "a"], "--prompt and --prompt-ids go with --streams greedy"),
        (["--streams", "random", "--prompt-ids", "1"], "--prompt and --prompt-ids go with --streams greedy"),
        (["--streams", "greedy", "--prompt", ""], "--prompt: the prompt is empty"),
        (["--streams", "greedy", "--prompt-ids", "264"], "token id 264 lies outside the vocabulary of 264"),
        (["--tokens", "99"], "--tokens goes with --streams greedy or random"),
        (["--streams", "random", "--tokens", "1023"], "--tokens 1023: 4 windows of 256 positions take 1024"),
        (["--streams", "greedy", "--tokens", "3", "--window", "1"], "--tokens 3: 4 windows of 1 positions take 4"),
        (["--max-windows", "3"], "--max-windows 3: 4 or more are needed"),
        (["--window", "0"], "'0' is not a positive integer"),
        (["--streams", "random", "--window", "131073"], "--window: 131073 positions are needed, the model takes 1 to"),
        (["--streams", "greedy", "--tokens", "131072"], "--tokens: 131310 positions are needed, the model takes 1 to"),
        (["--text", "no/such/file"], "no/such/file: No such file"),
        (["--text", "."], ".: is a directory"),
        (["--layers", "3"], "--layers 3: the model has layers 1 to 2"),
        (["--random-weights", "120b"], "not allowed with"),
        (["--test-model", "nowhere/at/all"], "nowhere/at/all"),
        (["--verify"], "--verify: "),
        (["--json", "nowhere/at/all.json"], "--json nowhere/at/all.json: there is no such folder"),
        (["--plot", "."], "--plot .: is there already, and not a regular file"),
        (["--quant"], "unrecognized arguments: --quant"),
    ],
)
def test_bad_input_is_one_line(run, words, message):
    assert_rejected(run(*words), message)


def test_a_text_too_short_for_its_windows(run, text, tmp_path):
    message = f"--text {text}: {len(IDS)} tokens make 1 windows of 256 positions, 4 are needed; give a smaller --window"
    assert_rejected(run("--text", text), message)
    (tmp_path / "empty").touch()
    assert_rejected(run("--text", tmp_path / "empty", "--window", 1), "0 tokens make 0 windows")


def test_greedy_windows_are_counted_before_any_work(run, monkeypatch):
    """The demo's prompt has 238 tokens, so that the third window of 90 skips 57."""
    monkeypatch.setattr(acc_eval, "open_side", None)
    message = (
        "--streams greedy: 598 tokens make 3 windows of 90 positions, 4 are needed; give a smaller --window or more"
    )
    assert_rejected(run("--streams", "greedy", "--window", 90, "--tokens", 360), message)


def test_a_text_that_is_not_utf8(run, tmp_path):
    (tmp_path / "text").write_bytes(b"caf\xe9 au lait")
    assert_rejected(run("--text", tmp_path / "text"), f"{tmp_path / 'text'}: not UTF-8 (byte 3)")


def test_a_text_needs_a_tokenizer(run, monkeypatch, text):
    monkeypatch.setitem(PRESETS, "20b", small_checkpoint().config)
    random = ["--random-weights", "20b"]
    assert_rejected(run(*random, "--text", text, model=None), "--text: this model has no tokenizer")
    assert_rejected(run(*random, "--streams", "shipped", model=None), "--streams shipped: this model has no tokenizer")


def test_a_vocabulary_with_other_words_than_the_model(run, checkpoint, text, tmp_path):
    write(smaller_vocabulary(checkpoint, 190), tmp_path / "m")
    assert_rejected(
        run("--text", text, "--test", "reference", "--window", 60, model=tmp_path / "m"), "token id 195 lies"
    )


def smaller_vocabulary(checkpoint: MemoryCheckpoint, vocab_size: int) -> MemoryCheckpoint:
    """Return the same model without its last tokens."""
    cut = checkpoint.with_tensors(lambda n, t: t[:vocab_size] if "embed" in n or "lm_head" in n else t)
    return cut.with_config(vocab_size=vocab_size, stop_ids=())


def test_models_of_different_vocabularies(run, checkpoint, text, tmp_path):
    write(smaller_vocabulary(checkpoint, 260), tmp_path / "other")
    message = f"--test-model {tmp_path / 'other'}: the vocabulary has 260 tokens, that of the reference 264"
    assert_rejected(run("--text", text, "--test-model", tmp_path / "other"), message)


def test_a_window_longer_than_the_other_model(run, checkpoint, text, tmp_path):
    write(checkpoint.with_config(max_position_embeddings=50), tmp_path / "other")
    words = ["--text", text, "--window", 60, "--test-model", tmp_path / "other"]
    assert_rejected(run(*words), "--window: 60 positions are needed, the model takes 1 to 50")


def test_an_interrupt_is_quiet(run, text, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(acc_eval, "evaluate", interrupted)
    assert run("--text", text, "--test", "reference", "--window", 60) == (130, "", "")


def test_the_exit_code_of_the_program(folder, text):
    words = ["--model", folder, "--text", text, "--test", "reference-quant", "--window", "60", "--fail-under", "kl=0"]
    done = subprocess.run(
        [sys.executable, ROOT / "acc_eval.py", *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("acc_eval: kl ")
    assert "| top1 |" in done.stdout


def test_an_unknown_side_is_a_usage_error():
    with pytest.raises(argparse.ArgumentTypeError, match="'' is not one of the sides"):
        Side.parse("")
