"""measure.conditions: what a report says about the machine, also where little is known about it."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
import triton

from measure import conditions
from measure.conditions import GPU_FIELDS, gpu_fields, parse_gpu_fields

REPLY = "575.57.08, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 700.00 W\n"


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))


def test_a_cpu_has_no_clocks():
    assert conditions.conditions(torch.device("cpu")) == {
        "device": "cpu",
        "multiprocessors": None,
        "clocks": None,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def test_each_field_gets_its_value(fake_gpu, monkeypatch):
    def run(command, **_):
        assert command[-2:] == ["-i", "GPU-1234"]
        return SimpleNamespace(stdout=REPLY)

    monkeypatch.setattr(subprocess, "run", run)
    fields = gpu_fields(torch.device("cuda"))
    assert list(fields) == list(GPU_FIELDS)
    assert (fields["driver_version"], fields["clocks.mem"]) == ("575.57.08", "3201 MHz")


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.CalledProcessError(6, "nvidia-smi")])
def test_without_nvidia_smi_the_clocks_are_not_known(fake_gpu, monkeypatch, error):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_fields(torch.device("cuda")) is None


@pytest.mark.parametrize("reply", ["", "No devices were found", REPLY * 2])
def test_an_answer_of_another_form_is_not_taken(reply):
    assert parse_gpu_fields(reply) is None


def test_lines_of_a_gpu_s_conditions():
    found = {"device": "GPU 9", "multiprocessors": 7, "clocks": {"a": "1 MHz", "b": "2 W"}, "torch": "2", "triton": "3"}
    assert conditions.device_line(found, 14) == "- GPU 9, 7 multiprocessors; programs: 14; torch 2, triton 3"
    assert conditions.state_line(found) == "- right after the runs: a 1 MHz, b 2 W"
    assert conditions.state_line(found | {"clocks": None}) == "- right after the runs: clocks not known"
    assert conditions.axis_label("ms", found) == "ms"


def test_lines_of_a_cpu_s_conditions_make_no_claim():
    found = conditions.conditions(torch.device("cpu"))
    assert conditions.device_line(found, 3).startswith("- cpu; programs: 3; torch ")
    assert "No claim." in conditions.state_line(found)
    assert conditions.axis_label("ms", found) == "ms (CPU interpreter, no claim)"
