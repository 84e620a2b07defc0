import shutil
import subprocess

import pytest

from thaw_vllm.transport.wordsum_cuda import source

PTXAS = shutil.which("ptxas")
pytestmark = pytest.mark.skipif(PTXAS is None, reason="ptxas is not installed")


@pytest.mark.parametrize("target", ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_kernel_assembles_and_keeps_to_registers(target, tmp_path):
    (tmp_path / "wordsum.ptx").write_bytes(source())
    command = [PTXAS, f"-arch={target}", "-v", "wordsum.ptx", "-o", "wordsum.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "is not defined for option 'gpu-name'" in done.stderr:
        pytest.skip(f"this ptxas knows no {target}")
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
