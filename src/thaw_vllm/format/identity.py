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
_OBJECTS = ("parallel", "experts")


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


SIZES = (("tp", "tensor_parallel_size"), ("pp", "pipeline_parallel_size"), ("dp", "data_parallel_size"))
"""Coordinates that a rank's file has a place in its set by, fastest first, each with the option that sets its size."""


@dataclass(frozen=True)
class Parallel:
    """Coordinates of one rank; ``rank`` counts tensor parallel fastest, then pipeline, then data."""

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
        return (self.dp_rank * self.pp_size + self.pp_rank) * self.tp_size + self.tp_rank

    @property
    def world(self) -> int:
        """Files in the set."""
        return self.dp_size * self.pp_size * self.tp_size

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The same in all files of a set."""
        return self.tp_size, self.pp_size, self.ep_size, self.dp_size

    def at(self, rank: int) -> Parallel:
        """Coordinates of another rank of this one's set, the experts' where they follow from the others."""
        rest, tp = divmod(rank, self.tp_size)
        dp, pp = divmod(rest, self.pp_size)
        divided = self.ep_size == self.tp_size * self.dp_size
        expert = (dp * self.tp_size + tp, self.ep_size) if divided else (0, 1)
        return Parallel(tp, self.tp_size, pp, self.pp_size, *expert, dp, self.dp_size)

    def options(self, other: Parallel | None = None) -> list[str]:
        """The engine's options with these sizes: those that matter, or those in which ``other`` differs."""
        found = [
            f"{option}={size}"
            for short, option in SIZES
            if (size := getattr(self, f"{short}_size")) != (getattr(other, f"{short}_size") if other else 1)
        ]
        if (self.ep_size > 1) != (other is not None and other.ep_size > 1):
            found.append(f"enable_expert_parallel={self.ep_size > 1}")
        return found

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
class Experts:
    """Which experts an expert-parallel rank holds.

    Attributes:
        placement: by which rule the engine divided them among its ranks.
        map: digest of the experts of each layer (docs/format.md, section 5.4).
    """

    placement: str
    map: str

    def to_json(self) -> JSONObject:
        """Of the header's ``identity``."""
        return {"placement": self.placement, "map": self.map}

    @classmethod
    def from_json(cls, value: Any) -> Experts:
        """Checked."""
        document = mapping(value, "identity.experts")
        placement = text(document.get("placement"), "identity.experts.placement", 256)
        return cls(placement, hex_digest(document.get("map"), "identity.experts.map"))


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
        experts: of an expert-parallel rank's weights.
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
    experts: Experts | None = None

    def to_json(self) -> JSONObject:
        """The header's ``identity`` object."""
        found: JSONObject = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OBJECTS}
        found["parallel"] = self.parallel.to_json()
        if self.experts is not None:
            found["experts"] = self.experts.to_json()
        return found

    @classmethod
    def from_json(cls, value: Any) -> Identity:
        """Checked against the rules of docs/format.md, section 5."""
        document = mapping(value, "identity")
        found: dict[str, Any] = {"parallel": Parallel.from_json(document.get("parallel"))}
        if document.get("experts") is not None:
            found["experts"] = Experts.from_json(document["experts"])
        for f in fields(cls):
            given = document.get(f.name)
            if f.name in _OBJECTS:
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
    _require_parallel(found.parallel, wanted.parallel, what)
    if found.experts != wanted.experts and found.stage != "kv":
        raise MismatchError(
            f"{what!r} holds {_placed(found.experts)}, this engine has {_placed(wanted.experts)}; start it with the "
            "expert_placement_strategy, the all2all_backend and the vLLM that froze the snapshot, or freeze again with "
            "these"
        )


def _placed(experts: Experts | None) -> str:
    return "no experts of its own" if experts is None else f"experts placed {experts.placement} ({experts.map[:12]}…)"


def _require_parallel(found: Parallel, wanted: Parallel, what: str) -> None:
    if found == wanted:
        return
    again, instead = wanted.options(found), found.options(wanted)
    cure = (
        f"freeze again with {' and '.join(again)}, or start the engine with {' and '.join(instead)}"
        if again
        else "give the manifest's path (rank 0's file) of a set frozen by an engine of these sizes"
    )
    raise MismatchError(f"{what!r} holds {found}, this engine process is {wanted}; {cure}")


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return repr(value if len(value) <= 40 else value[:36] + "…")
