"""Engine arguments as the server's command line has them."""

from thaw_vllm.engines.vllm.command_line import options


def test_options():
    args = {"enforce_eager": True, "enable_prefix_caching": False, "dtype": "float32", "max_model_len": 64}
    args |= {"compilation_config": {"level": 0}, "cudagraph_capture_sizes": [1, 2]}
    assert options(args) == [
        *("--enforce-eager", "--no-enable-prefix-caching", "--dtype", "float32", "--max-model-len", "64"),
        *("--compilation-config", '{"level": 0}', "--cudagraph-capture-sizes", "1", "2"),
    ]
