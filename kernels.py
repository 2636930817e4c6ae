"""The megakernel's phases as launches of their own, one after the other, driven by the host.

The same functions of common/phases.py as in the megakernel, so the same bits; what the grid barrier orders there, the
order of the launches orders here. For debuggers and profilers, which see a phase at a time, and to measure what a phase
costs and what one persistent kernel saves. run_triton_phased.py is its command line.
"""

from collections.abc import Callable

from gpt_oss_megakernel import MegaModel  # before Triton: it sets TRITON_INTERPRET

# isort: split
import triton
import triton.language as tl

from common import phases
from common.stream import Plan, describe_and_fill, open_stream, plan_until, shares_of
from host.launch import compile_errors, next_power_of_2


@triton.jit(do_not_specialize=["position", "n_programs"])
def embedding_kernel(w, s, position, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    token = tl.maximum(tl.load(s.tokens + position), 0)  # -1 if the position was never fed
    BLOCK_H: tl.constexpr = triton.next_power_of_2(CONFIG.hidden_size)
    phases.embed_token(w, s, token, tl.program_id(0), n_programs, CONFIG, BLOCK_H)


@triton.jit
def stream_phase(w, s, plan, layer, place, n_units, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """(a stream of one phase's n_units, the first at `place` of the layer; the plan that ends with them)."""
    plan = Plan(n_units, plan.experts, plan.n_layers, plan.shares)
    stream = open_stream(s, plan.shares, pid, layer, place, CONFIG, TUNING)
    return describe_and_fill(stream, plan, w, pid, n_programs, CONFIG, TUNING), plan


@triton.jit
def plan_of(n_layers, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    """A program's shares in a plan, whose limit each launch replaces by that of its own phase."""
    shares = shares_of(pid, n_programs, CONFIG, TUNING, QUANT)
    return plan_until(0, (tl.cast(0, tl.int32),), tl.cast(n_layers, tl.int32), 1, shares)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def qkv_kernel(w, s, layer, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    pid = tl.program_id(0)
    plan = plan_of(layer + 1, pid, n_programs, CONFIG, TUNING, QUANT)
    stream, plan = stream_phase(w, s, plan, layer, 0, plan.shares.qkv, pid, n_programs, CONFIG, TUNING)
    tile = phases.first_qkv_tile(w, layer, pid, n_programs, CONFIG, TUNING)
    phases.qkv_phase(w, s, layer, tile, stream, plan, pid, n_programs, CONFIG, TUNING)


@triton.jit(do_not_specialize=["layer", "position", "n_programs"])
def attention_kernel(
    w, s, layer, position, max_context, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr
):
    layer = tl.cast(layer, tl.int64)
    window = tl.load(s.windows + layer)
    phases.attention_phase(w, s, layer, window, position, max_context, tl.program_id(0), n_programs, CONFIG, TUNING)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def o_kernel(w, s, layer, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    pid = tl.program_id(0)
    plan = plan_of(layer + 1, pid, n_programs, CONFIG, TUNING, QUANT)
    shares = plan.shares
    stream, plan = stream_phase(w, s, plan, layer, shares.qkv, shares.o, pid, n_programs, CONFIG, TUNING)
    tile = phases.first_o_tile(w, layer, pid, n_programs, CONFIG, TUNING)
    phases.o_phase(w, s, layer, tile, stream, plan, pid, n_programs, CONFIG, TUNING)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def router_kernel(w, s, layer, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    phases.router_phase(w, s, layer, tl.program_id(0), n_programs, CONFIG, TUNING, QUANT)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def gate_up_kernel(w, s, layer, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    pid = tl.program_id(0)
    plan = plan_of(layer + 1, pid, n_programs, CONFIG, TUNING, QUANT)
    shares = plan.shares
    # Which the phase fills when it has chosen experts.
    stream = open_stream(s, shares, pid, layer, shares.qkv + shares.o, CONFIG, TUNING)
    plan = Plan(shares.gate_up, plan.experts, plan.n_layers, shares)
    phases.gate_up_phase(w, s, layer, stream, plan, pid, n_programs, CONFIG, TUNING, QUANT)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def down_kernel(w, s, layer, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    pid = tl.program_id(0)
    plan = plan_of(layer + 1, pid, n_programs, CONFIG, TUNING, QUANT)
    plan, weights = phases.choose_experts(s, plan, CONFIG, TUNING)
    shares = plan.shares
    place = shares.qkv + shares.o + shares.gate_up
    stream, plan = stream_phase(w, s, plan, layer, place, shares.down, pid, n_programs, CONFIG, TUNING)
    phases.down_phase(w, s, layer, weights, stream, plan, pid, n_programs, CONFIG, TUNING, QUANT)


@triton.jit(do_not_specialize=["want_logits", "n_programs"])
def head_kernel(w, s, want_logits, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    pid = tl.program_id(0)
    plan = plan_of(0, pid, n_programs, CONFIG, TUNING, QUANT)
    stream, plan = stream_phase(w, s, plan, 0, 0, plan.shares.head, pid, n_programs, CONFIG, TUNING)
    phases.head_phase(w, s, want_logits, stream, plan, pid, n_programs, CONFIG, TUNING)


@triton.jit(do_not_specialize=["position", "n_programs"])
def argmax_kernel(
    w, s, position, BLOCK_P: tl.constexpr, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr
):
    phases.argmax_phase(s, position, tl.program_id(0), n_programs, BLOCK_P)


class PhasedModel(MegaModel):
    """MegaModel with a launch for each phase of each layer: the same interface, tokens and logits.

    There is no grid barrier and no trace, and nothing is loaded ahead of its phase. Programs wait for each other in
    attention alone, where the splits of a long context are merged.
    """

    on_phase: Callable[[], None] | None = None  # called after each launch, which a GPU may only have queued

    def __init__(self, *args, **options):
        """As MegaModel."""
        super().__init__(*args, **options)
        with compile_errors(self.device):
            self._run(range(1), self._launch, 0, token=True, n_layers=1)  # compiles them all
        self.reset()

    def _launch(self, position: int, token: bool = False, logits: bool = False, n_layers: int | None = None) -> None:
        """The launches of a position, with `token` those of host.phases.phases_of_token in that order."""
        self._launch_phase(embedding_kernel, position)
        for layer in range(self.config.n_layers if n_layers is None else n_layers):
            self._launch_phase(qkv_kernel, layer)
            self._launch_phase(attention_kernel, layer, position, self.max_context)
            self._launch_phase(o_kernel, layer)
            self._launch_phase(router_kernel, layer)
            self._launch_phase(gate_up_kernel, layer)
            self._launch_phase(down_kernel, layer)
        if token or logits:
            self._launch_phase(head_kernel, int(logits))
        if token:
            self._launch_phase(argmax_kernel, position, next_power_of_2(self.num_programs))

    def _launch_phase(self, kernel, *arguments: int) -> None:
        kernel[self.grid](
            self.weights,
            self.state,
            *arguments,
            self.num_programs,
            CONFIG=self.compiled_config,
            TUNING=self.tuning,
            QUANT=self.quant,
            **self.tuning.options(),
        )
        if self.on_phase:
            self.on_phase()
