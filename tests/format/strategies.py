"""Hypothesis strategies for what a snapshot may say."""

from hypothesis import strategies as st

from thaw_vllm.format.chunks import Chunk
from thaw_vllm.format.dtypes import ITEM_SIZE
from thaw_vllm.format.header import UNSEALED, Header, Member, RankSet
from thaw_vllm.format.identity import MODEL_ID_SCHEMES, STAGES, Experts, Identity, Parallel
from thaw_vllm.format.index import KINDS, File, Index, Tensor
from thaw_vllm.format.kv import Group, Layout, Region

hexadecimal = st.text("0123456789abcdef", min_size=64, max_size=64)
# No control characters (Cc) and no surrogates (Cs).
printable = st.text(st.characters(blacklist_categories=("Cc", "Cs")), min_size=1, max_size=40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | printable,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(printable, inner, max_size=4),
    max_leaves=20,
)


@st.composite
def parallels(draw):
    """Coordinates of a rank."""
    found = {}
    for kind, largest in (("tp", 8), ("pp", 3), ("ep", 8), ("dp", 3)):
        size = draw(st.integers(1, largest))
        found |= {f"{kind}_size": size, f"{kind}_rank": draw(st.integers(0, size - 1))}
    return Parallel(**found)


@st.composite
def identities(draw, parallel=None):
    unknown = {name: draw(st.none() | printable) for name in ("engine", "engine_version", "architecture", "dtype")}
    return Identity(
        stage=draw(st.sampled_from(STAGES)),
        quantization=draw(st.none() | printable),
        config=draw(st.none() | hexadecimal),
        model=draw(st.none() | st.builds("{}:{}".format, st.sampled_from(MODEL_ID_SCHEMES), hexadecimal)),
        parallel=draw(parallel or parallels()),
        experts=draw(st.none() | st.builds(Experts, printable, hexadecimal)),
        **unknown,
    )


@st.composite
def layouts(draw):
    """How a KV cache is laid out."""
    sizes = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
    groups = st.builds(
        Group,
        kind=printable,
        window=st.none() | st.integers(1, 4096),
        layers=st.lists(printable, max_size=3).map(tuple),
    )
    names = draw(st.lists(printable, min_size=1, max_size=4, unique=True))
    regions = [Region(name, draw(printable), draw(sizes), draw(sizes), draw(st.integers(1, 2**40))) for name in names]
    return Layout(
        draw(st.integers(1, 2**16)),
        draw(printable),
        tuple(draw(st.lists(groups, min_size=1, max_size=3))),
        tuple(regions),
        draw(st.text("sha256_cbor", max_size=20)),
        draw(st.sampled_from(["", "00ff", "ab" * 32])),
    )


@st.composite
def headers(draw):
    identity = draw(identities())
    parallel, ranks = identity.parallel, None
    if parallel.world > 1:
        count = parallel.world - 1 if parallel.rank == 0 else 0
        sizes, digest = st.integers(1, 2**56), draw(hexadecimal)
        members = tuple(Member(f"w.rank{i}.thaw", draw(sizes), digest) for i in range(count))
        ranks = RankSet(digest[:32], members)
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | printable
    keys = st.builds("{}|{}".format, *[st.text("abc.0123", max_size=8)] * 2)
    return Header(
        identity=identity,
        kv=draw(layouts()) if identity.stage == "kv" else None,
        content=draw(hexadecimal.filter(lambda digest: digest != UNSEALED)),
        writer=draw(printable),
        source=draw(st.dictionaries(printable, json_values, max_size=3)),
        attributes=draw(st.dictionaries(keys, plain, max_size=4)),
        ranks=ranks,
        metadata=draw(st.dictionaries(printable, st.text(st.characters(blacklist_categories=("Cs",))), max_size=3)),
    )


@st.composite
def _owner(draw):
    """Dtype, shape and stride of a tensor that fills its storage, its dimensions in any order, some repeated."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    stride, step = [0] * len(shape), 1
    for dim in order:
        if shape[dim] > 1 and draw(st.integers(0, 5)) == 0:
            continue
        stride[dim] = step
        step *= shape[dim]
    dtype = draw(st.sampled_from(sorted(ITEM_SIZE)))
    return dtype, shape, tuple(stride), step * ITEM_SIZE[dtype]


@st.composite
def indexes(draw):
    """Owners, views inside them, tensors without elements, and carried files."""
    tensors, storages, files = [], [], []
    names = draw(st.lists(printable, min_size=12, max_size=12, unique=True))
    kinds = st.sampled_from(KINDS)
    for number in range(draw(st.integers(0, 4))):
        dtype, shape, stride, length = draw(_owner())
        tensors.append(Tensor(names.pop(), draw(kinds), dtype, shape, stride, number))
        storages.append(length)
        if draw(st.booleans()):
            other = draw(st.sampled_from([d for d, item in sorted(ITEM_SIZE.items()) if item <= length]))
            item = ITEM_SIZE[other]
            at = draw(st.integers(0, length // item - 1))
            count = draw(st.integers(1, length // item - at))
            tensors.append(Tensor(names.pop(), draw(kinds), other, (count,), (1,), number, at * item))
    if draw(st.booleans()):
        tensors.append(Tensor(names.pop(), draw(kinds), "float32", (3, 0), (7, 1), None))
    if draw(st.booleans()):
        files = [File("config.json", len(storages)), File("vocab.txt", None)]
        storages.append(draw(st.integers(1, 5000)))
    return Index(tuple(draw(st.permutations(tensors)) if not storages else tensors), tuple(storages), tuple(files))


numbers = st.integers(0, 2**64 - 1)
chunks = st.builds(
    Chunk,
    stored_at=numbers,
    at=numbers,
    length=st.integers(0, 2**32 - 1),
    stored=st.integers(0, 2**32 - 1),
    storage=st.integers(0, 2**32 - 1),
    codec=st.integers(0, 2**16 - 1),
    xxh3=numbers,
    wordsum=numbers,
)
