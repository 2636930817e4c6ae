"""What the options of command_line/options.py stand for: models, formats, paths and sampling."""

import argparse
import sys
from collections.abc import Callable

from checkpoints.checkpoint import Checkpoint
from checkpoints.config import DenseFormats, held_formats
from command_line.options import FP8_COMPONENTS, FP8_SCALES
from host.sampling import GREEDY, Sampling, new_seed
from system.errors import InputError


def load_model(make: Callable, args: argparse.Namespace, checkpoint: Checkpoint, **options):
    """Return make(checkpoint, ...), a model with what the options of add_kernel_arguments and --max-context ask for.

    With --load-rate a line on stderr says how long it took.
    """
    model = make(
        checkpoint,
        args.quant,
        args.max_context,
        num_programs=args.num_programs,
        show_progress=sys.stderr.isatty(),
        dense=dense_formats(args, checkpoint),
        **options,
    )
    if args.load_rate:
        print(model.load_rate(), file=sys.stderr)
    return model


def dense_formats(args: argparse.Namespace, checkpoint: Checkpoint) -> DenseFormats:
    """Return the formats of the dense matrices after the options of add_fp8_arguments are applied; see held_formats.

    Raise InputError if a matrix that the checkpoint holds in FP8 is requested in another format, or if --fp8-scale is
    given without a matrix to apply it to.
    """
    flags = dict.fromkeys(args.fp8_components, "--fp8-components")
    if args.fp8_attn:
        flags |= dict.fromkeys(("qkv", "o"), "--fp8-attn")
    if args.fp8_head:
        flags["head"] = "--fp8-head"
    if args.fp8_scale and not flags:
        raise InputError("--fp8-scale: which matrices? see --fp8-attn, --fp8-head and --fp8-components")
    requested = DenseFormats(**dict.fromkeys(flags, FP8_SCALES[args.fp8_scale or "row"]))
    return held_formats(checkpoint, requested, flags)


def formats_text(dense: DenseFormats) -> str:
    """Return the dense matrices that are not bfloat16 and their formats, for example "qkv o fp8-row, head fp8-32"."""
    components = {fp8: [name for name in FP8_COMPONENTS if getattr(dense, name) == fp8] for fp8 in FP8_SCALES.values()}
    return ", ".join(f"{' '.join(names)} {fp8}" for fp8, names in components.items() if names)


def path_name(quant: bool, dense: DenseFormats) -> str:
    """Return a kernel path's name as users see it: "default", "quant" or, for example, "quant, qkv o fp8-row"."""
    return ", ".join(filter(None, ("quant" if quant else "default", formats_text(dense))))


def path_of(implementation: str, quant: bool, dense: DenseFormats) -> str:
    """Return the name of another implementation's path, for example "reference" or "reference-quant"."""
    return f"{implementation}-{path_name(quant, dense)}".replace("-default", "", 1)


def paths_to_measure(args: argparse.Namespace) -> tuple[bool, ...]:
    """Return, for each path that the options of add_path_arguments select, whether it is the quantized one."""
    return (False, True) if args.both else (args.quant,)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return what the options of add_sampling_arguments ask for. Raise InputError, naming one, if it is out of range.

    Without --temperature the others must be absent, as nothing is drawn. Without --seed, args.seed becomes a new one.
    """
    if args.temperature == 0:
        for name, default in (("seed", None), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if getattr(args, name) != default:
                raise InputError(f"--{name.replace('_', '-')}: nothing is drawn without --temperature")
        return GREEDY
    if args.seed is None:
        args.seed = new_seed()
    try:
        return Sampling(args.temperature, args.seed, args.top_k, args.top_p, args.min_p)
    except InputError as error:
        name, rest = str(error).split(" ", 1)
        raise InputError(f"--{name.replace('_', '-')} {rest}") from None
