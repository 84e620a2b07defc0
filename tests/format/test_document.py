import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.format.strategies import json_values, printable

from thaw_vllm.errors import FormatError
from thaw_vllm.format import document
from thaw_vllm.format.document import canonical, dump, parse

objects = st.dictionaries(printable, json_values, max_size=5)


@given(objects)
def test_what_is_dumped_is_parsed(value):
    assert parse(dump(value), "header") == value


@given(objects)
def test_order_of_keys_is_kept_and_canonical_form_ignores_it(value):
    backwards = dict(reversed(value.items()))
    assert list(parse(dump(value), "header")) == list(value)
    assert canonical(backwards) == canonical(value)
    assert canonical(value).isascii()
    assert json.loads(canonical(value)) == value


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b'\xef\xbb\xbf{"a": 1}')
@example(b'{"a": "\\ud800"}')
@example(b"{" * 50_000)
@example(b'{"a":' + b"[" * 990 + b"]" * 990 + b"}")
@example(b'{"a": ' + b"9" * 5000 + b"}")
@example(b'{"a": -1e400}')
def test_any_bytes_are_an_object_or_a_format_error(data):
    try:
        assert isinstance(parse(data, "header"), dict)
    except FormatError as error:
        assert str(error).startswith("bad header: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": -float("inf")}, "\ud800", {"\udfff": 1}])
def test_what_json_cannot_hold_is_not_dumped(value):
    with pytest.raises(FormatError, match="cannot be stored as JSON"):
        dump({"a": value})


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, [1], -1, 8, 2**80])
def test_integer_refuses(value):
    with pytest.raises(FormatError, match=r"^size must be an integer from 0 to 7, found "):
        document.integer(value, "size", 0, 7)


def test_integer_takes_its_bounds():
    assert [document.integer(n, "size", 0, 7) for n in (0, 7)] == [0, 7]


@pytest.mark.parametrize(
    "bad", ["\0", "\x1b", "\n", "\x7f", "\x80", "\x9b", "\x9f", "\ud800", "\udfff", "x" * 9, b"x", 1, None]
)
def test_text_refuses(bad):
    value = f"a{bad}b" if isinstance(bad, str) else bad
    with pytest.raises(FormatError, match=r"^name must be a string of at most 8 printable characters"):
        document.text(value, "name", 8)


@pytest.mark.parametrize("good", ["", "x" * 8, "é", "\xa0", "日本", "\U0001f9ca"])
def test_text_takes(good):
    assert document.text(good, "name", 8) == good


@given(json_values)
def test_lists_and_objects_are_told_apart(value):
    for check, kind in ((document.array, list), (document.mapping, dict)):
        arguments = (value, "here", 4) if kind is list else (value, "here")
        if isinstance(value, kind):
            assert check(*arguments) is value
        else:
            with pytest.raises(FormatError, match=r"^here must be "):
                check(*arguments)


def test_array_refuses_one_too_many():
    assert document.array([1, 2], "here", 2) == [1, 2]
    with pytest.raises(FormatError, match="at most 1 entries"):
        document.array([1, 2], "here", 1)


def test_short_shows_anything_in_a_line():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, [[]] * 1_000_000, "x" * 1_000_000, {"a" * 1000: {"b": deep}}, 10**4000, 2.5, None):
        assert len(document.short(value)) <= 60
    while deep:  # or freeing it would overflow the stack of older interpreters
        deep = deep[0]
