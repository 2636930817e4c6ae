"""Shared memory beyond what Triton allocates, for the ring of common/sm90/ring.py, which asks for it in its PTX."""

import re

from triton import knobs

REQUEST = re.compile(r"// shared memory behind Triton's own: (\d+) bytes")
ALIGNMENT = 128
HEADER = ".address_size 64\n"
SYMBOL = ".extern .shared .align 16 .b8 global_smem[];"  # as Triton writes it, into kernels that have some of their own


def install() -> None:
    """Make every kernel compiled from now on get what its PTX asks for, through Triton's hook into its stages."""
    earlier = knobs.runtime.add_stages_inspection_hook
    if getattr(earlier, "grants_requests", False):
        return

    def hook(backend, stages, options, language, capability):
        if earlier is not None:
            earlier(backend, stages, options, language, capability)
        if "ptx" in stages:
            stages["ptx"] = _granting(stages["ptx"])

    hook.grants_requests = True
    knobs.runtime.add_stages_inspection_hook = hook


def _granting(make_ptx):
    def stage(source, metadata):
        ptx = make_ptx(source, metadata)
        requests = [int(request) for request in REQUEST.findall(ptx)]
        if requests:
            metadata["shared"] = -(-metadata["shared"] // ALIGNMENT) * ALIGNMENT + max(requests)
            if SYMBOL not in ptx:
                ptx = ptx.replace(HEADER, f"{HEADER}{SYMBOL}\n", 1)
        return ptx

    return stage
