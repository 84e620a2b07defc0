import os
import threading

import pytest

from thaw_vllm.transport.numa import near, pinned_to

BUS = "0000:3b:00.0"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """``system(nodes, list)``: a made-up /sys of a machine on whose cores 0 to 15 this process may run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def make(nodes, cores):
        for number in range(nodes):
            (tmp_path / f"devices/system/node/node{number}").mkdir(parents=True)
        (tmp_path / "devices/system/node/possible").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "devices/system/node/possible").write_text("0-9")
        device = tmp_path / "bus/pci/devices" / BUS
        device.mkdir(parents=True)
        if cores is not None:
            (device / "local_cpulist").write_text(cores)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("cores", "found"),
    [
        ("0-3\n", {0, 1, 2, 3}),
        ("0-1,8,10-11\n", {0, 1, 8, 10, 11}),
        ("7", {7}),
        ("12-31\n", {12, 13, 14, 15}),
    ],
)
def test_cores_beside_the_device(system, cores, found):
    assert near(BUS, system(2, cores)) == found


@pytest.mark.parametrize("cores", ["0-15\n", "0-255\n", "16-31\n", "\n", "", "nonsense\n", "3-x\n", None])
def test_it_makes_no_difference_or_is_not_known(system, cores):
    assert near(BUS, system(2, cores)) == frozenset()


@pytest.mark.parametrize("nodes", [0, 1])
def test_memory_in_one_part(system, nodes):
    assert near(BUS, system(nodes, "0-3\n")) == frozenset()


def test_another_device_and_no_sysfs(system, tmp_path):
    assert near("0000:ff:00.0", system(2, "0-3\n")) == frozenset()
    assert near(BUS, tmp_path / "absent") == frozenset()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be kept on cores here")
class TestPinned:
    def test_this_thread_alone_and_only_meanwhile(self):
        before, seen = os.sched_getaffinity(0), {}
        core = min(before)

        def work():
            with pinned_to(frozenset({core})):
                seen["inside"] = os.sched_getaffinity(0)
            seen["after"] = os.sched_getaffinity(0)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == {"inside": {core}, "after": before}
        assert os.sched_getaffinity(0) == before

    def test_ended_by_an_error(self):
        before = os.sched_getaffinity(0)
        with pytest.raises(KeyError), pinned_to(frozenset({min(before)})):
            raise KeyError
        assert os.sched_getaffinity(0) == before

    def test_no_cores(self):
        before = os.sched_getaffinity(0)
        with pinned_to(frozenset()):
            assert os.sched_getaffinity(0) == before

    def test_not_allowed_to(self, monkeypatch):
        def refuse(*_):
            raise PermissionError

        monkeypatch.setattr(os, "sched_setaffinity", refuse)
        with pinned_to(frozenset({0})):
            pass
        with pytest.raises(KeyError), pinned_to(frozenset({0})):
            raise KeyError
