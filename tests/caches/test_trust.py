"""A file of caches is unpacked if this user packed it here, or its SHA-256 is given; and for no other reason."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thaw_vllm.caches import archive, packing, trust
from thaw_vllm.errors import StorageError, UsageError

pytestmark = pytest.mark.usefixtures("no_leaks")

DIGESTS = [f"{number:064x}" for number in range(8)]


@pytest.fixture
def caches(tmp_path):
    (tmp_path / "kernel").write_bytes(b"kernel")
    packing.pack(tmp_path / "a.thawcaches", [("triton/K/k", tmp_path / "kernel")], {}, {})
    return archive.read(tmp_path / "a.thawcaches")


@pytest.fixture
def environment(tmp_path):
    return {trust.VARIABLE: str(tmp_path / "state")}


@pytest.fixture
def own(environment, caches):
    """The list, which names the file."""
    trust.note_own(caches.sha256, environment)
    return trust.own_list(environment)


def test_without_a_word(caches, environment, own):
    """Also where it was packed here."""
    why = trust.why_not(caches, None, environment)
    assert why.startswith(f"{caches.shown} was not trusted")
    assert "--trust-caches own" in why and f"--trust-caches {caches.sha256}" in why


def test_by_its_digest(caches, environment):
    assert trust.why_not(caches, caches.sha256, environment) is None
    assert trust.why_not(caches, caches.sha256.upper(), environment) is None
    assert not Path(environment[trust.VARIABLE]).exists(), "no list is needed, and none is made"


@pytest.mark.parametrize("digest", ["0" * 64, "F" * 64])
def test_by_the_digest_of_another(caches, environment, own, digest):
    why = trust.why_not(caches, digest, environment)
    assert "is not the file that was trusted" in why and caches.sha256 in why


def test_what_differs_in_one_digit_is_another(caches, environment):
    first = "1" if caches.sha256[0] == "0" else "0"
    assert trust.why_not(caches, first + caches.sha256[1:], environment) is not None


WORDS = ["", "OWN", "own ", "own\n", "yes", "true", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n", "٣" * 64]


@pytest.mark.parametrize("word", WORDS)
def test_other_words_are_an_error(caches, environment, own, word):
    for ask in (lambda: trust.check_word(word), lambda: trust.why_not(caches, word, environment)):
        with pytest.raises(UsageError, match="--trust-caches takes 'own'"):
            ask()


def test_a_long_word_is_not_repeated():
    with pytest.raises(UsageError) as raised:
        trust.check_word("x\x1b" * 100_000)
    assert len(str(raised.value)) < 500 and str(raised.value).isprintable()


def test_own_ones(caches, environment):
    why = trust.why_not(caches, "own", environment)
    assert "is not one that you have packed here" in why and caches.sha256 in why
    assert not Path(environment[trust.VARIABLE]).exists(), "asking makes no list"
    for digest in DIGESTS:
        trust.note_own(digest, environment)
    assert trust.why_not(caches, "own", environment) == why
    trust.note_own(caches.sha256, environment)
    assert trust.why_not(caches, "own", environment) is None


def test_the_list(environment):
    for digest in [*DIGESTS, *DIGESTS[::-1]]:
        trust.note_own(digest, environment)
    path = trust.own_list(environment)
    assert path.read_text() == "".join(f"{digest}\n" for digest in DIGESTS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_newest_are_kept(environment, monkeypatch):
    monkeypatch.setattr(trust, "_MOST", 3 * 65)
    for digest in DIGESTS:
        trust.note_own(digest, environment)
    assert trust.own_list(environment).read_text().split() == DIGESTS[-3:]


def test_several_that_pack_at_once(environment):
    digests = [f"{number:064x}" for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda digest: trust.note_own(digest, environment), digests))
    assert sorted(trust.own_list(environment).read_text().split()) == digests


def test_what_else_stands_in_it_trusts_nothing(caches, environment, own):
    own.write_text(f"own\n{caches.sha256[:-1]}\nx{caches.sha256}\n{caches.sha256}x\n\xff\n")
    assert trust.why_not(caches, "own", environment) is not None
    trust.note_own(caches.sha256, environment)
    assert own.read_text() == f"{caches.sha256}\n"


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert trust.own_list({}) == tmp_path / "home/.local/state/thaw/own-caches"
    assert trust.own_list({"XDG_STATE_HOME": "/s"}) == Path("/s/thaw/own-caches")
    assert trust.own_list({"XDG_STATE_HOME": "/s", trust.VARIABLE: "/t"}) == Path("/t/own-caches")
    assert trust.own_list({"XDG_STATE_HOME": "", trust.VARIABLE: ""}) == trust.own_list({})
    monkeypatch.chdir(tmp_path)
    assert trust.own_list({trust.VARIABLE: "here"}) == tmp_path / "here/own-caches"


def writable_by_the_group(path):
    path.chmod(0o620)


def writable_by_all(path):
    path.chmod(0o602)


def readable_by_all(path):
    path.chmod(0o644)


def a_link(path):
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def a_link_to_nothing(path):
    path.unlink()
    path.symlink_to("nowhere")


def a_directory(path):
    path.unlink()
    path.mkdir(mode=0o700)


def in_a_directory_of_the_group(path):
    path.parent.chmod(0o770)


def in_a_directory_of_all(path):
    path.parent.chmod(0o1777)


SPOILED = [
    *(writable_by_the_group, writable_by_all, readable_by_all, a_link, a_link_to_nothing, a_directory),
    *(in_a_directory_of_the_group, in_a_directory_of_all),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_list_that_others_could_have_written(caches, environment, own, spoil):
    """It trusts nothing, and nothing is added to it."""
    spoil(own)
    before = sorted((path.name, path.is_file() and path.read_text()) for path in own.parent.iterdir())
    for ask in (
        lambda: trust.why_not(caches, "own", environment),
        lambda: trust.note_own(DIGESTS[0], environment),
    ):
        with pytest.raises(StorageError, match=r"others may|list of your own caches"):
            ask()
    assert sorted((path.name, path.is_file() and path.read_text()) for path in own.parent.iterdir()) == before
    assert trust.why_not(caches, caches.sha256, environment) is None, "a digest needs no list"


def test_a_list_of_another_user(caches, environment, own, monkeypatch):
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(StorageError, match="others may"):
        trust.why_not(caches, "own", environment)


def test_a_list_of_another_user_in_our_directory(caches, environment, own, monkeypatch):
    """Of the two owners that are asked for, this is the second."""
    other, fstat = os.geteuid() + 1, os.fstat

    def of_another(descriptor):
        found = fstat(descriptor)
        return os.stat_result([*found[:4], other, *found[5:]])

    monkeypatch.setattr(os, "fstat", of_another)
    with pytest.raises(StorageError, match="others may read or write the list"):
        trust.why_not(caches, "own", environment)


def test_a_list_that_cannot_be_kept(environment, tmp_path):
    (tmp_path / "state").touch()
    with pytest.raises(StorageError, match="cannot be made"):
        trust.note_own(DIGESTS[0], environment)
