"""``thaw serve``: vLLM's own server, in a fork of the zygote where there is one."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..engines.vllm.versions import SERVER as MODULE
from .caches import Trust
from .zygote import CacheDir

if TYPE_CHECKING:
    from ..engines.vllm.snapshot_choice import Choice

LOCALHOST = "127.0.0.1"
NOT_FOR_SEVERAL = ("uds", "served-model-name", "load-format", "model-loader-extra-config", "api-server-count")
ROUTERS = {"host": 0.75, "port": 0.75, "api-key": 0.75, "register": 0.75, "allowed-host": 0.9}
"""Options of the router, which are gone from those of servers by the time that these are looked at; and how alike
another is that was meant as one of them. vLLM has none that is."""
EXAMPLES = """
thaw serve --model Llama-3-8B/
thaw serve --model Llama-3-8B/ --snapshot W.thaw
thaw serve --model Llama-3-8B/ --snapshot W.thaw --port 8001 --max-model-len 8192
thaw serve --model Llama-3-8B/ --snapshot W.thaw --kv-snapshot prompts.thawkv
thaw serve --model Llama-3-8B/ --snapshot W.thaw --peer auto --offer-weights
thaw serve --model Llama-3-8B/ --snapshot-dir /srv/snapshots --kv-dir /srv/kv
thaw serve --model Llama-3-8B/ --require-zygote
thaw serve --models models.toml --port 8001
thaw serve --register a=Llama-3-8B/ --register b=Qwen3-4B/ --max-model-len 8192
thaw serve --model Llama-3-8B/ --snapshot W.thaw --fast-start --cache-dir /var/cache/thaw
thaw serve --model Llama-3-8B/ --snapshot W.thaw --caches W.thawcaches --trust-caches own
"""
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["--help"]}


class Command(TyperCommand):
    """Takes -h for itself only where it stands alone: vLLM has options such as -cc.cudagraph_mode."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are left."""
        parsed: list[str] = super().parse_args(ctx, ["--help" if word == "-h" else word for word in args])
        return parsed


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", help="A model directory, or its name on the hub; vLLM's own server for it.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option("--models", metavar="FILE", help="Several models, as this TOML file says.")
    ] = None,
    register: Annotated[
        list[str] | None,
        typer.Option("--register", metavar="NAME=PATH", help="One of several models; repeat it, also beside --models."),
    ] = None,
    model_dir: Annotated[
        list[str] | None,
        typer.Option(
            "--model-dir",
            metavar="DIRECTORY",
            help="With several models: where admins may register more, and see snapshots; repeat it.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="With several models: a further name of this server."),
    ] = None,
    snapshot: Annotated[
        str | None,
        typer.Option(
            "--snapshot",
            metavar="FILE",
            help="Thaw the weights from this file. auto: from thaw's cache, and freeze into it what is not there. "
            "none: neither. [default: auto]",
        ),
    ] = None,
    kv_snapshot: Annotated[
        Path | None,
        typer.Option(
            "--kv-snapshot", metavar="FILE", help="Restore these KV blocks before the server is ready (thaw kv freeze)."
        ),
    ] = None,
    snapshot_dir: Annotated[
        Path | None,
        typer.Option(
            "--snapshot-dir", metavar="DIRECTORY", help="Where thaw swap finds snapshots. [default: $THAW_SNAPSHOT_DIR]"
        ),
    ] = None,
    kv_dir: Annotated[
        Path | None,
        typer.Option("--kv-dir", metavar="DIRECTORY", help="Where thaw kv puts its files. [default: $THAW_KV_DIR]"),
    ] = None,
    sessions_dir: Annotated[
        Path | None,
        typer.Option(
            "--sessions-dir",
            metavar="DIRECTORY",
            help="Where thaw checkpoint keeps sessions. [default: $THAW_SESSIONS_DIR]",
        ),
    ] = None,
    zygote: Annotated[str, typer.Option("--zygote", metavar="NAME", help="Which one to fork.")] = "default",
    require_zygote: Annotated[
        bool, typer.Option("--require-zygote", help="Fail where no zygote can run the server; else it is started anew.")
    ] = False,
    fast_start: Annotated[
        bool,
        typer.Option(
            "--fast-start",
            help="Few CUDA graphs, compiled code as one file, memory as measured before; says what that costs.",
        ),
    ] = False,
    caches: Annotated[
        str | None,
        typer.Option(
            "--caches",
            metavar="FILE",
            help="Code compiled elsewhere (thaw caches pack). [default, if trusted: beside the snapshot]",
        ),
    ] = None,
    trust_caches: Trust = None,
    peer: Annotated[
        str | None,
        typer.Option(
            "--peer",
            metavar="auto|SOCKET|tcp://HOST:PORT",
            help="Take the weights from an engine that offers them. auto: of this host, where there is one. tcp://: of "
            "another, by its thaw lend; unencrypted.",
        ),
    ] = None,
    offer_weights: Annotated[
        bool, typer.Option("--offer-weights", help="Lend the weights to engines of this host and user (--peer).")
    ] = False,
    cache_dir: CacheDir = None,
    cache_gb: Annotated[
        float | None,
        typer.Option(
            "--cache-gb",
            metavar="GB",
            min=0,
            help="How large the cache of snapshots may become. [default: $THAW_CACHE_GB, else a fifth of its disk]",
        ),
    ] = None,
) -> None:
    """Run vLLM's own server, for one model or for several.

    It is OpenAI-compatible; any other option is vllm serve's. With a zygote (thaw zygote start) it is forked from it,
    and up in seconds. Without one, a new Python is started for it, and a line says so.

    The first start of a model freezes its weights into a cache while it loads them, and later ones thaw them from
    there, as long as nothing has changed (thaw cache).

    Where neither --host nor --uds is given it listens on 127.0.0.1. thaw's routes (/v1/thaw/…; thaw kv, swap, park,
    wake, checkpoint, checkout) ask for the admin token: THAW_ADMIN_TOKEN, or one that is made once and kept for you
    alone.

    With --models or --register requests are passed on by the model that they name. Whichever is asked is started where
    it is not there, and others make room for it; the page at /thaw shows them. Other options are then vllm serve's for
    each of them.
    """
    from ..engines.vllm.caches import chosen_file
    from ..engines.vllm.kv.access import DIRECTORY_VARIABLE, SNAPSHOTS_VARIABLE
    from ..engines.vllm.serve_variables import PARENT_VARIABLE
    from ..engines.vllm.snapshot_choice import AUTO, NONE, among_engines, choose
    from ..errors import UsageError
    from ..sessions.store import VARIABLE as SESSIONS_VARIABLE
    from ..transport.tcp_address import peer_address, remote

    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is not None:
        from ..serve.lease import end_with

        end_with(int(parent))
    if (model is None) == (models is None and not register):
        both = "; not both" if model is not None else ""
        raise UsageError(f"give --model for one model, or --models FILE and --register NAME=PATH for several{both}")
    if model is None:
        if snapshot not in (None, AUTO, NONE) or kv_snapshot is not None:
            raise UsageError('several models have their snapshots in --models FILE, as snapshot = "W.thaw"')
        if snapshot_dir is not None:
            raise UsageError(
                "several models name their snapshots themselves; leave --snapshot-dir out (see --model-dir)"
            )
        if caches is not None or trust_caches is not None:
            raise UsageError(
                "several models take no --caches: give it in the args of each in --models FILE, or unpack it first"
            )
        if peer is not None and remote(peer):
            peer_address(peer)
        elif peer not in (None, AUTO):
            raise UsageError(f"a socket lends the weights of one model; give several --peer {AUTO} or tcp://HOST:PORT")
        for directory in (kv_dir, sessions_dir):
            _require_directory(directory)
        passed = _shared(zygote, require_zygote, fast_start, cache_dir, kv_dir, sessions_dir)
        passed += [] if snapshot is None else ["--snapshot", snapshot]
        passed += [] if cache_gb is None else ["--cache-gb", f"{cache_gb:g}"]
        passed += ["--offer-weights"] if offer_weights else []
        passed += [] if peer is None else ["--peer", peer]
        named = ((DIRECTORY_VARIABLE, kv_dir), (SESSIONS_VARIABLE, sessions_dir))
        kept = [os.environ.get(name) or None if path is None else os.path.abspath(path) for name, path in named]
        _several(models, register or [], allowed_host or [], model_dir or [], kept, [*passed, *context.args])
        return
    if peer not in (None, AUTO) and not remote(peer) and not Path(peer).is_socket():
        raise UsageError(f"no engine offers its weights at {peer!r}; give --peer {AUTO}, tcp://HOST:PORT or its socket")
    options = list(context.args)
    choice = among_engines(choose(snapshot, model, options, cache_dir, cache_gb), peer, offer_weights)
    compiled = chosen_file(caches, choice.file, trust_caches)
    directories = {SNAPSHOTS_VARIABLE: snapshot_dir, DIRECTORY_VARIABLE: kv_dir, SESSIONS_VARIABLE: sessions_dir}
    _single(
        model,
        options,
        choice,
        kv_snapshot,
        directories,
        zygote,
        require_zygote,
        fast_start,
        cache_dir,
        compiled,
        trust_caches,
    )


def _single(
    model: str,
    options: list[str],
    choice: Choice,
    kv_snapshot: Path | None,
    directories: Mapping[str, Path | None],
    zygote: str,
    require_zygote: bool,
    fast_start: bool,
    cache_dir: str | None,
    compiled: str | None,
    trust: str | None,
) -> None:
    """vLLM's server for one model, in place of this process.

    Args:
        options: vLLM's.
        directories: by the variables that tell the server.
        compiled: a file of caches.
        trust: what lets it be unpacked.
    """
    from ..engines.vllm.api import check_model, check_sizes, require_vllm_installed
    from ..engines.vllm.caches import bring
    from ..engines.vllm.command_line import given, parallel
    from ..engines.vllm.command_line import options as command_line
    from ..engines.vllm.fast_start import cache_variables
    from ..engines.vllm.fast_start import fast_start as choose
    from ..engines.vllm.serve_variables import MIDDLEWARE, START_VARIABLE
    from .run import hand_over

    require_vllm_installed()
    check_model(model)
    chosen = given(options)
    if not {"host", "uds"} & chosen.keys():
        options = ["--host", LOCALHOST, *options]
    if choice.file is not None:
        check_sizes(choice.file, parallel(chosen))
    if choice.extra is not None:
        options = ["--load-format", "thaw", "--model-loader-extra-config", json.dumps(choice.extra), *options]
    if choice.said is not None:
        print(f"thaw: {choice.said}", file=sys.stderr, flush=True)
    os.environ.update(cache_variables(cache_dir))
    os.environ.update(_additions(kv_snapshot, directories))
    options = [*options, "--middleware", MIDDLEWARE]
    if fast_start:
        preset = choose(given(options), os.environ)
        os.environ.update(preset.environment)
        options = [*command_line(preset.engine_args), *options]
        for line in preset.said:
            print(f"thaw: fast start: {line}", file=sys.stderr, flush=True)
    if compiled is not None:
        brought = bring(compiled, trust, os.environ, report=os.environ.get(START_VARIABLE))
        os.environ.update(brought.environment)
        print(f"thaw: {brought.said}", file=sys.stderr, flush=True)
    hand_over([MODULE, "--model", model, *options], "module", zygote, fallback=not require_zygote)


def _additions(kv_snapshot: Path | None, directories: Mapping[str, Path | None]) -> dict[str, str]:
    """Variables that tell the server what thaw adds to it.

    Raises:
        StorageError: a file or directory is not there, or the admin token cannot be kept.
    """
    from ..engines.vllm.kv.access import TOKEN_VARIABLE
    from ..engines.vllm.serve_variables import KV_VARIABLE, START_VARIABLE, TOKEN_FILE_VARIABLE
    from ..errors import StorageError
    from ..serve.admin_token import admin_token
    from ..serve.state import new_start

    token, file = admin_token()
    found = {TOKEN_VARIABLE: token}
    if file is not None:
        found[TOKEN_FILE_VARIABLE] = str(file)
    if kv_snapshot is not None:
        if not kv_snapshot.is_file():
            raise StorageError(
                f"there is no file {str(kv_snapshot.absolute())!r} of KV blocks; --kv-snapshot is a path"
            )
        found[KV_VARIABLE] = str(kv_snapshot.absolute())
    for variable, directory in directories.items():
        _require_directory(directory)
        if directory is not None:
            found[variable] = str(directory.absolute())
    if not os.environ.get(START_VARIABLE):
        found[START_VARIABLE] = str(new_start())
    return found


def _require_directory(path: Path | None) -> None:
    """Raises:
    StorageError: a directory that is given is not there.
    """
    from ..errors import StorageError

    if path is not None and not path.is_dir():
        raise StorageError(f"there is no directory {str(path)!r}; make it first")


def _shared(
    zygote: str,
    require_zygote: bool,
    fast_start: bool,
    cache_dir: str | None,
    kv_dir: Path | None,
    sessions_dir: Path | None,
) -> list[str]:
    """Options of this command that each of several servers gets."""
    found = ["--zygote", zygote]
    found += ["--require-zygote"] if require_zygote else []
    found += ["--fast-start"] if fast_start else []
    for option, path in (("--cache-dir", cache_dir), ("--kv-dir", kv_dir), ("--sessions-dir", sessions_dir)):
        found += [] if path is None else [option, os.path.abspath(path)]
    return found


def meant_for_router(option: str) -> str | None:
    """The router's option that was mistyped as this one."""
    alike = (name for name, least in ROUTERS.items() if difflib.SequenceMatcher(a=name, b=option).ratio() >= least)
    return next(alike, None)


def _several(
    models: Path | None,
    register: list[str],
    hosts: list[str],
    directories: list[str],
    kept: list[str | None],
    options: list[str],
) -> None:
    """A pool of servers behind one address, until a signal says to stop.

    Args:
        kept: where servers have their files of KV blocks, and their store of sessions.
        options: for each server, but for those that say where to listen, and for whom.
    """
    from ..engines.vllm.api import check_model, check_sizes, require_vllm_installed
    from ..engines.vllm.command_line import given, parallel
    from ..engines.vllm.fast_start import has_gpu
    from ..errors import MissingDependencyError, UsageError
    from ..serve.admin_token import admin_token
    from ..serve.config import read, registered

    require_vllm_installed()
    settings = registered(register) if models is None else read(models, register)
    if not settings.models:
        raise UsageError(f"{str(models)!r} names no model; it has tables like [models.llama]")
    for model in settings.models.values():
        check_model(model.path)
        if model.snapshot is not None:
            check_sizes(model.snapshot, parallel(given([*options, *model.args])))
        if {"host", "port"} & given(model.args).keys():
            raise UsageError(f"model {model.name!r}: where to listen is the router's to say; leave it out of args")
    own, options = _taken(options, ("host", "port", "api-key"), several=("api-key",))
    for words in (options, *(model.args for model in settings.models.values())):
        for name in given(words):
            option = name.replace("_", "-")
            meant = meant_for_router(option)
            if meant and words is options:  # else every server would be started with it, and refuse it
                raise UsageError(f"there is no option --{option}; did you mean --{meant}?")
            if option in NOT_FOR_SEVERAL or option.startswith("ssl-"):
                raise UsageError(f"--{option} cannot be given for several models; leave it out")
    try:
        port = int(own.get("port", ["8000"])[-1])
    except ValueError:
        raise UsageError(f"--port {own['port'][-1]!r} is no number") from None
    keys = own.get("api-key") or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    token, file = admin_token()
    try:
        from ..serve.run import Listening, run
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"several models need {error.name}, which vLLM brings along; pip install {error.name}"
        ) from None
    host = own.get("host", [LOCALHOST])[-1]
    where = Listening(host, port, token, file, tuple(keys), tuple(hosts), tuple(directories), *kept)
    run(settings, where, options, has_gpu(os.environ))


def _taken(
    options: list[str], names: tuple[str, ...], several: tuple[str, ...]
) -> tuple[dict[str, list[str]], list[str]]:
    """Values of these options, and the other words.

    Args:
        several: those of ``names`` that take as many values as follow.

    Raises:
        UsageError: one has no value.
    """
    from ..errors import UsageError

    found: dict[str, list[str]] = {}
    left, words = [], [*options]
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("_", "-")
        if not option.startswith("--") or name not in names:
            left.append(word)
            continue
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("-") and (not values or name in several):
            values.append(words.pop(0))
        if not any(values):
            raise UsageError(f"--{name} needs a value")
        found.setdefault(name, []).extend(values)
    return found, left
