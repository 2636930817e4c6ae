"""Generate text with one launch for each phase of each layer, and time the phases; see kernels.py."""

import host.start

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass

import numpy as np
import torch

from command_line.run import run_main
from command_line.scripts import arguments
from gpt_oss_megakernel import MegaModel
from host import cli, generation
from host.phases import PHASE_NAMES, phases_of_token
from kernels import PhasedModel
from load_model import files_of, open_model
from measure.timing import DeviceMarks, WallMarks

GPU_TOKENS, CPU_TOKENS = 33, 5  # decoded for --times; the first warms up
HOLD_CYCLES = 400_000  # GPU cycles for each launch of a token: 200 us; queuing a launch takes the host a few tens


@dataclass(frozen=True)
class Row:
    """The times of one phase, in microseconds."""

    phase: str
    launches: int  # per token
    us_per_launch: float  # median of all launches
    us_per_token: float  # sum over a token's launches, median of the tokens
    share: float  # fraction of the sum over phases


@dataclass(frozen=True)
class Times:
    """Where a token's time goes: medians over tokens, in microseconds per token."""

    rows: tuple[Row, ...]
    sum_us: float  # sum over phases
    separate_us: float  # the launches of all phases with no timing between them, as fast as the host queues them
    megakernel_us: float
    first_position: int
    n_tokens: int
    on_device: bool  # device time; False: the host's wall clock


def compare(phased: PhasedModel, mega: MegaModel, prompt_ids: list[int], generated: list[int]) -> Times:
    """Decode what follows the prompt by phases and by the megakernel, and time both.

    `phased` has been fed the prompt and gave `generated`. Raises SystemExit with a message if any tokens differ.
    """
    on_device = phased.device.type != "cpu"
    start = len(prompt_ids) - 1
    n_tokens = min(GPU_TOKENS if on_device else CPU_TOKENS, phased.max_context - start)
    list(mega.generate(prompt_ids, 1))  # to feed the prompt
    phase_ids, phase_us = time_phases(phased, prompt_ids[-1], start, n_tokens)
    separate_ids, separate_us = time_tokens(phased, prompt_ids[-1], start, n_tokens)
    mega_ids, mega_us = time_tokens(mega, prompt_ids[-1], start, n_tokens)
    n_common = min(n_tokens, len(generated))
    if not phase_ids == separate_ids == mega_ids or generated[:n_common] != mega_ids[:n_common]:
        sys.exit(f"error: separate launches gave {phase_ids}, the megakernel {mega_ids}")
    n_warm = min(1, n_tokens - 1)
    rows = table_rows(phase_us[n_warm:], phased.config.n_layers)
    return Times(
        rows=rows,
        sum_us=sum(row.us_per_token for row in rows),
        separate_us=statistics.median(separate_us[n_warm:]),
        megakernel_us=statistics.median(mega_us[n_warm:]),
        first_position=start + n_warm,
        n_tokens=n_tokens - n_warm,
        on_device=on_device,
    )


def time_tokens(model: MegaModel, token_id: int, start: int, n_tokens: int) -> tuple[list[int], list[float]]:
    """Return the ids that follow, and the microseconds of each."""
    marks = WallMarks() if model.device.type == "cpu" else DeviceMarks()
    marks.mark()
    token_ids = list(model.decode(token_id, start, n_tokens, on_launch=marks.mark))
    return token_ids, [ms * 1e3 for ms in marks.intervals_ms()]


def time_phases(model: PhasedModel, token_id: int, start: int, n_tokens: int) -> tuple[list[int], np.ndarray]:
    """Return the ids that follow, and microseconds [tokens, launches of a token], each from the previous launch's end.

    The launches are too short for the host to keep up with. So the GPU is held up before each token but the first,
    until the host has queued that token's launches.
    """
    n_launches = len(phases_of_token(model.config.n_layers))
    on_device = model.device.type != "cpu"
    marks = DeviceMarks() if on_device else WallMarks()

    def before_next_token() -> None:
        if on_device:
            torch.cuda._sleep(HOLD_CYCLES * n_launches)
        marks.mark()

    marks.mark()
    model.on_phase = marks.mark
    try:
        token_ids = list(model.decode(token_id, start, n_tokens, on_launch=before_next_token))
    finally:
        model.on_phase = None
    us = np.array(marks.intervals_ms()).reshape(n_tokens, n_launches + 1) * 1e3
    return token_ids, us[:, :-1]  # the last interval of each token is the hold


def table_rows(us: np.ndarray, n_layers: int) -> tuple[Row, ...]:
    """Return a row for each phase from microseconds [tokens, phases_of_token(n_layers)]."""
    phases = phases_of_token(n_layers)
    columns = {name: us[:, [phase.name == name for phase in phases]] for name in PHASE_NAMES}
    per_token = {name: float(np.median(times.sum(-1))) for name, times in columns.items()}
    total = sum(per_token.values())
    return tuple(
        Row(name, times.shape[1], float(np.median(times)), per_token[name], per_token[name] / total)
        for name, times in columns.items()
    )


def table_text(times: Times) -> str:
    """Format the rows, their sum, and the times of the whole token that it compares with."""
    first, last = times.first_position, times.first_position + times.n_tokens - 1
    clock = "device time between events" if times.on_device else "wall clock of an interpreter on a CPU: no claim"
    lines = [
        f"{times.n_tokens} tokens at positions {first} to {last}, medians; {clock}",
        f"{'phase':<30}{'launches':>10}{'us/launch':>14}{'us/token':>14}{'share':>9}",
    ]
    lines += [
        f"{row.phase:<30}{row.launches:>10}{row.us_per_launch:>14.2f}{row.us_per_token:>14.2f}{row.share:>9.1%}"
        for row in times.rows
    ]
    n_launches = sum(row.launches for row in times.rows)
    lines += [
        f"{'sum':<30}{n_launches:>10}{'':>14}{times.sum_us:>14.2f}{1:>9.1%}",
        f"{'as the host launches them':<30}{n_launches:>10}{'':>14}{times.separate_us:>14.2f}",
        f"{'megakernel, the same tokens':<30}{1:>10}{'':>14}{times.megakernel_us:>14.2f}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Generate the text that the command line asks for, and time it with --times."""
    args = arguments("run_triton_phased.py")
    generation.check_outputs(args)
    checkpoint, tokenizer = open_model(args)
    config = checkpoint.config
    prompt_ids = generation.prompt_ids_from(args, tokenizer, config)
    with generation.logits_writer(args.logits_out, config.vocab_size, files_of(checkpoint)) as on_logits:
        dense = cli.dense_formats(args, checkpoint)
        options = {"max_context": args.max_context, "num_programs": args.num_programs, "dense": dense}
        model = PhasedModel(checkpoint, args.quant, show_progress=sys.stderr.isatty(), **options)
        mega = MegaModel(checkpoint, args.quant, weights=model.weights, **options) if args.times else None
        if args.load_rate:
            print(model.load_rate(), file=sys.stderr)
        path = cli.path_of("phased", args.quant, model.config.dense)
        answer = generation.print_answer(args, model, path, prompt_ids, tokenizer, on_logits)
    if mega is not None:
        times = compare(model, mega, prompt_ids, answer.token_ids)
        print(json.dumps(dataclasses.asdict(times)) if args.json else f"\n{table_text(times)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
