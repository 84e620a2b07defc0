import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import thaw_vllm

ROOT = Path(__file__).resolve().parent.parent
NAME = "thaw-vllm"

# In pieces, or this file would be the first to break its own rules.
REGISTRIES = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
# Where working copies have lived; such a path is pasted from a terminal and means nothing to anyone else.
COPIES = ["/" + "work" + "/", f"{ROOT}/"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=target)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True)
    return target


@pytest.fixture(scope="module")
def distribution(site):
    (found,) = importlib.metadata.distributions(path=[str(site)])
    return found


def requirements(distribution, extra):
    """What ``extra`` adds to the base requirements."""
    lines = [Requirement(line) for line in distribution.requires or []]
    base = {str(line) for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})}
    return [line for line in lines if str(line) not in base and line.marker.evaluate({"extra": extra})]


def test_wheel_is_pure_python_and_typed(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "thaw_vllm/py.typed" in names
    assert not [name for name in names if not re.match(r"thaw_vllm/|thaw_vllm-[^/]+\.dist-info/", name)]
    assert not [name for name in names if re.search(r"\.(so|pyd|dll|dylib|pyc|thaw)$", name)]


def test_wheel_carries_every_source_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if re.search(r"\.(py|html|js|css|svg)$", name)}
    sources = [path for path in (ROOT / "src").rglob("*") if re.search(r"\.(py|html|js|css|svg)$", path.name)]
    assert packed == {path.relative_to(ROOT / "src").as_posix() for path in sources}
    assert "thaw_vllm/serve/page/index.html" in packed


def test_installed_wheel_offers_its_entry_points(distribution):
    assert canonicalize_name(distribution.metadata["Name"]) == NAME
    assert distribution.version == thaw_vllm.__version__
    offered = {(point.group, point.name): point.value for point in distribution.entry_points}
    assert offered == {
        ("console_scripts", "thaw"): "thaw_vllm.cli.main:main",
        ("vllm.general_plugins", "thaw"): "thaw_vllm.engines.vllm.plugin:register",
        ("vllm.endpoint_plugins", "thaw"): "thaw_vllm.engines.vllm.kv.routes:KVRoutes",
    }
    for value in offered.values():
        module, _, _ = value.partition(":")
        assert distribution.locate_file(module.replace(".", "/") + ".py").is_file()


def test_installed_wheel_runs(site):
    # Its requirements come from this environment; the package itself from nowhere but the wheel.
    shown = subprocess.run(
        [sys.executable, "-c", "import thaw_vllm; print(thaw_vllm.__file__)"],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert Path(shown.stdout.strip()).is_relative_to(site)
    script = subprocess.run(
        [site / "bin" / "thaw", "--help"], env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert script.returncode == 0, script.stderr
    assert "freeze" in script.stdout


def test_wheel_cannot_be_uploaded(distribution):
    """The name belongs to another author on the package index, which refuses this classifier."""
    assert "Private :: Do Not Upload" in distribution.metadata.get_all("Classifier")


@pytest.mark.parametrize("extra", ["vllm", "serve", "convert"])
def test_extra_pulls_no_cuda_wheel(distribution, extra):
    """torch's wheels and vLLM's are the CUDA ones on Linux, so no extra may lead to them, however indirectly."""
    ours = requirements(distribution, extra)
    assert ours, f"[{extra}] is empty"
    reached, waiting = {}, [(extra, line) for line in ours]
    while waiting:
        why, line = waiting.pop()
        name = canonicalize_name(line.name)
        if name in reached:
            continue
        reached[name] = why
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in {"", *line.extras}):
                waiting.append((name, needed))
    cuda = re.compile(r"(torch.*|vllm.*|triton.*|xformers|flashinfer.*|nvidia-.*|cuda-.*|cupy.*)$")
    assert {name: why for name, why in reached.items() if cuda.match(name)} == {}


def test_all_is_the_union_of_the_extras(distribution):
    def listed(extra):
        return {f"{canonicalize_name(line.name)}{line.specifier}" for line in requirements(distribution, extra)}

    names = set(distribution.metadata.get_all("Provides-Extra"))
    assert names == {"vllm", "serve", "convert", "compress", "demo", "plots", "all", "dev"}
    assert listed("all") == set().union(*(listed(extra) for extra in names - {"all", "dev"}))


def tracked():
    """Every text file that is, or is about to be, in the repository: (path from ROOT, text)."""
    # safe.directory: a checkout that another user owns is read all the same.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue


INSTALL = re.compile(r"\b(?:pip[x\d.]*|uv|poetry|pdm|conda)\s+(?:tool\s+)?(?:install|add|download)\b(?P<rest>[^\n`]*)")
BY_NAME = re.compile(r"""(?<![\w./-])thaw[-_.]vllm(?:\[[^]]*])?(?![\w./\[-]|["']?\s*@)""", re.IGNORECASE)


def installs_by_name(text):
    """Install commands in ``text`` that name the distribution, not a path, a wheel file or an address."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [found[0] for found in INSTALL.finditer(joined) if BY_NAME.search(found["rest"])]


@pytest.mark.parametrize(
    "rest",
    [NAME, f"{NAME}[vllm]", f"'{NAME}[all]'", f"-U {NAME}==0.1.0", f"torch {NAME}", "thaw_vllm", f"\\\n  {NAME}>=0.1"],
)
def test_install_by_name_is_found(rest):
    assert installs_by_name("$ pip install " + rest)
    assert installs_by_name("uv pip install " + rest)
    assert installs_by_name("`pipx install " + rest + "`")


@pytest.mark.parametrize(
    "rest",
    [
        "-e .",
        "-e '.[demo,dev]'",
        f"./{NAME}",
        f"../{NAME}/[all]",
        "dist/thaw_vllm-0.1.0-py3-none-any.whl",
        "thaw_vllm-0.1.0-py3-none-any.whl",
        f"'{NAME}[vllm] @ git+https://example.invalid/{NAME}'",
        f"git+https://example.invalid/{NAME}.git",
        f"vllm`, then start {NAME}",
    ],
)
def test_install_from_here_is_allowed(rest):
    assert not installs_by_name("pip install " + rest)


def test_nothing_tells_to_install_by_name():
    """The name belongs to another author on the package index: whoever typed it would run somebody else's code."""
    assert {name: found for name, text in tracked() if (found := installs_by_name(text))} == {}


def test_no_file_names_this_machine_or_a_registry():
    found = {
        (name, wrong)
        for name, text in tracked()
        for wrong in COPIES + REGISTRIES
        if re.search(rf"(?<![\w.]){re.escape(wrong)}", text)
    }
    assert found == set()
