"""Records of rollouts: what they hold survives, and nothing else is taken for one."""

import json
import math
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sessions.made_rollouts import any_rollouts, rollout, rollouts

from thaw_vllm.errors import CorruptionError, ExistsError, FormatError, StorageError, UsageError, VersionError
from thaw_vllm.format.document import canonical
from thaw_vllm.sessions import rollouts as module
from thaw_vllm.sessions.rollouts import decode, read, single, write

MADE = rollouts(rollout([1, 2, 3], reward=1.0), rollout([1, 4], seed=2))


def altered(change, *, honest=True):
    """The bytes of ``MADE`` after a change of the document, its id made anew as a forger would."""
    document = json.loads(MADE.encode())
    del document["id"]
    change(document)
    id_ = module._digest(document) if honest else "0" * 32
    return canonical(document | {"id": id_})


@given(made=any_rollouts)
def test_it_survives(made):
    data = made.encode()
    found = decode(data, "it")
    assert found == made and found.encode() == data and json.loads(data)["id"] == found.id


def test_a_file(tmp_path):
    path = tmp_path / "r.json"
    write(path, MADE)
    assert read(path) == MADE and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ExistsError):
        write(path, MADE)
    write(path, rollouts(rollout([1])), force=True)
    assert len(read(path).rollouts) == 1 and os.listdir(tmp_path) == ["r.json"]


def test_a_crash_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write(path, MADE)
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path, rollouts(rollout([1])), force=True)
    assert read(path) == MADE and os.listdir(tmp_path) == ["r.json"]


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match=r"none\.json' cannot be read"):
        read(tmp_path / "none.json")
    write(tmp_path / "r.json", MADE)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(FormatError, match="longer than any"):
        read(tmp_path / "r.json")
    with pytest.raises(UsageError, match="more than 10 bytes"):
        MADE.encode()


@pytest.mark.parametrize("what", ["a pipe", "a directory", "a device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, what):
    path = {"a pipe": tmp_path / "pipe", "a directory": tmp_path, "a device": "/dev/zero"}[what]
    if what == "a pipe":
        os.mkfifo(path)
    with pytest.raises((FormatError, StorageError), match=r"could be in|cannot be read"):
        read(path)


@given(data=st.data())
def test_any_change_is_noticed(data):
    """It is refused, unless it says the same, as a space for a line's end does."""
    whole = MADE.encode()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert decode(bytes(changed), "it") == MADE
    except FormatError as error:
        assert str(error).startswith(("it is", "bad it"))


def test_damage_names_the_cure():
    for data in (MADE.encode()[:-9], MADE.encode().replace(b'"reward":1.0', b'"reward":0.5'), b"\xff"):
        with pytest.raises(FormatError, match="make it anew with thaw demo rollouts"):
            decode(data, "'r.json'")
    with pytest.raises(CorruptionError, match=r"'r\.json' is damaged: its contents are not those"):
        decode(altered(lambda document: None, honest=False), "'r.json'")
    with pytest.raises(FormatError, match=r"'r\.json' is no record"):
        decode(b"{}", "'r.json'")
    with pytest.raises(VersionError, match="version 2; this thaw knows version 1"):
        decode(altered(lambda document: document.update(version=2)), "'r.json'")
    for found in (True, 1.0, "1", None):
        with pytest.raises(VersionError, match="this thaw knows version 1"):
            decode(altered(set_in("version", found)), "'r.json'")


def set_in(*path):
    """A change: the last entry is the value, those before it lead to its place."""

    def change(document):
        *way, name, value = path
        for one in way:
            document = document[one]
        document[name] = value

    return change


def remove(*path):
    def change(document):
        *way, name = path
        for one in way:
            document = document[one]
        del document[name]

    return change


def nested(depth):
    return [nested(depth - 1)] if depth else []


STEP = ("rollouts", 0, "steps", 0)
FORGED = {
    "no rollouts": set_in("rollouts", []),
    "a member too many": set_in("more", 1),
    "a member too few": remove("task"),
    "a step's member too few": remove(*STEP, "rank"),
    "a rollout's member too many": set_in("rollouts", 0, "more", 1),
    "a prompt's member too few": remove("prompt", "text"),
    "no model id": set_in("model", "m"),
    "a session that is a path": set_in("session", "../../../../../../etc/passwd"),
    "a rollout's session that is none": set_in("rollouts", 0, "session", "x"),
    "log-probabilities of something else": set_in("logprobs", "raw_logits"),
    "log-probabilities that are a list": set_in("logprobs", []),
    "a log-probability above 0": set_in(*STEP, "top", [[9, 0.5]]),
    "a log-probability that is a text": set_in(*STEP, "logprob", "-1"),
    "a log-probability that is a bool": set_in(*STEP, "logprob", False),
    "a rank of 0": set_in(*STEP, "rank", 0),
    "a token below 0": set_in(*STEP, "token", -1),
    "a token that is too large": set_in("prompt", "tokens", [1 << 31]),
    "nothing most likely": set_in(*STEP, "top", []),
    "the likeliest last": set_in(*STEP, "top", [[9, -2.0], [1, -1.0]]),
    "the likeliest twice": set_in(*STEP, "top", [[9, -0.5], [9, -0.5]]),
    "a token of the likeliest alone": set_in(*STEP, "top", [[9]]),
    "a token of the likeliest that is none": set_in(*STEP, "top", [9]),
    "its own token with another number in top": set_in(*STEP, "top", [[9, -0.5], [1, -1.5]]),
    "rank 1 that is not the likeliest": set_in(*STEP, "rank", 1),
    "seeds that fall": set_in("rollouts", 0, "seed", 3),
    "a seed twice": set_in("rollouts", 0, "seed", 2),
    "no reason to end": set_in("rollouts", 0, "finished", ""),
    "sampling that has no UTF-8": set_in("sampling", {"stop": ["\ud800"]}),
    "a name of sampling that has no UTF-8": set_in("sampling", {"\ud800": 1}),
    "sampling that is deep": set_in("sampling", {"stop": nested(17)}),
    "sampling that is very deep": set_in("sampling", {"stop": nested(900)}),
    "a sum of other tokens": set_in("rollouts", 0, "sum_logprob", -4.0),
    "a mean of other tokens": set_in("rollouts", 1, "mean_logprob", -0.5),
    "a reward that is a text": set_in("rollouts", 0, "reward", "good"),
    "a reward beyond all": set_in("rollouts", 0, "reward", 10**400),
    "a reward whose square is beyond all": set_in("rollouts", 0, "reward", 1e200),
    "a seed that is none": set_in("rollouts", 0, "seed", 1.5),
    "a text that is none": set_in("rollouts", 0, "text", None),
    "a text that has no UTF-8": set_in("rollouts", 0, "text", "\ud800"),
    "a piece too few": remove("pieces", "4"),
    "a piece too many": set_in("pieces", "77", "x"),
    "a piece of no token": set_in("pieces", "-1", "x"),
    "a piece twice": set_in("pieces", "01", "x"),
    "a piece of a huge number": set_in("pieces", "9" * 5000, "x"),
    "a time that is text": set_in("created", "today"),
    "versions that are a list": set_in("versions", []),
    "sampling that is none": set_in("sampling", None),
    "a task of numbers": set_in("task", "question", 1),
    "too many notes": set_in("task", {str(one): "" for one in range(65)}),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_is_forged_is_held_against_the_rules(what):
    """An id is no signature: whoever forges a record can make one."""
    with pytest.raises(FormatError, match=r"^it is damaged: .+; make it anew"):
        decode(altered(FORGED[what]), "it")


def test_no_depth_is_too_much():
    head = b'{"format":"thaw rollouts","version":1,"id":"' + b"0" * 32 + b'","more":'
    for depth in range(800, 1010):
        with pytest.raises(FormatError, match="it"):
            decode(head + b"[" * depth + b"]" * depth + b"}", "it")


def test_the_forger_can_forge():
    assert decode(altered(set_in("source", "other")), "it").source == "other"


def test_what_no_reader_takes_is_not_written():
    for made in (
        rollouts(),
        rollouts(rollout([1], reward=math.nan)),
        rollouts(rollout([1], logprob=-math.inf)),
        rollouts(rollout([1]), pieces={}),
        rollouts(rollout([1]), sampling={"p": {1, 2}}),
        rollouts(rollout([1]), sampling={"p": nested(900)}),
        rollouts(rollout([1]), rollout([2])),
    ):
        with pytest.raises(UsageError, match="cannot be kept"):
            made.encode()


def test_sums():
    one = rollout([1, 2, 3], logprob=-0.1)
    assert one.sum_logprob == math.fsum([-0.1] * 3) and one.mean_logprob == one.sum_logprob / 3
    assert (rollout([]).sum_logprob, rollout([]).mean_logprob) == (0.0, 0.0)
    assert (one.steps[0].gap, rollout([1], logprob=-0.75).steps[0].gap) == (0.0, 0.25)


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_shortest_number_of_a_float32(value):
    found = single(value)
    assert struct.pack("<f", found) == struct.pack("<f", value)
    digits = len(repr(abs(found)).partition("e")[0].replace(".", "").strip("0"))
    assert digits <= 9
    if value:  # one digit less would be another number
        assert digits == 1 or struct.pack("<f", float(f"{value:.{digits - 1}g}")) != struct.pack("<f", value)
