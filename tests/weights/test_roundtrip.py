"""What is frozen is thawed, bit for bit, for any module and into any layout."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.weights.modules import DTYPES, LAYOUTS, Plan, Plans, Tie, plans, state

from thaw_vllm import freeze_model, restore_model, restore_model_from_ram
from thaw_vllm.format.limits import MIB
from thaw_vllm.weights.open import open_snapshot

pytestmark = pytest.mark.usefixtures("no_leaks")
any_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
workers = st.sampled_from((1, 2, 5))


@pytest.mark.soak
@any_example
@given(plans(), workers, st.booleans())
def test_any_module(tmp_path, plan, threads, verify):
    path = tmp_path / "w.thaw"
    frozen = plan.build(1)
    report = freeze_model(frozen, path, force=True, workers=threads)
    thawed = plan.build(2)
    restored = restore_model(thawed, path, workers=threads, verify=verify)
    assert state(thawed) == state(frozen)
    assert restored.tensors == report.tensors == len(state(frozen))
    assert restored.bytes == report.bytes
    assert report.file_size == path.stat().st_size
    again = plan.build(3)
    restore_model_from_ram(again, path.read_bytes(), workers=threads)
    assert state(again) == state(frozen)


@pytest.mark.soak
@any_example
@given(plans(), st.lists(st.sampled_from(LAYOUTS), min_size=7, max_size=7), workers)
def test_any_module_into_other_strides(tmp_path, plan, layouts, threads):
    path = tmp_path / "w.thaw"
    frozen = plan.build(1)
    freeze_model(frozen, path, force=True)
    thawed = plan.elsewhere(layouts).build(2)
    strides = {name: t.stride() for name, t in thawed.state_dict().items()}
    restore_model(thawed, path, workers=threads)
    assert state(thawed) == state(frozen)
    assert {name: t.stride() for name, t in thawed.state_dict().items()} == strides


@pytest.mark.soak
@any_example
@given(plans(max_tensors=3), st.sampled_from((4, 8, 64)), workers)
def test_ids_do_not_depend_on_chunks_or_threads(tmp_path, plan, chunk, threads):
    path = tmp_path / "w.thaw"
    first = freeze_model(plan.build(1), path, force=True)
    second = freeze_model(plan.build(1), path, force=True, chunk_size=chunk * MIB, workers=threads)
    other = freeze_model(plan.build(2), path, force=True)
    assert (first.content, first.model) == (second.content, second.model)
    if sum(torch.Size(t.shape).numel() for t in plan.tensors) > 16:
        assert other.content != first.content


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_in_every_layout(dtype, layout, tmp_path):
    """Every bit pattern of the small ones: NaNs keep their payload, and zeros their sign."""
    plan = Plans((Plan("w", "parameter", dtype, (64, 65), layout, (1, 0)), Plan("s", "buffer", dtype, (), layout)))
    frozen = plan.build(1)
    freeze_model(frozen, tmp_path / "w.thaw")
    for other in LAYOUTS:
        thawed = plan.elsewhere([other, other]).build(2)
        restore_model(thawed, tmp_path / "w.thaw")
        assert state(thawed) == state(frozen)


LARGE = Plans(
    (
        Plan("matrix", "parameter", "bfloat16", (1031, 4099)),
        Plan("transposed", "parameter", "float32", (1500, 1501), "permuted", (1, 0)),
        Plan("gaps", "buffer", "int16", (3, 1100, 1300), "gaps"),
        Plan("exactly", "parameter", "uint8", (8 * MIB,)),
        Plan("one_more", "parameter", "uint8", (4 * MIB + 1,)),
        Plan("one_less", "parameter", "uint8", (4 * MIB - 1,)),
    ),
    (Tie("head", "parameter", "matrix"),),
)


@pytest.mark.parametrize("chunk_size", [4 * MIB, 8 * MIB])
def test_tensors_of_several_chunks(chunk_size, tmp_path):
    """In each the file's layout and another: the pieces do not end where rows do."""
    path = tmp_path / "w.thaw"
    frozen = LARGE.build(1)
    freeze_model(frozen, path, chunk_size=chunk_size)
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
        assert max(c.length for c in snapshot.chunks) == chunk_size
        assert len(snapshot.chunks) > len(snapshot.index.storages)
    for number in range(len(LAYOUTS)):
        layouts = LAYOUTS[number:] + LAYOUTS * 2
        thawed = LARGE.elsewhere(layouts).build(number + 2)
        restore_model(thawed, path)
        assert state(thawed) == state(frozen)


def test_ids_of_tensors_of_several_chunks(tmp_path):
    ids = set()
    for number, (chunk, threads) in enumerate(((4, 1), (8, 4), (16, 2))):
        report = freeze_model(LARGE.build(1), tmp_path / f"{number}.thaw", chunk_size=chunk * MIB, workers=threads)
        ids.add((report.content, report.model))
    assert len(ids) == 1


def test_many_tiny_tensors(tmp_path):
    module = torch.nn.Module()
    rng = random.Random(0)
    for number in range(3000):
        module.register_buffer(f"b{number}", torch.tensor(rng.random(), dtype=torch.float64))
    freeze_model(module, tmp_path / "w.thaw")
    thawed = torch.nn.Module()
    for number in range(3000):
        thawed.register_buffer(f"b{number}", torch.tensor(0.0, dtype=torch.float64))
    report = restore_model(thawed, tmp_path / "w.thaw")
    assert state(thawed) == state(module)
    assert (report.tensors, report.bytes) == (3000, 24_000)


def test_module_without_tensors(tmp_path):
    report = freeze_model(torch.nn.Module(), tmp_path / "w.thaw")
    assert (report.bytes, report.tensors) == (0, 0)
    assert restore_model(torch.nn.ReLU(), tmp_path / "w.thaw").bytes == 0


@pytest.mark.parametrize(
    "text", ["weight", "w" * 1024, "é" * 512, "a b", "雪", "a|b", "../w", "__class__", "\U0001f9ca"]
)
def test_any_name_of_a_parameter(text, tmp_path):
    def module(value):
        found = torch.nn.Module()
        found._parameters[text] = torch.nn.Parameter(torch.full((3,), value))
        return found

    freeze_model(module(1.5), tmp_path / "w.thaw")
    thawed = module(0.0)
    restore_model(thawed, tmp_path / "w.thaw")
    assert thawed._parameters[text].tolist() == [1.5] * 3


def test_ties_are_one_memory_before_and_after(tmp_path):
    """Of parameters, of modules, of buffers, and of a transposed view."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(7, 4)
            self.head = torch.nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.again = self.head
            self.register_buffer("flat", torch.randn(12))
            self.register_buffer("square", self.flat.view(3, 4))
            self.register_buffer("turned", self.flat.view(3, 4).t())
            self.register_buffer("tail", self.flat[5:])
            self.register_buffer("bits", self.flat.view(torch.int32))

    frozen, thawed = Tied(), Tied()
    report = freeze_model(frozen, tmp_path / "w.thaw")
    assert (report.tensors, report.bytes) == (8, 4 * (28 + 12))
    restore_model(thawed, tmp_path / "w.thaw")
    assert state(thawed) == state(frozen)
    assert thawed.head.weight is thawed.embed.weight
    thawed.flat[5] = 77
    assert thawed.tail[0] == thawed.square[1, 1] == thawed.turned[1, 1] == 77


def test_buffers_that_do_not_persist_are_the_module_s_own(tmp_path):
    def module(value):
        found = torch.nn.Module()
        found.register_buffer("kept", torch.full((2,), value))
        found.register_buffer("own", torch.full((2,), value), persistent=False)
        return found

    freeze_model(module(1.0), tmp_path / "w.thaw")
    thawed = module(2.0)
    restore_model(thawed, tmp_path / "w.thaw")
    assert (thawed.kept.tolist(), thawed.own.tolist()) == ([1, 1], [2, 2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_that_need_gradients_and_tensors_of_inference_mode(layout, tmp_path):
    plan = Plan("w", "parameter", "float32", (5, 6), layout, (1, 0))

    def module(seed, inference):
        with torch.inference_mode(inference):
            tensor = plan.build(random.Random(seed))
        if not inference:
            tensor.requires_grad_()
        found = torch.nn.Module()
        found.register_buffer("w", tensor)
        return found

    for number, inference in enumerate((True, False)):
        path = tmp_path / f"{number}.thaw"
        frozen = module(1, inference)
        freeze_model(frozen, path)
        for other in (True, False):
            thawed = module(2, other)
            restore_model(thawed, path, workers=2)
            assert state(thawed) == state(frozen)
            with torch.inference_mode():
                thawed = module(3, other)
                restore_model(thawed, path, workers=2)
                assert state(thawed) == state(frozen)


def test_progress_counts_to_the_end(tmp_path):
    seen = {"freeze": [], "thaw": []}
    report = freeze_model(LARGE.build(1), tmp_path / "w.thaw", progress=lambda *n: seen["freeze"].append(n), workers=4)
    restore_model(LARGE.build(2), tmp_path / "w.thaw", progress=lambda *n: seen["thaw"].append(n), workers=4)
    for counts in seen.values():
        assert sorted(counts) == counts
        assert counts[-1] == (report.bytes, report.bytes)


def test_reports_say_how_long_each_phase_took(tmp_path):
    frozen = torch.nn.Linear(10, 10)
    report = freeze_model(frozen, tmp_path / "w.thaw")
    assert set(report.seconds) == {"payload", "publish", "total"}
    assert report.seconds["total"] >= max(report.seconds["payload"], report.seconds["publish"]) >= 0
    restored = restore_model(frozen, tmp_path / "w.thaw")
    assert set(restored.seconds) == {"choose", "open", "match", "plan", "read", "settle", "total"}
    assert restored.gb_per_s > 0
    assert report.gb_per_s > 0
    assert (restored.verified, restored.path, restored.replaced) == ("xxh3", str(tmp_path / "w.thaw"), False)
    assert restore_model(frozen, tmp_path / "w.thaw", verify=False).verified == "none"
