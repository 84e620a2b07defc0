import ctypes
import mmap

import numpy
import pytest

from thaw_vllm.transport.staging import HUGE, Staging, address_of, advise_huge


@pytest.mark.parametrize(("count", "size"), [(1, 4096), (7, 3 * 4096), (4, HUGE), (2, 3 << 20)])
def test_slots_are_apart_aligned_and_where_they_say(count, size):
    with Staging(count, size) as staging:
        assert len(staging.slots) == count
        for number, slot in enumerate(staging.slots):
            assert slot.view.nbytes == size
            assert not slot.view.readonly
            assert slot.address % 4096 == 0
            assert slot.address == address_of(slot.view)
            slot.view[:] = bytes([number + 1]) * size
        for number, slot in enumerate(staging.slots):
            assert ctypes.string_at(slot.address, size) == bytes([number + 1]) * size
        assert staging.slots[0].address % HUGE == 0


def test_closed_twice():
    staging = Staging(2, 4096)
    view = staging.slots[0].view
    staging.close()
    staging.close()
    assert staging.slots == []
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_error_under_way_is_not_hidden_by_a_view_that_its_frames_hold():
    def fail(view):
        raise KeyError(len(view))

    with pytest.raises(KeyError), Staging(1, 4096) as staging:
        fail(staging.slots[0].view[10:])


@pytest.mark.parametrize(("count", "size"), [(1, 0), (1, -4096), (1, 100), (1, 4097), (0, 4096), (-1, 4096)])
def test_sizes_are_checked(count, size):
    with pytest.raises(ValueError, match=f"{count} slots of {size} bytes"):
        Staging(count, size)


def test_more_than_the_address_space():
    with pytest.raises((OSError, ValueError, OverflowError)):
        Staging(1 << 40, 1 << 20)


def test_address_of_anything_that_holds_bytes():
    array = numpy.arange(100, dtype=numpy.uint8)
    assert address_of(memoryview(array)) == array.ctypes.data
    assert address_of(memoryview(array)[7:]) == array.ctypes.data + 7
    array.flags.writeable = False
    assert address_of(memoryview(array)) == array.ctypes.data


def test_kernel_without_huge_pages():
    class Memory:
        def madvise(self, advice):
            raise OSError(22, "Invalid argument")

    advise_huge(Memory())


def test_system_without_huge_pages(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    with Staging(1, 4096) as staging:
        staging.slots[0].view[:] = bytes(4096)
