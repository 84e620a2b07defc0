import subprocess
import sys

from thaw_vllm.bench.footprint import MIB, Watch, held

ALLOCATE = """
import mmap, sys
print("ready", flush=True)
for line in sys.stdin:
    what, path = line.split()
    if what == "child":
        import subprocess
        code = "x = bytearray(b'1') * (64 << 20); print(1, flush=True); input()"
        pipe = subprocess.PIPE
        child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
        child.stdout.readline()
        print("done", flush=True)
        continue
    if what == "anonymous":
        memory = bytearray(64 << 20)
    else:
        file = open(path, "r+b")
        memory = mmap.mmap(file.fileno(), 0)
    for at in range(0, len(memory), 4096):
        memory[at] = 1
    print("done", flush=True)
"""


def watched(what, path, files):
    process = subprocess.Popen(
        [sys.executable, "-c", ALLOCATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        process.stdout.readline()
        with Watch(process.pid, files) as watch:
            process.stdin.write(f"{what} {path}\n")
            process.stdout.readline()
        return watch.process_mib
    finally:
        process.communicate()


def test_anonymous_memory_counts(tmp_path):
    assert 60 < watched("anonymous", "-", [tmp_path]) < 80


def test_memory_of_processes_that_it_started_counts(tmp_path):
    assert 60 < watched("child", "-", [tmp_path]) < 90


def test_files_on_tmpfs_do_not_count_and_others_do(memory_path):
    file = memory_path / "file"
    file.write_bytes(bytes(64 * MIB))
    assert watched("mapped", file, [memory_path]) < 8
    elsewhere = watched("mapped", file, [memory_path / "other"])
    assert elsewhere > 60 or not str(memory_path).startswith("/dev/shm")


def test_a_process_that_is_gone():
    process = subprocess.Popen(["true"])
    process.wait()
    assert held(process.pid, []) is None
