"""checkpoints.config against the published checkpoint's own files, transformers' reading of them, and bad input."""

import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checkpoints.checkpoint import config_to_dict
from checkpoints.config import (
    FP8_ROWS,
    GPT_OSS_20B,
    GPT_OSS_120B,
    PRESETS,
    DenseFormats,
    ModelConfig,
    YarnConfig,
    config_from_dict,
    expected_tensors,
    read_config,
)
from host.rope import inverse_frequencies
from system.errors import InputError

PUBLISHED = Path(__file__).parents[1] / "data" / "gpt-oss-120b"
ITEM_BYTES = {"BF16": 2, "U8": 1}
SMALL = ModelConfig(
    n_layers=3,
    n_experts=6,
    experts_per_token=2,
    hidden_size=96,
    intermediate_size=64,
    n_heads=6,
    n_kv_heads=3,
    head_dim=32,
    vocab_size=300,
    sliding_window=5,
    layer_is_sliding=(False, True, True),
    max_position_embeddings=777,
    rms_norm_eps=3e-6,
    swiglu_limit=5.5,
    yarn=YarnConfig(10000.0, 8.0, 512, 24.0, 2.0, True, 1.25),
    stop_ids=(7, 3),
)


def published_dict() -> dict:
    return json.loads((PUBLISHED / "config.json").read_text())


def write_config(folder: Path, raw: object, generation: object = None) -> Path:
    """Make a folder with these as config.json and generation_config.json; strings are written unchanged."""
    for name, content in (("config.json", raw), ("generation_config.json", generation)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def assert_rejected(folder: Path, *culprits: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config(folder)
    message = str(caught.value)
    assert message.isprintable(), message
    assert all(culprit in message for culprit in culprits), message


def test_published_config_is_the_120b_preset():
    assert read_config(PUBLISHED) == GPT_OSS_120B == PRESETS["120b"]


def test_published_20b_differs_in_layers_and_experts_only():
    raw = published_dict() | {"num_hidden_layers": 24, "num_local_experts": 32}
    raw["layer_types"] = raw["layer_types"][:24]
    raw["eos_token_id"] = [200002, 199999, 200012]
    assert config_from_dict(raw, "20b") == GPT_OSS_20B == PRESETS["20b"]


def test_expected_tensors_have_the_published_count_and_bytes():
    tensors = expected_tensors(GPT_OSS_120B)
    assert len(tensors) == 687
    assert sum(math.prod(shape) * ITEM_BYTES[dtype] for shape, dtype in tensors.values()) == 65_248_815_744


def test_derived_sizes():
    assert (GPT_OSS_120B.q_size, GPT_OSS_120B.kv_size, GPT_OSS_120B.qkv_size) == (4096, 512, 5120)
    assert GPT_OSS_120B.sm_scale == 1 / 8
    assert [GPT_OSS_120B.window(layer) for layer in range(3)] == [128, 0, 128]
    assert GPT_OSS_120B.yarn.concentration == pytest.approx(1.34657, abs=1e-5)


def test_cut_keeps_the_first_layers():
    cut = SMALL.cut(2)
    assert cut.n_layers == 2
    assert cut.layer_is_sliding == (False, True)
    names = set(expected_tensors(cut))
    assert {name for name in expected_tensors(SMALL) if not name.startswith("model.layers.2.")} == names
    assert SMALL.cut(3) == SMALL


@pytest.mark.parametrize("n_layers", [0, -1, 4])
def test_cut_rejects(n_layers):
    with pytest.raises(InputError, match=f"--layers {n_layers}: .*1 to 3"):
        SMALL.cut(n_layers)


@pytest.mark.parametrize("config", [GPT_OSS_120B, GPT_OSS_20B, SMALL, SMALL.cut(1)])
def test_config_to_dict_round_trips(config, tmp_path):
    assert read_config(write_config(tmp_path, config_to_dict(config))) == config


def test_transformers_reads_config_to_dict_alike():
    """`to_dict` of the configuration that transformers read holds its view of every key, in its own spelling."""
    read = GptOssConfig(**config_to_dict(SMALL)).to_dict()
    assert config_from_dict(read, "transformers") == SMALL
    assert read["rope_parameters"]["rope_theta"] == 10000.0


def test_old_and_new_rope_spellings_agree():
    old = published_dict()
    new = copy.deepcopy(old)
    new["rope_parameters"] = new.pop("rope_scaling") | {"rope_theta": new.pop("rope_theta")}
    older = copy.deepcopy(old)
    older["rope_scaling"]["type"] = older["rope_scaling"].pop("rope_type")
    assert config_from_dict(old, "") == config_from_dict(new, "") == config_from_dict(older, "")
    old["rope_theta"] = new["rope_parameters"]["rope_theta"] = 9999
    assert config_from_dict(old, "").yarn.theta == config_from_dict(new, "").yarn.theta == 9999.0


def test_yarn_defaults_are_those_of_transformers():
    raw = published_dict()
    del raw["rope_theta"]
    raw["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    yarn = config_from_dict(raw, "").yarn
    assert yarn == YarnConfig(150000.0, 4.0, 64, 32.0, 1.0, truncate=True)
    assert GptOssConfig(**raw).rope_parameters["rope_theta"] == 150000.0


def test_layer_types_default_to_alternating_from_sliding():
    raw = published_dict()
    del raw["layer_types"]
    assert config_from_dict(raw, "") == config_from_dict(published_dict(), "")


@pytest.mark.parametrize("eos", [200002, [200002, 7], None])
@pytest.mark.parametrize(
    "generation", [None, {"eos_token_id": [5, 200002]}, {"eos_token_id": 9}, {"eos_token_id": None}, {}]
)
def test_stop_ids_are_those_of_transformers(tmp_path, eos, generation):
    """transformers reads generation_config.json, and config.json only where there is no such file."""
    folder = write_config(tmp_path, published_dict() | {"eos_token_id": eos}, generation)
    if generation is None:
        theirs = GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    else:
        theirs = GenerationConfig.from_pretrained(folder)
    ids = theirs.eos_token_id
    assert read_config(folder).stop_ids == tuple(ids if isinstance(ids, list) else [] if ids is None else [ids])


def made_up(rng: random.Random) -> dict:
    """Make up a configuration that repeats or contradicts itself, or differs from the published one."""

    def rope() -> dict | None:
        keys = {
            "rope_type": ["yarn", "yarn", "yarn", "default", "llama3"],
            "type": ["yarn", "linear"],
            "rope_theta": [150000, 10000.0, 500.0],
            "factor": [32.0, 16, 1.0, 0.5],
            "original_max_position_embeddings": [4096, 131072, 64, 4],
            "beta_fast": [32.0, 8],
            "beta_slow": [1.0, 2],
            "truncate": [False, True],
            "attention_factor": [None, 1.25],
            "mscale": [None, 1.0],
            "partial_rotary_factor": [1.0, 0.5],
            "full_attention": [{"rope_type": "yarn", "factor": 2.0}],
        }
        often = ("rope_type", "factor", "original_max_position_embeddings")
        seldom = ("type", "mscale", "partial_rotary_factor", "full_attention")
        chance = {key: 0.9 if key in often else 0.05 if key in seldom else 0.5 for key in keys}
        return {key: rng.choice(values) for key, values in keys.items() if rng.random() < chance[key]}

    raw = {k: v for k, v in published_dict().items() if k not in ("rope_scaling", "rope_theta")}
    beside = {
        "rope_scaling": [rope(), rope(), rope(), None, {}],
        "rope_parameters": [rope(), rope(), rope(), None, {}],
        "rope_theta": [150000, 1e6],
        "initial_context_length": [4096, 2048],
        "original_max_position_embeddings": [2048],
        "max_position_embeddings": [131072, 8192],
        "sliding_window": [128, 64],
        "layer_types": [None, ["full_attention", "sliding_attention"] * 18],
        "num_experts": [128, 64],
        "experts_per_token": [4, 2],
        "torch_dtype": ["float32"],
        "dtype": ["bfloat16", "float16"],
        "partial_rotary_factor": [None, 0.5],
        "num_key_value_heads": [8, 4],
    }
    chance = {"original_max_position_embeddings": 0.15, "num_experts": 0.1, "partial_rotary_factor": 0.1}
    raw |= {key: rng.choice(values) for key, values in beside.items() if rng.random() < chance.get(key, 0.6)}
    return raw


def test_made_up_configurations_are_refused_or_what_transformers_makes_of_them():
    """The model's numbers are compared, and its RoPE as transformers computes it when it builds the model."""
    rng, accepted = random.Random(16), 0
    for number in range(800):
        raw = made_up(rng)
        try:
            ours = config_from_dict(copy.deepcopy(raw), f"number {number}")
        except InputError:
            continue
        accepted += 1
        theirs = GptOssConfig(**{key: value for key, value in copy.deepcopy(raw).items() if key != "model_type"})
        assert theirs.rope_parameters["rope_type"] == "yarn", raw
        frequencies, concentration = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
        torch.testing.assert_close(inverse_frequencies(ours), frequencies, rtol=1e-6, atol=0, msg=str(raw))
        assert ours.yarn.concentration == pytest.approx(concentration, rel=1e-12), raw
        assert [ours.window(layer) or None for layer in range(36)] == [
            theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types
        ]
        names = ("num_local_experts", "num_experts_per_tok", "num_key_value_heads", "max_position_embeddings")
        values = (ours.n_experts, ours.experts_per_token, ours.n_kv_heads, ours.max_position_embeddings)
        assert values == tuple(getattr(theirs, name) for name in names), raw
    assert accepted > 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.5),
        ("num_experts", 64),
        ("per_layer_config", {"0": {"sliding_window": 5}}),
        ("attribute_map", {"head_dim": "hidden_size"}),
        ("transformers_weights", "other.safetensors"),
        ("original_max_position_embeddings", None),
        ("original_max_position_embeddings", 0),
    ],
)
def test_keys_beside_that_would_make_another_model(tmp_path, key, value):
    assert_rejected(write_config(tmp_path, published_dict() | {key: value}), "config.json", key)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_rope_for_one_kind_of_layer(tmp_path, kind):
    raw = published_dict()
    raw["rope_scaling"][kind] = {"rope_type": "yarn", "factor": 2.0}
    assert_rejected(write_config(tmp_path, raw), "config.json", kind)


@pytest.mark.parametrize("n_layers", [1.0, "1", None, True, [1]])
def test_cut_to_what_is_no_integer(n_layers):
    with pytest.raises(TypeError, match="n_layers must be an integer, not"):
        SMALL.cut(n_layers)


def test_stop_ids_beyond_the_vocabulary_are_none(tmp_path):
    raw = published_dict() | {"vocab_size": 512}
    assert read_config(write_config(tmp_path, raw, {"eos_token_id": [512, 511]})).stop_ids == (511,)


SIZES = [
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
]
NOT_A_SIZE = [None, "64", -64, 0, True, 64.0, [64], {}, 2**31, 10**400]
NOT_A_NUMBER = [None, "7", -1.0, 0, True, [7.0], math.nan, math.inf, -math.inf, 10**400, 1e39]


@pytest.mark.parametrize("key", [*SIZES, "sliding_window", "max_position_embeddings"])
@pytest.mark.parametrize("value", NOT_A_SIZE, ids=lambda value: repr(value)[:12])
def test_sizes_of_a_wrong_kind(tmp_path, key, value):
    assert_rejected(write_config(tmp_path, published_dict() | {key: value}), "config.json", key)


@pytest.mark.parametrize("key", [*SIZES, "model_type", "quantization_config", "rope_scaling"])
def test_missing_keys(tmp_path, key):
    raw = published_dict()
    del raw[key]
    assert_rejected(write_config(tmp_path, raw), "config.json", "rope" if key == "rope_scaling" else key)


@pytest.mark.parametrize("key", ["rms_norm_eps", "swiglu_limit", "rope_theta"])
@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=lambda value: repr(value)[:12])
def test_numbers_of_a_wrong_kind(tmp_path, key, value):
    """NaN and Infinity are not JSON, but Python's json reads and writes them."""
    assert_rejected(write_config(tmp_path, published_dict() | {key: value}), "config.json", key)


@pytest.mark.parametrize("key", ["factor", "beta_fast", "beta_slow", "attention_factor"])
@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=lambda value: repr(value)[:12])
def test_yarn_numbers_of_a_wrong_kind(tmp_path, key, value):
    raw = published_dict()
    raw["rope_scaling"][key] = value
    folder = write_config(tmp_path, raw)
    if (key, value) == ("attention_factor", None):  # null says that it is not set
        assert read_config(folder).yarn == YarnConfig()
    else:
        assert_rejected(folder, "config.json", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("model_type", ["gpt_oss"]),
        ("quantization_config", None),
        ("quantization_config", "mxfp4"),
        ("quantization_config", ["mxfp4"]),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", {}),
        ("tie_word_embeddings", True),
        ("attention_bias", False),
        ("hidden_act", "gelu"),
        ("hidden_size", 2881),
        ("hidden_size", 16),
        ("intermediate_size", 2896),
        ("head_dim", 24),
        ("head_dim", 8),
        ("num_key_value_heads", 7),
        ("num_experts_per_tok", 129),
        ("num_hidden_layers", 2**31 - 1),
        ("layer_types", ["sliding_attention"] * 35),
        ("layer_types", ["sliding_attention"] * 35 + ["chunked_attention"]),
        ("layer_types", ["sliding_attention"] * 35 + [["full_attention"]]),
        ("layer_types", "sliding_attention"),
        ("layer_types", []),
        ("layer_types", 36),
        ("eos_token_id", -1),
        ("eos_token_id", "200002"),
        ("eos_token_id", [200002, None]),
        ("eos_token_id", True),
        ("rope_theta", 1.0),
    ],
)
def test_unsupported_values(tmp_path, key, value):
    raw = published_dict() | {key: value}
    if key == "num_hidden_layers":
        del raw["layer_types"]
    assert_rejected(write_config(tmp_path, raw), "config.json", key)


@pytest.mark.parametrize("rope", [None, [], "yarn", 5, {"rope_type": "llama3", "factor": 8.0}, {"factor": 32.0}])
def test_rope_that_is_not_yarn(tmp_path, rope):
    assert_rejected(write_config(tmp_path, published_dict() | {"rope_scaling": rope}), "config.json", "YaRN")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("truncate", "no"),
        ("truncate", None),
        ("original_max_position_embeddings", "4096"),
        ("original_max_position_embeddings", True),
        ("original_max_position_embeddings", 0),
        ("partial_rotary_factor", 0.5),
        ("mscale", 1.0),
        ("mscale_all_dim", 1.0),
        ("beta_fast", 0.5),
    ],
)
def test_unsupported_yarn_values(tmp_path, key, value):
    raw = published_dict()
    raw["rope_scaling"][key] = value
    assert_rejected(write_config(tmp_path, raw), "config.json", key)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"gpt_oss"', "\ufeff{}", "{" * 100_000, "[" * 100_000, "9" * 5000]
)
def test_config_that_is_no_json_object(tmp_path, text):
    assert_rejected(write_config(tmp_path, text), "config.json")


def test_config_that_is_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert_rejected(tmp_path, "config.json", "not valid JSON")


def test_config_that_is_missing_or_a_folder(tmp_path):
    assert_rejected(tmp_path, "config.json", "No such file")
    (tmp_path / "config.json").mkdir()
    assert_rejected(tmp_path, "config.json", "directory")


@pytest.mark.parametrize("generation", ["{", "[]", {"eos_token_id": "x"}, {"eos_token_id": [1, -1]}])
def test_bad_generation_config(tmp_path, generation):
    assert_rejected(write_config(tmp_path, published_dict(), generation), "generation_config.json")


def test_models_that_no_kernel_tells_apart_share_what_is_compiled():
    alike = [GPT_OSS_120B.cut(3), replace(GPT_OSS_120B, stop_ids=()), replace(GPT_OSS_120B, sliding_window=7)]
    assert all(config.compiled() == GPT_OSS_120B.compiled() for config in alike)
    fp8 = DenseFormats(qkv=FP8_ROWS)
    for other in (replace(GPT_OSS_120B, hidden_size=2816), GPT_OSS_20B, replace(GPT_OSS_120B, dense=fp8)):
        assert other.compiled() != GPT_OSS_120B.compiled()
