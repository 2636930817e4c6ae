"""host.shared_memory: what a kernel's PTX asks for is added to what Triton allocates."""

import pytest
from triton import knobs

from common.sm90.ring import OPEN
from host import shared_memory

REQUEST = "// shared memory behind Triton's own: {} bytes"


@pytest.fixture
def hooks(monkeypatch):
    """Remove any hook that was installed in Triton's knobs before."""
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", None)
    return knobs.runtime


def compiled(hooks, ptx: str, shared: int) -> int:
    """Return the shared memory of a kernel whose stages the hook has seen; the stages' results must not change."""
    seen = []

    def make_ptx(source, metadata):
        seen.append(source)
        return ptx

    stages = {"ttgir": lambda *_: "ttgir", "ptx": make_ptx, "cubin": lambda *_: "cubin"}
    others = {name: stage for name, stage in stages.items() if name != "ptx"}
    hooks.add_stages_inspection_hook("backend", stages, "options", "language", 90)
    assert {name: stages[name] for name in others} == others
    assert list(stages) == ["ttgir", "ptx", "cubin"]
    metadata = {"shared": shared, "name": "kernel"}
    assert stages["ptx"]("source", metadata) == ptx
    assert seen == ["source"]
    assert metadata == {"shared": metadata["shared"], "name": "kernel"}
    return metadata["shared"]


@pytest.mark.parametrize("own, rounded", [(0, 0), (1, 128), (127, 128), (128, 128), (129, 256), (9000, 9088)])
def test_a_request_follows_what_triton_has(own, rounded, hooks):
    shared_memory.install()
    assert compiled(hooks, f"first\n{REQUEST.format(1000)}\nlast", own) == rounded + 1000


@pytest.mark.parametrize("stages, stage_bytes", [(2, 8192), (8, 25600)])
def test_what_a_ring_asks_for(stages, stage_bytes, hooks):
    shared_memory.install()
    ring = 128 + stages * stage_bytes
    assert compiled(hooks, f"mov.u32 %r1, 0;\n{OPEN(stages, stage_bytes)}\nret;", 100) == 128 + ring


def test_the_largest_of_several_requests(hooks):
    shared_memory.install()
    assert compiled(hooks, "\n".join(REQUEST.format(n) for n in (2000, 30000, 700)), 0) == 30000


@pytest.mark.parametrize("ptx", ["", "ret;", "// shared memory behind Triton's own"])
def test_kernels_without_a_request_keep_what_they_have(ptx, hooks):
    shared_memory.install()
    assert compiled(hooks, ptx, 1000) == 1000


def test_backends_without_ptx_are_left_alone(hooks):
    shared_memory.install()
    stages = {"amdgcn": "stage"}
    hooks.add_stages_inspection_hook("backend", stages, "options", "language", None)
    assert stages == {"amdgcn": "stage"}


def test_an_earlier_hook_is_asked_first(hooks):
    """The earlier hook gets the same arguments, and its changes of the stages count."""
    calls = []

    def earlier(backend, stages, options, language, capability):
        calls.append((backend, options, language, capability))
        stages["ptx"] = lambda source, metadata: REQUEST.format(512)

    hooks.add_stages_inspection_hook = earlier
    shared_memory.install()
    stages, metadata = {"ptx": None}, {"shared": 128}
    hooks.add_stages_inspection_hook("backend", stages, "options", "language", 90)
    assert calls == [("backend", "options", "language", 90)]
    stages["ptx"]("source", metadata)
    assert metadata["shared"] == 640


def test_installing_twice_adds_once(hooks):
    shared_memory.install()
    hook = hooks.add_stages_inspection_hook
    shared_memory.install()
    assert hooks.add_stages_inspection_hook is hook
    assert compiled(hooks, REQUEST.format(1000), 0) == 1000


@pytest.mark.parametrize("own", [0, 100])
def test_the_memory_has_a_name_in_a_kernel_that_has_none_of_its_own(own, hooks):
    """Triton declares the name only where it allocates shared memory itself."""
    shared_memory.install()
    declaration = ".extern .shared .align 16 .b8 global_smem[];\n"
    head, body = ".version 8.7\n.target sm_90a\n.address_size 64\n", f"mov.u32 %r1, 0;\n{OPEN(2, 8192)}\nret;"
    given = head + (declaration if own else "") + body
    stages = {"ptx": lambda *_: given}
    hooks.add_stages_inspection_hook("backend", stages, "options", "language", 90)
    assert stages["ptx"]("source", {"shared": own}) == head + declaration + body
