"""Thousands of malformed requests: none is answered by a server's error, and nothing grows.

MALFORMED_REQUESTS=10000 sets another number than the default.
"""

import http.client
import json
import os
import random
import socket

import pytest
from prepared_model import JSON, SECONDS

N_REQUESTS = int(os.environ.get("MALFORMED_REQUESTS", "2000"))
SEED = 20
MAX_MORE_BYTES = 20 << 20

GOOD = {
    "model": "prepared",
    "messages": [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "reasoning_content": "c",
            "tool_calls": [{"id": "i", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "i", "content": "d"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "g",
                "parameters": {
                    "type": "object",
                    "properties": {"h": {"type": "string", "enum": ["i"]}, "j": {"oneOf": [{"type": "integer"}]}},
                    "required": ["h"],
                },
            },
        }
    ],
    "tool_choice": "auto",
    "stream": False,
    "stream_options": {"include_usage": True},
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "seed": 4,
    "stop": ["k"],
    "n": 1,
    "reasoning_effort": "low",
}
GOOD_COMPLETION = {"model": "prepared", "prompt": [[1, 2, 3]], "max_tokens": 3, "stop": "a", "temperature": 0.5}
VALUES = [None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.5]
VALUES += ["", "a", "<|end|>", "\x00", "\u2028", "😀" * 50, "a" * 5000]
VALUES += [[], {}, [[]], [{}], [None], {"a": 1}, [1, "a"], [0] * 2000, {"type": {"a": 1}}, {"type": ["object", 3]}]


def paths(value, path=()):
    """Yield the path of each value in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def mutated(value, rng: random.Random):
    """Return a JSON value in which one value is replaced, removed, doubled or renamed."""
    value = json.loads(json.dumps(value))
    *path, last = rng.choice([path for path in paths(value) if path])
    parent = value
    for key in path:
        parent = parent[key]
    kind = rng.choice(("replace", "replace", "remove", "nest", "rename"))
    if kind == "remove":
        del parent[last]
    elif kind == "nest":
        parent[last] = [parent[last]] * rng.choice((1, 2, 100))
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice(("", "type", "role", "x" * 300))] = parent.pop(last)
    else:
        parent[last] = rng.choice(VALUES)
    return value


def body_of(rng: random.Random, good) -> bytes:
    """Return a request's body with a few mutations, of its values or of its bytes."""
    value = good
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = mutated(value, rng) or good
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
    kind = rng.randrange(12)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        at = rng.randrange(len(data))
        data = data[:at] + rng.randbytes(rng.randrange(1, 5)) + data[at + 1 :]
    elif kind == 2:
        data = data.replace(b'"a"', rng.choice((b'"\\ud800"', b'"\xff"', b"NaN", b"-Infinity", b"9" * 5000, b"'a'")))
    elif kind == 3:
        depth = rng.choice((50, 150, 300, 5000))
        data = data.replace(b'"a"', rng.choice((b'{"items":', b"[")) * depth, 1)
    elif kind == 4:
        depth = rng.choice((30, 60, 90))
        deep = b'{"type":"object","properties":{"a":' * depth + b"{}" + b"}}" * depth
        data = data.replace(b'{"type": "integer"}', deep)
    elif kind == 5:
        data = rng.choice((b"", b"null", b"[]", b"{}", b'"a"', b"\x00", rng.randbytes(40)))
    return data


def memory() -> int:
    """Return the bytes that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_malformed_bodies(model, server):
    rng = random.Random(SEED)
    model.answers = [model.tokenizer.encode_plain("a b c d")]
    statuses: dict[int, int] = {}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    before = None
    for n in range(N_REQUESTS):
        is_chat = rng.random() < 0.75
        body = body_of(rng, GOOD if is_chat else GOOD_COMPLETION)
        connection.request("POST", "/v1/chat/completions" if is_chat else "/v1/completions", body, JSON)
        response = connection.getresponse()
        data = response.read()
        statuses[response.status] = statuses.get(response.status, 0) + 1
        assert response.status in (200, 400, 404, 413), (n, body[:2000], data)
        if response.status != 200:
            assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}, (n, data)
        model.prompts.clear()
        model.samplings.clear()
        if n == N_REQUESTS // 4:
            before = memory(), n_descriptors()
    assert n_descriptors() <= before[1] + 2
    assert memory() <= before[0] + MAX_MORE_BYTES
    assert statuses[400] > N_REQUESTS / 4 and statuses[200] > N_REQUESTS / 20
    connection.close()


@pytest.mark.parametrize("n_requests", [300])
def test_malformed_connections(n_requests, model, server, client):
    """What is not HTTP, or ends too early, costs nothing that stays."""
    rng = random.Random(SEED)
    before = n_descriptors()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    for _ in range(n_requests):
        data = rng.choice(
            (
                rng.randbytes(rng.randrange(200)),
                head % 500 + b'{"messages": [',
                head % 10**30,
                head.replace(b"%d", rng.choice((b"-1", b"a", b"1, 2"))),
                b"GET /" + rng.randbytes(50).replace(b"\n", b"") + b" HTTP/1.1\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                b"GET /%ff%fe/%00?%ff HTTP/1.1\r\nHost: a\r\n\r\n",
            )
        )
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            status = connection.recv(1 << 16).partition(b" ")[2][:3]
        assert status in (b"", b"400", b"404", b"413", b"499"), (data, status)
    messages = [{"role": "user", "content": "a"}]
    assert client.chat.completions.create(model="prepared", messages=messages).choices[0].message.content == "a b c"
    assert n_descriptors() <= before + 5
