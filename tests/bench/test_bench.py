"""`localvit bench`: arithmetic by hand with a clock of its own, the command end to end with tiny models."""

import json

import pytest
import torch

from localvit.bench import comparison, engines, host as machine, measure
from localvit.bench.comparison import BenchConfig, compare, fraction, fraction_flops, training_step
from localvit.bench.measure import Quartiles, interleaved, ratio
from localvit.bench.peak import Matmul, fastest_matmul
from localvit.cli import main
from localvit.errors import ConfigError

CPU = torch.device("cpu")
NAME = "localvit_tiny_patch16_224"
ARGS = {"patch_size": 8, "embed_dim": 192, "depth": 1, "num_classes": 5}
SMALL = [word for key, value in ARGS.items() for word in ("--set", f"{key}={value}")]
COMMAND = ["bench", NAME, "--size", "16", "--batch", "2", "--rounds", "2", "--device", "cpu", *SMALL]


@pytest.fixture
def short(monkeypatch):
    """Turns of one call, and a yardstick that takes no search."""
    x = torch.rand(64, 64)
    monkeypatch.setattr(comparison, "SHORTEST", 0.0)
    monkeypatch.setattr(
        comparison, "fastest_matmul", lambda device, dtype: Matmul("by hand", 2 * 64**3, lambda: x @ x)
    )


class Clock:
    """Time passes only where a work says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def work(self, name, *seconds):
        turns = iter(seconds)

        def call():
            self.calls.append(name)
            self.now += next(turns)

        return call

    def timer(self, work):
        start = self.now
        work()
        return self.now - start


def test_turns_alternate_and_the_warm_up_is_not_counted():
    clock = Clock()
    works = {"a": clock.work("a", 100, 1, 2, 3), "b": clock.work("b", 100, 4, 2, 1)}
    seconds = interleaved(works, 3, timer=clock.timer, warm_up=1)
    assert seconds == {"a": [1, 2, 3], "b": [4, 2, 1]}
    assert "".join(clock.calls) == "ab" + "ab" + "ba" + "ab"
    # 1/4, 2/2, 3/1: the median of the quotients of rounds, not 2/2 of the medians by chance
    assert ratio(seconds["a"], seconds["b"]) == Quartiles(0.625, 1.0, 2.0)


def test_the_ratio_is_of_rounds_so_that_a_slow_while_cancels():
    slow = [1, 1, 50, 50, 50]
    assert ratio([2 * x for x in slow], slow) == Quartiles(2, 2, 2)


def test_short_work_is_repeated_and_its_mean_reported():
    clock = Clock()
    times = [0.1] * 100
    seconds = interleaved({"a": clock.work("a", *times)}, 2, timer=clock.timer, warm_up=1, at_least=0.4)
    assert seconds["a"] == pytest.approx([0.1, 0.1])
    assert len(clock.calls) == 1 + 1 + 2 * 4


def test_rounds_go_through_the_progress():
    seen = []
    interleaved({"a": lambda: None}, 3, progress=lambda rounds: (seen.append(i) or i for i in rounds))
    assert seen == [0, 1, 2]


def test_fraction_of_the_peak_by_hand():
    flops = fraction_flops(1.5, 4)
    assert flops == 12e9  # 2 operations x 1.5e9 x 4 images
    assert fraction_flops(1.5, 4, train=True) == 36e9
    # 12 GFLOP in 1 and 2 s; the product's 10 GFLOP in 0.5 and 0.25 s: 12/20, 6/40
    assert fraction(flops, [1, 2], 10e9, [0.5, 0.25]).median == pytest.approx((0.6 + 0.15) / 2)


def test_the_fastest_matmul_is_the_one_with_most_operations_per_second(monkeypatch):
    times = {"F.linear, 1024 x 1024 x 1024": [0.1, 9.0], "1 x 1 convolution, 1568 x 192 x 768": [0.1, 0.1]}

    def fake(works, rounds, timer):
        return {name: times.get(name, [9.0, 9.0]) for name in works}

    monkeypatch.setattr("localvit.bench.peak.interleaved", fake)
    found = fastest_matmul(CPU)
    assert (found.words, found.flops) == ("F.linear, 1024 x 1024 x 1024", 2 * 1024**3)


def test_a_peak_can_be_measured():
    found = fastest_matmul(CPU)
    assert found.flops / measure.wall_clock(found.work) > 0


def test_a_comparison_names_all_that_it_rests_on(short):
    threads = torch.get_num_threads()
    found = compare(
        BenchConfig(model=NAME, size=16, batch_size=2, rounds=2, threads=2, args=ARGS, engine="fused")
    )
    assert torch.get_num_threads() == threads
    assert (found.model.model, found.model.engine) == (NAME, "fused")
    assert (found.against.model, found.against.engine) == ("deit_tiny_patch16_224", "fused")
    assert found.setting.threads == 2
    assert "2 threads" in found.setting.machine
    assert found.peak_gflops > 0
    assert found.model.input_size == (3, 16, 16)
    # patches 4 x 192 x 192; a block of DeiT: 5 tokens x 12 x 192^2, attention 2 x 25 x 192; head 192 x 5
    macs = 4 * 192 * 192 + 5 * 12 * 192**2 + 2 * 25 * 192 + 192 * 5
    assert found.against.gmacs == pytest.approx(macs / 1e9)
    assert found.against.images_per_second == pytest.approx(2 / found.against.seconds.median)


def test_a_training_step_changes_nothing_but_computes_gradients():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
    before = model[1].weight.clone()
    step = training_step(model, torch.randn(2, 1, 2, 2))
    step()
    assert model.training
    assert torch.equal(model[1].weight, before)
    assert model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_is_that_of_both_models_and_of_the_peak(monkeypatch, train, precision):
    dtypes = []
    monkeypatch.setattr(comparison, "SHORTEST", 0.0)
    matmul, linear = fastest_matmul, torch.nn.Linear.forward
    monkeypatch.setattr(
        comparison, "fastest_matmul", lambda *arguments: dtypes.append(arguments[1]) or matmul(*arguments)
    )

    def noted(self, x):
        y = linear(self, x)
        dtypes.append(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    found = compare(
        BenchConfig(model=NAME, size=16, rounds=2, train=train, precision=precision, args=ARGS, device="cpu")
    )
    want = {"fp32": (torch.float32, "float32"), "bf16": (torch.bfloat16, "bfloat16 by autocast")}[precision]
    assert found.setting.dtype == want[1]
    after_checks = dtypes[dtypes.index(want[0]) :]  # that models take such images is tried in float32
    assert set(after_checks) == {want[0]}
    assert len(after_checks) > 10


def test_a_training_step_is_compiled_where_that_is_asked_for(short, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(type(model).__name__) or model)
    shared = {"size": 16, "rounds": 2, "train": True, "args": ARGS, "device": "cpu"}
    found = compare(BenchConfig(model=NAME, engine="compile", against_engine="eager", **shared))
    assert compiled == ["VisionTransformer"]
    assert (found.model.engine, found.against.engine) == ("compile", "eager")


def test_sides_that_differ_in_engine_or_size_are_noted(short, capsys):
    assert main([*COMMAND, "--engine", "eager", "--against-engine", "eager"]) == 0
    assert "note: " not in capsys.readouterr().out
    assert main([*COMMAND, "--engine", "eager"]) == 0
    assert "note: the two sides use different engines; --against-engine" in capsys.readouterr().out


def test_json(short, capsys):
    assert main([*COMMAND, "--train", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["batch_size"], found["rounds"]) == ("training step", 2, 2)
    quartiles = {"low", "median", "high"}
    assert set(found["ratio"]) == quartiles
    for side in ("model", "against"):
        assert set(found[side]["seconds"]) == set(found[side]["fraction_of_peak"]) == quartiles
        assert found[side]["gmacs"] > 0
        assert found[side]["peak_memory"] is None or found[side]["peak_memory"] >= 0
    setting = found["setting"]
    assert setting["machine"]
    assert setting["allocator"]
    assert setting["environment"]["OMP_NUM_THREADS"] == "1"
    assert set(setting["versions"]) == {"localvit", "torch", "timm"}


def test_the_table_has_the_ratio_first_and_the_machine_last(short, capsys):
    assert main([*COMMAND, "--against", "vit_tiny_patch16_224", "--engine", "fused"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ratio ")
    text = " ".join(" ".join(lines).split())
    for part in (
        "(PyTorch, fused)",
        "vit_tiny_patch16_224",
        "median [quartiles] of 2 rounds",
        "fraction of peak, %",
        "GMACs",
    ):
        assert part in text
    assert "machine: " in text
    assert "allocator" in text.rpartition("machine: ")[2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            [],
            [
                ("fused", "PyTorch, fused"),
                ("eager", "PyTorch, not fused: ResNet has no fast form"),
            ],
        ),
        (["--no-fuse"], [("eager", "PyTorch"), ("eager", "PyTorch")]),
        (["--engine", "eager"], [("eager", "PyTorch"), ("eager", None)]),
    ],
)
def test_models_run_fused_where_they_can_be_unless_it_is_declined(short, capsys, options, expected):
    size = ["--size", "32", "--batch", "1", "--rounds", "2", "--device", "cpu", "--json"]
    command = ["bench", "localvit_tiny_patch16_224", "--against", "test_resnet", *size, *options]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    for side, (engine, form) in zip(("model", "against"), expected, strict=True):
        assert found[side]["engine"] == engine
        assert form in (None, found[side]["form"])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_of_files(engine, short, capsys):
    assert main([*COMMAND, "--engine", engine, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert found["engine"] == engine
    assert found["peak_memory"] is None  # it keeps its memory: nothing would be seen


def test_memory_that_runs_out_is_one_line(short, capsys):
    assert main(["bench", NAME, "--batch", str(10**13), "--rounds", "2"]) == 1
    out, err = capsys.readouterr()
    assert "memory ran out" in err
    assert "use a smaller batch, image or model" in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "no baseline of 'resnet18' is known; name one (--against NAME)"),
        (["resnet18", "--batch", "0"], "batch_size=0 is not accepted; use at least 1"),
        (["deit_tny_patch16_224"], "did you mean"),
        ([NAME, "--batch", "0"], "batch_size=0 is not accepted; use at least 1"),
        ([NAME, "--rounds", "1"], "rounds=1 is not accepted; use at least 2"),
        ([NAME, "--threads", "0"], "threads=0 is not accepted; use at least 1"),
        ([NAME, "--threads", "5000"], "threads=5000 is not accepted; use 1 to 1024"),
        ([NAME, "--device", "tpu9"], "device='tpu9' does not exist; use auto, cpu or cuda"),
        ([NAME, "--engine", "tensorrt"], "--engine"),
        ([NAME, "--train", "--engine", "fused"], "engine='fused' is not accepted in training"),
        ([NAME, "--precision", "fp16", "--device", "cpu"], "precision='fp16' is not accepted on a CPU"),
        (
            [NAME, "--precision", "bf16", "--engine", "openvino", "--device", "cpu"],
            "precision='bf16' is not accepted",
        ),
        (["deit_tny_patch16_224", "--against", NAME], "did you mean"),
        ([NAME, "--set", "depths=1"], "depths"),
        ([NAME, "--size", "50"], "50x50 is not divisible by the patch size 16x16"),
        (["localvit_swin_tiny_patch4_window7_224", "--size", "2"], "size"),
        (["test_resnet", "--against", "test_resnet", "--engine", "fused"], "has no fast form"),
    ],
)
def test_wrong_use_is_one_line(arguments, message, short, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_an_engine_that_is_missing_names_the_extra_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(comparison, "load", lambda *args: pytest.fail("a model was built"))
    monkeypatch.setattr("localvit.engines.open.importlib.util.find_spec", lambda name: None)
    assert main([*COMMAND, "--engine", "openvino"]) == 2
    assert "pip install 'localvit[export]'" in capsys.readouterr().err


def test_files_of_engines_run_on_the_cpu():
    with pytest.raises(ConfigError, match="use 'cpu'"):
        engines.check_engine("openvino", torch.device("meta"))


def test_memory_of_a_call_is_what_it_holds_at_its_peak():
    size = 64 * 2**20

    def work():
        torch.zeros(size, dtype=torch.uint8).add_(1)

    work()  # the first call loads code
    held = machine.memory_growth(work, CPU)
    if held is None:
        pytest.skip("this system does not tell")
    assert held == pytest.approx(size, abs=4 * 2**20)  # the system counts pages in lots, large ones of 2 MiB


def test_settings_of_threads_and_memory_are_named(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("LD_PRELOAD", "/somewhere/libjemalloc.so.2")
    monkeypatch.setenv("HOME_OMP_X", "no")
    found = machine.environment()
    assert found["MALLOC_ARENA_MAX"] == "2"
    assert found["LD_PRELOAD"] == "libjemalloc.so.2"  # the file, not where it lies
    assert "HOME_OMP_X" not in found


def test_a_preloaded_allocator_is_told(monkeypatch):
    monkeypatch.setattr(
        machine.Path, "read_text", lambda path, encoding: "7f r-xp /usr/lib/libjemalloc.so.2\n"
    )
    assert machine.allocator() == "jemalloc"
