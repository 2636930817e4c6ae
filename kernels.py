"""Launch the megakernel's phases one by one from the host.

The launches call the megakernel's own phases, so that all bits agree; their order replaces the grid barriers. This is
for debuggers and profilers, which see one phase at a time, and to measure what a phase costs and what one persistent
kernel saves. run_triton_phased.py is its command line.
"""

import host.start

from collections.abc import Callable

import triton
import triton.language as tl

import gpt_oss_megakernel as phases
from common.barrier import LAYER_BARRIERS
from common.experts import no_choice
from gpt_oss_megakernel import MegaModel
from host.compilers import compile_errors


@triton.jit
def context_of(w, s, position, max_context, n_layers, n_programs, BUILD: tl.constexpr):
    """Return a Context of a model with n_layers layers whose LM head is wanted."""
    return phases.open_context(w, s, position, max_context, n_layers, 1, n_programs, BUILD, ())


@triton.jit(do_not_specialize=["position", "n_programs"])
def embedding_kernel(w, s, position, n_programs, BUILD: tl.constexpr):
    phases.embedding_phase(context_of(w, s, position, 0, 0, n_programs, BUILD), BUILD)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def qkv_kernel(w, s, layer, n_programs, BUILD: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    MATRIX: tl.constexpr = BUILD.qkv
    ctx = context_of(w, s, 0, 0, layer + 1, n_programs, BUILD)
    feed = BUILD.machine.feed.open_phase(ctx, layer, MATRIX, no_choice(), BUILD)
    phases.qkv_phase(ctx, layer, feed, BUILD)


@triton.jit(do_not_specialize=["layer", "position", "n_programs"])
def attention_kernel(w, s, layer, position, max_context, n_programs, BUILD: tl.constexpr):
    ctx = context_of(w, s, position, max_context, layer + 1, n_programs, BUILD)
    barrier = 3 + LAYER_BARRIERS * layer  # the megakernel's number, for an abort
    phases.attention_phase(ctx, tl.cast(layer, tl.int64), tl.load(s.windows + layer), barrier, BUILD)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def o_kernel(w, s, layer, n_programs, BUILD: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    MATRIX: tl.constexpr = BUILD.o
    ctx = context_of(w, s, 0, 0, layer + 1, n_programs, BUILD)
    feed = BUILD.machine.feed.open_phase(ctx, layer, MATRIX, no_choice(), BUILD)
    phases.o_phase(ctx, layer, feed, BUILD)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def router_kernel(w, s, layer, n_programs, BUILD: tl.constexpr):
    ctx = context_of(w, s, 0, 0, layer + 1, n_programs, BUILD)
    phases.router_phase(ctx, tl.cast(layer, tl.int64), BUILD)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def gate_up_kernel(w, s, layer, n_programs, BUILD: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    MATRIX: tl.constexpr = BUILD.gate_up
    ctx = context_of(w, s, 0, 0, layer + 1, n_programs, BUILD)
    feed = BUILD.machine.feed.open_phase(ctx, layer, MATRIX, no_choice(), BUILD)
    phases.gate_up_phase(ctx, layer, feed, BUILD)


@triton.jit(do_not_specialize=["layer", "n_programs"])
def down_kernel(w, s, layer, n_programs, BUILD: tl.constexpr):
    layer = tl.cast(layer, tl.int64)
    MATRIX: tl.constexpr = BUILD.down
    ctx = context_of(w, s, 0, 0, layer + 1, n_programs, BUILD)
    choice = phases.choose_experts(ctx, BUILD)
    feed = BUILD.machine.feed.open_phase(ctx, layer, MATRIX, choice, BUILD)
    phases.down_phase(ctx, layer, choice, feed, BUILD)


@triton.jit(do_not_specialize=["position", "want_logits", "n_programs"])
def head_kernel(w, s, position, want_logits, n_programs, BUILD: tl.constexpr):
    MATRIX: tl.constexpr = BUILD.lm_head
    ctx = context_of(w, s, position, 0, 0, n_programs, BUILD)
    feed = BUILD.machine.feed.open_phase(ctx, 0, MATRIX, no_choice(), BUILD)
    phases.head_phase(ctx, want_logits, feed, BUILD)


@triton.jit(do_not_specialize=["position", "n_programs"])
def argmax_kernel(w, s, position, n_programs, BLOCK_P: tl.constexpr, BUILD: tl.constexpr):
    phases.argmax_phase(context_of(w, s, position, 0, 0, n_programs, BUILD), BUILD, BLOCK_P)


class PhasedModel(MegaModel):
    """MegaModel with a launch for each phase of each layer; interface, tokens and logits are the same.

    There are no grid barriers and no trace, and nothing is loaded ahead of its phase. Programs wait for each other only
    in attention, where the splits of a long context are merged.
    """

    on_phase: Callable[[], None] | None = None  # called after each launch, which a GPU may only have queued

    def __init__(self, *args, **options):
        """Load the model with MegaModel's arguments, and compile all kernels."""
        super().__init__(*args, **options)
        with compile_errors(self.device):
            self._run(range(1), self._launch, 0, token=True, n_layers=1)  # compiles all kernels
        self.reset()

    def _launch(self, position: int, token: bool = False, logits: bool = False, n_layers: int | None = None) -> None:
        """Launch the phases of a position; with `token` these are host.phases.phases_of_token, in that order."""
        self._launch_phase(embedding_kernel, position)
        for layer in range(self.config.n_layers if n_layers is None else n_layers):
            self._launch_phase(qkv_kernel, layer)
            self._launch_phase(attention_kernel, layer, position, self.max_context)
            self._launch_phase(o_kernel, layer)
            self._launch_phase(router_kernel, layer)
            self._launch_phase(gate_up_kernel, layer)
            self._launch_phase(down_kernel, layer)
        if token or logits:
            self._launch_phase(head_kernel, position, int(logits))
        if token:
            self._launch_phase(argmax_kernel, position, BLOCK_P=triton.next_power_of_2(self.num_programs))

    def _launch_phase(self, kernel, *arguments: int, **constants: int) -> None:
        kernel[self.grid](
            self.weights,
            self.state,
            *arguments,
            self.num_programs,
            BUILD=self.build,
            **constants,
            **self.tuning.options(),
        )
        if self.on_phase:
            self.on_phase()
