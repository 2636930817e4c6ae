"""The configuration of a GPT-OSS model: its sizes, its constants, and the names and shapes of its tensors.

Where a configuration file states something twice, the value that transformers 5.17 uses counts. A key that would mean
another model there, and is not supported here, is refused by name. docs/checkpoints.md has the rules.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from system.arguments import integer
from system.errors import InputError
from system.files import is_there, parse_json, read_small

CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
MAX_JSON_BYTES = 1 << 20  # of either file
ORIGINAL_CONTEXT = "original_max_position_embeddings"
MXFP4_GROUP = 32  # elements that share one E8M0 scale
MAX_LAYERS = 1024  # a damaged file may ask for billions, and each layer costs memory before any shape is checked
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
BF16, FP8_ROWS, FP8_GROUPS = "bf16", "fp8-row", "fp8-32"  # bfloat16; E4M3 with a scale per row, or per 32 elements
# Keys that make transformers build another model, or load other weights, than the supported keys describe.
CHANGES_MEANING = ("per_layer_config", "attribute_map", "partial_rotary_factor", "transformers_weights")
LAYER_TYPES = ("sliding_attention", "full_attention")
ITEM_BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}  # by dtype as safetensors spells it
SCALE_ENDING = "_scale"  # appended to an FP8 matrix's name for its scales

# Ending of each dense matrix's published name -> the field of DenseFormats with its format.
DENSE_MATRICES = {
    "q_proj.weight": "qkv",
    "k_proj.weight": "qkv",
    "v_proj.weight": "qkv",
    "o_proj.weight": "o",
    "router.weight": "router",
    "lm_head.weight": "head",
}


@dataclass(frozen=True)
class YarnConfig:
    """YaRN parameters (Peng et al. 2023, arXiv:2309.00071), as `rope_parameters` or `rope_scaling` hold them."""

    theta: float = 150000.0
    factor: float = 32.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    attention_factor: float | None = None

    @property
    def concentration(self) -> float:
        """The factor of both cos and sin, called attention factor in transformers."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0


@dataclass(frozen=True)
class DenseFormats:
    """The format of each dense matrix on a device or in a file: BF16, as published, or one of checkpoints/fp8.py."""

    qkv: str = BF16
    o: str = BF16
    router: str = BF16
    head: str = BF16

    def format_of(self, name: str) -> str:
        """Return the format of the tensor of this published name; BF16 if it is no dense matrix."""
        component = DENSE_MATRICES.get(".".join(name.split(".")[-2:]))
        return getattr(self, component) if component else BF16


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-OSS model; the defaults are those of gpt-oss-120b."""

    n_layers: int = 36
    n_experts: int = 128
    experts_per_token: int = 4
    hidden_size: int = 2880
    intermediate_size: int = 2880
    n_heads: int = 64
    n_kv_heads: int = 8
    head_dim: int = 64
    vocab_size: int = 201088
    sliding_window: int = 128
    layer_is_sliding: tuple[bool, ...] = (True, False) * 18
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    yarn: YarnConfig = YarnConfig()
    stop_ids: tuple[int, ...] = (200002, 199999, 200012)
    dense: DenseFormats = DenseFormats()

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    @property
    def sm_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def swiglu_bound(self) -> float:
        """An upper bound of an expert's activations, as z sigmoid(alpha z) lies between -0.2785 / alpha and z."""
        return max(self.swiglu_limit, 0.2785 / self.swiglu_alpha) * (self.swiglu_limit + 1)

    def window(self, layer: int) -> int:
        """Return the number of keys that a query of this layer sees, its own included; 0 means all."""
        return self.sliding_window if self.layer_is_sliding[layer] else 0

    def compiled(self) -> "ModelConfig":
        """Return the configuration that kernels are compiled for, with None for the fields that no kernel reads.

        Models that differ only in those fields share compiled kernels.
        """
        unread = "n_layers sliding_window layer_is_sliding max_position_embeddings yarn stop_ids"
        return replace(self, **dict.fromkeys(unread.split()))

    def cut(self, n_layers: int) -> "ModelConfig":
        """Return the model with only its first n_layers. Raise InputError if it has fewer, TypeError for no integer."""
        n_layers = integer(n_layers, "n_layers")
        if not 1 <= n_layers <= self.n_layers:
            raise InputError(f"--layers {n_layers}: the model has layers 1 to {self.n_layers}")
        return ModelConfig(
            **{**self.__dict__, "n_layers": n_layers, "layer_is_sliding": self.layer_is_sliding[:n_layers]}
        )


GPT_OSS_120B = ModelConfig()
GPT_OSS_20B = ModelConfig(n_layers=24, n_experts=32, layer_is_sliding=(True, False) * 12)
PRESETS = {"120b": GPT_OSS_120B, "20b": GPT_OSS_20B}


def held_formats(checkpoint, requested: DenseFormats | None, flags: Mapping[str, str] | None = None) -> DenseFormats:
    """Return the formats for dense matrices: those requested where the checkpoint has bfloat16, else the checkpoint's.

    BF16 requests nothing. flags: field of DenseFormats -> the flag that requests its format, for errors. Raise
    InputError for a request that differs from the checkpoint's FP8 format, as values are never rounded twice.
    """
    formats = dict(checkpoint.config.dense.__dict__)
    for name, dense_format in (requested or DenseFormats()).__dict__.items():
        if dense_format != BF16:
            if formats[name] not in (BF16, dense_format):
                flag = (flags or {}).get(name, f"dense.{name}")
                raise InputError(
                    f"{flag}: {checkpoint.name} holds {name} in {formats[name]}, which cannot become {dense_format}"
                )
            formats[name] = dense_format
    return DenseFormats(**formats)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> (shape, dtype as safetensors spells it) of each tensor of a checkpoint in the published layout.

    Matrices that are FP8 according to `config.dense` are E4M3, and their scales are separate tensors, see scale_name.
    """
    hidden, inter, experts = config.hidden_size, config.intermediate_size, config.n_experts
    tensors = {
        "model.embed_tokens.weight": ((config.vocab_size, hidden), "BF16"),
        "model.norm.weight": ((hidden,), "BF16"),
        "lm_head.weight": ((config.vocab_size, hidden), "BF16"),
    }
    for layer in range(config.n_layers):
        attn, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ((hidden,), "BF16")
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = ((hidden,), "BF16")
        for proj, rows in (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)):
            tensors[f"{attn}.{proj}_proj.weight"] = ((rows, hidden), "BF16")
            tensors[f"{attn}.{proj}_proj.bias"] = ((rows,), "BF16")
        tensors[f"{attn}.o_proj.weight"] = ((hidden, config.q_size), "BF16")
        tensors[f"{attn}.o_proj.bias"] = ((hidden,), "BF16")
        tensors[f"{attn}.sinks"] = ((config.n_heads,), "BF16")
        tensors[f"{mlp}.router.weight"] = ((experts, hidden), "BF16")
        tensors[f"{mlp}.router.bias"] = ((experts,), "BF16")
        for proj, rows, k in (("gate_up", 2 * inter, hidden), ("down", hidden, inter)):
            groups = k // MXFP4_GROUP
            tensors[f"{mlp}.experts.{proj}_proj_blocks"] = ((experts, rows, groups, MXFP4_GROUP // 2), "U8")
            tensors[f"{mlp}.experts.{proj}_proj_scales"] = ((experts, rows, groups), "U8")
            tensors[f"{mlp}.experts.{proj}_proj_bias"] = ((experts, rows), "BF16")
    for name, (shape, _) in list(tensors.items()):
        dense_format = config.dense.format_of(name)
        if dense_format != BF16:
            rows, k = shape
            tensors[name] = shape, "F8_E4M3"
            tensors[scale_name(name)] = (
                ((rows,), "F32") if dense_format == FP8_ROWS else ((rows, k // MXFP4_GROUP), "U8")
            )
    return tensors


def scale_name(name: str) -> str:
    """Return the name of the scales of the FP8 matrix with this published name."""
    return f"{name}{SCALE_ENDING}"


def checkpoint_bytes(config: ModelConfig) -> int:
    """Return the bytes of all tensors of a checkpoint in the published layout."""
    return sum(math.prod(shape) * ITEM_BYTES[dtype] for shape, dtype in expected_tensors(config).values())


def check_token(token_id: int, config: ModelConfig) -> None:
    """Raise InputError unless the id is in the vocabulary, TypeError if it is no integer."""
    if not 0 <= integer(token_id, "token_id") < config.vocab_size:
        raise InputError(f"token id {token_id} lies outside the vocabulary of {config.vocab_size}")


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json` and, if there is one, `generation_config.json` of a checkpoint folder.

    Raise InputError, naming the file and the key, if it is not a GPT-OSS model of a supported size.
    """
    path, generation = Path(folder) / CONFIG_NAME, Path(folder) / GENERATION_NAME
    return parse_config(
        read_small(path, MAX_JSON_BYTES),
        read_small(generation, MAX_JSON_BYTES) if is_there(generation) else None,
        str(path),
        str(generation),
    )


def parse_config(
    config: bytes, generation: bytes | None, source: str = CONFIG_NAME, generation_source: str = GENERATION_NAME
) -> ModelConfig:
    """Return the configuration in the content of `config.json` and `generation_config.json` (None if there is none).

    The model's stop ids are those of `generation_config.json` if there is one, even if it has none, and else those of
    `config.json`. Raise InputError, naming the source and the key, if it is not a GPT-OSS model of a supported size.
    """
    result = config_from_dict(_json_object(config, source), source)
    if generation is None:
        return result
    stop_ids = _stop_ids(_json_object(generation, generation_source), result.vocab_size, generation_source)
    return dataclasses.replace(result, stop_ids=stop_ids)


def config_from_dict(raw: dict, source: str) -> ModelConfig:
    """Return the configuration in the keys of a `config.json`. Raise InputError, naming `source`, for a bad value."""
    if raw.get("model_type") != "gpt_oss":
        raise InputError(f"{source}: model_type is {raw.get('model_type')!r}, not 'gpt_oss'")
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "mxfp4":
        raise InputError(f"{source}: quantization_config is {quantization!r}, its quant_method must be 'mxfp4'")
    for key, supported in (("tie_word_embeddings", False), ("attention_bias", True), ("hidden_act", "silu")):
        if raw.get(key, supported) != supported:
            raise InputError(f"{source}: {key} is {raw[key]!r}, only {supported!r} is supported")

    def size(key: str, default: int | None = None) -> int:
        return _size(raw, key, source, default)

    for key in CHANGES_MEANING:
        if raw.get(key) is not None:
            raise InputError(f"{source}: {key} is {raw[key]!r}, it is not supported")
    n_layers = size("num_hidden_layers")
    if n_layers > MAX_LAYERS:
        raise InputError(f"{source}: num_hidden_layers is {n_layers}, at most {MAX_LAYERS} are supported")
    n_heads, n_kv_heads, head_dim = size("num_attention_heads"), size("num_key_value_heads"), size("head_dim")
    n_experts, experts_per_token = size("num_local_experts"), size("num_experts_per_tok")
    if raw.get("num_experts", n_experts) != n_experts:  # another name that transformers accepts
        raise InputError(f"{source}: num_experts is {raw['num_experts']!r}, but num_local_experts {n_experts}")
    hidden, inter, vocab = size("hidden_size"), size("intermediate_size"), size("vocab_size")
    for key, value in (("hidden_size", hidden), ("intermediate_size", inter)):
        if value % MXFP4_GROUP:
            raise InputError(f"{source}: {key} is {value}, not a multiple of {MXFP4_GROUP}")
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise InputError(f"{source}: head_dim is {head_dim}, not a power of two of at least 16")
    if n_heads % n_kv_heads:
        raise InputError(
            f"{source}: num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}"
        )
    if experts_per_token > n_experts:
        raise InputError(f"{source}: num_experts_per_tok {experts_per_token} exceeds num_local_experts {n_experts}")
    max_positions = size("max_position_embeddings", 131072)
    return ModelConfig(
        n_layers=n_layers,
        n_experts=n_experts,
        experts_per_token=experts_per_token,
        hidden_size=hidden,
        intermediate_size=inter,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        sliding_window=size("sliding_window", 128),
        layer_is_sliding=_layer_is_sliding(raw, n_layers, source),
        max_position_embeddings=max_positions,
        rms_norm_eps=_number(raw, "rms_norm_eps", source, 1e-5),
        swiglu_limit=_number(raw, "swiglu_limit", source, 7.0),
        yarn=_yarn(raw, max_positions, source),
        stop_ids=_stop_ids(raw, vocab, source),
    )


def _json_object(data: bytes, source: str) -> dict:
    raw = parse_json(data, source)
    if not isinstance(raw, dict):
        raise InputError(f"{source}: not a JSON object")
    return raw


def _size(raw: dict, key: str, source: str, default: int | None = None) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise InputError(f"{source}: {key} is {value!r}, not a positive integer")
    return value


def _number(raw: dict, key: str, source: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MAX_FLOAT32:
        raise InputError(f"{source}: {key} is {value!r}, not a positive number")
    return float(value)


def _stop_ids(raw: dict, vocab_size: int, source: str) -> tuple[int, ...]:
    """Return the stop ids inside the vocabulary; a smaller copy of a model may still list ids outside it."""
    ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise InputError(f"{source}: eos_token_id is {raw['eos_token_id']!r}, not a token id or a list of them")
    return tuple(dict.fromkeys(i for i in ids if i < vocab_size))


def _layer_is_sliding(raw: dict, n_layers: int, source: str) -> tuple[bool, ...]:
    types = raw.get("layer_types")
    if types is None:
        types = [LAYER_TYPES[layer % 2] for layer in range(n_layers)]
    if not isinstance(types, list) or len(types) != n_layers or not all(name in LAYER_TYPES for name in types):
        raise InputError(f"{source}: layer_types must hold {n_layers} of {' or '.join(map(repr, LAYER_TYPES))}")
    return tuple(name == "sliding_attention" for name in types)


def _yarn(raw: dict, max_positions: int, source: str) -> YarnConfig:
    """Return the parameters in the older `rope_scaling` if it is there and not empty, and else in `rope_parameters`.

    A `rope_theta` inside that object takes precedence over one beside it. For `original_max_position_embeddings` the
    one beside it takes precedence, and `max_position_embeddings` is the default.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "yarn":
        raise InputError(f"{source}: rope_parameters (or rope_scaling) does not describe YaRN")
    for key in ("mscale", "mscale_all_dim", "partial_rotary_factor", *LAYER_TYPES):
        if rope.get(key) is not None:
            raise InputError(f"{source}: {key} is {rope[key]!r}, it is not supported")
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise InputError(f"{source}: truncate is {truncate!r}, neither true nor false")
    theta = _number(rope if "rope_theta" in rope else raw, "rope_theta", source, 150000.0)
    if theta <= 1.0:
        raise InputError(f"{source}: rope_theta is {theta!r}, not above 1")
    beta_fast, beta_slow = _number(rope, "beta_fast", source, 32.0), _number(rope, "beta_slow", source, 1.0)
    if beta_fast < beta_slow:
        raise InputError(f"{source}: beta_fast {beta_fast} is below beta_slow {beta_slow}")
    return YarnConfig(
        theta=theta,
        factor=_number(rope, "factor", source),
        original_context=_size(raw if ORIGINAL_CONTEXT in raw else rope, ORIGINAL_CONTEXT, source, max_positions),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=truncate,
        attention_factor=None if rope.get("attention_factor") is None else _number(rope, "attention_factor", source),
    )
