"""Give kernels shared memory beyond Triton's own, for the ring of common/sm90/ring.py, which requests it in its PTX."""

import re

from triton import knobs

REQUEST = re.compile(r"// shared memory behind Triton's own: (\d+) bytes")
ALIGNMENT = 128
HEADER = ".address_size 64\n"
SYMBOL = ".extern .shared .align 16 .b8 global_smem[];"  # Triton writes it into kernels that use shared memory


def install() -> None:
    """Grant the shared memory that a kernel's PTX requests to all kernels compiled from now on, by Triton's hook."""
    earlier = knobs.runtime.add_stages_inspection_hook
    if getattr(earlier, "grants_requests", False):
        return

    def hook(backend, stages, options, language, capability):
        if earlier is not None:
            earlier(backend, stages, options, language, capability)
        if "ptx" in stages:
            stages["ptx"] = _grant_requests(stages["ptx"])

    hook.grants_requests = True
    knobs.runtime.add_stages_inspection_hook = hook


def _grant_requests(make_ptx):
    """Wrap Triton's PTX stage so that the kernel's metadata includes the requested bytes."""

    def stage(source, metadata):
        ptx = make_ptx(source, metadata)
        requests = [int(request) for request in REQUEST.findall(ptx)]
        if requests:
            metadata["shared"] = -(-metadata["shared"] // ALIGNMENT) * ALIGNMENT + max(requests)
            if SYMBOL not in ptx:
                ptx = ptx.replace(HEADER, f"{HEADER}{SYMBOL}\n", 1)
        return ptx

    return stage
