"""Many clients at once, ones that talk nonsense, files that change, and who may start a zygote where."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading

import pytest
from tests.zygote.running import ROOT, Zygote, alive, until

from thaw_vllm.errors import UnsupportedError, UsageError
from thaw_vllm.zygote import client, program
from thaw_vllm.zygote.place import place


class TestTogether:
    def test_many_programs(self, zygote: Zygote):
        code = "import sys, time; time.sleep(0.2); print(input()[::-1], sys.argv[1]); sys.exit(int(sys.argv[1]))"
        started = [zygote.popen("-c", code, n, stdin=subprocess.PIPE) for n in range(20)]
        for n, process in enumerate(started):
            assert process.communicate(f"{n:05}\n", timeout=60) == (f"{f'{n:05}'[::-1]} {n}\n", "")
            assert process.returncode == n
        until(lambda: not zygote.status()["programs"])

    def test_a_program_within_a_program(self, zygote: Zygote):
        code = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-m', 'thaw_vllm', 'run', '-c', "
        ran = zygote.run("-c", code + "'print(1); exit(5)']).returncode + 1)")
        assert ran.returncode == 6 and ran.stdout == "1\n"

    def test_status(self, zygote: Zygote):
        before = zygote.status()
        process = zygote.popen("-c", "import os; print(os.getpid(), flush=True); print(input())", stdin=subprocess.PIPE)
        pid = int(process.stdout.readline())
        (about,) = zygote.status()["programs"]
        assert about["pid"] == pid and about["processes"] == 1 and not about["detached"]
        assert about["memory"]["resident"] > about["memory"]["private"] > 0
        process.communicate("\n", timeout=60)
        until(lambda: zygote.status()["ended"] == before["ended"] + 1)

    def test_two_starts(self, own: Zygote):
        found: list[object] = []

        def start():
            try:
                found.append(own.start())
            except UsageError as error:
                found.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (own.pid,) = [one for one in found if isinstance(one, int)]
        (words,) = [one for one in found if isinstance(one, str)]
        assert "runs already" in words and own.status()["pid"] == own.pid

    def test_a_second_start_leaves_the_log_alone(self, own: Zygote):
        own.start()
        with own.place.log.open("a") as log:
            log.write("what the first one said\n")
        with pytest.raises(UsageError, match="runs already"):
            own.start()
        assert own.place.log.read_text().startswith("what the first one said\n")
        own.idle()

    def test_several_names(self, own: Zygote):
        own.start()
        with pytest.raises(client.NoZygoteError, match="thaw zygote start --name other"):
            client.ask(place("other"), "status")
        assert subprocess.run([sys.executable, "-m", "thaw_vllm", "run", "--zygote", "other", "-c", ""]).returncode == 2
        own.idle()


@contextlib.contextmanager
def connected(zygote: Zygote):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(zygote.place.socket))
        yield connection


def message(document: object) -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<I", len(body)) + body


REQUEST = {
    "do": "run",
    "python": program.python(),
    "kind": "code",
    "arguments": ["print('ran')"],
    "detached": False,
    "environment": {},
    "streams": [],
    "umask": 0o22,
    "ignored": [],
    "affinity": [],
    "nice": 0,
    "limits": {},
}


class TestNonsense:
    """After each the zygote goes on: the fixture asks it."""

    @pytest.mark.parametrize(
        "sent",
        [
            b"",
            b"\x01",
            b"GET / HTTP/1.1\r\n\r\n",
            struct.pack("<I", 0xFFFFFFFF),
            struct.pack("<I", 100) + b"short",
            message(b"{"),
            message(b"\xff\xfe"),
            message(b"[" * 100_000),
            message([]),
            message(7),
            message({}),
            message({"do": "dance"}),
            message({"do": ["run"]}),
            message({"do": "run"}),
        ],
        ids=lambda sent: repr(sent[:12]),
    )
    def test_garbage(self, zygote: Zygote, sent: bytes):
        with connected(zygote) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # it does not read on
                while connection.recv(4096):
                    pass
        assert zygote.status()["pid"] == zygote.pid

    @pytest.mark.parametrize("name", [name for name in REQUEST if name != "do"])
    @pytest.mark.parametrize("value", [None, 3.5, [[]], [{}]], ids=repr)
    def test_requests_of_another_version(self, zygote: Zygote, name: str, value: object):
        """They are refused in words, or fail in the fork: at no time in the zygote."""
        with connected(zygote) as connection:
            where = os.open(".", os.O_RDONLY)
            files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [where]))]
            connection.sendmsg([message(REQUEST | {name: value})], files)
            os.close(where)
            answer = connection.recv(4096)
        if value is None or value == 3.5:
            assert b"is thaw of another version there?" in answer
        zygote.all_gone()
        assert zygote.status()["pid"] == zygote.pid

    def test_files_that_do_not_fit(self, zygote: Zygote):
        with connected(zygote) as connection:
            connection.sendall(message(REQUEST))
            assert b"0 files came where 1 were named" in connection.recv(4096)

    def test_one_that_says_nothing(self, zygote: Zygote):
        """Others wait for it no longer than the zygote is patient."""
        with connected(zygote), connected(zygote), connected(zygote):
            assert zygote.run("-c", "print(1)").stdout == "1\n"

    def test_one_that_leaves(self, zygote: Zygote):
        """Before it has its answer."""
        for _ in range(5):
            with connected(zygote) as connection:
                connection.sendall(message({"do": "status"}))
        zygote.run("-c", "")


class TestSources:
    def test_a_change_ends_the_zygote(self, own: Zygote, tmp_path, monkeypatch):
        module = tmp_path / "users_module.py"
        module.write_text("VALUE = 1\n")
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
        own.start(("users_module",))
        show = ("-c", "import users_module; print(users_module.VALUE)")
        assert own.run(*show).stdout == "1\n" and own.status()["changed"] is None
        waits = own.popen("-c", "print('ready', flush=True); print(input())", stdin=subprocess.PIPE)
        assert waits.stdout.readline() == "ready\n"
        module.write_text("VALUE = 22\n")
        assert own.status()["changed"] == str(module)
        ran = own.run(*show)
        assert ran.returncode == 5 and ran.stdout == "" and str(module) in ran.stderr and "has ended" in ran.stderr
        until(lambda: not alive(own.pid))
        assert not own.place.socket.exists()
        assert waits.communicate("goes on\n", timeout=60)[0] == "goes on\n"
        own.start(("users_module",))
        assert own.run(*show).stdout == "22\n"

    @pytest.mark.parametrize("how", ["removed", "replaced"])
    def test_other_changes(self, own: Zygote, tmp_path, monkeypatch, how: str):
        module = tmp_path / "users_module.py"
        module.write_text("VALUE = 1\n")
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
        own.start(("users_module",))
        if how == "replaced":  # by one of the same size and time
            (tmp_path / "new.py").write_text("VALUE = 2\n")
            old = module.stat()
            os.utime(tmp_path / "new.py", ns=(old.st_atime_ns, old.st_mtime_ns))
            (tmp_path / "new.py").replace(module)
        else:
            module.unlink()
        with pytest.raises(UnsupportedError, match="users_module"):
            client.Handed(own.place, [""], "code")
