"""Signals and the terminal: what reaches the client reaches the program, and what the shell sees is the client."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from tests.zygote.running import Zygote, state, until

from thaw_vllm.zygote import messages
from thaw_vllm.zygote.keeper import Keeper

NOTES = """
import os, signal, sys, time
def note(number, frame):
    os.write(1, f"program got {signal.Signals(number).name}\\n".encode())  # print is not reentrant
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM, signal.SIGWINCH,
               signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, note)
if len(sys.argv) > 1 and not (child := os.fork()):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.write(1, b"child got %d\\n" % number))
    print("ready", flush=True)
    while True:
        time.sleep(600)
if len(sys.argv) == 1:
    print("ready", flush=True)
while True:
    time.sleep(600)
"""


def ready(process: subprocess.Popen) -> None:
    assert process.stdout.readline() == "ready\n", process.stderr.read()


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2", "HUP", "ALRM", "INT", "QUIT", "TSTP", "WINCH"])
def test_sent_to_the_client(zygote: Zygote, name: str):
    """As ``kill`` does: the program alone gets it, once, and its child does not."""
    process = zygote.popen("-c", NOTES, "with a child")
    ready(process)
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.stdout.readline() == f"program got SIG{name}\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "program got SIGUSR1\n"
    end(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGQUIT])
def test_that_nobody_handles(zygote: Zygote, number: signal.Signals):
    process = zygote.popen("-c", "import time; print('ready', flush=True); time.sleep(600)")
    ready(process)
    process.send_signal(number)
    assert process.wait(60) == -number
    process.communicate()


def test_interrupt_is_an_exception(zygote: Zygote):
    code = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(600)\n"
    code += "except KeyboardInterrupt:\n    print('caught')"
    process = zygote.popen("-c", code)
    ready(process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "caught\n" and process.returncode == 0


def test_one_that_is_ignored(zygote: Zygote):
    """As ``nohup`` does."""
    process = zygote.popen("-c", NOTES, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    ready(process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "program got SIGUSR1\n"
    end(process)


def test_stopped_from_outside(zygote: Zygote):
    """A client that is stopped and goes on wakes its program, which was stopped with it."""
    process = zygote.popen("-c", "import os, time; print('ready', os.getpid(), flush=True); time.sleep(600)")
    program = int(process.stdout.readline().split()[1])
    process.send_signal(signal.SIGTSTP)
    until(lambda: state(program) == "T" and state(process.pid) == "T", "both to stop")
    process.send_signal(signal.SIGCONT)
    until(lambda: state(program) == "S" and state(process.pid) == "S", "both to go on")
    os.kill(program, signal.SIGSTOP)
    until(lambda: state(process.pid) == "T", "the client to stop as its program did")
    process.send_signal(signal.SIGCONT)
    until(lambda: state(program) == "S", "the program to go on")
    end(process)


@pytest.mark.parametrize("times", [1, 20])
def test_program_is_stopped_and_goes_on(zygote: Zygote, times: int):
    """By somebody who knows the program and not its client."""
    process = zygote.popen("-c", "import os; print(os.getpid(), flush=True); print(input())", stdin=subprocess.PIPE)
    program = int(process.stdout.readline())
    for number in range(times):
        os.kill(program, signal.SIGSTOP)
        if number % 2 == 0:
            until(lambda: state(process.pid) == "T", "the client to stop")
        os.kill(program, signal.SIGCONT)
    until(lambda: (state(program), state(process.pid)) == ("S", "S"), "both to go on")
    assert process.communicate("said\n", timeout=60)[0] == "said\n" and process.returncode == 0


@pytest.mark.parametrize("client", ["stopped", "perhaps"])
def test_stopped_program_is_killed(zygote: Zygote, client: str):
    process = zygote.popen("-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    program = int(process.stdout.readline())
    os.kill(program, signal.SIGSTOP)
    if client == "stopped":
        until(lambda: state(process.pid) == "T", "the client to stop")
    os.kill(program, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process.communicate()


class Terminal:
    """A client in the foreground of a terminal of its own."""

    def __init__(self, zygote: Zygote, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 0, 0))

        def take():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        piped = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.client = zygote.popen(*arguments, preexec_fn=take, **piped)
        os.close(theirs)
        self.seen = ""

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def sees(self, text: str) -> None:
        while text not in self.seen:
            try:
                more = os.read(self.ours, 1024)
            except OSError:  # nobody has the other side open
                more = b""
            if not more:
                pytest.fail(f"no {text!r} in {self.seen!r}")
            self.seen += more.decode()

    def close(self) -> None:
        if self.client.poll() is None:
            self.client.kill()
            self.client.wait()
        os.close(self.ours)


@pytest.fixture
def terminal(zygote: Zygote):
    made = []

    def open_one(*arguments):
        made.append(Terminal(zygote, *arguments))
        return made[-1]

    yield open_one
    for one in made:
        one.close()


class TestTerminal:
    def test_is_seen(self, terminal):
        code = "import os, sys; print([s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)], "
        code += "tuple(os.get_terminal_size()), sys.stdout.line_buffering); print(input('name? ')[::-1])"
        one = terminal("-c", code)
        one.sees("[True, True, True] (77, 33) True")
        one.sees("name? ")
        one.type(b"abc\n")
        one.sees("cba")
        assert one.client.wait(60) == 0

    def test_interrupt_reaches_all(self, terminal):
        one = terminal("-c", NOTES, "with a child")
        one.sees("ready")
        one.type(b"\x03")
        one.sees("program got SIGINT")
        one.sees("child got 2")

    def test_interrupt_ends(self, terminal):
        one = terminal("-c", "import time; print('ready', flush=True); time.sleep(600)")
        one.sees("ready")
        one.type(b"\x03")
        one.sees("KeyboardInterrupt")
        assert one.client.wait(60) == -signal.SIGINT

    def test_quit(self, terminal):
        one = terminal("-c", "import time; print('ready', flush=True); time.sleep(600)")
        one.sees("ready")
        one.type(b"\x1c")
        assert one.client.wait(60) == -signal.SIGQUIT

    def test_stop_and_go_on(self, terminal):
        code = "import os, time\nchild = os.fork()\nif child: print('ready', os.getpid(), child, '.', flush=True)\n"
        one = terminal("-c", code + "time.sleep(600)")
        one.sees(" .")
        pids = [int(word) for word in one.seen.split()[1:3]]
        one.type(b"\x1a")
        until(lambda: {state(pid) for pid in (*pids, one.client.pid)} == {"T"}, "all to stop")
        os.kill(one.client.pid, signal.SIGCONT)
        until(lambda: {state(pid) for pid in (*pids, one.client.pid)} == {"S"}, "all to go on")
        one.type(b"\x03")
        assert one.client.wait(60) == -signal.SIGINT

    def test_another_size(self, terminal):
        code = "import os, signal, time\n"  # print is not reentrant
        code += "signal.signal(signal.SIGWINCH, lambda *a: os.write(1, b'%d %d .' % os.get_terminal_size()))\n"
        one = terminal("-c", code + "print('ready', flush=True)\nwhile True: time.sleep(600)")
        one.sees("ready")
        fcntl.ioctl(one.ours, termios.TIOCSWINSZ, struct.pack("4H", 11, 22, 0, 0))
        one.sees("22 11 .")

    def test_hang_up(self, zygote, terminal):
        """The window is closed."""
        one = terminal("-c", NOTES.replace("signal.SIGHUP, ", ""), "with a child")
        one.sees("ready")
        os.close(one.ours)
        one.ours = os.open(os.devnull, os.O_RDONLY)
        assert one.client.wait(60) == -signal.SIGHUP
        zygote.all_gone()

    def test_it_is_not_the_terminal_of_the_program(self, terminal):
        """A program that opens a terminal does not get it as its controlling one."""
        one = terminal(
            "-c",
            "import os; os.open(os.ttyname(0), os.O_RDWR); print(os.path.exists('/dev/tty') and "
            "open('/proc/self/stat').read().split()[6], '.')",
        )
        one.sees("0 .")


class TestKeeper:
    """Without a zygote: what is sent to it by hand, and a process that stands for its program."""

    @pytest.fixture
    def kept(self) -> Iterator[tuple[Keeper, socket.socket, subprocess.Popen]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
        wake = os.open(os.devnull, os.O_RDONLY)
        try:
            yield Keeper(theirs, program.pid, wake, [], detached=False), ours, program
        finally:
            end(program)
            os.close(wake)
            ours.close()
            theirs.close()

    @pytest.mark.parametrize("ended", [True, False])
    def test_no_signal_after_the_end(self, kept, ended: bool):
        """Its process id may be another's by then."""
        keeper, ours, program = kept
        keeper._ended = ended
        messages.send(ours, {"signal": int(signal.SIGTERM), "group": False})
        keeper._hear()
        messages.send(ours, {"resumed": 3})
        keeper._hear()
        if ended:
            time.sleep(0.2)
            assert program.poll() is None
        else:
            assert program.wait(60) == -signal.SIGTERM

    @pytest.mark.parametrize("client", [0, 7])
    def test_a_client_that_cannot_be_seen(self, kept, client: int):
        """Process 0 would be this one's whole group."""
        keeper = kept[0]
        keeper._client, keeper._told = client, 1
        assert keeper._client_is_behind() == bool(client)
