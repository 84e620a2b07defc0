"""A hostile file of caches is refused with the right error, before a byte of it is written, in words that name it."""

import ast
import hashlib
import json
import os
import pickle
import random
import stat
import struct
import tracemalloc
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import thaw_vllm.caches
from thaw_vllm.caches import archive, places
from thaw_vllm.caches.archive import MANIFEST, read
from thaw_vllm.caches.places import Place
from thaw_vllm.caches.unpacking import unpack
from thaw_vllm.errors import CorruptionError, FormatError, ReplacedError, StorageError, ThawError, VersionError

MIB = 1 << 20
FILES = {"vllm/a/x": b"compiled" * 20, "triton/K/k.cubin": bytes(range(256))}


@dataclass
class Entry:
    """A member as it stands in a ZIP file; what is None is as it should be."""

    name: bytes
    data: bytes
    stored: bytes | None = None
    size: int | None = None
    crc: int | None = None
    method: int = 8
    flags: int = 0x800
    mode: int = stat.S_IFREG | 0o600
    local_name: bytes | None = None

    def fields(self):
        """Those that stand in both headers, and the bytes after the first."""
        deflate = zlib.compressobj(wbits=-15)
        deflated = deflate.compress(self.data) + deflate.flush() if self.method == 8 else self.data
        stored = deflated if self.stored is None else self.stored
        crc = zlib.crc32(self.data) if self.crc is None else self.crc
        size = len(self.data) if self.size is None else self.size
        return struct.pack("<5H3I", 20, self.flags, self.method, 0, 33, crc, len(stored), size), stored


def zipped(entries):
    """A ZIP file of these, as they are."""
    body, directory = b"", b""
    for one in entries:
        fields, stored = one.fields()
        local = one.name if one.local_name is None else one.local_name
        rest = struct.pack("<5H2I", len(one.name), 0, 0, 0, 0, one.mode << 16, len(body))
        directory += b"PK\1\2" + struct.pack("<H", 3 << 8 | 20) + fields + rest + one.name
        body += b"PK\3\4" + fields + struct.pack("<2H", len(local), 0) + local + stored
    count = len(entries)
    return body + directory + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, count, count, len(directory), len(body), 0)


def told(contents=FILES, **changes):
    """A manifest of these files, with changes."""
    listed = [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in contents.items()]
    document = {"format": "thaw caches", "version": 1, "key": {"gpu": "none"}, "made": {}, "files": listed}
    return json.dumps({name: value for name, value in (document | changes).items() if value is not ...}).encode()


def entries(contents=FILES, manifest=None, **last):
    """The manifest and these files, with changes to the last."""
    found = [Entry(MANIFEST.encode(), told(contents) if manifest is None else manifest)]
    found += [Entry(name.encode(), data) for name, data in contents.items()]
    return [*found[:-1], replace(found[-1], **last)]


def sound(contents=FILES, manifest=None, **last):
    return zipped(entries(contents, manifest, **last))


def listing(number, *values):
    """A manifest in which the last file has another path, size or digest."""
    document = json.loads(told())
    document["files"][-1][number : number + 1] = values
    return json.dumps(document).encode()


def tree(root):
    """All that is below a directory: what it is, and what is in it."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        held = os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(root))] = (mode, held)
    return found


def here(root):
    return {name: Place(name, root / "places" / name) for name in ("vllm", "triton")}


def refused(root, data, error, *words):
    """Unpack these bytes, which must raise exactly ``error`` and leave no trace."""
    path = root / "x.thawcaches"
    path.write_bytes(data)
    before = tree(root)
    with pytest.raises(ThawError) as raised:
        unpack(read(path), here(root))
    assert type(raised.value) is error, raised.value
    assert tree(root) == before
    said = str(raised.value)
    assert repr(str(path)) in said and len(said) < 600 + len(str(path)) and said.isprintable(), said
    for word in words:
        assert word in said


def test_a_sound_file_is_accepted(tmp_path):
    """All others differ from it in one thing, so it must be that thing they are refused for."""
    (tmp_path / "x").write_bytes(sound())
    assert unpack(read(tmp_path / "x"), here(tmp_path)).written == 2
    assert {name: (tmp_path / "places" / name).read_bytes() for name in FILES} == FILES
    stored = [replace(one, method=0, mode=0) for one in entries({"vllm/b": b"b"})]
    (tmp_path / "y").write_bytes(zipped(stored))
    assert unpack(read(tmp_path / "y"), here(tmp_path)).written == 1


PATHS = {
    "absolute": "{root}/evil",
    "absolute twice": "/{root}/evil",
    "a parent": "../evil",
    "a parent below a place": "vllm/../../evil",
    "a parent at the end": "vllm/a/..",
    "itself": "vllm/./evil",
    "itself first": "./vllm/evil",
    "an empty part": "vllm//evil",
    "no place": "evil",
    "a place": "vllm",
    "backslashes": "vllm\\..\\..\\evil",
    "a backslash in a part": "vllm/a\\b",
    "a control character": "vllm/\x01",
    "a line's end": "vllm/a\nb",
    "a line's end last": "vllm/a\n",
    "delete": "vllm/\x7f",
    "an escape": "vllm/\x1b[2J",
    "a C1 control character": "vllm/\x9b2J",
    "too deep": "vllm/" + "d/" * places.MAX_DEPTH + "evil",
    "a part too long": "vllm/" + "n" * 256,
    "too long": "vllm/" + "/".join(["n" * 200] * 6),
}


@pytest.mark.parametrize("what", PATHS)
def test_a_path_that_leads_elsewhere(tmp_path, what):
    name = PATHS[what].format(root=tmp_path)
    word = "is no path in a cache" if name.isprintable() else "printable characters"
    refused(tmp_path, sound({**FILES, name: b"evil"}), FormatError, word)
    refused(tmp_path, sound(manifest=listing(0, name)), FormatError, word)


NEVER_CARRIED = [
    "vllm/gpu_p2p_access_cache_for_0,1.json",
    "vllm/startup_plan/startup_plan_0123.json",
    "vllm/torch_compile_cache/0123456789/rank_0_0/x",
    "vllm/torch_compile_cache/torch_aot_compile/" + "a" * 64 + "/rank_0_0/model",
    "vllm/torch_compile_cache/torch_aot_compile/thaw-evil/rank_0_0/model",
    "vllm/deep_gemm/x",
    "vllm/thaw/snapshots/x.thaw",
    "vllm/assets/x",
    "vllm/usage_stats.json",
    "triton/K/k.lock",
    "triton/locks/x",
    "inductor/lock",
    "triton/.hidden/x",
    "triton/K/.x",
    "triton/K/tmp.pid_1_2/x",
    "inductor/x.tmp",
    "inductor/__pycache__/x.pyc",
]


@pytest.mark.parametrize("name", NEVER_CARRIED)
def test_what_never_travels(tmp_path, name):
    refused(tmp_path, sound({name: b"evil", **FILES}), FormatError, "is nothing that travels")


MODES = {
    "link": stat.S_IFLNK,
    "pipe": stat.S_IFIFO,
    "character device": stat.S_IFCHR,
    "block device": stat.S_IFBLK,
    "socket": stat.S_IFSOCK,
    "directory": stat.S_IFDIR,
}


@pytest.mark.parametrize("what", MODES)
def test_a_member_that_is_no_file(tmp_path, what):
    mode = MODES[what] | 0o777
    refused(tmp_path, sound({**FILES, "vllm/evil": b"/etc/passwd"}, mode=mode), FormatError, "is no plain file")
    first, *others = entries()
    refused(tmp_path, zipped([replace(first, mode=mode), *others]), FormatError, "is no plain file")


def extra(*more):
    return [*entries(), *more]


EVIL = Entry(b"vllm/evil", b"evil")
HOSTILE = {
    # what the ZIP file and its manifest tell of each other
    "a directory": (lambda: zipped(extra(Entry(b"vllm/evil/", b""))), FormatError, "is no plain file"),
    "a member that is not told": (lambda: zipped(extra(EVIL)), FormatError, "its members are not those"),
    "a member that is not there": (lambda: zipped(entries()[:-1]), FormatError, "its members are not those"),
    "a member twice": (lambda: zipped(extra(entries()[-1])), FormatError, "its members are not those"),
    "a member told twice": (lambda: sound(manifest=listing(3, *[json.loads(told())["files"][0]])), FormatError, ""),
    "twice in both": (
        lambda: zipped(
            [
                Entry(MANIFEST.encode(), told(files=json.loads(told())["files"] * 2)),
                *entries()[1:],
                *entries()[1:],
            ]
        ),
        FormatError,
        "is there twice",
    ),
    "the manifest twice": (lambda: zipped(extra(entries()[0])), FormatError, "its members are not those"),
    "another manifest last": (
        lambda: zipped(extra(Entry(MANIFEST.encode(), told({"vllm/evil": b"evil"})))),
        FormatError,
        "",
    ),
    "a file below a file": (
        lambda: sound({"vllm/a": b"a", "vllm/a/b": b"b", "vllm/a-b": b"c"}),
        FormatError,
        "lies below a file",
    ),
    "a file far below a file": (lambda: sound({"vllm/a/b/c/d": b"b", "vllm/a": b"a"}), FormatError, "below a file"),
    "a name cut by NUL": (lambda: zipped(extra(replace(EVIL, name=b"vllm/evil\0.txt"))), FormatError, "another name"),
    "a name that is no UTF-8": (lambda: zipped(extra(replace(EVIL, name=b"vllm/\xff"))), FormatError, "utf-8"),
    "a surrogate": (lambda: sound(manifest=listing(0, "vllm/\udcff")), FormatError, "printable characters"),
    "the manifest's name cut by NUL": (
        lambda: zipped([replace(entries()[0], name=MANIFEST.encode() + b"\0"), *entries()[1:]]),
        FormatError,
        "another name",
    ),
    "a size of one more": (lambda: sound(manifest=listing(1, 257)), FormatError, "its members are not those"),
    "a size of one less": (lambda: sound(manifest=listing(1, 255)), FormatError, "its members are not those"),
    "encrypted": (lambda: sound(flags=0x801), FormatError, "is encrypted"),
    "a manifest that is encrypted": (
        lambda: zipped([replace(entries()[0], flags=0x801), *entries()[1:]]),
        FormatError,
        "is encrypted",
    ),
    "shrunk": (lambda: sound(method=1), FormatError, "not known here"),
    "bzip2": (lambda: sound(method=12), FormatError, "not known here"),
    "lzma": (lambda: sound(method=14), FormatError, "not known here"),
    "a method that nobody has": (lambda: sound(method=99), FormatError, "not known here"),
    "a size beyond the limit": (lambda: sound(size=archive.MAX_MEMBER + 1), FormatError, "are the most"),
    # the manifest
    "no manifest": (lambda: zipped(entries()[1:]), FormatError, "does not begin with"),
    "the manifest later": (lambda: zipped([*entries()[1:], entries()[0]]), FormatError, "does not begin with"),
    "no members": (lambda: zipped([]), FormatError, "does not begin with"),
    "no JSON": (lambda: sound(manifest=b"{"), FormatError, MANIFEST),
    "no UTF-8": (lambda: sound(manifest=told().replace(b"none", b"\xff")), FormatError, MANIFEST),
    "nothing at all": (lambda: sound(manifest=b""), FormatError, MANIFEST),
    "nested": (lambda: sound(manifest=b"[" * 100_000), FormatError, "nests too deeply"),
    "a list": (lambda: sound(manifest=b"[]"), FormatError, "expected a JSON object"),
    "a key that stands twice": (lambda: sound(manifest=told()[:-1] + b', "files": []}'), FormatError, "stands twice"),
    "NaN": (lambda: sound(manifest=told(made={"a": float("nan")})), FormatError, "NaN"),
    "of another kind": (lambda: sound(manifest=told(format="thaw")), FormatError, "is no file of caches"),
    "of no kind": (lambda: sound(manifest=told(format=...)), FormatError, "is no file of caches"),
    "a later version": (lambda: sound(manifest=told(version=2)), VersionError, "upgrade thaw"),
    "a later version of other shape": (lambda: sound(manifest=told(version=9, files={})), VersionError, "upgrade thaw"),
    "no version": (lambda: sound(manifest=told(version=...)), VersionError, "version None"),
    "a version in words": (lambda: sound(manifest=told(version="1")), VersionError, "version '1'"),
    "no key": (lambda: sound(manifest=told(key=...)), FormatError, "must be an object"),
    "a key that is a list": (lambda: sound(manifest=told(key=["gpu"])), FormatError, "must be an object"),
    "a key of numbers": (lambda: sound(manifest=told(key={"gpu": 1})), FormatError, "must be a string"),
    "a key with escapes": (lambda: sound(manifest=told(key={"gpu": "\x1b[2J"})), FormatError, "must be a string"),
    "a key that is long": (lambda: sound(manifest=told(key={"gpu": "x" * 1001})), FormatError, "at most 1000"),
    "a key with a long name": (lambda: sound(manifest=told(key={"x" * 101: "a"})), FormatError, "at most 100"),
    "nothing about its making": (lambda: sound(manifest=told(made=...)), FormatError, "must be an object"),
    "a making that is none": (lambda: sound(manifest=told(made="x")), FormatError, "must be an object"),
    "no files": (lambda: sound(manifest=told(files=...)), FormatError, "must be a list"),
    "files by name": (lambda: sound(manifest=told(files={"a": 1})), FormatError, "must be a list"),
    "a file in words": (lambda: sound(manifest=told(files=["abc"])), FormatError, "a path, a size and a digest"),
    "a file of two": (lambda: sound(manifest=listing(2)), FormatError, "a path, a size and a digest"),
    "a file of four": (lambda: sound(manifest=listing(2, "0" * 64, 1)), FormatError, "a path, a size and a digest"),
    "a path that is none": (lambda: sound(manifest=listing(0, None)), FormatError, "must be a string"),
    "a negative size": (lambda: sound(manifest=listing(1, -1)), FormatError, "must be an integer"),
    "a huge size": (lambda: sound(manifest=listing(1, 1 << 80)), FormatError, "must be an integer"),
    "a size that is true": (lambda: sound({"vllm/a": b"a"}, told(files=[["vllm/a", True, "0" * 64]])), FormatError, ""),
    "a size with a point": (lambda: sound(manifest=listing(1, 256.0)), FormatError, "must be an integer"),
    "a size in words": (lambda: sound(manifest=listing(1, "256")), FormatError, "must be an integer"),
    "a digest in capitals": (lambda: sound(manifest=listing(2, "A" * 64)), FormatError, "is no SHA-256"),
    "a digest that is short": (lambda: sound(manifest=listing(2, "a" * 63)), FormatError, "is no SHA-256"),
    "a digest and a line's end": (lambda: sound(manifest=listing(2, "a" * 64 + "\n")), FormatError, ""),
    "a digest that is none": (lambda: sound(manifest=listing(2, 0)), FormatError, "must be a string"),
    "a manifest whose CRC is another": (
        lambda: zipped([replace(entries()[0], crc=1), *entries()[1:]]),
        CorruptionError,
        "is damaged",
    ),
    "a manifest that does not inflate": (
        lambda: zipped([replace(entries()[0], stored=b"\xff" * 99), *entries()[1:]]),
        CorruptionError,
        "is damaged",
    ),
    # something else altogether
    "empty": (lambda: b"", FormatError, "is no file of caches"),
    "zeros": (lambda: bytes(5000), FormatError, "is no file of caches"),
    "a snapshot": (lambda: b"\x89thaw\r\n\x1a" + bytes(5000), FormatError, "is no file of caches"),
    "a wheel": (lambda: zipped([Entry(b"x/__init__.py", b"")]), FormatError, "does not begin with"),
    "a comment": (lambda: sound()[:-2] + b"\5\0", FormatError, "has a comment"),
    "a comment that is there": (lambda: sound()[:-2] + b"\5\0hello", FormatError, "is no file of caches"),
    "something after it": (lambda: sound() + b"after", FormatError, "is no file of caches"),
    "a ZIP64": (lambda: sound()[:-22] + b"PK\6\7" + bytes(16) + sound()[-22:], FormatError, "is a ZIP64"),
    "only the end": (lambda: zipped([])[:21], FormatError, "is no file of caches"),
    "something before it": (lambda: b"before it" + sound(), FormatError, "are the most"),
    "more members than it says": (
        lambda: sound()[:-14] + b"\1\0\1\0" + sound()[-10:],
        FormatError,
        "more members than",
    ),
    "a directory that is too large": (
        lambda: sound()[:-10] + struct.pack("<2IH", 1 << 31, 0, 0),
        FormatError,
        "are the most",
    ),
}


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file(tmp_path, what):
    maker, error, word = HOSTILE[what]
    refused(tmp_path, maker(), error, word)


@pytest.mark.parametrize(
    ("limit", "most", "word"),
    [
        ("MAX_MEMBERS", 1, "1 are the most"),
        ("MAX_MEMBER", 255, "255 are the most"),
        ("MAX_BYTES", 415, "415 are the most"),
        ("MAX_MANIFEST", 100, "its manifest is too large"),
        ("MAX_FILE", 300, "300 are the most"),
        ("_NAMES", 10, "are the most"),
    ],
)
def test_each_limit(tmp_path, monkeypatch, limit, most, word):
    monkeypatch.setattr(archive, limit, most)
    refused(tmp_path, sound(), FormatError, word)


def test_just_within_each_limit(tmp_path, monkeypatch):
    """So that what is refused above is refused for its size."""
    deep = "vllm/" + "d/" * (places.MAX_DEPTH - 2) + "x"
    long = "/".join(["vllm", *["n" * 200] * 5])
    contents = {**FILES, deep: b"", long + "n" * (1024 - len(long)): b"", "vllm/" + "m" * 200: b""}
    data = sound(contents)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 5)
    monkeypatch.setattr(archive, "MAX_BYTES", 416)
    monkeypatch.setattr(archive, "MAX_MANIFEST", len(told(contents)))
    monkeypatch.setattr(archive, "MAX_MEMBER", len(told(contents)))
    monkeypatch.setattr(archive, "MAX_FILE", len(data))
    (tmp_path / "x").write_bytes(data)
    assert len(read(tmp_path / "x").manifest.members) == 5


LAST = "triton/K/k.cubin"
DAMAGED = {
    "other bytes": lambda: sound(manifest=listing(2, "0" * 64)),
    "another CRC": lambda: sound(crc=1),
    "bytes that do not inflate": lambda: sound(stored=b"\xff" * 99),
    "bytes that end": lambda: sound(stored=entries()[-1].fields()[1][:9]),
    "no bytes": lambda: sound(stored=b""),
    "another name before it": lambda: sound(local_name=b"triton/K/x.cubin"),
    "fewer bytes than it says": lambda: sound(method=0, stored=b"few"),
    "more bytes than it says": lambda: sound({**FILES, LAST: bytes(9)}, manifest=told(), size=256),
}


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("what", DAMAGED)
def test_a_member_that_is_damaged(tmp_path, what):
    """It is the last, and those before it are not written either."""
    refused(tmp_path, DAMAGED[what](), CorruptionError, "is damaged: 'triton/K/k.cubin'")


def peak(work):
    tracemalloc.start()
    try:
        with pytest.raises(ThawError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOMB = bytes(64 * MIB)


def test_a_bomb_is_not_inflated(tmp_path):
    """64 MiB where 100 bytes were told, in both places."""
    manifest = told(files=[["vllm/a", 100, hashlib.sha256(BOMB).hexdigest()]])
    (tmp_path / "x").write_bytes(sound({"vllm/a": BOMB}, manifest, size=100))
    caches = read(tmp_path / "x")
    assert peak(lambda: unpack(caches, here(tmp_path))) < MIB
    assert not (tmp_path / "places/vllm/a").exists()


def test_a_size_that_is_claimed_is_not_allocated(tmp_path):
    manifest = told(files=[["vllm/a", archive.MAX_MEMBER, "0" * 64]])
    for method in (0, 8):
        (tmp_path / "x").write_bytes(sound({"vllm/a": b"few"}, manifest, size=archive.MAX_MEMBER, method=method))
        caches = read(tmp_path / "x")
        (member,) = caches.manifest.members
        assert peak(lambda caches=caches, member=member: caches.read(member)) < MIB


def test_a_manifest_that_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_FILE", MIB)
    first, *others = entries()
    (tmp_path / "x").write_bytes(zipped([replace(first, data=b" " * len(BOMB), size=100), *others]))
    assert peak(lambda: read(tmp_path / "x")) < 4 * MIB


def test_every_cut_is_noticed(tmp_path):
    data = sound()
    for keep in range(len(data)):
        (tmp_path / "x").write_bytes(data[:keep])
        with pytest.raises(FormatError):
            read(tmp_path / "x")


def all_of(path):
    """What a file says and holds; None where that is refused."""
    try:
        caches = read(path)
        return caches.manifest, [caches.read(member) for member in caches.manifest.members]
    except ThawError:
        return None


def test_every_flipped_byte_is_noticed_or_means_nothing(tmp_path):
    """And it is another file to whoever trusts a SHA-256."""
    path, data = tmp_path / "x", sound()
    path.write_bytes(data)
    expected, digest, noticed = all_of(path), read(path).sha256, 0
    rng = random.Random(0)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= rng.randrange(1, 256)
        path.write_bytes(flipped)
        found = all_of(path)
        assert found in (None, expected), at
        noticed += found is None
        assert found is None or read(path).sha256 != digest
    assert noticed > len(data) / 2


@given(data=st.data())
def test_flipped_bits_leave_whole_files(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("a")
    whole = bytearray(sound())
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3)):
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    (root / "x").write_bytes(whole)
    before = tree(root)
    try:
        assert unpack(read(root / "x"), here(root)).written == 2
    except ThawError:
        pass
    else:
        assert {name: (root / "places" / name).read_bytes() for name in FILES} == FILES
    after = tree(root)
    left = {name.removeprefix("places/"): held for name, (_, held) in after.items() if held is not None}
    assert left.pop("x") == before["x"][1] and left.items() <= FILES.items()


def test_a_file_that_is_none(tmp_path):
    """None of them is waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", tmp_path / "none", tmp_path / "none" / "x"):
        with pytest.raises(StorageError):
            read(path)
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(StorageError, match="is no plain file"):
            read(path)


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "x").write_bytes(sound())
    (tmp_path / "link").symlink_to("x")
    assert read(tmp_path / "link").manifest == read(tmp_path / "x").manifest


@pytest.mark.parametrize("what", ["link", "absolute link", "link to a parent", "link to nothing", "link to a file"])
def test_a_link_that_leads_out_of_a_place(tmp_path, what):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine")
    (tmp_path / "places/triton").mkdir(parents=True)
    target = {
        "link": "../../outside",
        "absolute link": tmp_path / "outside",
        "link to a parent": "..",
        "link to nothing": tmp_path / "outside/none",
        "link to a file": tmp_path / "outside/file",
    }[what]
    (tmp_path / "places/triton/K").symlink_to(target)
    (tmp_path / "x").write_bytes(sound({LAST: b"evil"}))
    before = tree(tmp_path)
    with pytest.raises(StorageError, match=r"leads out of|cannot be written"):
        unpack(read(tmp_path / "x"), here(tmp_path))
    assert tree(tmp_path) == before


def test_links_that_stay_within_a_place_or_are_one(tmp_path):
    """As where a home has its caches on another disk."""
    (tmp_path / "disk/L").mkdir(parents=True)
    (tmp_path / "places").mkdir()
    (tmp_path / "places/triton").symlink_to("../disk")
    (tmp_path / "disk/K").symlink_to("L")
    (tmp_path / "x").write_bytes(sound())
    assert unpack(read(tmp_path / "x"), here(tmp_path)).written == 2
    assert (tmp_path / "disk/L/k.cubin").read_bytes() == FILES[LAST]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_moved_and_not_loaded(tmp_path):
    data = pickle.dumps(Evil(tmp_path / "loaded"))
    contents = {"vllm/modelinfos/a.pkl": data, "inductor/a.pkl": data, "triton/K/__grp__k.json": data}
    (tmp_path / "x").write_bytes(sound(contents))
    assert unpack(read(tmp_path / "x"), here(tmp_path)).written == 2
    assert (tmp_path / "places/vllm/modelinfos/a.pkl").read_bytes() == data
    assert (tmp_path / "places/triton/K/__grp__k.json").read_bytes() == data
    assert not (tmp_path / "loaded").exists()
    pickle.loads(data)
    assert (tmp_path / "loaded").exists(), "it would have been noticed"


def test_no_source_of_it_knows_how_to_load_one():
    sources = sorted(Path(thaw_vllm.caches.__file__).parent.glob("*.py"))
    assert {"archive", "groups", "machine", "places", "trust"} <= {path.stem for path in sources}
    for path in sources:
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        assert not modules & {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "torch", "runpy"}, path
        assert not names & {"eval", "exec", "__import__"}, path


def test_a_small_file_takes_a_small_memory(tmp_path):
    (tmp_path / "x").write_bytes(sound())
    tracemalloc.start()
    read(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_cannot_be_read_leaves_no_descriptor(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(StorageError):
            read(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_grows_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(sound() + b"more")
    real = os.fstat
    smaller = SimpleNamespace(st_mode=real(0).st_mode, st_size=len(sound()))

    def fstat(descriptor):
        found = real(descriptor)
        if found.st_size == len(sound()) + 4:
            smaller.st_mode = found.st_mode
            return smaller
        return found

    monkeypatch.setattr(archive.os, "fstat", fstat)
    with pytest.raises(ReplacedError, match="was written to while it was read"):
        read(tmp_path / "x")


def test_a_member_of_no_name(tmp_path):
    (tmp_path / "x").write_bytes(zipped([*entries(), Entry(b"", b"")]))
    with pytest.raises(FormatError):
        read(tmp_path / "x")


@pytest.mark.parametrize("name", [b"thaw-caches.json", b"vllm/a/x"])
def test_an_offset_beyond_every_file(tmp_path, name):
    """In a field of ZIP64 that a member may have where the file is none."""
    data = sound()
    end = len(data) - 22
    at = begin = struct.unpack("<I", data[end + 16 : end + 20])[0]
    out = b""
    while at < end:
        size = struct.unpack("<H", data[at + 28 : at + 30])[0]
        head, extra = bytearray(data[at : at + 46]), b""
        if data[at + 46 : at + 46 + size] == name:
            extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
            head[42:46], head[30:32] = b"\xff" * 4, struct.pack("<H", len(extra))
        out += head + data[at + 46 : at + 46 + size] + extra
        at += 46 + size
    length = struct.pack("<I", len(out))
    (tmp_path / "x").write_bytes(data[:begin] + out + data[end : end + 12] + length + data[end + 16 :])
    with pytest.raises(FormatError):
        caches = read(tmp_path / "x")
        [caches.read(member) for member in caches.manifest.members]


@pytest.mark.parametrize("version", [True, 1.0, "1", None])
def test_a_version_that_is_no_number(tmp_path, version):
    (tmp_path / "x").write_bytes(sound(manifest=told(version=version)))
    with pytest.raises(VersionError):
        read(tmp_path / "x")
