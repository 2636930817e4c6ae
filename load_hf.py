"""Find a GPT-OSS checkpoint in the published layout, check it, and read its tensors one at a time."""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from huggingface_hub import HfApi, constants, errors, get_session, snapshot_download
from safetensors import SafetensorError, safe_open

from checkpoints.checkpoint import INDEX_NAME, MAX_TOKENIZER_BYTES, TOKENIZER_NAME, WEIGHTS_NAME
from checkpoints.config import CONFIG_NAME, GENERATION_NAME, ModelConfig, expected_tensors, read_config
from system.errors import InputError
from system.files import (
    LFS_POINTER_START,
    FileState,
    check_same,
    file_state,
    is_there,
    json_value,
    open_regular,
    path_of,
    read_small,
    refuse_lfs_pointer,
)
from system.mapped import name_on_bus_error, release_pages
from system.slow_network import TooSlow, watch

HUB_REPLY_SECONDS = 10.0
SMALL_FILES = (CONFIG_NAME, GENERATION_NAME, TOKENIZER_NAME, INDEX_NAME)
# What else repositories in this layout hold.
COMPANIONS = (
    *SMALL_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "USAGE_POLICY",
)
MAX_INDEX_BYTES = 16 << 20  # that of gpt-oss-120b has 50 KB, one of the most layers that are taken would have 3 MB
MAX_HEADER_BYTES = 16 << 20  # of a shard; all of gpt-oss-120b's have 100 KB
MAX_REF_BYTES = 4096  # of a commit's 40
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class HFCheckpoint:
    """A checkpoint folder whose tensors were all checked against its configuration, but not read yet.

    Tensors are views of the memory-mapped file, so host memory holds only the pages in use; a shard stays mapped for as
    long as one of its tensors is alive. They are bfloat16 or uint8, but for norms and sinks that are stored as float32,
    and stay so. Biases stored as float32 come as bfloat16, rounded to nearest even, which are copies.

    `tensors`, at the end of each shard, and check_unchanged raise InputError if it was written to, or replaced, since
    the checkpoint was opened.
    """

    name: str
    folder: Path
    config: ModelConfig
    shards: dict[str, tuple[str, ...]]  # shard file name -> the tensors to read from it, in the order of the file
    states: dict[str, FileState]  # shard file name -> the file's state when its header was read

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of this published name. Raises KeyError if the model has no such tensor."""
        for shard, names in self.shards.items():
            if name in names:
                with self._open(shard, (name,)) as file:
                    return _as_given(name, file.get_tensor(name))
        raise KeyError(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All (name, tensor), shard by shard and in the order of the file within each."""
        for shard, names in self.shards.items():
            with self._open(shard, names) as file:
                path = str((self.folder / shard).resolve())
                for name in names:
                    tensor = file.get_tensor(name)
                    yield name, _as_given(name, tensor)
                    release_pages(tensor, path)
            self._check_shard_is_the_same(shard)

    def document(self, name: str) -> bytes | None:
        """What a file of the folder holds; None if there is none. Raises InputError."""
        path = self.folder / name
        return read_small(path, MAX_TOKENIZER_BYTES) if is_there(path) else None

    def check_unchanged(self) -> None:
        """InputError if a shard was written to, or replaced, since the checkpoint was opened."""
        for shard in self.shards:
            self._check_shard_is_the_same(shard)

    def _check_shard_is_the_same(self, shard: str) -> None:
        check_same(self.states[shard], _shard_state(self.folder / shard), self.folder / shard)

    def files(self) -> list[Path]:
        """All files that belong to it, also those that are not read: weights, configuration, tokenizer, licence."""
        names = {*COMPANIONS, *self.shards}
        return sorted({*self.folder.glob("*.safetensors*"), *(self.folder / name for name in names)})

    def _open(self, shard: str, names: tuple[str, ...]) -> safe_open:
        """InputError if these tensors are not what open_checkpoint saw: another file may have taken the place."""
        file = _open_shard(self.folder / shard)
        stored, expected = _kinds(file), expected_tensors(self.config)
        for name in names:
            if not _is_taken(name, stored.get(name), expected[name]):
                raise InputError(f"{self.folder / shard}: tensor {name} is another than when the checkpoint was opened")
        return file


def open_checkpoint(model: str | Path, n_layers: int | None = None) -> HFCheckpoint:
    """Check a checkpoint, given as a folder or a hub id, by its headers alone; no tensor is read.

    With n_layers only the first layers are used, and shards that hold nothing of them may be absent.
    `model.safetensors` counts where it is there, and no index beside it does; tensors and files that an index does not
    name are ignored, with a line on stderr. docs/checkpoints.md has all rules.
    Raises InputError, naming the file and tensor, if a tensor is missing, unknown, or of another shape or dtype,
    or if a file is missing or damaged; TypeError if `model` is no path.
    """
    folder = resolve(model)
    full = read_config(folder)
    config = full if n_layers is None else full.cut(n_layers)
    known, wanted = expected_tensors(full), expected_tensors(config)
    source, shard_of = _weight_map(folder)
    for name in shard_of:
        if name not in known:
            raise InputError(f"{source}: unknown tensor {name!r}: not part of the model that config.json describes")
    for name in wanted:
        if name not in shard_of:
            raise InputError(f"{source}: tensor {name} is missing")
    shards, states, extra = {}, {}, []
    for shard in sorted({shard_of[name] for name in wanted}):
        states[shard] = _shard_state(folder / shard)
        stored = _read_header(folder / shard)
        _check_shard(folder / shard, stored, shard_of, wanted)
        shards[shard] = tuple(name for name in stored if name in wanted)
        extra += [f"{name!r} of {shard}" for name in stored if name not in shard_of]
    named = {source.name, *shard_of.values()}
    files = {path.name for ending in (".safetensors", INDEX_NAME) for path in folder.glob(f"*{ending}")}
    ignored = [repr(name) for name in sorted(files - named)] + extra
    if ignored:
        shown = ", ".join(ignored[:3]) + (f" and {len(ignored) - 3} more" if len(ignored) > 3 else "")
        _notice(f"{folder}: ignores what {source.name} does not name: {shown}")
    return HFCheckpoint(str(model), folder, config, shards, states)


@functools.cache
def _notice(text: str) -> None:
    """Says something once, on stderr unless the program has told Python's logging otherwise."""
    logging.getLogger(__name__).warning(text)


def resolve(model: str | Path) -> Path:
    """The folder of a checkpoint, given as that folder, as a repository's folder in the hub's cache, or as `org/name`.

    A complete snapshot in the hub's cache is used without asking the network; otherwise the needed files are
    downloaded, with progress bars. Raises InputError if there is no such folder or repository.
    """
    path = path_of(model, "model")
    try:
        if path.is_dir():
            return (_cached_snapshot(path) or path) if (path / "snapshots").is_dir() else path
        if path.exists():
            raise InputError(f"{model}: is a file, not a checkpoint folder")
    except OSError as error:
        raise InputError(f"{model}: {error.strerror}") from None
    if not HUB_ID.fullmatch(str(model)):
        raise InputError(f"{str(model)!r}: no such folder, and not a hub id of the form org/name")
    repo = Path(constants.HF_HUB_CACHE) / f"models--{str(model).replace('/', '--')}"
    return _cached_snapshot(repo) or _download(str(model))


def _cached_snapshot(repo: Path) -> Path | None:
    """A complete snapshot in a repository's folder of the hub's cache: that of `main`, or else the newest.

    Whole ones go before those with a shard that was cut short, which are for open_checkpoint to complain about.
    """
    main = repo / "refs" / "main"
    try:
        snapshots = sorted((repo / "snapshots").iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
        commit = read_small(main, MAX_REF_BYTES).strip().decode("ascii", "replace") if main.is_file() else ""
    except PermissionError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    except (OSError, InputError):
        return None
    snapshots.sort(key=lambda folder: folder.name != commit)
    complete = list(filter(_is_complete, snapshots))
    return next(filter(_is_whole, complete), complete[0] if complete else None)


def _is_complete(folder: Path) -> bool:
    try:
        return not _missing_files(folder)
    except InputError:
        return False


def _is_whole(folder: Path) -> bool:
    """Whether each shard is as long as its header says."""
    try:
        for shard in set(_weight_map(folder)[1].values()):
            _read_header(folder / shard)
        return True
    except InputError:
        return False


def _missing_files(folder: Path) -> list[str]:
    """The files that a checkpoint folder should have and has not. InputError if its index is damaged."""
    needed = [CONFIG_NAME, TOKENIZER_NAME]
    if os.path.lexists(folder / WEIGHTS_NAME):
        needed.append(WEIGHTS_NAME)
    elif os.path.isfile(folder / INDEX_NAME):
        needed += dict.fromkeys(_read_index(folder / INDEX_NAME).values())
    else:
        needed.append(INDEX_NAME)
    return [name for name in needed if not os.path.isfile(folder / name)]


def _download(repo_id: str) -> Path:
    """The snapshot's folder in the hub's cache. InputError, before any weights are fetched, if it is no GPT-OSS.

    Of the weights `model.safetensors` is fetched or, where there is none, the shards of the index: the published
    repositories hold the weights twice more, in original/ and metal/.
    """
    with _hub_errors(repo_id):
        watch(get_session())
        # snapshot_download's own first request waits for ever where packets are lost without a word.
        info = HfApi().model_info(repo_id, revision="main", timeout=HUB_REPLY_SECONDS)
    folder = _fetch(repo_id, SMALL_FILES)
    read_config(folder)
    has_single = any(file.rfilename == WEIGHTS_NAME for file in info.siblings or ())
    index = folder / INDEX_NAME
    is_sharded = not has_single and os.path.isfile(index)
    _fetch(repo_id, set(_read_index(index).values()) if is_sharded else {WEIGHTS_NAME})
    missing = _missing_files(folder)
    if missing:
        raise InputError(f"{repo_id}: the repository lacks {missing[0]}")
    return folder


def _fetch(repo_id: str, file_names: Collection[str]) -> Path:
    with _hub_errors(repo_id):
        return Path(snapshot_download(repo_id, allow_patterns=list(file_names)))


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Whatever the hub's client raises comes as an InputError."""
    failure = f"{repo_id}: no such folder, and not to be had from the Hugging Face hub"
    unreachable = f"{repo_id}: no such folder, not in the hub's cache, and the Hugging Face hub cannot be reached"
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(f"{failure}: access is gated; accept its terms there and run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{failure}: no such repository, or a private one") from None
    except TooSlow as error:
        raise InputError(f"{failure}: it sends too slowly ({error})") from None
    except (httpx.TransportError, errors.OfflineModeIsEnabled) as error:
        raise InputError(f"{unreachable} ({_first_line(error)})") from None
    except Exception as error:  # noqa: BLE001 - the hub client lets the errors of its transports and of its checks through
        raise InputError(f"{failure}: {_first_line(error)}") from None


def _weight_map(folder: Path) -> tuple[Path, dict[str, str]]:
    """The file that lists the tensors, and for each tensor the shard that holds it. Raises InputError.

    An index is looked at even where it does not count: one that is damaged tells of a folder that is.
    """
    index, weights = folder / INDEX_NAME, folder / WEIGHTS_NAME
    listed = _read_index(index) if is_there(index) else None
    if os.path.lexists(weights):
        return weights, dict.fromkeys(_read_header(weights), WEIGHTS_NAME)
    if listed is None:
        raise InputError(f"{folder}: holds neither {INDEX_NAME} nor {WEIGHTS_NAME}")
    return index, listed


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> name of the shard, which is a plain file name. Raises InputError."""
    data = read_small(index, MAX_INDEX_BYTES)
    try:
        raw = json_value(data, unique_keys=True)
    except ValueError as error:
        raise InputError(f"{index}: not valid JSON ({_first_line(error)})") from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: holds no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or shard in ("", ".", "..") or not shard.isprintable():
            raise InputError(f"{index}: tensor {name!r} lies in {shard!r}, which names no file of this folder")
    return weight_map


def _open_shard(path: Path) -> safe_open:
    """Maps the file; get_tensor then gives views of it. Raises InputError."""
    if os.path.exists(path):  # Path.exists lets a name that is too long through as an OSError
        _check_header(path)
        name_on_bus_error(str(path))
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, though the checkpoint lists it") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({_first_line(error)})") from None


def _shard_state(path: Path) -> FileState:
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file, though the checkpoint lists it")
    return file_state(path)


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of each tensor of a shard, in the order of the file. Raises InputError."""
    with _open_shard(path) as file:
        return _kinds(file)


def _kinds(file: safe_open) -> dict[str, tuple[tuple[int, ...], str]]:
    slices = {name: file.get_slice(name) for name in file.offset_keys()}
    return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _check_header(path: Path) -> None:
    """InputError for what safetensors takes: a header that fills memory, and the last of several tensors of a name."""
    with open(open_regular(path), "rb") as file:
        try:
            refuse_lfs_pointer(file.read(len(LFS_POINTER_START)), path)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes, at most {MAX_HEADER_BYTES} are expected")
            json_value(file.read(length), unique_keys=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({_first_line(error)})") from None


def _check_shard(
    path: Path,
    stored: dict[str, tuple[tuple[int, ...], str]],
    shard_of: dict[str, str],
    wanted: dict[str, tuple[tuple[int, ...], str]],
) -> None:
    """InputError if the shard does not hold all that the index says, or a wanted tensor is of another kind.

    It may hold what the index does not list, but nothing that lies in another shard.
    """
    for name in stored:
        if shard_of.get(name, path.name) != path.name:
            raise InputError(f"{path}: holds tensor {name!r}, but the index places it in {shard_of[name]}")
    for name, shard in shard_of.items():
        if shard == path.name and name not in stored:
            raise InputError(f"{path}: tensor {name} is missing, though the index places it there")
    for name, (shape, dtype) in stored.items():
        if name in wanted and not _is_taken(name, (shape, dtype), wanted[name]):
            expected_shape, expected_dtype = wanted[name]
            raise InputError(
                f"{path}: tensor {name} is {dtype} {list(shape)}, expected {expected_dtype} {list(expected_shape)}"
            )


def _is_taken(name: str, stored: tuple | None, expected: tuple) -> bool:
    """Whether a tensor of this (shape, dtype) can be had in the published one: see _as_given."""
    (shape, dtype), others = expected, ()
    if name.endswith("_scales"):
        others = ("F8_E8M0",)
    elif name.endswith(("norm.weight", "sinks", "bias")):
        others = ("F32",)
    return stored is not None and stored[0] == shape and stored[1] in (dtype, *others)


def _as_given(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a Checkpoint gives it: E8M0 as bytes, biases in bfloat16; norms and sinks may stay float32."""
    if tensor.dtype == torch.float8_e8m0fnu:
        return tensor.view(torch.uint8)
    return tensor.to(torch.bfloat16) if name.endswith("bias") else tensor


def _first_line(error: Exception) -> str:
    """Without what a terminal would obey: safetensors quotes names as they are."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
