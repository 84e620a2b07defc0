"""Every command: its help, its page in the documentation, and how light it is to start."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from thaw_vllm import __version__, errors
from thaw_vllm.cli.commands import COMMANDS, app, module_name

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
HEAVY = ("torch", "numpy", "vllm", "transformers", "safetensors")


def every_command():
    """``thaw X`` → the command, and ``thaw X Y`` for the commands of a group."""
    group = typer.main.get_command(app)
    found = {}
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        found[f"thaw {name}"] = command
        for below in getattr(command, "commands", {}):
            found[f"thaw {name} {below}"] = command.commands[below]
    return found


ALL = every_command()


def sections():
    """The documentation's text by heading."""
    parts = re.split(r"^#{2,3} (thaw [a-z -]+)$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_documented_are_the_commands_there_are():
    assert list(sections()) == list(ALL)
    table = re.findall(r"^\| \[`(thaw [a-z-]+)`\]\(#(thaw-[a-z-]+)\)", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert table == [(f"thaw {name}", f"thaw-{name}") for name in COMMANDS]


@pytest.mark.parametrize("name", ALL)
def test_documented_are_the_options_there_are(name):
    command = ALL[name]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    options -= {"--help", "-h"}
    arguments = {p.metavar for p in command.params if not p.opts[0].startswith("-")}
    cells = re.findall(r"^\| (`[^|]*`) \|", sections()[name], re.MULTILINE)
    documented = set(re.findall(r"`(-[^` ]+|[A-Z]+)", " ".join(cells)))
    assert documented == options | arguments


def test_exit_codes_are_documented():
    rows = re.findall(r"^\| (\d+) \| .* \| (?:`(\w+)`)? ?\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name: int(code) for code, name in rows if name}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ThawError)]
    own = {k.__name__: k.exit_code for k in kinds if "exit_code" in vars(k) and k is not errors.ThawError}
    assert documented == own
    assert {int(code) for code, _ in rows} == {0, 1, *documented.values(), 130, 141}


def test_help_lists_the_commands_in_whole_sentences(thaw):
    ran = thaw("--help")
    assert ran.code == 0 and ran.err == ""
    for name in COMMANDS:
        (line,) = re.findall(rf"^  {name} +(.+)$", ran.out, re.MULTILINE)
        if name != "demo":
            assert not line.endswith("...")


def test_no_command_is_help(thaw):
    assert thaw() == thaw("--help")


@pytest.mark.parametrize("name", ALL)
def test_help_has_every_option_in_full_and_an_example(thaw, name):
    ran = thaw(*name.split()[1:], "-h")
    assert ran.code == 0 and ran.err == ""
    assert ran.out.startswith(f"Usage: {name} ")
    for parameter in ALL[name].params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert option in ran.out or not option.startswith("-")
    if name not in ("thaw demo", "thaw bench"):
        examples = ran.out.partition("Examples:\n")[2]
        assert re.search(rf"^ *{name}", examples, re.MULTILINE)
        assert max(map(len, examples.splitlines())) <= 110


def test_examples_in_the_help_parse():
    """Each example's arguments are accepted by its own command, which is not run."""
    for name in COMMANDS:
        module = importlib.import_module(f"thaw_vllm.cli.{module_name(name)}")
        for line in getattr(module, "EXAMPLES", "").strip().splitlines():
            words = shlex.split(line.partition(" | ")[0].replace('"$(', "").replace(')"', ""))
            if words[0] != "thaw":
                continue
            command, rest = ALL[f"thaw {name}"], words[2:]
            if hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(" ".join(words[:2]), rest)


def test_version(thaw):
    ran = thaw("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"thaw {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["info", "--help"], ["start-report", "nowhere"], ["bench", "--help"], ["nothing"]],
)
def test_light(arguments, tmp_path):
    code = f"""
import sys
from thaw_vllm.cli.main import main
main({arguments})
print([name for name in {HEAVY} if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
