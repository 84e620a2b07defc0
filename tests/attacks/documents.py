"""Hostile headers and indexes: well-formed JSON that says something it must not."""

import re

from tests.attacks.parts import MIB, Parts, chunks, header, index, manifest, member, tensor
from tests.attacks.registry import several

from thaw_vllm.errors import FormatError

SECRET = "".join(["__", "class", "__"])

# --- header -----------------------------------------------------------------------------------------------------------


def _header(**changes):
    return lambda: Parts(header=header(**changes)).bytes()


several(FormatError, "neither weights nor kv", holds_sessions=_header(holds="sessions"))
several(FormatError, "of the format 'tar', not thaw", of_another_format=_header(format="tar"))
several(FormatError, "never finished", unsealed=_header(content="0" * 64))
several(
    FormatError,
    "attributes",
    **{
        f"attribute_{name}": _header(attributes=attributes)
        for name, attributes in {
            "of_the_class": {f"|{SECRET}": 1},
            "of_a_child_s_class": {f"layers.0|{SECRET}": "x"},
            "through_the_class": {f"layers.{SECRET}|weight": 1},
            "dict": {"|__dict__": 1},
            "reduce": {"|__reduce__": "os.system"},
            "without_module": {"weight": 1},
            "with_two_bars": {"a|b|c": 1},
            "that_is_a_list": {"a|b": [1]},
            "that_is_an_object": {"a|b": {"$type": "os.system"}},
        }.items()
    },
    attributes_that_are_a_list=_header(attributes=[]),
)
several(
    FormatError,
    "metadata",
    metadata_that_is_a_list=_header(metadata=[]),
    metadata_of_a_number=_header(metadata={"a": 1}),
    metadata_key_with_escape=_header(metadata={"\x1b[2J": "x"}),
    metadata_key_with_c1_escape=_header(metadata={"\x9b2J": "x"}),
)
several(
    FormatError,
    "hexadecimal",
    content_of_uppercase=_header(content="A" * 64),
    content_too_short=_header(content="0" * 63),
    config_not_hex=_header(identity={"config": "z" * 64}),
    experts_not_hex=_header(identity={"experts": {"placement": "linear", "map": "z" * 64}}),
    model_not_hex=_header(identity={"model": "tensors-blake3:" + "-" * 64}),
    set_id_not_hex=_header(set={"id": "../" + "0" * 29, "members": []}),
)
several(
    FormatError,
    "must be",
    content_missing=_header(content=None),
    content_a_number=_header(content=0),
    experts_a_list=_header(identity={"experts": ["linear"]}),
    experts_without_placement=_header(identity={"experts": {"map": "0" * 64}}),
    identity_a_list=lambda: Parts(header=header() | {"identity": []}).bytes(),
    parallel_a_list=lambda: Parts(header=header() | {"identity": {"stage": "module", "parallel": [1]}}).bytes(),
    source_a_list=_header(source=[]),
    stage_missing=_header(identity={"stage": None}),
    engine_a_list=_header(identity={"engine": ["vllm"]}),
    engine_with_newline=_header(identity={"engine": "vllm\n"}),
    writer_too_long=_header(writer="x" * 300),
    writer_with_escape=_header(writer="\x1b]0;owned\x07"),
    rank_negative=_header(parallel={"tp_rank": -1}),
    rank_a_float=_header(parallel={"tp_rank": 0.0}),
    rank_a_boolean=_header(parallel={"tp_rank": False}),
    size_huge=_header(parallel={"tp_size": 2**63}),
    set_a_list=_header(set=[]),
)
several(FormatError, "none of module", stage_unknown=_header(identity={"stage": "pickled"}))
several(FormatError, "scheme", model_of_unknown_scheme=_header(identity={"model": "md5:" + "0" * 64}))
several(
    FormatError,
    "not below",
    rank_beyond_size=_header(parallel={"tp_rank": 1}),
    size_zero=_header(parallel={"tp_size": 0}),
)
several(
    FormatError,
    "set: missing",
    rank_without_set=_header(parallel={"tp_size": 2}),
    replica_without_set=_header(parallel={"dp_size": 2}),
    replica_of_many_without_set=_header(parallel={"dp_size": 2**20, "pp_size": 2**20, "tp_size": 2**20}),
)


REGION = {"name": "a#0", "dtype": "bfloat16", "shape": [2, 4], "stride": [4, 1], "page": 16}
LAYOUT = {
    "block_size": 4,
    "cache_dtype": "bfloat16",
    "groups": [{"kind": "FullAttentionSpec", "window": None, "layers": ["a"]}],
    "regions": [REGION],
}


def _kv(**changes):
    return _header(holds="kv", identity={"stage": "kv"}, kv=LAYOUT | changes)


def _group(**changes):
    return _kv(groups=[LAYOUT["groups"][0] | changes])


def _region(**changes):
    return _kv(regions=[REGION | changes])


several(
    FormatError,
    "its identity is of the stage",
    kv_of_a_module=_header(holds="kv", kv=LAYOUT),
    weights_of_stage_kv=_header(identity={"stage": "kv"}, kv=LAYOUT),
)
several(FormatError, "is empty", kv_without_groups=_kv(groups=[]), kv_without_regions=_kv(regions=[]))
several(FormatError, "names a region twice", kv_region_twice=_kv(regions=[REGION, REGION]))
several(FormatError, "hexadecimal", kv_none_hash_not_hex=_kv(none_hash="0x12"))
several(
    FormatError,
    "must be",
    kv_missing=_header(holds="kv", identity={"stage": "kv"}),
    kv_a_list=_header(holds="kv", identity={"stage": "kv"}, kv=[LAYOUT]),
    kv_block_size_zero=_kv(block_size=0),
    kv_block_size_huge=_kv(block_size=1 << 17),
    kv_block_size_true=_kv(block_size=True),
    kv_cache_dtype_with_escape=_kv(cache_dtype="\x1b[2J"),
    kv_algorithm_a_number=_kv(algorithm=1),
    kv_groups_an_object=_kv(groups={"0": {}}),
    kv_groups_beyond_count=_kv(groups=LAYOUT["groups"] * 65),
    kv_group_a_string=_kv(groups=["FullAttentionSpec"]),
    kv_group_of_no_kind=_group(kind=None),
    kv_window_zero=_group(window=0),
    kv_window_a_float=_group(window=4.0),
    kv_layers_missing=_group(layers=None),
    kv_layer_with_newline=_group(layers=["a\nb"]),
    kv_regions_missing=_kv(regions=None),
    kv_region_a_list=_kv(regions=[[]]),
    kv_region_with_c1_escape=_region(name="\x9b2J"),
    kv_page_zero=_region(page=0),
    kv_page_huge=_region(page=2**57),
    kv_shape_of_65=_region(shape=[1] * 65),
    kv_shape_negative=_region(shape=[-1]),
    kv_stride_a_string=_region(stride=["1"]),
)


def _manifest(*members, world=2):
    return lambda: Parts(header=manifest(list(members), world)).bytes()


several(
    FormatError,
    "not a base name beside the manifest",
    **{
        f"member_{name}": _manifest(member(text))
        for name, text in {
            "in_parent": "../weights.thaw",
            "far_away": "../../../../../../etc/passwd",
            "absolute": "/etc/passwd",
            "in_folder": "folder/weights.thaw",
            "with_backslash": "..\\weights.thaw",
            "parent_itself": "..",
            "here": ".",
            "hidden": ".weights.thaw",
            "without_name": "",
            "too_long": "w" * 256,
        }.items()
    },
)
several(
    FormatError,
    "must be",
    member_with_nul=_manifest(member("weights\0.thaw")),
    member_of_no_bytes=_manifest(member(size=0)),
    member_of_negative_size=_manifest(member(size=-1)),
    member_of_true_size=_manifest(member(size=True)),
    member_of_huge_size=_manifest(member(size=2**63)),
    member_a_string=_manifest("weights.rank1.thaw"),
    members_beyond_count=lambda: Parts(header=manifest([member(f"w{i}") for i in range(4097)], 4098)).bytes(),
)
several(
    FormatError,
    "must name",
    too_few_members=_manifest(),
    too_many_members=_manifest(member("a"), member("b")),
    members_in_a_single_file=_header(set={"id": "0" * 32, "members": [member()]}),
    members_in_rank_1=lambda: Parts(
        header=header(parallel={"tp_size": 2, "tp_rank": 1}, set={"id": "0" * 32, "members": [member()]})
    ).bytes(),
    world_larger_than_the_set=_manifest(member(), world=2**20),
)
several(FormatError, "twice", member_twice=_manifest(member(), member(), world=3))

# --- index ------------------------------------------------------------------------------------------------------------


def _tensors(*entries, storages=(24,), files=()):
    return lambda: Parts(index={"tensors": list(entries), "storages": list(storages), "files": list(files)}).bytes()


def _raw(entry, storages=(24,), count=None):
    """An index whose storages need not have bytes: the index is refused before the chunk table is read."""
    entries = [entry] if isinstance(entry, dict) else entry
    document = {"tensors": entries, "storages": list(storages), "files": []}
    return lambda: Parts(index=document, chunks=[], payload=b"").bytes()


several(
    FormatError,
    "must be an integer",
    **{
        f"{name}_{what}": _raw(tensor("weight") | {name: value([2, 3])})
        for what, number in {
            "negative": -1,
            "float": 1.0,
            "boolean": True,
            "string": "1",
            "null": None,
            "of_2_to_the_63": 2**63,
            "of_2_to_the_64": 2**64,
            "of_2_to_the_4000": 2**4000,
            "tiny_float": 1e-300,
        }.items()
        for name, value in {
            "shape": lambda given, number=number: [number, given[1]],
            "stride": lambda given, number=number: [number, 1],
        }.items()
    },
    **{
        f"offset_{what}": _raw(tensor("weight") | {"offset": number})
        for what, number in {"negative": -4, "float": 0.0, "boolean": False, "huge": 2**63, "null": None}.items()
    },
    **{
        f"storage_{what}": _raw(tensor("weight") | {"storage": number})
        for what, number in {"negative": -1, "float": 0.0, "boolean": False, "huge": 2**63, "next": 1}.items()
    },
    **{
        f"storage_length_{what}": _raw(tensor("weight"), [number])
        for what, number in {"zero": 0, "negative": -24, "float": 24.0, "boolean": True, "huge": 2**63}.items()
    },
    storage_of_no_storages=_raw(tensor("weight"), []),
)
several(
    FormatError,
    "lie outside its storage",
    tensor_past_storage=_raw(tensor("weight", shape=(2, 4))),
    tensor_just_past_storage=_raw([tensor("weight"), tensor("tail", dtype="uint8", shape=(2,), offset=23)]),
    tensor_behind_storage=_raw([tensor("weight"), tensor("tail", dtype="uint8", shape=(1,), offset=24)]),
    offset_far_away=_raw(tensor("weight", offset=2**55)),
    stride_past_storage=_raw(tensor("weight", shape=(2, 2), stride=(2**40, 1))),
    stride_product_beyond_64_bits=_raw(tensor("weight", shape=(2**20, 2**20), stride=(2**56, 2**56))),
    huge_tensor=_raw(tensor("weight", shape=(2**40,))),
)
several(
    FormatError,
    "elements",
    product_beyond_64_bits=_raw(tensor("weight", shape=(2**32, 2**32), stride=(1, 1))),
    product_that_wraps_to_zero=_raw(tensor("weight", shape=(2**32, 2**32, 2), stride=(0, 0, 0))),
    product_that_wraps_to_six=_raw(tensor("weight", shape=(2**33, 2**31, 6), stride=(0, 0, 0))),
    repeated_to_a_huge_shape=_raw(tensor("weight", shape=[2**20] * 60, stride=[0] * 60), [4]),
    empty_with_storage=_raw(tensor("weight", shape=(0, 3))),
    elements_without_storage=_raw(tensor("weight", storage=None)),
)
several(FormatError, "at most 64 entries", too_many_dimensions=_raw(tensor("weight", shape=[1] * 65)))
several(
    FormatError,
    "dimensions",
    fewer_strides=_raw(tensor("weight", stride=(1,))),
    more_strides=_raw(tensor("weight", stride=(3, 1, 1))),
)
several(
    FormatError,
    "densely",
    storage_with_a_gap=_raw(tensor("weight", stride=(4, 1)), [28]),
    storage_with_a_tail=_raw(tensor("weight"), [28]),
    storage_with_a_head=_raw(tensor("weight", offset=4), [28]),
    storage_that_overlaps_itself=_raw(tensor("weight", stride=(1, 1)), [16]),
    view_before_its_owner=_raw([tensor("view", shape=(2,)), tensor("weight")]),
)
several(
    FormatError,
    "multiple of its element size",
    crooked_offset=_raw([tensor("weight"), tensor("v", shape=(1,), offset=2)]),
)
several(
    FormatError, "without a storage", empty_with_offset=_raw(tensor("weight", shape=(0,), storage=None, offset=4), [])
)
several(FormatError, "no tensor and no file", storage_of_nobody=_raw(tensor("weight"), [24, 24]))
several(FormatError, "stands twice", tensor_twice=_raw([tensor("weight"), tensor("weight")]))
several(
    FormatError,
    "1 to 1024 bytes",
    name_empty=_raw(tensor("")),
    name_too_long_in_bytes=_raw(tensor("é" * 513)),
)
several(
    FormatError,
    "must be a string",
    name_too_long=_raw(tensor("x" * 1025)),
    name_a_number=_raw(tensor(1)),
    name_null=_raw(tensor(None)),
    name_with_newline=_raw(tensor("a\nb")),
    name_with_escape=_raw(tensor("\x1b[31mweight")),
    name_with_half_a_surrogate=_raw(tensor("\ud800")),
    dtype_a_number=_raw(tensor("weight", dtype=4)),
    kind_null=_raw(tensor("weight", kind=None)),
)
several(FormatError, "kind", kind_unknown=_raw(tensor("weight", kind="module")))
several(
    FormatError,
    "dtype",
    dtype_unknown=_raw(tensor("weight", dtype="float7")),
    dtype_quantised=_raw(tensor("weight", dtype="qint8")),
    dtype_an_attribute=_raw(tensor("weight", dtype=SECRET)),
)
several(
    FormatError,
    "must be a list",
    tensors_an_object=lambda: Parts(index=index(tensors={}), chunks=[], payload=b"").bytes(),
    tensors_missing=lambda: Parts(index={"storages": []}).bytes(),
    storages_missing=lambda: Parts(index={"tensors": []}, chunks=[], payload=b"").bytes(),
    files_an_object=lambda: Parts(index=index(files={}), chunks=[], payload=b"").bytes(),
    shape_a_string=_raw(tensor("weight") | {"shape": "23"}),
    too_many_tensors=lambda: Parts(index=index(tensors=[0] * (2**19 + 1)), chunks=[], payload=b"").bytes(),
    too_many_storages=lambda: Parts(index=index(storages=[1] * (2**22 + 1)), chunks=[], payload=b"").bytes(),
    too_many_files=lambda: Parts(index=index(files=[0] * 65), chunks=[], payload=b"").bytes(),
)
several(
    FormatError,
    "must be an object",
    tensor_a_list=_raw([[]]),
    file_a_string=_tensors(tensor("weight"), files=["config.json"]),
)


def _file(name, storage=1, storages=(24, 2)):
    document = {
        "tensors": [tensor("weight")],
        "storages": list(storages),
        "files": [{"name": name, "storage": storage}],
    }
    return lambda: Parts(index=document, chunks=[], payload=b"").bytes()


several(
    FormatError,
    "not a plain file name",
    **{
        "file_" + re.sub(r"\W+", "_", name): _file(name)
        for name in (
            "../config.json",
            "/etc/passwd",
            "folder/config.json",
            "C:\\config.json",
            "..",
            ".bashrc",
            "a..b",
            "-rf",
            "config json",
            "modeling.py",
            "Modeling.PY",
            "module.pyc",
            "library.so",
            "library.so.py",
            "run.sh",
            "run.EXE",
            "weights.pkl",
            "pytorch_model.bin",
            "model.pt",
            "cönfig.json",
            "x" * 101,
        )
    },
)
several(
    FormatError,
    "two owners",
    file_over_a_tensor=_file("config.json", 0, [24]),
    file_over_a_file=lambda: Parts(
        index=index(files=[{"name": "config.json", "storage": 2}, {"name": "tokenizer.json", "storage": 2}])
    ).bytes(),
)
several(
    FormatError,
    "stands twice",
    file_twice=lambda: Parts(
        index=index(files=[{"name": "config.json", "storage": 2}, {"name": "config.json", "storage": None}])
    ).bytes(),
)
several(FormatError, "may be carried", file_too_large=_file("config.json", 1, [24, 64 * MIB + 1]))

# --- what is kept elsewhere -------------------------------------------------------------------------------------------


def _kept(entries, rank=1, codec=2, stored=0):
    """Rank 1 of 2 whose storage 1 has its bytes elsewhere, or whatever these say."""

    def make():
        table = chunks([24, 5000, 2])
        table[1][5], table[1][3] = codec, stored
        table[2][0] = 4096 if not stored else table[2][0]
        own = header(parallel={"tp_rank": rank, "tp_size": 2}, set={"id": "0" * 32}) if rank else header()
        return Parts(header=own, index=index(kept=entries), chunks=table).bytes()

    return make


def _entry(storage=1, rank=0, there=7):
    return {"storage": storage, "rank": rank, "there": there}


several(
    FormatError,
    "the files of lower ranks only",
    kept_by_itself=_kept([_entry(rank=1)]),
    kept_by_a_higher_rank=_kept([_entry(rank=9)]),
    kept_by_rank_0_of_rank_0=_kept([_entry()], rank=0),
)
several(FormatError, "carried file's", kept_file=_kept([_entry(), _entry(2, there=8)]))
several(
    FormatError,
    "does not come after",
    kept_twice=_kept([_entry(), _entry(there=8)]),
    kept_out_of_order=_kept([_entry(), _entry(0, there=8)]),
)
several(FormatError, "kept in one", kept_in_one_place=_kept([_entry(0), _entry(1)]))
several(
    FormatError,
    "kept",
    kept_that_is_no_list=_kept({"1": 0}),
    kept_of_numbers=_kept([1]),
    kept_of_nothing=_kept([{}]),
    kept_of_no_storage=_kept([_entry(3)]),
    kept_below_0=_kept([_entry(-1)]),
    kept_by_rank_below_0=_kept([_entry(rank=-1)]),
    kept_by_rank_2_to_the_63=_kept([_entry(rank=2**63)]),
    kept_in_2_to_the_63=_kept([_entry(there=2**63)]),
    kept_in_a_fraction=_kept([_entry(there=0.5)]),
    kept_and_stored=_kept([_entry()], codec=0, stored=5000),
    kept_and_compressed=_kept([_entry()], codec=1, stored=20),
)
several(FormatError, "20 stored bytes for 5000 kept ones", kept_with_bytes=_kept([_entry()], stored=20))
