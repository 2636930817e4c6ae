"""The life of a model: what abnormal ends, overtaken generators and threads leave behind.

Expected tokens are those of the reference, which knows nothing of launches.
"""

import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from made_up_models import loud_checkpoint, small_config
from threads import LIMIT, together
from tunings import small_tiles

from common.barrier import ARRIVALS, EXITS
from gpt_oss_megakernel import MegaModel
from interpreter import GridDeadlock, simulate
from interpreter.scheduler import Grid
from kernels import PhasedModel
from reference import Reference
from system.errors import GenerationOvertaken, InputError, LogitsNotFinite, ModelInUse, PositionsLost

F32 = torch.float32
CONTEXT, PROGRAMS, N = 16, 3, 3
PROMPT = [5, 6, 7, 8, 9]
OTHER = [100, 101, 102]


@pytest.fixture(scope="module")
def checkpoint():
    return loud_checkpoint(small_config(n_layers=1, layer_is_sliding=(False,), stop_ids=()))


@pytest.fixture(scope="module")
def two_layers():
    """A model of two layers, so that a prompt's block has all launches."""
    return loud_checkpoint(small_config(n_layers=2, layer_is_sliding=(True, False), stop_ids=()))


def make_model(checkpoint, kind: type[MegaModel] = MegaModel, **options) -> MegaModel:
    return kind(checkpoint, max_context=CONTEXT, num_programs=PROGRAMS, kv_dtype=F32, **options)


@pytest.fixture(scope="module")
def shared_model(checkpoint):
    return make_model(checkpoint)


@pytest.fixture
def model(shared_model):
    shared_model.reset()
    return shared_model


def answers_of(checkpoint) -> Callable[[list[int], int], list[int]]:
    reference = Reference(checkpoint, kv_dtype=F32, max_context=CONTEXT)

    @functools.cache
    def answer(prompt: tuple[int, ...], n: int) -> list[int]:
        return list(reference.generate(prompt, n))

    return lambda prompt, n: answer(tuple(prompt), n)


@pytest.fixture(scope="module")
def expected(checkpoint) -> Callable[[list[int], int], list[int]]:
    return answers_of(checkpoint)


class Raised(BaseException):
    """An exception that only these tests raise."""


@pytest.fixture
def end_at(monkeypatch) -> Iterator[Callable[[int, Callable[[], None]], list[int]]]:
    """Call a function at the nth switch between programs from now on; return the switches so far."""

    def arm(n: int, act: Callable[[], None]) -> list[int]:
        switches, stock = [0], Grid.switch

        def switch(grid):
            switches[0] += 1
            if switches[0] == n:
                act()
            stock(grid)

        monkeypatch.setattr(Grid, "switch", switch)
        return switches

    yield arm


def raise_it() -> None:
    raise Raised


@pytest.fixture
def handlers():
    numbers = (signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGUSR1, lambda *_: raise_it())
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) is not None
        signal.signal(number, handler)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("at", [1, 40, 77, 118])
@pytest.mark.parametrize(
    ("act", "error"),
    [(send(signal.SIGINT), KeyboardInterrupt), (send(signal.SIGUSR1), Raised), (raise_it, Raised)],
    ids=["Ctrl-C", "a signal", "a program"],
)
def test_a_launch_that_is_interrupted_leaves_nothing(act, error, at, model, expected, end_at, monkeypatch):
    """Ctrl-C, another signal's handler or an exception of a program ends the launch, in an answer's second token."""
    tokens = model.generate(PROMPT, N)
    next(tokens)
    end_at(at, act)
    with pytest.raises(error):
        next(tokens)
    monkeypatch.undo()
    assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)
    assert not model.state.sync.any()
    assert list(model.generate(OTHER, N)) == expected(OTHER, N)


def test_interrupted_launches_leave_arrivals(model, end_at):
    """Without leftover arrivals the test above would show nothing."""
    end_at(40, raise_it)
    with pytest.raises(Raised):
        model.step(5, 0)
    assert model.state.sync[ARRIVALS.value] > 0 or model.state.sync[EXITS.value] > 0


def test_a_prompt_that_is_interrupted_leaves_nothing(two_layers, monkeypatch):
    """The interrupt comes between two launches of a block: no exception is lost, and no position counted."""
    model, expected = make_model(two_layers), answers_of(two_layers)
    for ended in ("_dense", "_experts"):
        with monkeypatch.context() as patch:
            patch.setattr(type(model.prefill), ended, lambda *_, **__: raise_it())
            with pytest.raises(Raised):
                next(model.generate(PROMPT, N))
        assert model.n_fed == 0
        with pytest.raises(PositionsLost, match="position 2: .* from 0 on"):
            model.step(7, 2)
        assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)
        model.reset()


def test_a_deadlock_leaves_nothing(model, expected):
    with simulate(deadlock_limit=1), pytest.raises(GridDeadlock):
        for position in range(CONTEXT):
            model.step(5, position)
    assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)


@pytest.mark.parametrize("call", ["step", "logits", "hidden", "decode"])
def test_a_position_behind_a_lost_one_is_refused(call, model, expected, end_at, monkeypatch):
    """A position behind a lost one is refused until the lost one is fed again; those before it are kept."""
    for position, token_id in enumerate(PROMPT[:2]):
        model.step(token_id, position)
    end_at(50, raise_it)
    with pytest.raises(Raised):
        model.step(PROMPT[2], 2)
    monkeypatch.undo()

    def feed(token_id, position):
        if call == "decode":
            return list(model.decode(token_id, position, 1))
        return getattr(model, call)(token_id, position, *[1] * (call == "hidden"))

    for position in (3, 4):
        with pytest.raises(PositionsLost, match=f"position {position}: an interrupted call lost those from 2 on"):
            feed(PROMPT[position], position)
    feed(PROMPT[2], 2)
    model.step(PROMPT[2], 2)
    model.step(PROMPT[3], 3)
    assert model.step(PROMPT[4], 4) == expected(PROMPT, 1)[0]
    end_at(50, raise_it)
    with pytest.raises(Raised):
        model.step(7, 9)
    monkeypatch.undo()
    model.reset()
    model.step(7, 9)  # behind a gap, which holds zeros again


def test_phases_that_are_interrupted_leave_nothing(checkpoint, expected, end_at, monkeypatch):
    """The interrupt comes between two launches of a token, when arrivals of attention's splits may be counted."""
    tuning = small_tiles(checkpoint.config, attention=dict(min_split_keys=2, step_keys=2))
    model = PhasedModel(checkpoint, max_context=CONTEXT, num_programs=PROGRAMS, kv_dtype=F32, tuning=tuning)
    for n_phases in (2, 3, 8):
        done = []

        def count_phase(done=done, n_phases=n_phases):
            done.append(1)
            if len(done) == n_phases:
                raise_it()

        tokens = model.generate(PROMPT, N)
        next(tokens)
        model.on_phase = count_phase
        with pytest.raises(Raised):
            next(tokens)
        model.on_phase = None
        assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)


def test_a_path_that_was_not_switched_to_the_end(checkpoint, expected, monkeypatch):
    model = make_model(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(model, "_new_state", lambda *_: raise_it())
        with pytest.raises(Raised):
            model.switch_path(True)
    quantized = list(make_model(checkpoint, quant=True).generate(PROMPT, N))
    assert list(model.generate(PROMPT, N)) == quantized
    model.switch_path(False)
    assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)


# ---------------------------------------------------------------- generators

OVERTAKE = {
    "generate": lambda model: next(model.generate(OTHER, 2)),
    "decode": lambda model: next(model.decode(5, 0, 1)),
    "step": lambda model: model.step(5, 0),
    "logits": lambda model: model.logits(5, 0),
    "hidden": lambda model: model.hidden(5, 0, 1),
    "reset": lambda model: model.reset(),
}


@pytest.mark.parametrize("overtake", OVERTAKE.values(), ids=OVERTAKE.keys())
@pytest.mark.parametrize("name", ["generate", "decode"])
def test_a_generator_that_was_overtaken_raises(name, overtake, model, expected):
    tokens = model.generate(PROMPT, 9) if name == "generate" else model.decode(5, 0, 9)
    next(tokens)
    overtake(model)
    with pytest.raises(GenerationOvertaken, match="another use of this model"):
        next(tokens)
    assert list(tokens) == []
    assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)


def test_a_generator_that_ends_disturbs_no_other(model, expected):
    first = model.generate(OTHER, N)
    next(first)
    second = model.generate(PROMPT, N)
    tokens = [next(second)]
    first.close()
    tokens.append(next(second))
    del first
    assert tokens + list(second) == expected(PROMPT, N)


def test_a_generator_takes_the_model_with_its_first_token(model, expected):
    """A generator does not take it earlier, so that those made ahead do no harm."""
    first, second = model.generate(PROMPT, N), model.generate(OTHER, N)
    tokens = [next(first)]
    model.generate(OTHER, N)
    assert tokens + list(first) == expected(PROMPT, N)
    assert list(second) == expected(OTHER, N)


def test_refused_calls_overtake_nothing(model, expected):
    tokens = model.generate(PROMPT, N)
    found = [next(tokens)]
    for call in (lambda: model.step(5, CONTEXT), lambda: model.generate([], 1), lambda: model.decode(-1, 0, 1)):
        with pytest.raises(InputError):
            call()
    assert found + list(tokens) == expected(PROMPT, N)


def test_on_logits_may_use_models(checkpoint, model, expected):
    """Another model is used without harm; its own model ends its generation. Its logits are a copy."""
    other, rows, answers = make_model(checkpoint), [], []

    def use_another(row):
        rows.append(row)
        answers.append(list(other.generate(OTHER, 1)))

    tokens = list(model.generate(PROMPT, N, use_another))
    assert tokens == expected(PROMPT, N)
    assert [int(row.argmax()) for row in rows[-N:]] == tokens
    assert answers == [expected(OTHER, 1)] * len(rows)
    with pytest.raises(GenerationOvertaken):
        list(model.generate(PROMPT, N, lambda row: model.step(5, 0)))


def test_generators_of_the_reference(checkpoint, expected):
    reference = Reference(checkpoint, kv_dtype=F32, max_context=CONTEXT)
    first = reference.generate(OTHER, N)
    next(first)
    second = reference.generate(PROMPT, N)
    tokens = [next(second)]
    with pytest.raises(GenerationOvertaken):
        next(first)
    assert tokens + list(second) == expected(PROMPT, N)
    tokens = reference.generate(PROMPT, N)
    next(tokens)
    reference.forward([5])
    with pytest.raises(GenerationOvertaken):
        next(tokens)


# ---------------------------------------------------------------- threads


def test_threads_with_a_model_each(checkpoint, model, expected):
    other = make_model(checkpoint)
    pairs = [(model, PROMPT), (other, OTHER)]
    found = together(*(lambda m=m, p=p: [list(m.generate(p, N)) for _ in range(3)] for m, p in pairs))
    assert found == [[expected(p, N)] * 3 for _, p in pairs]


def test_threads_that_share_a_model_get_right_tokens(model, expected):
    """Steps wait for each other; of two generations one is overtaken, or neither, and no token is wrong."""
    first = expected([5], 1)[0]
    assert together(*[lambda: [model.step(5, 0) for _ in range(4)]] * 3) == [[first] * 4] * 3
    prompts = (PROMPT, OTHER)
    found = together(*(lambda p=p: list(model.generate(p, N)) for p in prompts))
    for prompt, tokens in zip(prompts, found, strict=True):
        assert isinstance(tokens, GenerationOvertaken) or tokens == expected(prompt, N)
    assert any(isinstance(tokens, list) for tokens in found)
    assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)


def test_threads_that_make_models(checkpoint, expected):
    found = together(*[lambda: list(make_model(checkpoint).generate(PROMPT, N))] * 2)
    assert found == [expected(PROMPT, N)] * 2


@triton.jit
def add_kernel(x_ptr, n, TURNS: tl.constexpr):
    for _ in range(TURNS):
        tl.atomic_add(x_ptr + tl.program_id(0), tl.num_programs(0))


def count(programs: int) -> torch.Tensor:
    x = torch.zeros(programs, dtype=torch.int32)
    add_kernel[(programs,)](x, programs, TURNS=5)
    return x


def test_threads_may_launch_other_kernels(model, expected):
    """Grids of several sizes run beside a model."""
    sizes = (1, 2, 5)
    launches = [lambda n=n: [count(n) for _ in range(10)] for n in sizes]
    *found, tokens = together(*launches, lambda: list(model.generate(PROMPT, N)))
    assert all(x.eq(5 * n).all() for n, counts in zip(sizes, found, strict=True) for x in counts)
    assert tokens == expected(PROMPT, N)


def test_a_thread_that_fails_holds_nothing(model, expected, end_at, monkeypatch):
    end_at(30, raise_it)
    (error,) = together(lambda: list(model.generate(PROMPT, N)))
    assert isinstance(error, Raised)
    monkeypatch.undo()
    assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_while_waiting_for_another_thread(model, expected):
    held, done = threading.Event(), threading.Event()

    def hold():
        with model.turns.lock:
            held.set()
            done.wait(LIMIT)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(LIMIT)
    threading.Timer(0.2, send(signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        model.step(5, 0)
    done.set()
    thread.join(LIMIT)
    assert list(model.generate(PROMPT, N)) == expected(PROMPT, N)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("use", ["the model", "another model", "a kernel"])
def test_a_signal_handler_must_not_launch_during_a_launch(use, checkpoint, model, expected, end_at, monkeypatch):
    """The handler's launch is refused, as nothing could wait for it, and ends the first launch like any exception."""
    other = make_model(checkpoint)
    calls = {
        "the model": lambda: model.step(5, 0),
        "another model": lambda: other.step(5, 0),
        "a kernel": lambda: count(2),
    }
    signal.signal(signal.SIGUSR1, lambda *_: calls[use]())
    end_at(40, send(signal.SIGUSR1))
    with pytest.raises(ModelInUse):
        list(model.generate(PROMPT, N))
    monkeypatch.undo()
    for each in (model, other):
        assert list(each.generate(PROMPT, N)) == expected(PROMPT, N)


# ---------------------------------------------------------------- logits that are not finite


def with_head(checkpoint, token_id: int, value: float):
    """Make a checkpoint whose logit of one token is about that value, times the norm of the hidden state."""

    def change(name, tensor):
        if name != "lm_head.weight":
            return tensor
        tensor = tensor.clone()
        tensor[token_id] = value
        return tensor

    return checkpoint.with_tensors(change)


@pytest.mark.parametrize(
    ("kind", "token_id", "value"),
    [
        *((MegaModel, 0, value) for value in (math.nan, math.inf, -math.inf)),
        *((kind, token_id, math.nan) for kind in (MegaModel, PhasedModel) for token_id in (77, 159)),
    ],
)
def test_a_logit_that_is_not_finite_raises(kind, token_id, value, checkpoint):
    """One logit at any place is not finite: unchecked, it would be skipped or win."""
    checkpoint = with_head(checkpoint, token_id, value)
    model = make_model(checkpoint, kind, tuning=small_tiles(checkpoint.config))
    calls = {
        "step": (3, lambda: model.step(5, 3)),
        "logits": (2, lambda: model.logits(5, 2)),
        "generate": (len(PROMPT) - 1, lambda: list(model.generate(PROMPT, 2))),
        "generate with logits": (0, lambda: list(model.generate(PROMPT, 2, lambda row: None))),
        "decode": (6, lambda: list(model.decode(5, 6, 3))),
    }
    for position, call in calls.values():
        with pytest.raises(LogitsNotFinite, match=f"logits are not finite at position {position}: "):
            call()


def test_the_reference_refuses_them_too(checkpoint):
    reference = Reference(with_head(checkpoint, 77, float("nan")), max_context=CONTEXT)
    with pytest.raises(LogitsNotFinite, match=f"at position {len(PROMPT) - 1}: "):
        list(reference.generate(PROMPT, 2))
    with pytest.raises(LogitsNotFinite, match="at position 0: "):
        list(reference.generate(PROMPT, 2, lambda row: None))


def test_logits_that_become_not_finite_raise_then(checkpoint, expected):
    """The tokens before them are right, and so is a sequence without them."""
    tokens = expected(PROMPT, N)
    spoiled = tokens[1]

    def change(name, tensor):
        if name != "model.embed_tokens.weight":
            return tensor
        tensor = tensor.clone()
        tensor[spoiled, 3] = float("nan")
        return tensor

    model = make_model(checkpoint.with_tensors(change))
    found = []
    with pytest.raises(LogitsNotFinite, match=f"position {len(PROMPT) + 1}: "):
        found.extend(model.generate(PROMPT, 1))
        found.extend(map(int, model.decode(PROMPT[-1], len(PROMPT) - 1, N + 1)))
    assert found == tokens[:1] + tokens[:2]
    assert list(model.generate(PROMPT, 2)) == tokens[:2]


def test_large_logits_are_finite(checkpoint):
    large = with_head(checkpoint, 77, 1e37)
    model = make_model(large)
    assert model.step(5, 0) == next(Reference(large, kv_dtype=F32, max_context=4).generate([5], 1))
