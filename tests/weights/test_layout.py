import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.weights.modules import DTYPES, LAYOUTS, Plan, bits, elements
from torch._subclasses.fake_tensor import FakeTensorMode

from thaw_vllm.errors import UnsupportedError
from thaw_vllm.weights.layout import byte_view, check_storable, dense, extent, host_bytes, memory_order, ordered, runs


@st.composite
def tensors(draw, repeated=True):
    shape = tuple(draw(st.lists(st.integers(0 if repeated else 1, 5), max_size=4)))
    again = [dim for dim, size in enumerate(shape) if size > 1 and repeated and draw(st.integers(0, 3)) == 0]
    order = tuple(draw(st.permutations(range(len(shape)))))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    plan = Plan("t", "buffer", dtype, shape, layout, order, tuple(again))
    return plan.build(random.Random(draw(st.integers(0, 3))))


@given(tensors(), st.data())
def test_runs_are_the_elements_in_order(tensor, data):
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    parts = list(runs(tensor, start, stop))
    item = tensor.element_size()
    assert b"".join(bits(part) for part in parts) == bits(tensor)[start * item : stop * item]
    assert all(part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for part in parts)
    assert len(parts) <= 2 * max(tensor.dim(), 1) + 1


@given(tensors(repeated=False), st.data())
def test_runs_can_be_written_to(tensor, data):
    """As a restore does: whatever the cuts, every element gets its own value once."""
    cuts = sorted(data.draw(st.lists(st.integers(0, tensor.numel()), max_size=3)))
    source = elements(tensor.numel(), "int32", random.Random(9))
    target = torch.zeros_like(tensor, dtype=torch.int32)
    for start, stop in zip([0, *cuts], [*cuts, tensor.numel()], strict=True):
        position = start
        for part in runs(target, start, stop):
            part.copy_(source[position : position + part.numel()].view(part.shape))
            position += part.numel()
    assert target.reshape(-1).tolist() == source.tolist()


@given(tensors())
def test_dense_is_no_gap_and_no_overlap(tensor):
    once = tensor
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and step == 0:
            once = once.narrow(dim, 0, 1)
    places = {0}
    for size, step in zip(once.shape, once.stride(), strict=True):
        places = {place + i * step for place in places for i in range(size)}
    if not tensor.numel():
        return
    assert dense(tensor) == (len(places) == once.numel() == max(places) + 1)
    low, high = extent(tensor)
    assert (low, high) == (tensor.data_ptr(), tensor.data_ptr() + (max(places) + 1) * tensor.element_size())


@given(tensors(repeated=False))
def test_bytes_of_a_dense_tensor_are_its_elements_in_order_of_memory(tensor):
    if dense(tensor):
        expected = bits(tensor.permute(memory_order(tensor.stride())))
        assert bytes(host_bytes(byte_view(tensor))) == expected
        assert bits(ordered(tensor, tensor.stride())) == expected


def test_byte_view_shares_memory():
    tensor = torch.zeros(4, 5)[1:3]
    host_bytes(byte_view(tensor))[:4] = bytes([0, 0, 128, 63])
    assert tensor[0, 0] == 1
    assert tensor.sum() == 1


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (1, 2)])
def test_overlapping_windows_are_not_dense(stride):
    assert not dense(torch.arange(12).as_strided((3, 3), stride))


class Wrapper(torch.Tensor):
    """A tensor subclass that computes for itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def _freed():
    tensor = torch.randn(10)
    tensor.untyped_storage().resize_(0)
    return tensor


def _fake():
    with FakeTensorMode():
        return torch.empty(3)


UNSTORABLE = {
    "meta": (lambda: torch.empty(3, device="meta"), "meta device .* materialise it with to_empty"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"layout torch.sparse_coo"),
    "sparse_csr": (lambda: torch.eye(3).to_sparse_csr(), r"layout torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "layout nested"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        "wraps other tensors|layout",
    ),
    "quantised": (lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8), "dtype torch.qint8"),
    "subclass": (lambda: torch.zeros(3).as_subclass(Wrapper), "is a Wrapper, which wraps other tensors"),
    "fake": (_fake, "is a FakeTensor"),
    "conjugate": (lambda: torch.zeros(3, dtype=torch.complex64).conj(), "lazy conjugate"),
    "negative": (lambda: torch.zeros(3, dtype=torch.complex64).conj().imag, "lazy conjugate or negative"),
    "lazy": (torch.nn.UninitializedParameter, "not initialised yet; run the module once"),
    "lazy_buffer": (torch.nn.UninitializedBuffer, "not initialised yet"),
    "freed": (_freed, r"no memory of its own at present \(freed, sharded or offloaded\)"),
    "zero": (lambda: torch._efficientzerotensor(3), "no memory of its own|zero"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNSTORABLE)
def test_what_has_no_bytes_of_its_own_is_refused(kind):
    make, words = UNSTORABLE[kind]
    with pytest.raises(UnsupportedError, match=f"^'layer.weight' .*({words})"):
        check_storable("layer.weight", make())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_tensors_are_not(dtype, layout):
    for shape in ((), (0,), (3, 0), (3, 4)):
        tensor = Plan("t", "buffer", dtype, shape, layout).build(random.Random(0))
        check_storable("t", tensor)
        check_storable("t", torch.nn.Parameter(tensor, requires_grad=False))
        check_storable("t", torch.nn.Buffer(tensor) if hasattr(torch.nn, "Buffer") else tensor)


def test_parameter_subclasses_of_engines_are_not():
    """They add attributes, as vLLM's do, and compute as any tensor does."""

    class Sharded(torch.nn.Parameter):
        def __new__(cls, data, **_):
            return super().__new__(cls, data=data, requires_grad=False)

        def __init__(self, data, output_dim):
            self.output_dim = output_dim

        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            return super().__torch_function__(function, types, arguments, options or {})

    check_storable("t", Sharded(torch.zeros(3), output_dim=0))


def test_big_endian_machines_are_refused(monkeypatch):
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(UnsupportedError, match="big-endian"):
        check_storable("w", torch.ones(1))
