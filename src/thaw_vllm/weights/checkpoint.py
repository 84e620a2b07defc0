"""Plain checkpoints: directories of safetensors (or other) weight files, with their tensors and small files."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..errors import FormatError, ReplacedError, StorageError, UnsupportedError, UsageError
from ..format.document import JSONObject, array, canonical, integer, mapping, parse, text
from ..format.dtypes import ITEM_SIZE
from ..format.index import plain_file_name
from ..format.limits import MAX_FILE
from ..transport.source import FileSource, read_bytes

SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""The safetensors format's names to torch's."""

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header; the limit of the safetensors library."""

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.gguf")
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
"""What training leaves beside a model's weights; vLLM's default loader passes over the same names."""

INDEX = "model.safetensors.index.json"

CARRIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "params.json",
    "tekken.json",
)
"""The files an engine reads beside the weights; names fixed here, never code."""

CONFIG_FILES = ("config.json", "quantize_config.json", "hf_quant_config.json")

VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json that do not change the weights' shapes or meaning; the dtype is compared on its own."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; ``begin`` and ``end`` are absolute byte offsets in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory.

    Attributes:
        directory: resolved path.
        files: weight files, base names in order.
        tensors: of safetensors files; empty for other formats.
        headers: of safetensors files, the raw header by base name.
        stamp: each file's name, size, times and inode from before anything of it was read.
    """

    directory: Path
    files: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    headers: dict[str, bytes]
    stamp: list[list[Any]]

    def check_unchanged(self) -> None:
        """Raise ReplacedError when a weight file was replaced or written to since the checkpoint was opened."""
        try:
            now = _stamp(self.directory, self.files)
        except OSError as error:
            raise ReplacedError(f"{error.filename!r} was removed while it was being read; run it again") from None
        for ours, theirs in zip(self.stamp, now, strict=True):
            if ours != theirs:
                path = str(self.directory / ours[0])
                raise ReplacedError(f"{path!r} was replaced or written to while it was being read; run it again")

    @property
    def bytes(self) -> int:
        """Bytes of the weight files."""
        return sum((self.directory / name).stat().st_size for name in self.files)

    def open_file(self, name: str) -> FileSource:
        """A weight file, opened again; the offsets of ``tensors`` hold in it.

        Raises:
            ReplacedError: it does not begin with the header that was read.
        """
        source = FileSource(self.directory / name)
        try:
            header = self.headers.get(name)
            expected = b"" if header is None else len(header).to_bytes(8, "little") + header
            if source.size < len(expected) or read_bytes(source, 0, len(expected)) != expected:
                raise ReplacedError(f"{source.name!r} was replaced while it was being read; run it again")
        except BaseException:
            source.close()
            raise
        return source


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """List a checkpoint's weight files and the tensors in them.

    Raises:
        UsageError: not a directory, or no weight files in it.
        FormatError: a damaged safetensors header or index.
    """
    directory = Path(os.path.realpath(path))
    if not os.path.isdir(directory):
        raise UsageError(f"{os.fspath(path)!r} is not a model directory")
    names = _matching(directory, "*.safetensors")
    if (directory / INDEX).is_file():
        listed = _indexed(directory / INDEX)
        missing = sorted(listed - set(names))
        if missing:
            raise StorageError(f"{str(directory)!r} lacks {missing[0]!r}, which its {INDEX} names")
        names = sorted(listed)
    elif len(names) > 1:
        names = [name for name in names if not name.startswith("consolidated")] or names
    if names:
        stamp = _stamp(directory, names)
        headers: dict[str, bytes] = {}
        tensors: list[StoredTensor] = []
        for name in names:
            headers[name], found = read_header(directory / name)
            tensors += found
        _unique(tensors)
        return Checkpoint(directory, tuple(names), tuple(tensors), headers, stamp)
    for pattern in OTHER_WEIGHTS:
        if names := _matching(directory, pattern):
            return Checkpoint(directory, tuple(names), (), {}, _stamp(directory, names))
    raise UsageError(f"{str(directory)!r} holds no weight files (*.safetensors, {', '.join(OTHER_WEIGHTS)})")


def has_weights(directory: Path) -> bool:
    """Whether ``open_checkpoint`` would find weight files there."""
    return any(_matching(directory, pattern) for pattern in ("*.safetensors", *OTHER_WEIGHTS))


def _stamp(directory: Path, names: Iterable[str]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for name in names:
        status = (directory / name).stat()
        # ctime too: copying tools restore the other one, and some set it alike for all files.
        found.append([name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    return found


def _matching(directory: Path, pattern: str) -> list[str]:
    return sorted(p.name for p in directory.glob(pattern) if p.name not in NOT_WEIGHTS)


def read_header(path: Path) -> tuple[bytes, list[StoredTensor]]:
    """The raw JSON header of a safetensors file and its tensors, checked against the file's size.

    Raises:
        FormatError: not a sound safetensors file.
    """
    with FileSource(path) as source:
        if source.size < 8:
            raise FormatError(f"{path.name!r} is too short to be a safetensors file")
        length = int.from_bytes(read_bytes(source, 0, 8), "little")
        if length > MAX_HEADER or 8 + length > source.size:
            raise FormatError(f"{path.name!r}: a header of {length} bytes does not fit the file")
        raw = read_bytes(source, 8, length)
        document = parse(raw, f"safetensors header of {path.name!r}")
        document.pop("__metadata__", None)
        tensors = [_stored(name, entry, path.name, 8 + length, source.size) for name, entry in document.items()]
    return raw, sorted(tensors, key=lambda t: t.begin)


def carried_files(directory: Path, config_directory: Path | None = None) -> list[tuple[str, bytes]]:
    """Base name and bytes of each file of CARRIED_FILES that the directory has; warns of one that is too large.

    Args:
        config_directory: where config.json and how the model is quantised are read, if not in ``directory``.
    """
    found = []
    for name in CARRIED_FILES:
        path = (config_directory or directory if name in CONFIG_FILES else directory) / name
        if not path.is_file():
            continue
        if (size := path.stat().st_size) > MAX_FILE:
            logging.getLogger(__name__).warning(
                "%s has %d bytes, a snapshot carries at most %d of a file; thawing will need the model directory",
                path,
                size,
                MAX_FILE,
            )
            continue
        found.append((name, path.read_bytes()))
    assert all(plain_file_name(name) for name, _ in found)
    return found


def read_config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """The directory's config.json, or another JSON object beside it; empty when there is none."""
    path = directory / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def config_hash(config: Mapping[str, Any], overrides: object = None) -> str:
    """BLAKE3 of a model's config.json without VOLATILE keys, and the overrides, in canonical JSON.

    Published configs hold ``Infinity``, which is not JSON: numbers without end count as the strings Python writes.

    Raises:
        UnsupportedError: the overrides are a function, which has no canonical form.
    """
    if callable(overrides):
        raise UnsupportedError("hf_overrides is a function; give it as a dict, so that a snapshot can name it")
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    return blake3(canonical(_finite([kept, overrides or {}]))).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def _stored(name: str, entry: Any, file: str, base: int, size: int) -> StoredTensor:
    where = f"{file!r}: tensor {name[:80]!r}"
    document: JSONObject = mapping(entry, where)
    kind = text(document.get("dtype"), f"{where}: dtype", 32)
    if kind not in SAFETENSORS_DTYPES:
        raise FormatError(f"{where}: dtype {kind!r} is not known")
    dtype = SAFETENSORS_DTYPES[kind]
    shape = tuple(integer(n, f"{where}: shape") for n in array(document.get("shape"), f"{where}: shape", 64))
    offsets = [integer(n, f"{where}: data_offsets") for n in array(document.get("data_offsets"), where, 2)]
    elements = 1
    for n in shape:
        elements *= n
    if len(offsets) != 2 or offsets[1] - offsets[0] != elements * ITEM_SIZE[dtype] or base + offsets[1] > size:
        raise FormatError(f"{where}: its offsets {offsets} do not fit its shape or the file")
    return StoredTensor(name, dtype, shape, file, base + offsets[0], base + offsets[1])


def _indexed(path: Path) -> set[str]:
    document = parse(path.read_bytes(), INDEX)
    names = {text(v, f"{INDEX}: weight_map", 255) for v in mapping(document.get("weight_map"), "weight_map").values()}
    for name in names:
        if "/" in name or name.startswith("."):
            raise FormatError(f"{INDEX}: {name!r} is not a file beside it")
    return names


def _unique(tensors: list[StoredTensor]) -> None:
    seen: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in seen:
            raise FormatError(f"{tensor.name!r} stands in {seen[tensor.name]!r} and in {tensor.file!r}")
        seen[tensor.name] = tensor.file
