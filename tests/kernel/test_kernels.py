"""Phases as launches of their own, interpreted, give the megakernel's bits with any number of programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_models import ODD_SIZES, loud_checkpoint, random_token_ids, small_config
from small_model import small_checkpoint, write_model
from tunings import ring_tiles, small_tiles

from gpt_oss_megakernel import MegaModel
from host import limits
from host.launch import LAUNCH_TABLE, tuning_for
from host.phases import PHASES, phases_of_token
from host.state import State
from interpreter import simulate
from kernels import PhasedModel
from measure.random_cache import fill_cache
from system.errors import InputError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONTEXT = 40  # beyond the window of 20; the full layer has three splits of 16 positions at its end
SPLITS = dict(attention=dict(min_split_keys=16, max_splits=3))
SMALL_TILES = {"small": small_tiles, "ring": ring_tiles}


def rows_of(model: MegaModel, token_ids: list[int], first: int = 0) -> torch.Tensor:
    """Return logits of the tokens from position `first` on, after what reset() or fill_cache left."""
    return torch.stack([model.logits(token_id, position) for position, token_id in enumerate(token_ids, first)])


def assert_same_bits(mega: MegaModel, others: list[PhasedModel], token_ids: list[int], first: int = 0) -> None:
    """Compare every token's logits, the next token, and the state that the last token leaves."""
    last = first + len(token_ids) - 1
    fill_cache(mega.state.k_cache, mega.state.v_cache, first, seed=1)
    expected_rows, expected_token = rows_of(mega, token_ids, first), mega.step(token_ids[-1], last)
    # By program or split, or written while compiling.
    left_out = ("head_value", "head_index", "split_m", "split_l", "split_acc", "trace", "tokens")
    for phased in others:
        fill_cache(phased.state.k_cache, phased.state.v_cache, first, seed=1)
        assert torch.equal(rows_of(phased, token_ids, first), expected_rows)
        assert phased.step(token_ids[-1], last) == expected_token
        for name, found, expected in zip(State._fields, phased.state, mega.state):
            if name not in left_out:
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.parametrize("tiles", ["device", *SMALL_TILES])
def test_same_bits_as_the_megakernel(checkpoint, quant, tiles):
    config = checkpoint.config
    tuning = tuning_for(CPU, config) if tiles == "device" else SMALL_TILES[tiles](config, **SPLITS)
    mega = MegaModel(checkpoint, quant, CONTEXT, tuning=tuning)
    options = {"max_context": CONTEXT, "tuning": tuning, "weights": mega.weights}
    assert_same_bits(
        mega,
        [PhasedModel(checkpoint, quant, num_programs=num_programs, **options) for num_programs in (1, 3)],
        random_token_ids(4, config),
        CONTEXT - 4,
    )


@pytest.mark.parametrize("tiles", SMALL_TILES)
@pytest.mark.parametrize("changes", ODD_SIZES.values(), ids=ODD_SIZES.keys())
def test_odd_sizes(changes, quant, tiles):
    config = small_config(**{"n_layers": 2, "layer_is_sliding": (True, False), **changes})
    checkpoint, tuning = loud_checkpoint(config), SMALL_TILES[tiles](config, **SPLITS)
    mega = MegaModel(checkpoint, quant, 2, tuning=tuning)
    phased = PhasedModel(checkpoint, quant, 2, tuning=tuning, num_programs=3, weights=mega.weights)
    assert_same_bits(mega, [phased], random_token_ids(1, config), 1)


@pytest.mark.parametrize("tiles", SMALL_TILES)
def test_the_order_of_programs_changes_no_bit_and_none_race(checkpoint, quant, tiles):
    """Within a launch no program may read what another writes."""
    tuning = SMALL_TILES[tiles](checkpoint.config, **SPLITS)
    phased = PhasedModel(checkpoint, quant, CONTEXT, tuning=tuning, num_programs=5)
    fill_cache(phased.state.k_cache, phased.state.v_cache, CONTEXT - 1, seed=1)
    runs = []
    for seed in range(3):
        with simulate(seed=seed, detect_races=True) as simulation:
            runs.append(phased.logits(7, CONTEXT - 1))
            assert phased.step(7, CONTEXT - 1) == int(runs[-1].argmax())
        assert simulation.races == []
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.fixture(scope="module")
def models(checkpoint):
    mega = MegaModel(checkpoint.with_config(stop_ids=()), max_context=16)
    return PhasedModel(checkpoint.with_config(stop_ids=()), max_context=16, weights=mega.weights), mega


def test_hidden_agrees_after_any_number_of_layers(models, checkpoint):
    """The residual agrees after any number of layers; 0 is the embedding."""
    phased, mega = models
    for n_layers in range(checkpoint.config.n_layers + 1):
        assert torch.equal(phased.hidden(7, 0, n_layers), mega.hidden(7, 0, n_layers))
    with pytest.raises(InputError, match="n_layers 4: the model has 3"):
        phased.hidden(7, 0, 4)


def test_generate_and_decode(models):
    phased, mega = models
    assert list(phased.generate([7, 100], 9)) == list(mega.generate([7, 100], 9))
    assert list(phased.decode(5, 2, 20)) == list(mega.decode(5, 2, 20))
    rows = {phased: [], mega: []}
    for model, seen in rows.items():
        list(model.generate([7, 100, 31], 4, on_logits=lambda row, seen=seen: seen.append(row.clone())))
    assert torch.equal(torch.stack(rows[phased]), torch.stack(rows[mega]))


def test_a_stop_id_and_a_full_context_end_it(checkpoint):
    phased = PhasedModel(checkpoint.with_config(stop_ids=()), max_context=12)
    generated = list(phased.generate([7, 100], 100))
    assert len(generated) == 11
    stop_id = generated[4]
    stopping = PhasedModel(checkpoint.with_config(stop_ids=(stop_id,)), max_context=12, weights=phased.weights)
    assert list(stopping.generate([7, 100], 100)) == generated[: generated.index(stop_id) + 1]


def test_a_new_model_and_one_after_reset_hold_nothing(checkpoint):
    """Position 5 alone sees zeros before it, also after the launches that only compile."""
    mega = MegaModel(checkpoint, max_context=8)
    phased = PhasedModel(checkpoint, max_context=8)
    expected = mega.logits(50, 5)
    assert torch.equal(phased.logits(50, 5), expected)
    rows_of(phased, [1, 2, 3, 4, 5])
    phased.reset()
    assert torch.equal(phased.logits(50, 5), expected)


def test_launches_are_the_phases_in_order(models, checkpoint):
    """Each phase is one launch; a prompt's tokens have no LM head, logits no argmax."""
    phased, _ = models
    launched = []
    phased.on_phase = lambda: launched.append(1)
    n_layers = checkpoint.config.n_layers
    try:
        counts = []
        for action in (
            lambda: phased.step(7, 0),
            lambda: phased.logits(7, 0),
            lambda: phased.hidden(7, 0, 2),
            lambda: list(phased.generate([7, 8, 9], 1)),
        ):
            launched.clear()
            action()
            counts.append(len(launched))
    finally:
        phased.on_phase = None
    whole = len(phases_of_token(n_layers))
    assert counts == [whole, whole - 1, 1 + 2 * len(PHASES), 3 * whole - 2 * 2]


def test_switch_path(checkpoint):
    phased = PhasedModel(checkpoint, max_context=8)
    phased.switch_path(quant=True)
    expected = MegaModel(checkpoint, True, max_context=8)
    assert torch.equal(rows_of(phased, [7, 100, 31]), rows_of(expected, [7, 100, 31]))


def test_from_pretrained(tmp_path):
    folder = write_model(tmp_path / "model")
    phased = PhasedModel.from_pretrained(folder, True, 12, "cpu", num_programs=2)
    assert isinstance(phased, PhasedModel)
    assert (phased.quant, phased.max_context, phased.num_programs) == (True, 12, 2)
    mega = MegaModel(small_checkpoint(), True, 12)
    assert list(phased.generate([65, 66], 5)) == list(mega.generate([65, 66], 5))


def test_shared_weights_are_loaded_once_and_need_no_room(checkpoint, monkeypatch):
    mega = MegaModel(checkpoint, max_context=8)
    monkeypatch.setattr("host.decoder.load_weights", None)
    cache_and_workspace = limits.required_bytes(checkpoint.config, 8, weights=0)
    monkeypatch.setattr(limits, "available_bytes", lambda device: cache_and_workspace)
    phased = PhasedModel(checkpoint, max_context=8, weights=mega.weights)
    assert phased.weights is mega.weights
    assert not {tensor.data_ptr() for tensor in phased.state if tensor.numel()} & {t.data_ptr() for t in mega.state}
    with pytest.raises(InputError, match="not enough memory"):
        PhasedModel(checkpoint, max_context=8)


COMPILE_ALL = """
import kernels
from checkpoints.config import GPT_OSS_120B as config
from common.build import Build
from host.launch import LAUNCH_TABLE
from tools.compile_report import TARGETS, compile_kernel, meta_tensors

for target in TARGETS:
    tuning = LAUNCH_TABLE[target].tuning(config)
    for quant in (False, True):
        w, s = meta_tensors(config, tuning, quant, 240)
        constants = {"BUILD": Build(config.compiled(), tuning, quant), "BLOCK_P": 256}
        options = tuning.options() | {"launch_cooperative_grid": False}
        for name, kernel in vars(kernels).items():
            if name.endswith("_kernel"):
                arguments = dict.fromkeys(kernel.arg_names, 0) | {"w": w, "s": s}
                used = {name: value for name, value in constants.items() if name in kernel.arg_names}
                compile_kernel(target, kernel, arguments, used | options)
                print(target, quant, name)
"""


def test_all_compile_at_120b_sizes():
    """All kernels compile for gfx950 and sm_90 with no GPU, in a process that does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE_ALL]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=600)
    targets = len(LAUNCH_TABLE) - 1  # all but the CPU
    assert len(done.stdout.splitlines()) == targets * 2 * (len(PHASES) + 3)
