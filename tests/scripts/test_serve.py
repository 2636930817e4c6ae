"""serve.py as a process of its own, with the shipped model on the CPU interpreter."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from shipped import SONNET_18_START, SONNET_73_START
from small_model import assert_rejected, run_script
from threads import together

import serve
from checkpoints.harmony import chat_ids
from command_line.options import DEFAULT_MODEL
from command_line.parser import ArgumentParser
from command_line.scripts import add_server_arguments
from tokenizer_util import Tokenizer

ROOT = Path(__file__).parents[2]
SECONDS = 120  # that anything may take on a loaded machine
QUESTION = "Recite sonnet 18."
REASONING = "The user asks for sonnet 18."


@dataclass
class Process:
    """serve.py, and what it has printed when it is ready."""

    popen: subprocess.Popen
    line: str

    @property
    def port(self) -> int:
        return int(re.search(r":(\d+)/v1", self.line)[1])

    def client(self) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS)

    def ask(self, text: str = QUESTION, **options):
        """Return an answer, or the list of its chunks."""
        with self.client() as client:
            found = chat(client, text, **options)
            return list(found) if options.get("stream") else found


def chat(client: openai.OpenAI, text: str = QUESTION, **options):
    options = {"temperature": 0} | options
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="sonnets", messages=messages, **options)


@contextlib.contextmanager
def process(*words: str) -> Iterator[Process]:
    """Run serve.py in the body, from when it is ready."""
    command = [sys.executable, "serve.py", "--quant", "--port", "0", *words]
    popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield Process(popen, popen.stdout.readline())
    finally:
        popen.kill()
        popen.communicate(timeout=SECONDS)


@pytest.fixture(scope="module")
def served():
    with process() as found:
        yield found


def test_it_says_where_it_is_and_listens_there_alone(served):
    assert re.fullmatch(r"ready: http://127\.0\.0\.1:\d+/v1 serves sonnets\n", served.line)
    with socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS):
        pass
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", served.port), timeout=SECONDS)
    with socket.socket() as other:
        other.bind(("127.0.0.2", served.port))  # not taken, as it would be if the server listened everywhere


def test_an_answer_whole_and_streamed(served):
    """The second request finds all of the first one's prompt in the cache."""
    whole = served.ask(max_tokens=32)
    message, usage = whole.choices[0].message, whole.usage
    assert (message.reasoning_content, message.content) == (REASONING, SONNET_18_START[: len(message.content)])
    assert len(message.content) > 20
    assert whole.choices[0].finish_reason == "length"
    assert usage.prompt_tokens == len(chat_ids(Tokenizer.from_folder(DEFAULT_MODEL), QUESTION))
    assert usage.completion_tokens == 32
    *chunks, last = served.ask(max_tokens=32, stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == REASONING
    assert (last.usage.completion_tokens, last.usage.prompt_tokens) == (32, usage.prompt_tokens)
    assert last.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_a_further_turn_feeds_only_what_is_new(served):
    first = served.ask(max_tokens=14)
    with served.client() as client:
        messages = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Do."},
        ]
        second = client.chat.completions.create(model="sonnets", messages=messages, max_tokens=1)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens <= cached < second.usage.prompt_tokens - 3


def test_a_second_turn_at_another_effort(served):
    with served.client() as client:
        messages = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": SONNET_18_START},
            {"role": "user", "content": "Recite sonnet 73."},
        ]
        answer = client.chat.completions.create(
            model="sonnets", messages=messages, max_tokens=36, temperature=0, reasoning_effort="high"
        )
    message = answer.choices[0].message
    assert message.reasoning_content == "The user asks for sonnet 73."
    assert "\n" in message.content
    assert message.content == SONNET_73_START[: len(message.content)]


def test_equal_seeds_give_equal_answers(served):
    def draw(seed: int, **options) -> str:
        with served.client() as client:
            options = {"temperature": 1.5, "max_tokens": 6} | options
            return client.completions.create(model="sonnets", prompt="Shall I", seed=seed, **options).choices[0].text

    assert draw(7) == draw(7) != draw(8)
    assert draw(7, top_p=0.9) == draw(7, top_p=0.9)


def test_a_stop_string(served):
    found = served.ask(max_tokens=40, stop=" compare")
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("Shall I", "stop")


def test_twenty_requests_at_once(served):
    found = together(*(lambda: served.ask(max_tokens=2) for _ in range(20)))
    assert [answer.usage.completion_tokens for answer in found] == [2] * 20


def test_a_client_that_leaves_frees_the_model(served):
    """The whole sonnet would take a quarter of a minute."""
    with served.client() as client:
        stream = chat(client, stream=True)
        next(iter(stream))
        stream.close()
    start = time.monotonic()
    assert served.ask(max_tokens=2).usage.completion_tokens == 2
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_running_answer_finish(number, code):
    with process("--max-context", "200", "--max-queue", "0") as served:
        results: list = []
        asking = threading.Thread(target=lambda: results.append(served.ask(max_tokens=25)), daemon=True)
        asking.start()
        refused = None
        while refused is None:  # until the first request is being answered
            with contextlib.suppress(openai.RateLimitError):
                time.sleep(0.2)
                refused = _refusal(served)
        served.popen.send_signal(number)
        asking.join(SECONDS)
        assert results[0].usage.completion_tokens == 25
        assert served.popen.wait(SECONDS) == code
        assert served.popen.stderr.read() == ""


def _refusal(served: Process) -> str | None:
    """Return the code of a request's refusal, if it is refused because the model is busy."""
    try:
        served.ask("a", max_tokens=1)
    except openai.RateLimitError as error:
        return error.body["code"]
    return None


@pytest.mark.parametrize(
    "words, culprit",
    [
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port 8000: "),
        (["--host", "203.0.113.7"], "--host 203.0.113.7 --port 8000: Cannot assign requested address"),
        (["--port", "65536"], "--port"),
        (["--api-key", ""], "--api-key: expected printable ASCII"),
        (["--api-key", "a b"], "--api-key: expected printable ASCII"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--date", "June"], "date 'June': expected YYYY-MM-DD"),
        (["--port", "0", "--random-weights", "20b", "--layers", 1], "has no tokenizer, and cannot be served"),
        (["--port", "0", "--model", "/nothing.iris"], "/nothing.iris"),
    ],
)
def test_bad_input_is_one_line(words, culprit, monkeypatch, capsys):
    assert_rejected(run_script(serve.main, words, monkeypatch, capsys), culprit)


def test_a_port_that_is_taken_is_one_line(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_script(serve.main, ["--port", port], monkeypatch, capsys)
    assert_rejected(result, f"--host 127.0.0.1 --port {port}: Address already in use")


def test_the_key_of_the_environment(monkeypatch):
    parser = ArgumentParser()
    add_server_arguments(parser)
    assert serve.api_key_of(parser.parse_args([])) is None
    monkeypatch.setenv(serve.KEY_VARIABLE, "secret")
    assert serve.api_key_of(parser.parse_args([])) == "secret"
    assert serve.api_key_of(parser.parse_args(["--api-key", "other"])) == "other"
    monkeypatch.setenv(serve.KEY_VARIABLE, "")
    with pytest.raises(serve.InputError, match=serve.KEY_VARIABLE):
        serve.api_key_of(parser.parse_args([]))


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "pydantic"])
def test_a_missing_package_is_one_line(package, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{package}'\")\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "serve.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert package in done.stderr and done.stderr.endswith("-m pip install -r requirements-serve.txt\n")
