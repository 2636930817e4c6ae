"""Arguments of the public Python functions: integers of any kind are accepted, others are one error that names them."""

import numpy as np
import pytest
import torch
from made_up_models import loud_checkpoint, small_config

from gpt_oss_megakernel import MegaModel
from reference import Reference
from system.arguments import integer, integers
from system.errors import InputError

F32 = torch.float32
INTEGERS = [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor(5, dtype=torch.uint8)]
NO_INTEGERS = [
    *(1.5, 5.0, "5", b"5", None, True, False, np.True_, np.float32(5), np.array([5]), np.array(5.0), np.array(True)),
    *(
        torch.tensor(5.0),
        torch.tensor([5]),
        torch.tensor([[5]]),
        torch.tensor(True),
        [5],
        (),
        {},
        object(),
        5j,
        float("nan"),
    ),
]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_an_integer_of_any_kind(value):
    assert integer(value, "n") == 5
    assert type(integer(value, "n")) is int


@pytest.mark.parametrize("value", NO_INTEGERS, ids=map(repr, range(len(NO_INTEGERS))))
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match="^n must be an integer, not "):
        integer(value, "n")


@pytest.mark.parametrize("values", [[1, 2], (1, 2), iter([1, 2]), range(1, 3), np.array([1, 2]), torch.tensor([1, 2])])
def test_sequences_of_integers(values):
    assert integers(values, "ids") == [1, 2]


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ("12", r"ids must be a sequence of integers, not str '12'"),
        (b"12", "ids must be a sequence"),
        ({1: 2}, "ids must be a sequence of integers, not dict"),
        ({1, 2}, "ids must be a sequence"),
        (5, "ids must be a sequence"),
        (None, "ids must be a sequence"),
        (torch.tensor(5), "ids must be a sequence"),
        (torch.tensor([[1, 2]]), r"ids\[0\] must be an integer, not Tensor of shape \(2,\)"),
        (torch.tensor([[1], [2]]), r"ids\[0\] must be an integer"),
        (np.array([[1], [2]]), r"ids\[0\] must be an integer"),
        (torch.tensor([1.0]), r"ids\[0\] must be an integer"),
        ([1, None], r"ids\[1\] must be an integer, not NoneType"),
        ([1, "2"], r"ids\[1\] must be"),
        ([True], r"ids\[0\] must be"),
    ],
)
def test_what_is_no_sequence_of_integers(values, culprit):
    with pytest.raises(TypeError, match=culprit):
        integers(values, "ids")


@pytest.fixture(scope="module")
def checkpoint():
    return loud_checkpoint(small_config(n_layers=1, layer_is_sliding=(True,), stop_ids=()))


@pytest.fixture(scope="module")
def model(checkpoint):
    return MegaModel(checkpoint, max_context=8, kv_dtype=F32)


def test_a_model_takes_integers_of_any_kind(model):
    expected = model.step(5, 0)
    assert model.step(torch.tensor(5), np.int64(0)) == expected
    assert torch.equal(model.logits(np.uint8(5), torch.tensor(0)), model.logits(5, 0))
    assert torch.equal(model.hidden(5, 0, np.int32(1)), model.hidden(5, 0, 1))
    assert list(model.generate([np.int64(5)], torch.tensor(2))) == list(model.generate([5], 2))
    assert list(model.decode(torch.tensor(5), np.int64(0), np.int64(2))) == list(model.decode(5, 0, 2))


CALLS = {
    "token_id": lambda m: m.step(1.5, 0),
    "position": lambda m: m.step(5, 1.5),
    "position ": lambda m: m.step(5, "0"),
    "position  ": lambda m: m.logits(5, True),
    "token_id ": lambda m: m.logits(True, 0),
    "n_layers": lambda m: m.hidden(5, 0, None),
    "prompt_ids": lambda m: m.generate("Hi", 3),
    r"prompt_ids\[0\]": lambda m: m.generate(torch.tensor([[1, 2]]), 3),
    "max_new_tokens": lambda m: m.generate([5], None),
    "max_new_tokens ": lambda m: m.generate([5], 2.0),
    "max_new_tokens  ": lambda m: m.generate([5], True),
    "on_logits": lambda m: m.generate([5], 2, 7),
    "n_tokens": lambda m: m.decode(5, 0, None),
    "on_launch": lambda m: m.decode(5, 0, 1, "launch"),
    "quant": lambda m: m.switch_path("yes"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_names_the_argument_of_the_wrong_kind(name, model):
    """A generator function fails when it is called, not at its first token."""
    with pytest.raises(TypeError, match=f"^{name.strip()} must be "):
        CALLS[name](model)


OUT_OF_RANGE = {
    "max_new_tokens -1": lambda m: m.generate([5], -1),
    "n_tokens -1": lambda m: m.decode(5, 0, -1),
    "token id 160 ": lambda m: m.generate([5, 160], 1),
    "token id -1 ": lambda m: m.decode(-1, 0, 1),
    "positions 0 to 8": lambda m: m.generate([5] * 9, 1),
    "positions 8 to 8": lambda m: m.decode(5, 8, 1),
    "positions 10000000000000000000000 ": lambda m: m.step(5, 10**22),
    "n_layers 2": lambda m: m.hidden(5, 0, 2),
}


@pytest.mark.parametrize("culprit", OUT_OF_RANGE)
def test_a_call_names_what_is_out_of_range(culprit, model):
    with pytest.raises(InputError, match=culprit):
        OUT_OF_RANGE[culprit](model)


OPTIONS = [
    (dict(max_context=1.5), TypeError, "max_context must be an integer, not float 1.5"),
    (dict(max_context="8"), TypeError, "max_context"),
    (dict(max_context=True), TypeError, "max_context"),
    (dict(num_programs=True), TypeError, "num_programs"),
    (dict(num_programs=2.0), TypeError, "num_programs"),
    (dict(quant="yes"), TypeError, "quant must be True or False, not str 'yes'"),
    (dict(quant=1), TypeError, "quant"),
    (dict(quant=None), TypeError, "quant"),
    (dict(kv_dtype=torch.int8), InputError, "kv_dtype torch.int8: one of torch.bfloat16, torch.float32"),
    (dict(kv_dtype=torch.float16), InputError, "kv_dtype"),
    (dict(kv_dtype=None), InputError, "kv_dtype"),
    (dict(kv_dtype="float32"), InputError, "kv_dtype"),
    (dict(device="tpu"), InputError, "device tpu"),
    (dict(device=""), InputError, "device "),
    (dict(device=1.5), TypeError, "device"),
    (dict(device=0), TypeError, "device"),
    (dict(trace_position="3"), TypeError, "trace_position"),
    (dict(trace_position=-1), InputError, "trace_position -1"),
    (dict(max_context=8, trace_position=8), InputError, "trace_position 8: the context has 8 positions"),
    (dict(tuning="fast"), TypeError, "tuning"),
    (dict(blocks=4), TypeError, "blocks"),
    (dict(dense="fp8-row"), TypeError, "dense"),
    (dict(weights={}), TypeError, "weights"),
    (dict(show_progress="no"), TypeError, "show_progress"),
]


@pytest.mark.parametrize(
    ("options", "error", "culprit"), OPTIONS, ids=[f"{n}: {o}" for n, (o, *_) in enumerate(OPTIONS)]
)
def test_options_of_a_model(options, error, culprit, checkpoint):
    with pytest.raises(error, match=culprit):
        MegaModel(checkpoint, **options)


def test_a_path_is_no_checkpoint():
    for make in (MegaModel, Reference):
        with pytest.raises(TypeError, match="checkpoint must be an open one, not str"):
            make("models/sonnets")


@pytest.mark.parametrize(
    ("options", "error", "culprit"),
    [
        (dict(max_context=1.5), TypeError, "max_context"),
        (dict(max_context=0), InputError, "max_context 0: at least 1"),
        (dict(n_layers="1"), TypeError, "n_layers"),
        (dict(quant="yes"), TypeError, "quant"),
        (dict(kv_dtype=torch.int8), InputError, "kv_dtype"),
        (dict(dtype="float32"), TypeError, "dtype"),
        (dict(device=1.5), TypeError, "device"),
    ],
)
def test_options_of_the_reference(options, error, culprit, checkpoint):
    with pytest.raises(error, match=culprit):
        Reference(checkpoint, **options)


@pytest.mark.parametrize(
    ("call", "error", "culprit"),
    [
        (lambda r: r.forward([1.5]), TypeError, r"token_ids\[0\]"),
        (lambda r: r.forward([5], None), TypeError, "position"),
        (lambda r: r.forward([-1]), InputError, "token id -1"),
        (lambda r: r.forward([5, "5"]), TypeError, r"token_ids\[1\]"),
        (lambda r: r.generate([5], None), TypeError, "max_new_tokens"),
        (lambda r: r.generate([5], -1), InputError, "max_new_tokens -1"),
        (lambda r: r.generate([], 1), InputError, "the prompt is empty"),
        (lambda r: r.generate([5], 1, 7), TypeError, "on_logits"),
    ],
)
def test_calls_of_the_reference(call, error, culprit, checkpoint):
    with pytest.raises(error, match=culprit):
        call(Reference(checkpoint, max_context=8))
