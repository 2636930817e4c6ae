"""GPT-OSS in plain PyTorch: the definition of the model that the kernel is tested against.

All arithmetic is float32 by default. K (after RoPE) and V are rounded to the cache's type when they enter it, and the
rounded values are used everywhere, also by the token's own query. With `quant` the input of each expert matrix (the
normed hidden state, the SwiGLU output) is also rounded to MXFP8. With `dense` the dense matrices, but no activations,
are rounded to E4M3 with scales.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from checkpoints.checkpoint import check_unchanged
from checkpoints.config import BF16, DenseFormats, ModelConfig, check_token, expected_tensors, held_formats, scale_name
from checkpoints.fp8 import dequantize_fp8, quantize_fp8
from host.rope import rope_tables
from system.arguments import boolean, function_or_none, instance, integer, integer_or_none, integers
from system.errors import InputError, LogitsNotFinite
from system.turns import Turns, exclusive

# OCP Microscaling Formats v1.0: an E2M1 nibble is sign, two exponent bits, a mantissa bit; an E8M0 byte 2^(byte - 127).
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_VALUES = (*(2.0 ** (byte - 127) for byte in range(255)), math.nan)
MXFP8_GROUP = 32
E4M3_MAX = 448.0
E4M3_MAX_EXPONENT = 8  # 448 = 1.75 * 2^8

Recorder = Callable[[str, Tensor], None]

KEEP_BYTES = 2**30  # a model below this size is dequantized once and kept


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [..., hidden] divided by its root mean square, times weight [hidden]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [tokens, heads, head_dim] by cos and sin [tokens, head_dim / 2]; i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, window: int, sm_scale: float) -> Tensor:
    """Attend causally with the last tokens of a sequence to all of it: float [tokens, n_heads * head_dim].

    q [tokens, n_heads, head_dim] belongs to the last `tokens` of keys and values [n_keys, n_kv_heads, head_dim]. A
    query sees `window` keys, its own included; 0 means all up to its own. A head's sink, of sinks [n_heads], is one
    more logit: it is not scaled, takes its share of the softmax, and has no value.
    """
    tokens, n_heads, head_dim = q.shape
    n_keys, n_kv_heads, _ = keys.shape
    age = torch.arange(n_keys - tokens, n_keys, device=q.device)[:, None] - torch.arange(n_keys, device=q.device)
    visible = (age >= 0) & (age < (window or n_keys))
    grouped = q.view(tokens, n_kv_heads, n_heads // n_kv_heads, head_dim)
    logits = torch.einsum("tghd,kgd->ghtk", grouped, keys) * sm_scale
    logits = logits.masked_fill(~visible, -math.inf)
    sinks = sinks.view(n_kv_heads, -1, 1, 1).expand(-1, -1, tokens, 1)
    weights = torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("ghtk,kgd->tghd", weights, values).reshape(tokens, n_heads * head_dim)


def route(router_logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Return the experts chosen by router_logits [tokens, n_experts], int64, and weights: [tokens, experts_per_token].

    The largest logits are chosen, the lower index on a tie, in descending order; the softmax is over these alone.
    """
    values, indices = router_logits.sort(dim=-1, descending=True, stable=True)
    return indices[:, :experts_per_token], values[:, :experts_per_token].softmax(-1)


def swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """Return gate * sigmoid(alpha * gate) * (up + 1); gate is clamped only from above, up from both sides."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return float32 [..., K], exactly, of blocks uint8 [..., K / 32, 16] and scales uint8 [..., K / 32].

    The low nibble of a byte is the even element.
    """
    values = torch.tensor(E2M1_VALUES, device=blocks.device)
    nibbles = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    return (values[nibbles.int()] * _e8m0_to_float(scales)[..., None]).flatten(-2)


def mxfp8_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize float32 [..., K]: return elements float8_e4m3fn [..., K] and scales uint8 (E8M0) [..., K / 32].

    OCP MX v1.0, section 6.3: the shared exponent is floor(log2(max|x|)) - 8 and at least -127; the elements are
    x / 2^exponent, saturated to +-448 and rounded to nearest even. NaN stays NaN.
    """
    groups = x.float().unflatten(-1, (-1, MXFP8_GROUP))
    biased_exponent = groups.abs().amax(-1).view(torch.int32) >> 23  # of float32: floor(log2) + 127, 0 if subnormal
    scales = (biased_exponent - E4M3_MAX_EXPONENT).clamp(min=0).to(torch.uint8)
    inverse = _e8m0_to_float(254 - scales)[..., None]
    # clamped, as the cast alone saturates in some versions of PyTorch and gives NaN in others
    elements = (groups * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return elements.flatten(-2), scales


def quantize_mxfp8(x: Tensor) -> Tensor:
    """Return float32 x [..., K] rounded to MXFP8, as float32."""
    elements, scales = mxfp8_bytes(x)
    return (elements.float().unflatten(-1, (-1, MXFP8_GROUP)) * _e8m0_to_float(scales)[..., None]).flatten(-2)


def _e8m0_to_float(scales: Tensor) -> Tensor:
    return torch.tensor(E8M0_VALUES, dtype=torch.float32, device=scales.device)[scales.int()]


class MxFp4Matrices:
    """The MXFP4 matrices of all experts; indexing by expert dequantizes a float matrix [rows, K], or several."""

    def __init__(self, blocks: Tensor, scales: Tensor, device: torch.device, dtype: torch.dtype):
        self._blocks, self._scales, self._device, self._dtype = blocks, scales, device, dtype

    def __getitem__(self, expert: int) -> Tensor:
        blocks, scales = self._blocks[expert].to(self._device), self._scales[expert].to(self._device)
        return dequantize_mxfp4(blocks, scales).to(self._dtype)


def expert_activations(
    x: Tensor, chosen: Tensor, gate_up: Tensor | MxFp4Matrices, bias: Tensor, config: ModelConfig
) -> Tensor:
    """Return SwiGLU outputs [tokens, top_k, intermediate] of the chosen experts [tokens, top_k] for x [tokens, hidden].

    Of gate_up [n_experts, 2 * intermediate, hidden] and bias [n_experts, 2 * intermediate] even rows are gate rows and
    odd rows up rows.
    """
    act = x.new_empty(*chosen.shape, config.intermediate_size)
    for expert in chosen.unique().tolist():
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        rows = linear(x[token], gate_up[expert], bias[expert])
        act[token, rank] = swiglu(rows[:, 0::2], rows[:, 1::2], config.swiglu_limit, config.swiglu_alpha)
    return act


def combine_experts(act: Tensor, chosen: Tensor, weights: Tensor, down: Tensor | MxFp4Matrices, bias: Tensor) -> Tensor:
    """Return down projections of act [tokens, top_k, intermediate] summed with the router's weights: [tokens, hidden].

    down is [n_experts, hidden, intermediate]; bias [n_experts, hidden] is weighted too.
    """
    out = act.new_zeros(act.shape[0], bias.shape[-1])
    for expert in chosen.unique().tolist():
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        rows = linear(act[token, rank], down[expert], bias[expert])
        out[token] += weights[token, rank, None] * rows
    return out


_precision = threading.RLock()  # held while the process has another precision than the user set


def full_float32(function: Callable) -> Callable:
    """Run `function` without TF32, whatever the process has set; threads wait for each other."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with _precision:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                return function(*args, **kwargs)
            finally:
                torch.set_float32_matmul_precision(before)

    return wrapper


def _ignore(name: str, value: Tensor) -> None:
    pass


class Weights:
    """A checkpoint's dequantized tensors on a device: kept if the model is small, else read at each use."""

    def __init__(self, checkpoint, config: ModelConfig, device: torch.device, dtype: torch.dtype, dense: DenseFormats):
        self._checkpoint, self._device, self._dtype, self._dense = checkpoint, device, dtype, dense
        values = sum((2 if kind == "U8" else 1) * math.prod(shape) for shape, kind in expected_tensors(config).values())
        self._kept = {} if values * dtype.itemsize < KEEP_BYTES else None

    def tensor(self, name: str) -> Tensor:
        def read() -> Tensor:
            tensor = self._checkpoint.tensor(name).to(self._device)
            if tensor.dtype == torch.float8_e4m3fn:
                scales = self._checkpoint.tensor(scale_name(name)).to(self._device)
                tensor = dequantize_fp8(tensor, scales)
            elif (dense_format := self._dense.format_of(name)) != BF16:
                tensor = dequantize_fp8(*quantize_fp8(tensor, dense_format))
            return tensor.to(self._dtype)

        return self._keep(name, read)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Return some rows of a matrix; without converting the whole matrix, unless it is kept."""
        if self._kept is not None:
            return self.tensor(name)[indices]
        matrix = self._checkpoint.tensor(name)
        return matrix[indices.to(matrix.device)].to(self._device, self._dtype)

    def expert_matrices(self, name: str) -> Tensor | MxFp4Matrices:
        """Return experts' matrices whose [expert] is a float matrix; `name` has no _blocks or _scales."""

        def read() -> MxFp4Matrices:
            blocks, scales = self._checkpoint.tensor(f"{name}_blocks"), self._checkpoint.tensor(f"{name}_scales")
            return MxFp4Matrices(blocks, scales, self._device, self._dtype)

        return read() if self._kept is None else self._keep(name, lambda: read()[:])

    def _keep(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        if self._kept is None:
            return read()
        if name not in self._kept:
            self._kept[name] = read()
        return self._kept[name]


class Reference:
    """The model with a KV cache for one sequence.

    The cache is zero after construction and reset(). A token at a position sees all earlier positions (in a sliding
    layer those in its window); positions that were never fed have zero keys and values, as in the kernel. MegaModel
    documents how threads and generators may share a model.
    """

    def __init__(
        self,
        checkpoint,
        quant: bool = False,
        kv_dtype: torch.dtype | None = torch.bfloat16,
        max_context: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        n_layers: int | None = None,
        dense: DenseFormats | None = None,
    ):
        """Load a model from `checkpoint`, anything with .config and .tensor(name).

        kv_dtype: the cache's type; None keeps K and V unrounded. dense: formats that dense matrices are rounded to, see
        checkpoints/fp8.py; by default they stay in bfloat16 or as an archive has them. max_context: positions of the
        cache. device: that of the arithmetic, the CPU by default. n_layers: use only so many, the first ones.

        Raise InputError if an archive has dense matrices in other formats than `dense`, TypeError for an argument of
        the wrong type.
        """
        if not hasattr(checkpoint, "config"):
            raise TypeError(f"checkpoint must be an open one, not {type(checkpoint).__name__}")
        instance(dense, DenseFormats, "dense")
        for value, name in ((kv_dtype, "kv_dtype"), (dtype, "dtype")):
            instance(value, torch.dtype, name)
            if value is not None and not value.is_floating_point:
                raise InputError(f"{name} {value}: a floating point type")
        max_context, n_layers = integer(max_context, "max_context", minimum=1), integer_or_none(n_layers, "n_layers")
        boolean(quant, "quant")
        self.turns = Turns()
        self.config = checkpoint.config if n_layers is None else checkpoint.config.cut(n_layers)
        self._checkpoint = checkpoint
        self.quant, self.dtype, self.max_context = quant, dtype, max_context
        instance(device, torch.device | str, "device")
        self.device = torch.device("cpu" if device is None else device)
        self._weights = Weights(checkpoint, self.config, self.device, dtype, held_formats(checkpoint, dense))
        self._cos, self._sin = (table.to(dtype) for table in rope_tables(self.config, max_context, self.device))
        shape = (self.config.n_layers, max_context, self.config.n_kv_heads, self.config.head_dim)
        self.keys = torch.zeros(shape, dtype=kv_dtype or dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)

    @exclusive
    def reset(self) -> None:
        """Forget the sequence."""
        self.turns.take()
        self._forget()

    def _forget(self) -> None:
        self.keys.zero_()
        self.values.zero_()

    @exclusive
    def forward(self, token_ids: Iterable[int], position: int = 0, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Return logits [tokens, vocab_size] after each of the tokens, in the reference's dtype, float32 by default.

        The tokens are at position, position + 1, ...; their keys and values enter the cache. `trace` receives
        intermediates by name, under "layers.{n}.": qkv (with biases, before RoPE) [tokens, qkv_size], attention
        (before the output projection) [tokens, q_size], attn_residual (hidden state after it) [tokens, hidden],
        router_logits [tokens, n_experts], expert_act (before quantization) [tokens, top_k, intermediate], output
        (hidden state after the layer) [tokens, hidden].

        Raise InputError if a position exceeds max_context, a token is outside the vocabulary, or a file of the
        checkpoint was changed since it was opened; TypeError if positions or tokens are not integers.
        """
        token_ids, position = integers(token_ids, "token_ids"), integer(position, "position")
        self._check_fit(token_ids, position)
        self.turns.take()
        return self._forward(token_ids, position, trace)

    @torch.no_grad()
    @full_float32
    def _forward(self, token_ids: list[int], position: int, trace: dict[str, Tensor] | None = None) -> Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self.device)
        record = _ignore if trace is None else trace.__setitem__
        weight = self._weights.tensor
        x = self._weights.rows("model.embed_tokens.weight", ids)
        for layer in range(self.config.n_layers):
            x = self._attention_block(layer, x, position, record)
            x = self._expert_block(layer, x, record)
            record(f"layers.{layer}.output", x)
        logits = linear(rms_norm(x, weight("model.norm.weight"), self.config.rms_norm_eps), weight("lm_head.weight"))
        check_unchanged(self._checkpoint)
        return logits

    def generate(
        self, prompt_ids: Iterable[int], max_new_tokens: int, on_logits: Callable[[Tensor], None] | None = None
    ) -> Iterator[int]:
        """Start a new sequence and yield greedy tokens until a stop id, which is yielded too, or a full context.

        On a tie the lowest id wins. `on_logits` receives the logits [vocab_size] of each position fed, also the
        prompt's. Raise InputError if logits are not finite, and what `forward` raises.
        """
        prompt_ids = integers(prompt_ids, "prompt_ids")
        max_new_tokens = integer(max_new_tokens, "max_new_tokens", minimum=0)
        function_or_none(on_logits, "on_logits")
        if not prompt_ids:
            raise InputError("the prompt is empty")
        self._check_fit(prompt_ids, 0)
        return self._generate(prompt_ids, max_new_tokens, on_logits)

    def _generate(
        self, fed: list[int], max_new_tokens: int, on_logits: Callable[[Tensor], None] | None
    ) -> Iterator[int]:
        turn, position = self._begin(), 0
        for _ in range(max_new_tokens):
            if position + len(fed) > self.max_context:
                return
            logits = self._go_on(turn, fed, position)
            rows = logits if on_logits is not None else logits[-1:]
            position += len(fed)
            for n, row in enumerate(rows, position - len(rows)):
                if not row.isfinite().all():
                    raise LogitsNotFinite(n)
                if on_logits is not None:
                    on_logits(row)
            fed = [int(logits[-1].argmax())]  # the first one on a tie
            yield fed[0]
            if fed[0] in self.config.stop_ids:
                return

    @exclusive
    def _begin(self) -> int:
        self._forget()
        return self.turns.take()

    @exclusive
    def _go_on(self, turn: int, token_ids: list[int], position: int) -> Tensor:
        self.turns.check(turn)
        return self._forward(token_ids, position)

    def _check_fit(self, token_ids: list[int], position: int) -> None:
        """Raise InputError unless positions from `position` on are in the context, and tokens in the vocabulary."""
        if position < 0 or position + len(token_ids) > self.max_context:
            raise InputError(
                f"positions {position} to {position + len(token_ids) - 1} "
                f"do not fit a context of {self.max_context} tokens"
            )
        for token_id in token_ids:
            check_token(token_id, self.config)

    def _attention_block(self, layer: int, x: Tensor, position: int, record: Recorder) -> Tensor:
        config, tokens, end = self.config, len(x), position + len(x)
        weight, attn = self._weights.tensor, f"model.layers.{layer}.self_attn"
        normed = rms_norm(x, weight(f"model.layers.{layer}.input_layernorm.weight"), config.rms_norm_eps)
        q, k, v = (
            linear(normed, weight(f"{attn}.{p}_proj.weight"), weight(f"{attn}.{p}_proj.bias")).view(
                tokens, -1, config.head_dim
            )
            for p in "qkv"
        )
        record(f"layers.{layer}.qkv", torch.cat((q, k, v), dim=1).flatten(1))
        cos, sin = self._cos[position:end], self._sin[position:end]
        self.keys[layer, position:end] = apply_rope(k, cos, sin).to(self.keys.dtype)
        self.values[layer, position:end] = v.to(self.values.dtype)
        window = config.window(layer)
        oldest = max(0, position - window + 1) if window else 0
        keys, values = self.keys[layer, oldest:end].to(x.dtype), self.values[layer, oldest:end].to(x.dtype)
        mixed = attention(apply_rope(q, cos, sin), keys, values, weight(f"{attn}.sinks"), window, config.sm_scale)
        record(f"layers.{layer}.attention", mixed)
        x = x + linear(mixed, weight(f"{attn}.o_proj.weight"), weight(f"{attn}.o_proj.bias"))
        record(f"layers.{layer}.attn_residual", x)
        return x

    def _expert_block(self, layer: int, x: Tensor, record: Recorder) -> Tensor:
        config, weight, mlp = self.config, self._weights.tensor, f"model.layers.{layer}.mlp"
        matrices = self._weights.expert_matrices
        normed = rms_norm(x, weight(f"model.layers.{layer}.post_attention_layernorm.weight"), config.rms_norm_eps)
        router_logits = linear(normed, weight(f"{mlp}.router.weight"), weight(f"{mlp}.router.bias"))
        record(f"layers.{layer}.router_logits", router_logits)
        chosen, weights = route(router_logits, config.experts_per_token)
        quantize = self._quantize if self.quant else lambda values: values
        gate_up, bias = matrices(f"{mlp}.experts.gate_up_proj"), weight(f"{mlp}.experts.gate_up_proj_bias")
        act = expert_activations(quantize(normed), chosen, gate_up, bias, config)
        record(f"layers.{layer}.expert_act", act)
        down, bias = matrices(f"{mlp}.experts.down_proj"), weight(f"{mlp}.experts.down_proj_bias")
        return x + combine_experts(quantize(act), chosen, weights, down, bias)

    def _quantize(self, x: Tensor) -> Tensor:
        return quantize_mxfp8(x).to(self.dtype)
