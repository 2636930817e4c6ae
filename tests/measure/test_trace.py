"""measure/trace.py and host/phases.py: tables and traces of timestamps made by hand, and of an interpreted launch."""

import dataclasses
import itertools
import json
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import gpt_oss_megakernel
from command_line.options import DEFAULT_MODEL
from gpt_oss_megakernel import MegaModel
from host.phases import PHASE_NAMES, barrier_name, phases_of_token
from load_hf import open_checkpoint
from measure.trace import (
    DEFAULT_TRACE_TOKEN,
    HEADER,
    SLICES,
    Launch,
    Row,
    chrome_trace,
    gb_per_s_over_time,
    launch_of,
    table_rows,
    table_text,
    token_to_trace,
)
from measure.traffic import bytes_by_phase, bytes_per_token
from system.errors import InputError

START_NS = 7_000_000_000_000  # of the clock, which began long before the launch
FUNCTIONS = {
    "embedding": "embedding_phase",
    "QKV": "qkv_phase",
    "attention": "attention_phase",
    "O projection": "o_phase",
    "router": "router_phase",
    "gate-up": "gate_up_phase",
    "down": "down_phase",
    "LM head": "head_phase",
    "argmax": "argmax_phase",
}


def made_up_launch(columns: list[list[tuple[int, int]]], n_bytes: list[int], n_layers: int) -> Launch:
    """Make a launch from (entered, left) of each phase, in nanoseconds, a list for each program."""
    events = START_NS + np.array([[ns for phase in column for ns in phase] for column in columns], np.int64).T
    return Launch.from_events(events, n_layers, n_bytes)


@pytest.fixture(scope="module")
def launch() -> Launch:
    """A launch of two layers and two programs. A phase takes 100 ns, and program 1 enters 10 ns late.

    Program 0 works 40 ns in a phase, program 1 50 ns, 60 in QKV of layer 1; phase i reads 1000 + i bytes.
    """
    columns = []
    for program in (0, 1):
        column = []
        for i in range(15):
            first = 100 * i + 10 * program
            column.append((first, first + (60 if (program, i) == (1, 7) else 40 + 10 * program)))
        columns.append(column)
    return made_up_launch(columns, [1000 + i for i in range(15)], n_layers=2)


def test_the_names_of_a_launch():
    phases = phases_of_token(2)
    assert phases[:3] == [("embedding", None), ("QKV", 0), ("attention", 0)]
    assert phases[6:8] == [("down", 0), ("QKV", 1)]
    assert phases[-3:] == [("down", 1), ("LM head", None), ("argmax", None)]
    assert len(phases) == 15
    for barrier, (name, layer) in enumerate(phases[:-1], 1):
        place = f"the {name}" if layer is None else f"the {name} phase of layer {layer}"
        assert barrier_name(barrier, 2) == place


def test_rows_by_hand(launch):
    rows = {row.name: row for row in table_rows(launch)}
    assert list(rows) == [*PHASE_NAMES, "barriers", "total"]
    token_us = 1.46  # program 1 leaves the argmax, phase 14, at 1410 + 50

    def approx(*row) -> Row:
        return Row(*(pytest.approx(value) if isinstance(value, float) else value for value in row))

    # A span is 60 ns: program 0 enters, program 1 enters 10 later and works 50. QKV of layer 1: 70.
    assert rows["embedding"] == approx("embedding", 1, 0.06, 0.045, 0.05, 0.055, 0.06, 0.06 / token_us, 1000)
    # Waits: of program 0 from 140 to 200, of program 1 from 160 to 210; in layer 1 60 and 40.
    assert rows["QKV"] == approx("QKV", 2, 0.065, 0.0475, 0.06, 0.0525, 0.13, 0.13 / token_us, 1001 + 1007)
    assert rows["attention"] == approx("attention", 2, 0.06, 0.045, 0.05, 0.055, 0.12, 0.12 / token_us, 1002 + 1008)
    assert rows["argmax"] == approx("argmax", 1, 0.06, 0.045, 0.05, None, 0.06, 0.06 / token_us, 1014)
    # Each of 14 barriers: the last arrival at 60, the first leaving at 100; once at 70.
    assert rows["barriers"] == approx("barriers", 14, 0.04, None, None, None, 0.55, 0.55 / token_us, None)
    assert rows["total"] == approx("total", None, None, None, None, None, 1.46, 1.0, 15 * 1000 + 105)
    assert rows["embedding"].gb_per_s == pytest.approx(1000 / 60)
    assert rows["QKV"].gb_per_s == pytest.approx(2008 / 130)
    assert rows["total"].gb_per_s == pytest.approx(15105 / 1460)
    assert rows["barriers"].gb_per_s is None


def test_spans_and_gaps_make_the_token(launch):
    *parts, total = table_rows(launch)
    assert sum(row.total_us for row in parts) == pytest.approx(total.total_us)
    assert sum(row.share for row in parts) == pytest.approx(1.0)


def test_a_late_start_counts(launch):
    """The token's time begins with the start of the first program, whichever that is."""
    events = np.array([[1000, 500], *([2000, 2000] for _ in range(17))], np.int64)
    launch = Launch.from_events(events, 1, [0] * 9)
    assert table_rows(launch)[-1].total_us == 1.5
    assert table_rows(launch)[0].span_us == 1.5


def test_table_text(launch):
    launch = dataclasses.replace(launch, ns=1000 * launch.ns, n_bytes=[1000 * n for n in launch.n_bytes])
    lines = table_text(table_rows(launch)).splitlines()
    assert [word for name in HEADER for word in name.split()] == lines[0].split()
    table = lines[: 1 + len(PHASE_NAMES) + 2]
    assert len({len(line) for line in table}) == 1, "columns do not line up"
    assert table[2].split() == ["QKV", "2", "65.00", "47.50", "60.00", "52.50", "130.00", "8.9%", "2.008", "15.4"]
    assert table[9].split() == ["argmax", "1", "60.00", "45.00", "50.00", "-", "60.00", "4.1%", "1.014", "16.9"]
    assert table[10].split() == ["barriers", "14", "40.00", "-", "-", "-", "550.00", "37.7%", "-", "-"]
    assert table[11].split() == ["total", "-", "-", "-", "-", "-", "1460.00", "100.0%", "15.105", "10.3"]


def slices_of(trace: dict) -> dict[int, list[dict]]:
    """Return program -> its begin and end events, in the file's order."""
    programs = {}
    for event in trace["traceEvents"]:
        if event["ph"] in "BE":
            programs.setdefault(event["tid"], []).append(event)
    return programs


def assert_complete(trace: dict, n_layers: int, n_programs: int) -> None:
    """Assert that every program goes through all phases and barriers in order, without overlap, each begin ended."""
    expected = []
    for barrier, (name, layer) in enumerate(phases_of_token(n_layers), 1):
        at = {} if layer is None else {"layer": layer}
        expected += [(name, at), (f"barrier after {name}", {**at, "barrier": barrier})]
    del expected[-1]  # nothing follows the argmax
    programs = slices_of(trace)
    assert list(programs) == list(range(n_programs))
    for events in programs.values():
        begins, ends = events[0::2], events[1::2]
        assert {event["ph"] for event in begins} == {"B"}
        assert {event["ph"] for event in ends} == {"E"}
        assert [event["name"] for event in begins] == [event["name"] for event in ends]
        assert [(event["name"], event["args"]) for event in begins] == expected
        assert [event["ts"] for event in begins[1:]] == [event["ts"] for event in ends[:-1]]
        assert all(a["ts"] <= b["ts"] for a, b in itertools.pairwise(events))
        assert {event["pid"] for event in events} == {0}
    assert min(events[0]["ts"] for events in programs.values()) == 0


def test_chrome_trace_by_hand(launch):
    trace = json.loads(json.dumps(chrome_trace(launch, "a token")))
    assert_complete(trace, 2, 2)
    names = [(e["name"], e.get("tid"), e["args"]["name"]) for e in trace["traceEvents"] if e["ph"] == "M"]
    assert names == [
        ("process_name", None, "a token"),
        ("thread_name", 0, "program 0"),
        ("thread_name", 1, "program 1"),
    ]
    second = slices_of(trace)[1]
    assert [(e["name"], e["ts"]) for e in second[:4]] == [
        ("embedding", 0.01),
        ("embedding", 0.06),
        ("barrier after embedding", 0.06),
        ("barrier after embedding", 0.11),
    ]
    (router,) = (e for e in second if (e["name"], e["ph"]) == ("router", "B") and e["args"]["layer"] == 1)
    assert router["ts"] == 1.01

    counters = [e for e in trace["traceEvents"] if e["ph"] == "C"]
    assert [e["ts"] for e in counters] == pytest.approx([i * 0.073 for i in range(SLICES + 1)])
    assert counters[-1]["args"] == {"GB/s": 0.0}
    assert sum(e["args"]["GB/s"] * 73 for e in counters) == pytest.approx(sum(launch.n_bytes))


def test_bytes_over_time_by_hand():
    """Eight phases take no time, then one takes 100 ns: each slice of 50 ns has half of its 600 bytes."""
    columns = [[(0, 0)] * 7 + [(0, 100), (200, 200)]]
    launch = made_up_launch(columns, [10, 0, 0, 0, 0, 0, 0, 600, 40], n_layers=1)
    assert gb_per_s_over_time(launch, slices=4) == [310 / 50, 300 / 50, 0.0, 40 / 50]


def test_a_launch_of_no_time_is_still_in_order():
    launch = made_up_launch([[(0, 0)] * 9] * 2, [1] * 9, n_layers=1)
    assert_complete(chrome_trace(launch, ""), 1, 2)
    assert table_rows(launch)[-1].gb_per_s is None
    table_text(table_rows(launch))


def test_a_clock_that_is_set_back_stands_still():
    columns = [[(10 * i, 10 * i + 5) for i in range(9)]]
    columns[0][4] = (31, 32)  # entered before the phase ahead of it was left
    launch = made_up_launch(columns, [0] * 9, n_layers=1)
    assert_complete(chrome_trace(launch, ""), 1, 1)
    assert launch.ns[4, :, 0].tolist() == [35, 35]


def test_timestamps_that_are_not_all_there(launch):
    events = START_NS + launch.ns.reshape(30, 2)
    events[17, 1] = 0
    with pytest.raises(ValueError, match="not decoded"):
        Launch.from_events(events, 2, launch.n_bytes)
    with pytest.raises(ValueError, match="30 events"):
        Launch.from_events(events, 3, launch.n_bytes)


# Of an interpreted launch of the shipped model


def traced_model(n_programs: int, position: int) -> MegaModel:
    return MegaModel(open_checkpoint(DEFAULT_MODEL), max_context=16, num_programs=n_programs, trace_position=position)


def test_a_launch_of_the_shipped_model():
    model = traced_model(3, 4)
    with pytest.raises(ValueError, match="not decoded"):
        launch_of(model)
    token_ids = list(model.generate([1020, 5], 6))
    launch = launch_of(model)
    assert_complete(chrome_trace(launch, ""), model.config.n_layers, 3)
    assert launch.n_bytes == bytes_by_phase(model.config, 4)
    assert table_rows(launch)[-1].n_bytes == bytes_per_token(model.config, 4)
    assert table_rows(launch)[-1].total_us > 0
    untraced = MegaModel(open_checkpoint(DEFAULT_MODEL), max_context=16, num_programs=3)
    assert list(untraced.generate([1020, 5], 6)) == token_ids
    assert untraced.state.trace.shape == (0, 3)
    with pytest.raises(ValueError, match="0 events"):
        launch_of(untraced)


def test_each_phase_runs_between_its_begin_and_its_end(monkeypatch):
    """The phases' functions note when they are called, on the kernel's own clock."""
    model = traced_model(1, 3)
    calls = []

    def noting(name: str):
        function = getattr(gpt_oss_megakernel, FUNCTIONS[name])

        def call(*args, **kwargs):
            start = time.perf_counter_ns()
            result = function(*args, **kwargs)
            calls.append((name, start, time.perf_counter_ns()))
            return result

        return call

    for name in PHASE_NAMES:
        monkeypatch.setattr(gpt_oss_megakernel, FUNCTIONS[name], noting(name))
    for position in range(4):
        calls.clear()
        model.step(1020, position)
    events = model.state.trace[:, 0].tolist()
    phases = phases_of_token(model.config.n_layers)
    assert [name for name, _, _ in calls] == [phase.name for phase in phases]
    for i, (_, start, end) in enumerate(calls):
        assert events[2 * i] <= start <= end <= events[2 * i + 1]


# What --trace-token may ask for


def arguments(**changes) -> Namespace:
    defaults = dict(trace=Path("t.json"), trace_token=None, max_new_tokens=256, logits_out=None)
    return Namespace(**(defaults | changes))


@pytest.mark.parametrize(
    ("changes", "n_prompt", "expected"),
    [
        ({}, 5, DEFAULT_TRACE_TOKEN),
        ({"max_new_tokens": 7}, 5, 7),
        ({}, 90, 11),
        ({}, 100, 1),
        ({"trace_token": 1}, 5, 1),
        ({"trace_token": 96}, 5, 96),
        ({"trace_token": 7, "max_new_tokens": 7}, 5, 7),
        ({"trace": None}, 5, None),
    ],
)
def test_the_token_to_trace(changes, n_prompt, expected):
    assert token_to_trace(arguments(**changes), n_prompt, max_context=100) == expected


@pytest.mark.parametrize(
    ("changes", "culprits"),
    [
        ({"trace_token": 8, "max_new_tokens": 7}, "--trace-token 8: --max-new-tokens is 7"),
        ({"trace_token": 97}, "--trace-token 97: a context of 100 ends 96 tokens after the prompt"),
        ({"trace_token": 3, "trace": None}, "--trace-token 3: without --trace"),
        ({"logits_out": Path("t.json")}, "--trace t.json: is --logits-out's file"),
        ({"logits_out": Path("../") / Path.cwd().name / "t.json"}, "--trace t.json: is --logits-out's file"),
    ],
)
def test_a_token_that_cannot_be_traced(changes, culprits):
    with pytest.raises(InputError, match=culprits):
        token_to_trace(arguments(**changes), 5, max_context=100)
