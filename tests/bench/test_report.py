import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from thaw_vllm.bench.record import FIELDS, Record
from thaw_vllm.bench.report import goals, plots
from thaw_vllm.bench.report.page import TITLES, first, page
from thaw_vllm.bench.report.results import load
from thaw_vllm.bench.report.write import NOTES, text
from thaw_vllm.errors import MissingDependencyError, UsageError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16_060_000_000
MACHINE = {"cpu": "CPU", "cores": 16, "memory_gib": 125.0, "kernel": "6.1", "file_system": "tmpfs"}
GPU = {"gpu": "H100", "gpus": 1, "gpu_memory_gib": 79.6, "driver": "580"}


def line(work, system, speed, *, run="a", date="2026-11-20T10:00:00+00:00", size=SIZE, **fields):
    seconds = fields.pop("seconds", None) or [size / 1e9 / speed]
    values = {
        "work": work,
        "system": system,
        "route": fields.pop("route", "route"),
        "bytes": size,
        "seconds": seconds,
        "gb_per_s": speed,
        "cache": "warm",
        "verified": fields.pop("verified", False),
        "equal": None if system == "limit" else fields.pop("equal", True),
        "peak_host_mib": fields.pop("peak", None),
        "run": run,
        "machine": MACHINE | GPU,
        "versions": {"python": "3.12", "thaw": "0.1.0"},
        "command": "thaw bench weights --record",
        "date": date,
    }
    assert set(values) == set(FIELDS)
    return values | fields


RESULTS = [
    line("h2d", "limit", 54.0),
    line("disk-read", "limit", 1.65, directory="/mnt"),
    line("restore-tmpfs", "thaw", 48.6, verified=True, peak=270.0, medium="tmpfs", directory="/dev/shm"),
    line("restore-tmpfs", "thaw", 50.0, medium="tmpfs", directory="/dev/shm"),
    line("restore-tmpfs", "instanttensor", 28.0, medium="tmpfs", directory="/dev/shm"),
    line("restore-tmpfs", "fastsafetensors", 90.0, medium="tmpfs", directory="/dev/shm", equal=False),
    line("restore-disk", "thaw", 1.64, verified=True, peak=600.0, medium="disk", directory="/mnt"),
    line("vllm-load-weights", "thaw", 30.0, route="snapshot", start="start-eager"),
    line("vllm-load-weights", "thaw", 5.0, route="checkpoint", start="start-eager"),
    line("restore-tmpfs", "thaw", 40.0, run="b", date="2026-11-10T10:00:00+00:00", verified=True, medium="tmpfs"),
    line("restore-tmpfs", "thaw", 1.0, run="c", date="2026-11-22T10:00:00+00:00", size=10**7, verified=True),
    line("swap-tmpfs", "thaw", 0, size=0, seconds=[0.1]),
]


def prompt(tokens, cold, thawed, *, restore=0.05, pages=2**17, **fields):
    """The lines that ``thaw bench kv`` gives for one length."""
    extra = {"tokens": tokens} | fields
    size = tokens * pages
    both = [restore + thawed]
    return [
        line("kv-freeze", "thaw", 20.0, size=size, directory="/dev/shm", **extra),
        line("ttft-cold", "vllm", 0, size=0, seconds=[cold], equal=None, **extra),
        line("ttft-prefix", "vllm", 0, size=0, seconds=[thawed], equal=None, **extra),
        line("kv-restore", "thaw", size / 1e9 / restore, size=size, directory="/dev/shm", **extra),
        line("ttft-thawed", "thaw", 0, size=0, seconds=[thawed], with_restore=both, **extra),
    ]


PROMPTS = [
    line("h2d", "limit", 50.0),
    line("d2h", "limit", 50.0),
    line("tmpfs-write", "limit", 40.0, directory="/dev/shm"),
    *prompt(8192, 0.400, 0.020),
    *prompt(1024, 0.050, 0.010),
    *prompt(16384, 0.900, 0.100),
    *prompt(8192, 9.0, 3.0, pages=2**10, run="d", date="2026-11-23T10:00:00+00:00"),
]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for number, part in enumerate((RESULTS[:5], RESULTS[5:])):
        text = "".join(json.dumps(found) + "\n" for found in part)
        (folder / f"2026-11-2{number}.jsonl").write_text(text + "\n")
    return folder


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "r.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PROMPTS))
    return load(tmp_path / "prompts")


def test_committed_page_is_what_the_command_makes():
    made = text(ROOT / "benchmarks" / "results", ROOT / "docs" / NOTES)
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == made, "run: thaw bench report"


def test_runs_latest_first(results):
    runs = load(results)
    assert [run.id for run in runs] == ["c", "a", "b"]
    assert len(runs[1].outcome.records) == 10 and runs[1].machine["file_systems"] == ["tmpfs"]
    assert runs[1].works == [
        *("h2d", "disk-read", "restore-tmpfs", "restore-disk", "vllm-load-weights", "swap-tmpfs"),
    ]


def test_a_line_comes_back_as_it_was():
    record = Record.from_json(RESULTS[2])
    assert record.extra == {"medium": "tmpfs", "directory": "/dev/shm"}
    again = record.to_json()
    known = [name for name in RESULTS[2] if name not in ("seconds", "run", "machine", "versions", "command", "date")]
    assert {name: again[name] for name in known} == {name: RESULTS[2][name] for name in known}
    assert again["seconds"] == pytest.approx(RESULTS[2]["seconds"], abs=1e-6)


@pytest.mark.parametrize("bad", ["{", "[]", '{"work": "h2d"}', json.dumps(RESULTS[0] | {"seconds": []})])
def test_a_line_that_is_no_record(results, bad):
    path = results / "2026-11-20.jsonl"
    path.write_text(json.dumps(RESULTS[0]) + "\n" + bad + "\n")
    with pytest.raises(UsageError, match=r"2026-11-20\.jsonl:2 is not a record"):
        load(results)


def test_goals(results):
    runs = load(results)
    found = {goal.text: goal.reached(runs) for goal in goals.GOALS}
    of = {key.partition(":")[0]: value for key, value in found.items()}
    assert found["restore from tmpfs, verified: of the h2d limit"] == ("0.90 (2026-11-20)", "reached")
    assert of["restore from tmpfs, unverified"] == ("0.93 (2026-11-20)", "**missed**")
    assert found["restore from tmpfs, verified: of the best rival"] == ("1.74 × (2026-11-20)", "reached")
    assert of["restore from disk, cold, verified"] == ("0.99 (2026-11-20)", "reached")
    assert of["host memory while restoring, at most"] == ("600.00 MiB (2026-11-20)", "**missed**")
    assert of["vLLM's load_weights from a snapshot on tmpfs, 16 GB"] == ("0.54 s (2026-11-20)", "reached")
    assert of["warm restore, verified"] == ("–", "not measured")


def test_page(results):
    made = page(load(results), "Why it is so.\n")
    assert made.startswith("# Benchmarks\n") and made.endswith("\n") and not made.endswith("\n\n")
    assert "## Notes on these results\n\nWhy it is so.\n" in made
    section = made.partition("## Restore from tmpfs\n")[2].partition("\n## ")[0]
    assert section.startswith(
        "\n![Restore from tmpfs](plots/restore-tmpfs.svg)\n\n`restore-tmpfs`, 2026-11-20, 16.06 GB."
    )
    assert "Other runs:" in section and section.count("\n- 2026-11-") == 2
    assert "- 2026-11-22, H100: thaw, verified: route 1.00 GB/s\n" in section
    assert "| instanttensor: route | 28.00 |" in section
    headings = [h for h in made.splitlines() if h.startswith("## ")]
    wanted = [TITLES[w] for w in ("h2d", "disk-read", "restore-tmpfs", "restore-disk", "vllm-load-weights")]
    assert [h[3:] for h in headings][3:] == [*wanted, "swap-tmpfs"]
    assert made == page(load(results), "Why it is so.")


def test_the_run_with_most_rivals_stands_for_a_work(tmp_path):
    def run(name, *loaders, size=SIZE):
        date = f"2026-11-2{name}T10:00:00+00:00"
        return [line("start-eager", who, 1.0, route=route, run=name, date=date, size=size) for who, route in loaders]

    ours, default, other = ("thaw", "snapshot"), ("vllm", "default-loader"), ("vllm", "instanttensor")
    lines = [*run("1", ours, default), *run("2", ours, default, other), *run("3", ours, default), *run("4", ours)]
    lines += run("5", ours, default, other, ("x", "y"), size=10**7)
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert [run.id for run in first("start-eager", load(tmp_path))] == ["2", "3", "1", "4", "5"]


def test_starts_are_told_in_seconds(tmp_path):
    """Also among other runs, since they do not take longer by the gigabyte."""
    at = {"run": "e", "date": "2026-11-19T10:00:00+00:00"}
    later = {"run": "f", "date": "2026-11-21T10:00:00+00:00"}  # tells nothing: another token, other sizes
    fewer, every = {"max_cudagraph_capture_size": 64}, {"max_model_len": 2048, "max_cudagraph_capture_size": 512}
    preset = "snapshot-zygote-fast-start"
    lines = [
        line("start-eager", "thaw", 4.6, route="snapshot-zygote", seconds=[3.4]),
        line("start-graphs", "thaw", 2.0, route="snapshot-zygote", seconds=[9.0, 8.5, 7.0]),
        line("start-graphs", "thaw", 2.9, route="snapshot-zygote-fast-start", seconds=[5.5]),
        line("start-eager", "thaw", 4.2, route="snapshot-zygote", seconds=[3.8], **at),
        line("start-graphs", "thaw", 9.9, route="snapshot-zygote", seconds=[1.0], equal=False, **later),
        line("start-graphs", "thaw", 9.9, route=preset, seconds=[1.0], engine_args=fewer, **later),
        line("server-healthy-cpu", "thaw", 0.1, route="snapshot-zygote", size=10**8, seconds=[2.5], **at),
    ]
    (tmp_path / "2026-11-20.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    runs = load(tmp_path)
    assert "- 2026-11-19, H100: thaw: snapshot-zygote 3.800 s\n" in page(runs, "")
    found = [goal.reached(runs) for goal in goals.GOALS if goal.works[0].startswith(("start-", "server-"))]
    assert found == [
        ("3.40 s (2026-11-20)", "reached"),
        ("8.50 s (2026-11-20)", "**missed**"),
        ("5.50 s (2026-11-20)", "reached"),
        *[("–", "not measured")] * 3,
        ("2.50 s (2026-11-19)", "reached"),
    ]
    last = {"run": "g", "date": "2026-11-22T10:00:00+00:00"}
    lines = [
        line("start-eager", "thaw", 4.6, route=preset, seconds=[2.4], engine_args={"max_model_len": 2048}, **last),
        line("start-graphs", "thaw", 9.9, route=preset, seconds=[7.5], engine_args=every, **last),
        line("start-new-machine", "thaw", 0.5, route="checkpoint-nothing-compiled", seconds=[108.0], **last),
        line("start-new-machine", "thaw", 0.5, route="checkpoint", seconds=[34.0, 36.0, 38.0], **last),
        line("start-new-machine", "thaw", 2.0, route="checkpoint-zygote", seconds=[8.0], **last),
        line("start-new-machine", "thaw", 4.0, route="checkpoint-zygote-fast-start", seconds=[5.0], **last),
    ]
    (tmp_path / "2026-11-22.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    runs = load(tmp_path)
    found = [goal.reached(runs) for goal in goals.GOALS if goal.works[0].startswith("start-")]
    assert found == [
        ("2.40 s (2026-11-22)", "reached"),
        ("7.50 s (2026-11-22)", "reached"),
        ("5.50 s (2026-11-20)", "reached"),
        ("36.00 s (2026-11-22)", "**missed**"),
        ("8.00 s (2026-11-22)", "reached"),
        ("5.00 s (2026-11-22)", "reached"),
    ], "the preset overruled by vLLM's largest size has all of its sizes, and none of the four"


def test_goals_of_swaps_and_parking(tmp_path):
    """Of engines with CUDA graphs alone; a wake's is what the driver's own share leaves."""
    graphs, parked = {"start": "graphs"}, {"start": "graphs", "used": [25000.0, 24000.0], "left": [4.0, 120.0]}
    eager = {"run": "f", "date": "2026-11-21T10:00:00+00:00", "start": "eager"}
    lines = [
        line("swap", "thaw", 20.0, route="tmpfs", seconds=[0.8, 0.7, 2.0], **graphs),
        line("swap", "thaw", 20.0, route="page-locked", seconds=[0.7], **graphs),
        line("swap", "thaw", 20.0, route="tmpfs", seconds=[0.1], **eager),
        line("park", "thaw", 0.0, route="driver", size=0, seconds=[1.5, 1.0, 2.0], **parked),
        line("wake", "thaw", 20.0, route="driver", seconds=[0.9, 1.0], phases={"driver": [0.5, 0.7]}, **graphs),
        line("wake", "thaw", 20.0, route="driver", seconds=[0.9], phases={"driver": [0.1]}, **eager),
    ]
    (tmp_path / "2026-11-20.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    runs = load(tmp_path)
    found = [goal.reached(runs) for goal in goals.GOALS if goal.works[0] in ("swap", "park", "wake")]
    assert found == [
        ("0.80 s (2026-11-20)", "reached"),
        ("0.70 s (2026-11-20)", "**missed**"),
        ("1.50 s (2026-11-20)", "reached"),
        ("0.9950 (2026-11-20)", "reached"),
        ("0.35 s (2026-11-20)", "reached"),
    ]
    small = line("park", "thaw", 0.0, route="driver", size=0, seconds=[0.1], start="graphs", used=[900.0], left=[400.0])
    nobody = line("park", "thaw", 0.0, route="driver", size=0, seconds=[0.1], start="graphs", used=[None], left=[None])
    for other in (small, nobody):
        (tmp_path / "2026-11-20.jsonl").write_text(json.dumps(other) + "\n")
        found = [goal.reached(load(tmp_path)) for goal in goals.GOALS if goal.works[0] == "park"]
        assert found == [("–", "not measured")] * 2, "it says nothing about a model of full size"


def test_rows(results):
    made = page([run for run in load(results) if run.id == "a"], "")
    assert "| **thaw, verified: route** | 48.60 | 0.330 | 0% of 1 | 0.900 | 1.74 | 270 | yes |" in made
    assert "| fastsafetensors: route | 90.00 | 0.178 | 0% of 1 | 1.667 |  |  | **no** |" in made
    assert "| **thaw: route** |  | 0.100 | 0% of 1 |  |  |  | yes |" in made
    assert "H100 (79.6 GiB, driver 580); CPU, 16 cores, 125.0 GiB; Linux 6.1; files on tmpfs" in made


def test_prompts_are_rows_by_their_length(prompts):
    """And a small model's later run does not stand for the full one."""
    made = page(prompts, "")
    cold = made.partition("## KV cache: first token, nothing cached\n")[2].partition("\n## ")[0]
    assert cold.startswith("\n![Seconds to the first token by tokens of the prompt](plots/kv.svg)\n")
    rows = [row for row in cold.splitlines() if row.startswith("| ") and "tokens" in row]
    assert rows == [
        f"| {tokens} tokens, vllm: route |  | {seconds} | 0% of 1 |  |  |  |  |"
        for tokens, seconds in ((1024, "0.050"), (8192, "0.400"), (16384, "0.900"))
    ]
    assert "- 2026-11-23, H100: 8192 tokens, vllm: route 9.000 s\n" in cold + "\n"
    restored = made.partition("## KV cache: restore of a prefix\n")[2].partition("\n## ")[0]
    assert "In `/dev/shm`:" in restored and restored.count("| system: route |") == 1
    assert "| **8192 tokens, thaw: route** | 21.47 | 0.050 | 0% of 1 | 0.429 |  |  | yes |" in restored
    frozen = made.partition("## KV cache: freeze of a prefix\n")[2]
    assert "| **8192 tokens, thaw: route** | 20.00 | 0.054 | 0% of 1 | 0.500 |" in frozen


def test_goals_of_several_gpus(tmp_path):
    """Each rank's speed over that of one alone; and ranks say nothing about the goals for one GPU."""
    two, one = {"ranks": 2, "medium": "tmpfs"}, {"ranks": 1, "medium": "tmpfs"}
    pair = {"engine_args": {"tensor_parallel_size": 2}, "start": "start-graphs"}
    lines = [
        line("tp2-restore", "thaw", 40.0, verified=True, route="tmpfs, 1 rank", **one),
        line("tp2-restore", "thaw", 70.0, verified=True, route="tmpfs, 2 ranks", size=2 * SIZE, **two),
        line(
            "tp2-restore",
            "thaw",
            1.0,
            verified=True,
            route="page cache, 2 ranks",
            size=2 * SIZE,
            **two | {"medium": "page cache"},
        ),
        line("peer-nvlink", "thaw", 300.0, verified=True, route="cuda:0 → cuda:1", ranks=1),
        line("peer-ipc", "thaw", 100.0, verified=True, route="cuda:0 → cuda:0", ranks=1),
        line("d2d", "limit", 400.0, route="cuda:0 → cuda:1", ranks=1),
        line("d2d", "limit", 2000.0, route="cuda:0 → cuda:0", ranks=1),
        line("broadcast", "thaw", 40.0, verified=True, route="one read, 1 rank", seconds=[0.4], ranks=1),
        line("broadcast", "thaw", 40.0, verified=True, route="one read, 2 ranks", seconds=[0.5], ranks=2),
        line("start-graphs", "thaw", 1.0, route="snapshot-zygote", seconds=[25.0], **pair),
    ]
    later = {"run": "b", "date": "2026-11-21T10:00:00+00:00", "verified": True}
    large = [
        line("tp2-restore", "thaw", 40.0, route="tmpfs, 1 rank", size=2 * SIZE, **one, **later),
        line("tp2-restore", "thaw", 50.0, route="tmpfs, 2 ranks", size=4 * SIZE, **two, **later),
    ]
    (tmp_path / "2026-11-20.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines + large))
    runs = load(tmp_path)
    of = {goal.text.partition(":")[0]: goal.reached(runs) for goal in goals.GOALS}
    assert of["ranks of 8 to 16 GB restored from tmpfs at once, each"] == ("0.88 (2026-11-20)", "**missed**")
    assert of["weights from another GPU over NVLink, all counted"] == ("0.75 (2026-11-20)", "**missed**")
    assert of["one read for several GPUs"] == ("1.25 × (2026-11-20)", "**missed**")
    assert of["the same with CUDA graphs of vLLM's sizes"] == ("–", "not measured")


def test_goals_of_prompts(prompts):
    of = {goal.text: goal.reached(prompts) for goal in goals.GOALS}
    assert of["KV restore of an 8k-token prefix (1 GiB)"] == ("0.050 s (2026-11-20)", "**missed**")
    assert of["KV restore: of the h2d limit"] == ("0.43 (2026-11-20)", "**missed**")
    assert of["first token: cold over thawed at 8k tokens"] == ("20.00 × (2026-11-20)", "reached")


def test_forks_are_one_section(tmp_path):
    """Of all its works: a row a trunk, then each work with its spread."""
    about = {"tokens": 8128, "branches": 8}
    kept = {"tokens": 8128, "size": 8128 * 2**17, "route": "store", "directory": "/dev/shm"}
    lines = [
        line("h2d", "limit", 50.0),
        line("fork-prefills", "vllm", 0, size=0, seconds=[3.0, 3.3], equal=None, **about),
        line("fork-prefix", "vllm", 0, size=0, seconds=[0.45], equal=None, **about),
        line("fork", "thaw", 0, size=0, seconds=[0.5], **about),
        line("checkpoint", "thaw", 10.0, **kept),
        line("session-restore", "thaw", 20.0, seconds=[0.048], verified=True, **kept),
        line("fork-thawed", "thaw", 0, size=0, seconds=[0.06], with_restore=[0.105], **about),
        line("fork-pool", "thaw", 0, size=0, seconds=[0.55], equal=None, shared=True, **about),
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    runs = load(tmp_path)
    made = page(runs, "")
    assert [h for h in made.splitlines() if h.startswith("## ")][-2:] == [f"## {TITLES[w]}" for w in ("h2d", "fork")]
    section = made.partition(f"## {TITLES['fork']}\n")[2]
    (row,) = [row for row in section.splitlines() if row.startswith("| 8128 ")]
    figures = [
        "3.1500",
        "0.4500",
        "0.5000",
        "0.0600",
        "0.0480",
        "0.1065",
        "0.5500",
        "22.19",
        "0.444",
        "6.3",
        "30.0",
        "yes",
    ]
    assert row == "| " + " | ".join(["8128", "8", "1065.4", *figures]) + " |"
    assert "| fork-prefills, 8128 tokens, vllm: route |  | 3.150 | 10% of 2 |  |  |  |  |" in section
    assert "| **session-restore, 8128 tokens, thaw: store** | 22.19 | 0.048 | 0% of 1 | 0.444 |  |  | yes |" in section
    of = {goal.text: goal.reached(runs) for goal in goals.GOALS}
    assert of["a session's restore of an 8k-token trunk (about 1 GiB)"] == ("0.048 s (2026-11-20)", "reached")
    assert of["a fork pool's round of 4 × 64 tokens, trunks of up to 8k"] == ("0.55 s (2026-11-20)", "reached")


def test_nothing_recorded(tmp_path):
    assert "Nothing has been recorded yet" in text(tmp_path / "none", tmp_path / "none.md")


def test_command(thaw, results, tmp_path):
    (tmp_path / NOTES).write_text("# A title\n\nSaid by hand.\n")
    ran = thaw("bench", "report", "--results", results, "--output", tmp_path / "page.md", "--no-plots", "--json")
    assert ran.code == 0 and ran.document == {"page": str(tmp_path / "page.md"), "plots": [], "runs": 3}
    made = (tmp_path / "page.md").read_text()
    assert "Said by hand." in made and "A title" not in made


def test_plots_want_matplotlib(thaw, results, tmp_path, monkeypatch):
    def missing():
        raise MissingDependencyError("the plots need matplotlib: pip install matplotlib")

    monkeypatch.setattr(plots, "require", missing)
    ran = thaw("bench", "report", "--results", results, "--output", tmp_path / "page.md")
    assert ran.code == 7 and "pip install matplotlib" in ran.err
    assert not (tmp_path / "page.md").exists()


def test_matplotlib_is_asked_for_by_name(monkeypatch):
    if find_spec("matplotlib") is not None:
        pytest.skip("matplotlib is installed")
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        plots.require()


def test_plots(results, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    made = plots.draw(load(results), tmp_path / "plots")
    assert {path.name for path in made} == {f"restore-{w}.{e}" for w in ("tmpfs", "disk") for e in ("png", "svg")}
    before = [path.read_bytes() for path in made]
    assert before == [path.read_bytes() for path in plots.draw(load(results), tmp_path / "plots")]


def test_plot_of_prompts(prompts, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    made = plots.draw(prompts, tmp_path / "plots")
    assert [path.name for path in made] == ["kv.png", "kv.svg"]
    drawn = made[1].read_text()
    assert all(name in drawn for name in ("<!-- cold: nothing cached -->", "<!-- 16384 -->", "thawed first token"))
    before = [path.read_bytes() for path in made]
    assert before == [path.read_bytes() for path in plots.draw(prompts, tmp_path / "plots")]


def test_plot_of_two_directories(tmp_path):
    """Two bars, although one system by one route made both."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lines = [line("freeze-disk", "thaw", speed, directory=place) for speed, place in ((2.0, "/fast"), (1.0, "/slow"))]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    _, drawn = plots.draw(load(tmp_path), tmp_path / "plots")
    assert all(f"thaw: route, {place}" in drawn.read_text() for place in ("/fast", "/slow"))


@pytest.mark.parametrize("what", ["absent", "a file", "empty"])
def test_page_stays_where_there_are_no_records(what, thaw, tmp_path):
    results, output = tmp_path / "results", tmp_path / "page.md"
    output.write_text("as it was")
    if what == "a file":
        results.write_text("no directory")
    if what == "empty":
        results.mkdir()
    ran = thaw("bench", "report", "--results", results, "--output", output, "--no-plots")
    assert ran.code == (2 if what == "empty" else 6), ran.err
    assert output.read_text() == "as it was"
