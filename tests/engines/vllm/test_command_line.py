"""Engine arguments as the server's command line has them."""

import contextlib
import importlib

import pytest

from thaw_vllm.cli.serve import ROUTERS, meant_for_router
from thaw_vllm.engines.vllm.command_line import given, options, parallel


def test_options():
    args = {"enforce_eager": True, "enable_prefix_caching": False, "dtype": "float32", "max_model_len": 64}
    args |= {"compilation_config": {"level": 0}, "cudagraph_capture_sizes": [1, 2]}
    assert options(args) == [
        *("--enforce-eager", "--no-enable-prefix-caching", "--dtype", "float32", "--max-model-len", "64"),
        *("--compilation-config", '{"level": 0}', "--cudagraph-capture-sizes", "1", "2"),
    ]


def test_given():
    words = ["--dtype=float32", "auto", "-cc.mode=3", "-O1", "-tp", "2", "--a-b.c", "x=y", "--", "-"]
    assert list(given(words)) == ["dtype", "cc", "O", "tp", "a_b"]
    assert list(given(["--Other", "-O.x=1", "-O=2"])) == ["Other", "O"]


def test_values():
    words = ["--load_format", "thaw", "-tp", "2", "-cc.mode=3", "--sizes", "1", "2", "--eager", "--a=b=c", "--last"]
    assert given(words) == {
        "load_format": "thaw",
        "tp": "2",
        "cc": "3",
        "sizes": "1",
        "eager": "",
        "a": "b=c",
        "last": "",
    }
    assert given(["-O3", "word", "-O.x=1", "-O=2"]) == {"O": "2"}
    assert given(["-O3", "word"]) == {"O": "3"}
    assert list(given(["--tp-size=4", "-tp", "2", "--tp-size", "8"]).items()) == [("tp", "2"), ("tp_size", "8")]


def test_ranks():
    words = ["-tp", "2", "--pipeline-parallel-size=3", "--data-parallel-size", "4", "-ep", "--dtype", "auto"]
    asked = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 4}
    assert parallel(given(words)) == asked | {"enable_expert_parallel": True}
    assert parallel(given(["--enable-expert", "--tensor-parallel", "2"])) == {
        "enable_expert_parallel": True,
        "tensor_parallel_size": 2,
    }
    assert parallel(given(["-tp", "two", "--data-parallel-size-local", "1", "--no-enable-expert-parallel"])) == {}


@pytest.mark.vllm
def test_no_option_of_vllms_is_taken_for_a_mistyped_one_of_the_routers():
    for name in ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"):
        with contextlib.suppress(ImportError):
            arguments = importlib.import_module(name)
            break
    parser = arguments.make_arg_parser(arguments.FlexibleArgumentParser())
    known = {word.lstrip("-") for action in parser._actions for word in action.option_strings}
    assert {"host", "port", "api-key", "allowed-methods"} <= known
    assert not {name: meant for name in known - {*ROUTERS} if (meant := meant_for_router(name))}


@pytest.mark.parametrize("word", ["prot", "prt", "hots", "apikey", "allowed-hosts", "alowed-host", "registr"])
def test_mistyped_options_of_the_router(word):
    assert meant_for_router(word) in ROUTERS
