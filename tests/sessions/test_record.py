"""Records: what they hold survives, and nothing else is taken for one."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sessions.made import MODEL, session

from thaw_vllm.errors import CorruptionError, FormatError, ThawError, UsageError, VersionError
from thaw_vllm.sessions.record import EXPIRING, MAGIC, Head, decode, decode_head, expiry, ids, record_id

ID = "0123456789abcdef" * 2
WHOLE = {
    "prompt": 3,
    "parent": ID,
    "fork": 5,
    "labels": ("plan a", "π"),
    "finished": "stop",
    "sampling": {"temperature": 0.7, "stop": ["\n"], "logit_bias": None},
    "random": {"generator": "AAAA"},
    "salt": "s",
    "source": "/models/m",
}


@pytest.mark.parametrize("head", [{}, WHOLE, WHOLE | {"expires": 7.25}])
def test_it_survives(head):
    made = session([1, 2, 3, 4, 5, 2**31 - 1], **head)
    data = made.encode()
    assert decode(data, record_id(data), "it") == made and made.id == record_id(data)
    found, at = decode_head(data, "it", len(data))
    assert found == made.head and len(data) == at + 24


def test_two_of_the_same_content_are_two():
    assert session([1]).id != session([1]).id


@given(data=st.data())
def test_any_change_is_noticed(data):
    whole = session([1, 2, 3, 4, 5], created=1.5, nonce="0", **WHOLE).encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FormatError):
        decode(bytes(changed), record_id(whole), "it")


@given(cut=st.integers(0, 200))
def test_a_cut_one_is_noticed(cut):
    whole = session([1, 2, 3, 4, 5]).encode()
    part = whole[: max(0, len(whole) - 1 - cut)]
    for read in (lambda: decode(part, record_id(whole), "it"), lambda: decode_head(part, "it", len(part))):
        with pytest.raises(FormatError):
            read()


BAD = {
    "a count below the tokens": {"count": 1 << 40},
    "more prompt than tokens": {"prompt": 6},
    "more blocks than tokens": {"blocks": 2},
    "kept after the blocks": {"kept": [2]},
    "no groups": {"kept": []},
    "no ranks": {"contexts": []},
    "a context that is a path": {"contexts": ["../../../../../../etc/passwd"]},
    "a parent that is a path": {"parent": "../x", "fork": 1},
    "a parent alone": {"parent": ID},
    "a fork alone": {"fork": 1},
    "a fork beyond the end": {"parent": ID, "fork": 6},
    "no model id": {"model": "m"},
    "a label that is none": {"labels": [""]},
    "a label for a terminal": {"labels": ["\x1b[2J"]},
    "a source for a terminal": {"source": "\x1b[2J"},
    "a time that is text": {"created": "today"},
    "a time before all": {"created": -1},
    "sampling that is a list": {"sampling": []},
    "finished by a number": {"finished": 1},
    "a field too many": {"more": 1},
    "a lifetime that is text": {"expires": "tomorrow"},
    "a lifetime that is none": {"expires": None},
    "a lifetime before all": {"expires": -1},
    "a lifetime beyond all": {"expires": 1 << 41},
    "tokens of a bool": {"count": True},
    "pages of no group": {"kept": [1]},
    "blocks of too many ranks": {"contexts": [ID] * 4096, "blocks": 1025, "count": 5000, "kept": [0]},
}


@pytest.mark.parametrize("what", BAD)
def test_a_head_that_is_none(what):
    document = json.loads(json.dumps(session([1, 2, 3, 4, 5]).head.to_json()))
    with pytest.raises(FormatError):
        Head.from_json(document | BAD[what])


def test_a_field_too_few():
    document = session([1]).head.to_json()
    del document["salt"]
    with pytest.raises(FormatError, match="salt"):
        Head.from_json(document)


def test_what_no_reader_takes_is_not_written():
    for head in ({"labels": ("",)}, {"sampling": {"p": float("nan")}}, {"sampling": {"p": "x" * (1 << 20)}}):
        with pytest.raises(UsageError, match="cannot be kept"):
            session([1], **head).encode()


@pytest.mark.parametrize("tokens", [[-1], [2**31], ["a"], [1.5]])
def test_tokens_that_are_none(tokens):
    with pytest.raises(UsageError, match="token ids"):
        ids(tokens)


def test_other_files_are_told_apart():
    with pytest.raises(FormatError, match="no record"):
        decode_head(b"{}", "it", 2)
    with pytest.raises(VersionError, match="later version"):
        decode_head(MAGIC.replace(b"1", b"3") + b"{}\n", "it", 20)
    with pytest.raises(CorruptionError, match="first lines"):
        decode_head(MAGIC + b"{", "it", 20)
    with pytest.raises(ThawError, match="it: bad session"):
        decode_head(MAGIC + b"[]\n", "it", len(MAGIC) + 3)


def test_another_spelling_is_another_record():
    """It would come back from a file under another id."""
    whole = session([1, 2], created=5.0).encode()
    other = whole.replace(b'"created":5.0', b'"created":5')
    with pytest.raises(FormatError, match="not written as records are"):
        decode(other, record_id(other), "it")


def test_only_what_expires_is_of_version_2():
    """So what readers of version 1 know is as it was, and they see that the rest is not for them."""
    stays, goes = session([1], nonce="0", created=5.0), session([1], nonce="0", created=5.0, expires=7.0)
    assert stays.encode().startswith(b"thaw session 1\n") and b"expires" not in stays.encode()
    assert goes.encode().startswith(b"thaw session 2\n") and b'"created":5.0,"expires":7.0,' in goes.encode()
    for one, other in ((stays, EXPIRING), (goes, MAGIC)):
        data = other + one.encode()[len(MAGIC) :]
        with pytest.raises(FormatError, match="version 2 say when they expire"):
            decode(data, record_id(data), "it")
        with pytest.raises(FormatError, match="version 2 say when they expire"):
            decode_head(data, "it", len(data))


def test_when_a_session_expires():
    assert expiry(5, None) is None and expiry(5, 0.25) == 5.25 and expiry(0, 1 << 32) == 1 << 32
    stays, goes = session([1]).head, session([1], expires=7.0).head
    assert not stays.expired(1e12) and not goes.expired(6.9) and goes.expired(7.0) and goes.expired(8)
    assert stays.shown("0")["expires"] is None and goes.shown("0")["expires"] == 7.0


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), (1 << 32) + 1, 10**400, True, "7d", [1]])
def test_a_ttl_that_is_none(ttl):
    with pytest.raises(UsageError, match="ttl must be a number of seconds above 0"):
        expiry(5, ttl)


def test_tokens_and_head_agree():
    made = session([1, 2, 3])
    with pytest.raises(FormatError, match="its head says"):
        dataclasses.replace(made, tokens=ids([1]))
    negative = made.encode()[:-1] + b"\x80"
    with pytest.raises(FormatError, match="below 0"):
        decode(negative, record_id(negative), "it")
    assert made.head.model == MODEL
