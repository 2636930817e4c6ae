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
from system.errors import InputError, first_line
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
# Other files of repositories in this layout.
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
MAX_INDEX_BYTES = 16 << 20  # gpt-oss-120b has 50 KB; the largest supported number of layers would need 3 MB
MAX_HEADER_BYTES = 16 << 20  # of a shard; those of gpt-oss-120b have 100 KB together
MAX_REF_BYTES = 4096  # of a file that holds a commit's 40 digits
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class HFCheckpoint:
    """A checkpoint folder whose tensors have been checked against its configuration, but not read.

    Tensors are views of the memory-mapped file, so host memory holds only the pages in use, and a shard stays mapped as
    long as one of its tensors is alive. They are bfloat16 or uint8; norms and sinks stored as float32 stay float32.
    Biases stored as float32 are copied to bfloat16, rounded to nearest even.

    check_unchanged, and `tensors` at the end of each shard, raise InputError if a shard was written to or replaced
    since the checkpoint was opened.
    """

    name: str
    folder: Path
    config: ModelConfig
    shards: dict[str, tuple[str, ...]]  # shard file name -> the tensors to read from it, in the order of the file
    states: dict[str, FileState]  # shard file name -> the file's state when its header was read

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor of this published name. Raise KeyError if the model has no such tensor."""
        for shard, names in self.shards.items():
            if name in names:
                with self._open(shard, (name,)) as file:
                    return _convert(name, file.get_tensor(name))
        raise KeyError(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each (name, tensor), shard by shard and in the order of each file."""
        for shard, names in self.shards.items():
            with self._open(shard, names) as file:
                path = str((self.folder / shard).resolve())
                for name in names:
                    tensor = file.get_tensor(name)
                    yield name, _convert(name, tensor)
                    release_pages(tensor, path)
            self._check_shard_unchanged(shard)

    def document(self, name: str) -> bytes | None:
        """Return a file's content, or None if the folder has no such file. Raise InputError if it cannot be read."""
        path = self.folder / name
        return read_small(path, MAX_TOKENIZER_BYTES) if is_there(path) else None

    def check_unchanged(self) -> None:
        """Raise InputError if a shard was written to or replaced since the checkpoint was opened."""
        for shard in self.shards:
            self._check_shard_unchanged(shard)

    def _check_shard_unchanged(self, shard: str) -> None:
        check_same(self.states[shard], _shard_state(self.folder / shard), self.folder / shard)

    def files(self) -> list[Path]:
        """Return the paths of all files of the checkpoint, also those that are not read, such as its licence."""
        names = {*COMPANIONS, *self.shards}
        return sorted({*self.folder.glob("*.safetensors*"), *(self.folder / name for name in names)})

    def _open(self, shard: str, names: tuple[str, ...]) -> safe_open:
        """Open a shard. Raise InputError if these tensors are not those of open_checkpoint, as in a replaced file."""
        file = _open_shard(self.folder / shard)
        stored, expected = _shapes_and_dtypes(file), expected_tensors(self.config)
        for name in names:
            if not _is_accepted(name, stored.get(name), expected[name]):
                raise InputError(f"{self.folder / shard}: tensor {name} is another than when the checkpoint was opened")
        return file


def open_checkpoint(model: str | Path, n_layers: int | None = None) -> HFCheckpoint:
    """Open a checkpoint, given as a folder or a hub id, and check it by its headers; no tensor is read.

    With n_layers only the first layers are used, and shards that hold none of them may be absent. If there is a
    `model.safetensors`, an index beside it is not used. Tensors and files that an index does not name are ignored, with
    a line on stderr. docs/checkpoints.md has all rules.

    Raise InputError, naming the file and tensor, if a tensor is missing, unknown, or of another shape or dtype, or if a
    file is missing or damaged; TypeError if `model` is no path.
    """
    folder = resolve(model)
    full = read_config(folder)
    config = full if n_layers is None else full.cut(n_layers)
    known, expected = expected_tensors(full), expected_tensors(config)
    source, shard_of = _weight_map(folder)
    for name in shard_of:
        if name not in known:
            raise InputError(f"{source}: unknown tensor {name!r}: not part of the model that config.json describes")
    for name in expected:
        if name not in shard_of:
            raise InputError(f"{source}: tensor {name} is missing")
    shards, states, unlisted = {}, {}, []
    for shard in sorted({shard_of[name] for name in expected}):
        states[shard] = _shard_state(folder / shard)
        stored = _read_header(folder / shard)
        _check_shard(folder / shard, stored, shard_of, expected)
        shards[shard] = tuple(name for name in stored if name in expected)
        unlisted += [f"{name!r} of {shard}" for name in stored if name not in shard_of]
    listed_files = {source.name, *shard_of.values()}
    files = {path.name for ending in (".safetensors", INDEX_NAME) for path in folder.glob(f"*{ending}")}
    ignored = [repr(name) for name in sorted(files - listed_files)] + unlisted
    if ignored:
        names = ", ".join(ignored[:3]) + (f" and {len(ignored) - 3} more" if len(ignored) > 3 else "")
        _notice(f"{folder}: ignores what {source.name} does not name: {names}")
    return HFCheckpoint(str(model), folder, config, shards, states)


@functools.cache
def _notice(text: str) -> None:
    """Log a warning once per process, on stderr unless the program configures Python's logging otherwise."""
    logging.getLogger(__name__).warning(text)


def resolve(model: str | Path) -> Path:
    """Return a checkpoint's folder, given that folder, a repository's folder in the hub's cache, or `org/name`.

    A complete snapshot in the hub's cache is used without network access. Otherwise the required files are downloaded,
    with progress bars. Raise InputError if there is no such folder or repository, TypeError if `model` is no path.
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
    """Return a complete snapshot in a repository's folder of the hub's cache: that of `main`, or else the newest.

    Snapshots with a truncated shard come last; open_checkpoint then reports the damage.
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
    return next(filter(_has_full_shards, complete), complete[0] if complete else None)


def _is_complete(folder: Path) -> bool:
    try:
        return not _missing_files(folder)
    except InputError:
        return False


def _has_full_shards(folder: Path) -> bool:
    """Return whether each shard is as long as its header says."""
    try:
        for shard in set(_weight_map(folder)[1].values()):
            _read_header(folder / shard)
        return True
    except InputError:
        return False


def _missing_files(folder: Path) -> list[str]:
    """Return the required files that a checkpoint folder lacks. Raise InputError if its index is damaged."""
    required = [CONFIG_NAME, TOKENIZER_NAME]
    if os.path.lexists(folder / WEIGHTS_NAME):
        required.append(WEIGHTS_NAME)
    elif os.path.isfile(folder / INDEX_NAME):
        required += dict.fromkeys(_read_index(folder / INDEX_NAME).values())
    else:
        required.append(INDEX_NAME)
    return [name for name in required if not os.path.isfile(folder / name)]


def _download(repo_id: str) -> Path:
    """Download a repository to the hub's cache, and return the snapshot's folder.

    Only `model.safetensors` or, without it, the shards of the index are downloaded, because the published repositories
    hold the weights twice more, in original/ and metal/. Raise InputError if the download fails, a file is missing or
    the model, which is checked before its weights are downloaded, is not GPT-OSS.
    """
    with _hub_errors(repo_id):
        watch(get_session())
        # The first request of snapshot_download has no timeout, and waits forever on a network that drops packets.
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
    """Turn any exception that the hub's client raises in the body into an InputError."""
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
        raise InputError(f"{unreachable} ({first_line(error)})") from None
    except Exception as error:  # noqa: BLE001 - the client also raises errors of its transports and of its checks
        raise InputError(f"{failure}: {first_line(error)}") from None


def _weight_map(folder: Path) -> tuple[Path, dict[str, str]]:
    """Return the file that lists the tensors, and tensor name -> name of its shard. Raise InputError if damaged.

    An index is read even if it is not used, because a damaged one is a sign of a damaged folder.
    """
    index, weights = folder / INDEX_NAME, folder / WEIGHTS_NAME
    shard_of = _read_index(index) if is_there(index) else None
    if os.path.lexists(weights):
        return weights, dict.fromkeys(_read_header(weights), WEIGHTS_NAME)
    if shard_of is None:
        raise InputError(f"{folder}: holds neither {INDEX_NAME} nor {WEIGHTS_NAME}")
    return index, shard_of


def _read_index(index: Path) -> dict[str, str]:
    """Return tensor name -> name of its shard. Raise InputError if it is no index or names another folder's file."""
    data = read_small(index, MAX_INDEX_BYTES)
    try:
        raw = json_value(data, unique_keys=True)
    except ValueError as error:
        raise InputError(f"{index}: not valid JSON ({first_line(error)})") from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: holds no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or shard in ("", ".", "..") or not shard.isprintable():
            raise InputError(f"{index}: tensor {name!r} lies in {shard!r}, which names no file of this folder")
    return weight_map


def _open_shard(path: Path) -> safe_open:
    """Map a file, so that get_tensor returns views of it. Raise InputError if it is no valid safetensors file."""
    if os.path.exists(path):  # Path.exists would raise an OSError for a name that is too long
        _check_header(path)
        name_on_bus_error(str(path))
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, though the checkpoint lists it") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({first_line(error)})") from None


def _shard_state(path: Path) -> FileState:
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file, though the checkpoint lists it")
    return file_state(path)


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> (shape, dtype) of a shard's tensors, in the order of the file. Raise InputError if damaged."""
    with _open_shard(path) as file:
        return _shapes_and_dtypes(file)


def _shapes_and_dtypes(file: safe_open) -> dict[str, tuple[tuple[int, ...], str]]:
    slices = {name: file.get_slice(name) for name in file.offset_keys()}
    return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in slices.items()}


def _check_header(path: Path) -> None:
    """Raise InputError for a header that safetensors would accept: one that fills memory, or repeats a name."""
    with open(open_regular(path), "rb") as file:
        try:
            refuse_lfs_pointer(file.read(len(LFS_POINTER_START)), path)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes, at most {MAX_HEADER_BYTES} are expected")
            json_value(file.read(length), unique_keys=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({first_line(error)})") from None


def _check_shard(
    path: Path,
    stored: dict[str, tuple[tuple[int, ...], str]],
    shard_of: dict[str, str],
    expected: dict[str, tuple[tuple[int, ...], str]],
) -> None:
    """Raise InputError unless a shard holds all that the index places there, with the expected shapes and dtypes.

    It may hold tensors that the index does not list, but none that the index places in another shard.
    """
    for name in stored:
        if shard_of.get(name, path.name) != path.name:
            raise InputError(f"{path}: holds tensor {name!r}, but the index places it in {shard_of[name]}")
    for name, shard in shard_of.items():
        if shard == path.name and name not in stored:
            raise InputError(f"{path}: tensor {name} is missing, though the index places it there")
    for name, (shape, dtype) in stored.items():
        if name in expected and not _is_accepted(name, (shape, dtype), expected[name]):
            expected_shape, expected_dtype = expected[name]
            raise InputError(
                f"{path}: tensor {name} is {dtype} {list(shape)}, expected {expected_dtype} {list(expected_shape)}"
            )


def _is_accepted(name: str, stored: tuple | None, expected: tuple) -> bool:
    """Return whether a stored (shape, dtype) is the expected one, or one that _convert makes a Checkpoint's."""
    (shape, dtype), other_dtypes = expected, ()
    if name.endswith("_scales"):
        other_dtypes = ("F8_E8M0",)
    elif name.endswith(("norm.weight", "sinks", "bias")):
        other_dtypes = ("F32",)
    return stored is not None and stored[0] == shape and stored[1] in (dtype, *other_dtypes)


def _convert(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the dtype of a Checkpoint: E8M0 as uint8, biases as bfloat16; norms and sinks as stored."""
    if tensor.dtype == torch.float8_e8m0fnu:
        return tensor.view(torch.uint8)
    return tensor.to(torch.bfloat16) if name.endswith("bias") else tensor
