import io

import pytest

from thaw_vllm.transport import medium

pytestmark = pytest.mark.usefixtures("no_leaks")

MOUNTS = """\
22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw
23 1 259:1 / / rw,relatime shared:1 master:2 - ext4 /dev/nvme0n1p1 rw,discard
24 23 0:22 / /with\\040space rw - tmpfs tmpfs rw,size=1k
25 23 0:41 / /mnt rw - fuse.sshfs who@where:/ - rw
"""


def table(text):
    return lambda *_, **__: io.StringIO(text)


def test_what_the_kernel_shows_as_its_own():
    with open("/proc/self/status", "rb") as file:
        assert medium.file_system(file.fileno()) == "proc"
        assert not medium.in_memory(file.fileno())


def test_memory(memory_path, tmp_path):
    if memory_path == tmp_path:
        pytest.skip("no /dev/shm")
    (memory_path / "f").write_bytes(b"x")
    with (memory_path / "f").open("rb") as file:
        assert medium.file_system(file.fileno()) == "tmpfs"
        assert medium.in_memory(file.fileno())


def test_removed_file_is_where_it_was(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    with (tmp_path / "f").open("rb") as file:
        before = medium.file_system(file.fileno())
        (tmp_path / "f").unlink()
        assert medium.file_system(file.fileno()) == before


def test_table_is_read_by_device(monkeypatch):
    monkeypatch.setattr(medium, "open", table(MOUNTS), raising=False)
    assert medium._mounts() == {"0:21": "proc", "259:1": "ext4", "0:22": "tmpfs", "0:41": "fuse.sshfs"}


@pytest.mark.parametrize("text", ["", "nonsense\n", "1 2\n", "22 1 0:21 / /proc rw\n", "22 1 0:21 / /proc rw - \n"])
def test_table_that_says_nothing(monkeypatch, text):
    monkeypatch.setattr(medium, "open", table(text), raising=False)
    assert medium._mounts() == {}


def test_no_table(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(medium, "open", refuse, raising=False)
    (tmp_path / "f").write_bytes(b"x")
    with (tmp_path / "f").open("rb") as file:
        assert medium.file_system(file.fileno()) == ""
        assert not medium.in_memory(file.fileno())
