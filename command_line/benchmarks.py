"""Options of bench_tpot.py and bench_islosl.py, with what they measure unless told otherwise."""

import argparse
from dataclasses import dataclass

from command_line.options import add_gpus_arguments, add_report_arguments
from command_line.parser import positive_int

GPU_CONTEXTS, GPU_STEPS = (128, 2048, 8192, 32768, 131072), 64
CPU_CONTEXTS, CPU_STEPS = (64,), 12
GPU_CONFIGS = "100:100,1024:100,1024:1024,2048:2048,8192:128"
CPU_CONFIGS = "16:8,64:8"
GPU_REPEATS, CPU_REPEATS = 5, 2


def add_context_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --contexts, --steps, --repeats, --num-programs, --gpus, --layout, --json and --plot."""
    parser.add_argument(
        "--contexts",
        metavar="N,N,...",
        type=context_list,
        help=f"default: of {','.join(map(str, GPU_CONTEXTS))} those that fit; {CPU_CONTEXTS[0]} on a CPU",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=positive_int,
        help=f"tokens a run, 2 or more; default: {GPU_STEPS}, CPU {CPU_STEPS}",
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=positive_int,
        help=f"runs that count, after one that warms up; default: {GPU_REPEATS}, CPU {CPU_REPEATS}",
    )
    parser.add_argument("--num-programs", metavar="N", type=positive_int, help="default: all that are resident at once")
    add_gpus_arguments(parser)
    add_report_arguments(parser, "time over context")


def context_list(text: str) -> tuple[int, ...]:
    """Parse positive integers separated by commas, without repetitions, for argparse."""
    return tuple(dict.fromkeys(positive_int(word.strip()) for word in text.split(",")))


@dataclass(frozen=True)
class Shape:
    """The size of a request: 1024:100 stands for 1024 input and 100 output tokens."""

    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.input_tokens}:{self.output_tokens}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Parse INPUT:OUTPUT, for argparse."""
        words = text.split(":")
        if len(words) != 2:
            raise argparse.ArgumentTypeError(f"{text!r} is not INPUT:OUTPUT, such as 1024:100")
        return cls(*map(positive_int, words))

    @property
    def positions(self) -> int:
        """The number of positions that the KV cache needs."""
        return self.input_tokens + self.output_tokens


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --configs, --repeats, --gpus, --layout, --json and --plot."""
    parser.add_argument(
        "--configs",
        metavar="INPUT:OUTPUT,...",
        type=shape_list,
        help=f"tokens of a prompt and of its answer; default: {GPU_CONFIGS}, CPU {CPU_CONFIGS}",
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=positive_int,
        help=f"requests that count, after one that warms up; default: {GPU_REPEATS}, CPU {CPU_REPEATS}",
    )
    add_gpus_arguments(parser)
    add_report_arguments(parser, "TTFT over prompt length")


def shape_list(text: str) -> tuple[Shape, ...]:
    """Parse shapes separated by commas, without repetitions, for argparse."""
    return tuple(dict.fromkeys(Shape.parse(word.strip()) for word in text.split(",")))
