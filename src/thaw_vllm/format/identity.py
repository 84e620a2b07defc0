"""Who a snapshot is: the model, the engine, the rank; and whether that is whom an engine asks for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import FormatError, MismatchError
from .document import JSONObject, integer, mapping, text

STAGES = ("module", "checkpoint", "raw", "processed", "kv")
"""Where between checkpoint and kernels the tensors were taken.

``module``: the state of a torch module. ``checkpoint``: tensors under their checkpoint names. ``raw``: an engine's own
fused and sharded parameters just after loading, before its post-processing. ``processed``: after it (reserved).
``kv``: no weights but the blocks of KV cache that an engine made with them.
"""

MODEL_ID_SCHEMES = ("tensors-blake3", "files-blake3")
_HEX = frozenset("0123456789abcdef")


def hex_digest(value: Any, where: str) -> str:
    """``value`` as 64 lower-case hexadecimal digits."""
    found = text(value, where, 64)
    if len(found) != 64 or not set(found) <= _HEX:
        raise FormatError(f"{where} must be 64 hexadecimal digits")
    return found


def model_id(value: Any, where: str) -> str:
    """``value`` as ``scheme:digest``, the scheme being one of MODEL_ID_SCHEMES."""
    scheme, _, digest = text(value, where, 128).partition(":")
    if scheme not in MODEL_ID_SCHEMES:
        raise FormatError(f"{where}: the scheme {scheme[:40]!r} is none of {', '.join(MODEL_ID_SCHEMES)}")
    hex_digest(digest, where)
    return f"{scheme}:{digest}"


@dataclass(frozen=True)
class Parallel:
    """Coordinates of one rank; ``rank`` counts tensor parallel fastest, then pipeline."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    @property
    def rank(self) -> int:
        """Position of this rank's file in its set."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def world(self) -> int:
        """Files in the set."""
        return self.pp_size * self.tp_size

    def __str__(self) -> str:
        parts = [
            f"{label} rank {getattr(self, short + '_rank')} of {getattr(self, short + '_size')}"
            for short, label in (("tp", "tensor-parallel"), ("pp", "pipeline"), ("ep", "expert"), ("dp", "data"))
            if short == "tp" or getattr(self, short + "_size") > 1
        ]
        return ", ".join(parts)

    def to_json(self) -> JSONObject:
        """One integer a field."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, value: Any) -> Parallel:
        """Checked: sizes at least 1, ranks below their size."""
        document = mapping(value, "parallel")
        numbers = {f.name: integer(document.get(f.name), f"parallel.{f.name}", 0, 1 << 20) for f in fields(cls)}
        for short in ("tp", "pp", "ep", "dp"):
            if numbers[f"{short}_rank"] >= numbers[f"{short}_size"]:
                raise FormatError(f"parallel: {short}_rank {numbers[f'{short}_rank']} is not below {short}_size")
        return cls(**numbers)


@dataclass(frozen=True)
class Identity:
    """What must agree before a byte is copied. A field that is None was not known and is not compared.

    Attributes:
        stage: one of STAGES.
        engine: ``vllm``, ``transformers``, … or None for a plain module or checkpoint.
        engine_version: of the process that froze.
        architecture: as in the checkpoint's ``architectures``, or the module's class name.
        config: BLAKE3 of the model's canonical config, overrides included (docs/format.md, section 5).
        dtype: the engine's model dtype.
        quantization: the engine's quantisation method.
        model: the model id, over the source tensors.
        parallel: this rank's coordinates.
    """

    stage: str
    engine: str | None = None
    engine_version: str | None = None
    architecture: str | None = None
    config: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    model: str | None = None
    parallel: Parallel = Parallel()

    def to_json(self) -> JSONObject:
        """The header's ``identity`` object."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parallel"} | {
            "parallel": self.parallel.to_json()
        }

    @classmethod
    def from_json(cls, value: Any) -> Identity:
        """Checked against the rules of docs/format.md, section 5."""
        document = mapping(value, "identity")
        found: dict[str, Any] = {"parallel": Parallel.from_json(document.get("parallel"))}
        for f in fields(cls):
            given = document.get(f.name)
            if f.name == "parallel":
                continue
            if given is None and f.name != "stage":
                found[f.name] = None
            elif f.name == "model":
                found[f.name] = model_id(given, "identity.model")
            elif f.name == "config":
                found[f.name] = hex_digest(given, "identity.config")
            else:
                found[f.name] = text(given, f"identity.{f.name}", 256)
        if found["stage"] not in STAGES:
            raise FormatError(f"identity.stage {found['stage'][:40]!r} is none of {', '.join(STAGES)}")
        return cls(**found)


def require(found: Identity, wanted: Identity, what: str) -> None:
    """Hold a snapshot's identity against the one an engine asks for.

    Args:
        found: the snapshot's.
        wanted: the engine's; None fields are not compared. The engine's version is not compared.
        what: the snapshot's name, for messages.

    Raises:
        MismatchError: on the first field that differs, with its cure.
    """
    if (found.stage == "kv") != (wanted.stage == "kv"):
        held, needed = ("KV blocks", "weights") if found.stage == "kv" else ("weights", "KV blocks")
        raise MismatchError(f"{what!r} holds {held}, where {needed} are needed; give another file")
    if found.stage != wanted.stage or found.engine != wanted.engine:
        raise MismatchError(
            f"{what!r} holds the {found.stage!r} stage of {found.engine or 'no engine'}, "
            f"{wanted.engine or 'a plain module'} needs the {wanted.stage!r} stage; freeze again for it"
        )
    cures = {
        "architecture": "thaw it into the model it was frozen from",
        "dtype": "pass the same dtype, or freeze again with this one",
        "quantization": "pass the same quantization, or freeze again with this one",
        "config": "the model's config.json or its overrides changed; restore them or freeze again",
        "model": "it was frozen from other weights; freeze this model",
    }
    for name, cure in cures.items():
        ours, theirs = getattr(found, name), getattr(wanted, name)
        # Quantisation None is a statement (none), the others are "not known".
        if ours != theirs and (name == "quantization" or (ours is not None and theirs is not None)):
            raise MismatchError(f"{what!r} holds {name} {_shown(ours)}, the engine has {_shown(theirs)}; {cure}")
    if found.parallel != wanted.parallel:
        raise MismatchError(
            f"{what!r} holds {found.parallel}, this engine process is {wanted.parallel}; "
            f"freeze again with tensor_parallel_size={wanted.parallel.tp_size}"
            + (f" and pipeline_parallel_size={wanted.parallel.pp_size}" if wanted.parallel.pp_size > 1 else "")
        )


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return repr(value if len(value) <= 40 else value[:36] + "…")
