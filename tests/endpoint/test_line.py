"""Requests that come at once, clients that leave, and a server that ends."""

import contextlib
import http.client
import json
import threading
import time

import openai
import pytest
from prepared_model import JSON, SECONDS, PreparedModel, answer_ids, said, serving, until
from threads import together

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def long(tokenizer):
    """A model whose answers take 300 tokens."""
    model = PreparedModel(tokenizer)
    model.answers = [answer_ids(tokenizer, *said("one " * 300))[:300]]
    yield model
    model.may_go_on.set()


def ask(server, text: str = "Hello", **options) -> str:
    with server.client() as client:
        messages = [{"role": "user", "content": text}]
        found = client.chat.completions.create(model="prepared", messages=messages, **options)
        return found.choices[0].message.content


def refusals(results: list) -> list[openai.APIStatusError]:
    return [result for result in results if isinstance(result, openai.APIStatusError)]


def test_twenty_requests_at_once(model, server, tokenizer):
    texts = [f"question {n}" for n in range(20)]
    model.answers = [answer_ids(tokenizer, *said(f"answer {n}")) for n in range(20)]
    found = together(*(lambda text=text: ask(server, text) for text in texts))
    assert sorted(found) == sorted(f"answer {n}" for n in range(20))
    assert len(model.prompts) == 20


def test_requests_are_answered_in_the_order_in_which_they_came(model, server, tokenizer):
    model.may_go_on.clear()
    threads = []
    for n in range(5):
        threads.append(threading.Thread(target=ask, args=(server, f"question {n}"), daemon=True))
        threads[-1].start()
        until(lambda n=n: server.worker.n_jobs == n + 1)
    model.may_go_on.set()
    for thread in threads:
        thread.join(SECONDS)
    prompts = [tokenizer.decode(prompt) for prompt in model.prompts]
    assert [f"question {n}" in prompt for n, prompt in enumerate(prompts)] == [True] * 5


def test_a_full_line_refuses(long):
    long.may_go_on.clear()
    with serving(long, max_waiting=3) as server:
        threading.Timer(2, long.may_go_on.set).start()
        results = together(*(lambda: ask(server, max_tokens=4) for _ in range(20)))
        refused = refusals(results)
        assert len(refused) == 16
        for error in refused:
            assert (error.status_code, error.body["code"]) == (429, "queue_full")
            assert 1 <= int(error.response.headers["Retry-After"]) <= 60
        assert ask(server, max_tokens=4) is not None


def test_no_line_at_all(long):
    long.may_go_on.clear()
    with serving(long, max_waiting=0) as server:
        thread = threading.Thread(target=ask, args=(server,), daemon=True)
        thread.start()
        until(lambda: server.worker.n_jobs == 1)
        with pytest.raises(openai.RateLimitError):
            ask(server)
        long.may_go_on.set()
        thread.join(SECONDS)
        assert ask(server, max_tokens=4) is not None


def test_health_is_answered_while_the_model_is_busy(long):
    long.may_go_on.clear()
    with serving(long) as server:
        thread = threading.Thread(target=ask, args=(server,), daemon=True)
        thread.start()
        until(lambda: server.worker.n_jobs == 1)
        assert health(server) == (200, {"status": "ok"})
        long.may_go_on.set()
        thread.join(SECONDS)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model(stream, long):
    long.token_seconds = 0.05
    with serving(long) as server:
        connection = post(server, {"messages": HELLO, "stream": stream})
        if stream:
            response = connection.getresponse()
            response.read(10)
            response.close()
        until(lambda: long.n_tokens >= 8)
        connection.close()
        left_at = long.n_tokens
        until(lambda: server.worker.is_idle)
        assert long.n_tokens <= left_at + 3
        long.token_seconds = 0
        assert ask(server, max_tokens=4) is not None


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_prompt_is_fed_frees_the_model(stream, long):
    long.block_seconds = 0.05
    with serving(long) as server:
        connection = post(server, {"messages": [{"role": "user", "content": "a b c " * 120}], "stream": stream})
        until(lambda: long.n_blocks >= 3)
        connection.close()
        left_at = long.n_blocks
        until(lambda: server.worker.is_idle)
        assert long.n_blocks <= left_at + 3
        assert long.n_blocks < len(long.prompts[0]) // 10
        assert long.n_tokens == 0
        long.block_seconds = 0
        assert ask(server, max_tokens=4) is not None


def test_a_client_that_leaves_the_line_is_not_answered(long):
    long.may_go_on.clear()
    with serving(long, max_waiting=1) as server:
        first = threading.Thread(target=ask, args=(server,), daemon=True)
        first.start()
        until(lambda: server.worker.n_jobs == 1)
        waiting = post(server, {"messages": HELLO})
        until(lambda: server.worker.n_jobs == 2)
        waiting.close()
        until(lambda: server.worker.n_jobs == 1)  # its place is free at once
        long.may_go_on.set()
        first.join(SECONDS)
        assert len(long.prompts) == 1


def test_a_client_that_does_not_read_does_not_hold_the_model(long):
    with serving(long) as server:
        connection = post(server, {"messages": HELLO, "stream": True})
        until(lambda: server.worker.is_idle)
        assert ask(server, max_tokens=4) is not None
        connection.close()


def health(server) -> tuple[int, dict]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as connection:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status, json.load(response)


def post(server, body: dict) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
    return connection


def test_a_server_that_ends_lets_the_running_answer_finish(long):
    long.may_go_on.clear()
    with serving(long, drain_seconds=SECONDS) as server:
        results: dict[str, object] = {}
        threads = [in_background(results, name, server) for name in ("running", "waiting")]
        server.drain()
        until(lambda: server.worker.is_closed)
        with pytest.raises(openai.InternalServerError) as refused:
            ask(server)
        assert (refused.value.status_code, refused.value.body["code"]) == (503, "server_ending")
        assert health(server) == (503, {"status": "ending"})
        long.may_go_on.set()
        for thread in threads:
            thread.join(SECONDS)
        assert results["running"].startswith("one one")
        assert results["waiting"].status_code == 503


def in_background(results: dict, name: str, server) -> threading.Thread:
    """Ask in a thread, and return once the request is in line."""
    before = server.worker.n_jobs

    def call() -> None:
        try:
            results[name] = ask(server)
        except openai.APIStatusError as error:
            results[name] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    until(lambda: server.worker.n_jobs == before + 1)
    return thread


@pytest.mark.parametrize("n_signals, drain_seconds", [(1, 0), (1, 0.3), (2, SECONDS)])
def test_an_answer_that_takes_too_long_is_cut_when_the_server_ends(n_signals, drain_seconds, long):
    long.token_seconds = 0.1  # 30 seconds in all
    results: dict[str, object] = {}
    with serving(long, drain_seconds=drain_seconds) as server:
        thread = in_background(results, "cut", server)
        start = time.monotonic()
        for _ in range(n_signals):
            server.drain()
        thread.join(SECONDS)
    assert time.monotonic() - start < 5
    assert results["cut"].status_code == 503


def test_a_body_that_does_not_arrive_is_refused(long):
    with serving(long, body_seconds=0.2) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        connection.request("POST", "/v1/completions", b"{", JSON | {"Content-Length": "10"})
        response = connection.getresponse()
        assert response.status == 408 and "in time" in json.load(response)["error"]["message"]
        connection.close()
