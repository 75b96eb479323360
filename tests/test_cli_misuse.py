"""Bad command lines: whatever is typed, one line says what is wrong, and the exit code is 2."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nearfold.cli import main
from nearfold.study import engine, local
from nearfold.train.trainer import Trainer

HUGE = "9" * 5000
NUMBERS = [
    "0",
    "-1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "x",
    "",
    " 1",
    "1e9",
    "٣",
    "0x10",
    "99999999999",
    HUGE,
    "1_0",
    "1\n2",
]
FRACTIONS = ["nan", "inf", "-inf", "x", "", "1e999", "1,5", "--", HUGE, "1\0"]
NAMES = ["x", "", "cuda:97", "nonsense:0", "\0", "a\nb", "../x", "é\udcff", HUGE]
SHAPES = [
    "", "3", "2,3", "2,3,0", "a,b,c", "2,3,4,", "2;3;4", "-1,3,4", "1,8,9999999999,9999999999", f"1,8,{HUGE}", "1,8,٣",
    "1,8,1000000,1000000", "1000000000,1000000000,1000000000", "1,8,4\n",
]  # fmt: skip
NOTATIONS = [
    "", " ", "|", "window", "window(3)", "window(3) | box", "window(3) | box | kernel |", "window(3) | ranked | kernel",
    "windw(3) | box | kernel", "window(0) | box | kernel", "window(-3) | box | kernel", "window(nan) | box | kernel",
    "window(3, 3) | box | kernel", "all | row | softmax(heads=0)", "a*", "a* +", "()",
    "window(3) | box | kernel + ", "branch(2, all | row | table, all | row | table)", "nearest(0) | ranked | kernel",
    "(" * 500, "window(3) | box | kernel\0", "ввв", "window(1000000001) | box | kernel",
    "all | row | softmax(scale=nan)", f"all | row | softmax(scale=1{'0' * 400})", f"window({HUGE}) | box | kernel",
    "all | row | table(99999999999)",
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Paths that are not what is asked for, by what they are."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").write_bytes(b"")
    (root / "empty.py").write_bytes(b"")
    (root / "noise").write_bytes(os.urandom(300))
    (root / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(300))
    (root / "noise.py").write_bytes(b"\xff\xfe\0" + os.urandom(300))
    (root / "wrong.py").write_text("def study(preset):\n    return 3\n\ndef make():\n    return 3\n\nstr_ = 'x'\n")
    (root / "raises.py").write_text("raise RuntimeError('two\\nlines')\n")
    (root / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (root / "folder").mkdir()
    (root / "folder.py").mkdir()
    (root / "folder.png").mkdir()
    (root / "round").symlink_to(root / "round")
    (root / "nowhere").symlink_to(root / "gone")
    (root / "table.csv").write_text("a,b\n1\n")
    return root


def paths(bad, *more):
    return [*(str(bad / name) for name in ("missing", "empty", "folder", "round", "nowhere", "empty/x", *more)), "\0"]


def command_lines(bad):
    """Command lines, each wrong in one way."""
    yield from ([], ["nonsense"], ["--nonsense"], ["-1"], [""], ["\0"], ["ops", "--x"], ["train", "ops"], ["study"])
    for name in ["swim", "", "\0", HUGE, "conv,attention", "é\udcff"]:
        yield ["ops", name]
        yield ["ops", "conv", name]
        yield ["models", f"{name}!"]
    for notation in NOTATIONS:
        yield ["explain", notation, "--shape", "1,8,4,4"]
        yield ["train", "--op", notation, "--epochs", "1", "--limit", "20"]
        yield ["look", "sample:china.jpg", "--op", notation, "--size", "4", "--out", str(bad / "x.png")]
    for shape in SHAPES:
        yield ["explain", "all | row | softmax(heads=2)", "--shape", shape]
        yield ["describe", "timm:nothing", "--input", shape]
    yield ["explain", "conv"]
    yield ["explain", "deformable(3) | box | kernel", "--shape", "1,8,4,4,4,4"]
    yield ["explain", "all | row | softmax(heads=4)", "--shape", "1,6,4"]
    for dtype in ["int64", "bool", "complex64", "uint8", "float99", "", "\0", "Tensor", "load", "nn", "__class__"]:
        yield ["explain", "conv", "--shape", "1,8,4,4", "--dtype", dtype]
    for device in NAMES:
        if device != "cuda:97":  # explaining runs nothing there
            yield ["explain", "conv", "--shape", "1,8,4,4", "--device", device]
        yield ["train", "--device", device]
        yield ["study", "spectrum", "--device", device]
    for number in NUMBERS:
        yield ["explain", "conv", "--shape", "1,8,4,4", "--out-channels", number]
    for spec in [
        "resnet50",
        ":",
        "timm:",
        ":x",
        "timm:nothing",
        "torchvision:nothing",
        "hub:x",
        "\0:x",
        f"timm:{HUGE}",
    ]:
        yield ["describe", spec]
    for path in paths(bad, "noise.py", "folder.py", "empty.py", "raises.py", "exits.py"):
        yield ["describe", f"{path}:make"]
    for name in ["study", "str_", "none", "", "make"]:
        yield ["describe", f"{bad / 'wrong.py'}:{name}"]
    for path in paths(bad, "noise", "noise.png", "folder.png"):
        yield ["look", path, "--out", str(bad / "x.png")]
    for at in ["", "1", "1,2,3", "-1,2", "99999,1", "1,99999", f"{HUGE},1", "x,y", "1.5,2", "٣,٣"]:
        yield ["look", "sample:china.jpg", "--at", at, "--out", str(bad / "x.png")]
    for size in [*NUMBERS, "1", "5000"]:
        yield ["look", "sample:china.jpg", "--size", size, "--out", str(bad / "x.png")]
    for out in [
        "x",
        "x.exe",
        "",
        str(bad / "empty/x.png"),
        str(bad / "folder.png"),
        str(bad / "round/x.png"),
        "\0.png",
    ]:
        yield ["look", "sample:china.jpg", "--size", "4", "--op", "conv", "--out", out]
    for option, values in {
        "--epochs": NUMBERS, "--batch-size": NUMBERS, "--limit": NUMBERS,
        "--width": NUMBERS, "--depth": NUMBERS, "--checkpoint-every": NUMBERS, "--stream": NUMBERS,
        "--accumulate": NUMBERS, "--workers": [n for n in NUMBERS if n != "0"], "--seed": ["-1", "x", "", "1.5", "nan"],
        "--lr": [*FRACTIONS, "0", "-1"], "--weight-decay": [*FRACTIONS, "-1"], "--momentum": [*FRACTIONS, "-1", "1"],
        "--warmup-epochs": [*FRACTIONS, "-1", "1e6"], "--label-smoothing": [*FRACTIONS, "1"],
        "--clip-grad-norm": [*FRACTIONS, "-1"], "--mixup": [*FRACTIONS, "-1"], "--cutmix": [*FRACTIONS, "-1"],
        "--ema": [*FRACTIONS, "1"], "--until": [*FRACTIONS, "2"], "--optimizer": NAMES, "--schedule": NAMES,
        "--augment": NAMES, "--precision": NAMES, "--parallel": NAMES, "--compile": ["x"],
        "--data": [*paths(bad, "noise", "noise.png", "table.csv"), HUGE, ""],
        "--out": [str(bad / "empty"), str(bad / "empty/x"), str(bad / "round"), "\0", HUGE],
    }.items():  # fmt: skip
        for value in values:
            yield ["train", option, value]
    yield from (["train", "--resume"], ["train", "--tensorboard"], ["train", "--stream", "8", "--limit", "3"])
    yield ["train", "--stream", "8"]
    yield ["train", "--width", "65536", "--depth", "60"]
    yield ["train", "--op", "window(2, stride=2, padding=0) | box | max", "--depth", "9", "--width", "4"]
    for option, values in {
        "--epochs": NUMBERS, "--seeds": NUMBERS, "--width": NUMBERS, "--jobs": NUMBERS, "--limit": NUMBERS,
        "--only": ["nothing", "conv,nothing", "\0", HUGE], "--data": [*paths(bad, "noise"), HUGE],
        "--out": [str(bad / "empty"), str(bad / "empty/x"), str(bad / "round"), "\0"],
    }.items():  # fmt: skip
        for value in values:
            more = ["--only", "conv", "--limit", "20"] if option == "--out" else []
            yield ["study", "spectrum", *more, option, value]
    yield ["study", "run"]
    for name in [
        "everything",
        "",
        "\0",
        HUGE,
        *paths(bad),
        *(str(bad / f"{n}.py") for n in ("wrong", "noise", "folder")),
    ]:
        yield ["study", "run", name]
    for name in ("raises", "exits", "empty", "missing"):
        yield ["study", "run", str(bad / f"{name}.py")]
    for option, values in {
        "--preset": NAMES, "--seeds": NUMBERS, "--jobs": NUMBERS, "--gpus": [*FRACTIONS, "-1"], "--engine": NAMES,
        "--workers": [n for n in NUMBERS if n != "0"], "--data": ["x", "=", "cifar10=", "=x", "cifar10=/nowhere"],
        "--retry": ["x"],
    }.items():  # fmt: skip
        for value in values:
            yield ["study", "run", "ratio", option, value]
    yield ["study", "list", "x"]
    for option in ("--latency-ms", "--flops", "--memory-mib"):
        for value in [*FRACTIONS, "0", "-1"]:
            yield ["study", "budget", option, value]
    yield ["study", "budget"]


def check(argv, rc, out, err):
    shown = [word if len(word) < 80 else f"{word[:70]}..." for word in argv]
    lines = err.splitlines()
    assert rc == 2, (shown, rc, err[-400:])
    assert "Traceback" not in err and "fault of nearfold" not in err, (shown, err[-400:])
    assert out == "", (shown, out[-400:])
    pointed = len(lines) == 3 and lines[2].strip() == "^"  # a notation, and where in it
    assert len(lines) == 1 or pointed, (shown, err[-400:])
    assert lines[0].startswith("nearfold") and ": error: " in lines[0] and len(lines[0]) < 3000, (shown, err[-400:])


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_bad_command_lines_end_in_one_line(bad, capsys, monkeypatch, tmp_path, step):
    def trains(*_):
        raise AssertionError("it would have been done")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "take_step", trains)
    monkeypatch.setattr(engine, "attempt", trains)
    monkeypatch.setattr(local, "attempt", trains)
    lines = list(command_lines(bad))[::step]
    wrong = []
    for argv in lines:
        rc = main(argv)
        try:
            check(argv, rc, *capsys.readouterr())
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0])
    assert not wrong, f"{len(wrong)} of {len(lines)}:\n" + "\n".join(wrong)
    assert len(lines) > 200
    assert list(tmp_path.iterdir()) == [], "nothing is left behind by a command that was refused"


def test_in_a_process_of_its_own(bad, tmp_path):
    """With the interpreter's own ways to end; in one process, since each starts torch anew. As typed: test_cli.py."""
    lines = [
        ["explain", "window(3) | box | kernel", "--shape", "1,8,9999999999,9999999999"],
        ["explain", "window(3) | box | kernel", "--shape", "1,8,4,4", "--dtype", "int64"],
        ["explain", "deformable(3) | box | kernel", "--shape", "1,8,4,4,4,4"],
        ["train", "--width", "99999999999"],
        ["describe", f"{bad / 'exits.py'}:make"],
        ["study", "run", str(bad / "raises.py")],
    ]
    code = """if True:
    import sys, json
    from nearfold.cli import main
    codes = [main(argv) for argv in json.loads(sys.argv[1])]
    sys.exit(0 if codes == [2] * len(codes) else 1)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr[-500:]
    assert len(done.stderr.splitlines()) == len(lines) and "Traceback" not in done.stderr, done.stderr


def test_divergence_is_one_line(capsys, tmp_path):
    assert main(["train", "--lr", "1e9", "--epochs", "1", "--limit", "40", "--width", "4"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nearfold: error: ") and "lower lr" in err and len(err.splitlines()) == 1


def raising(error):
    def command(*_):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyError("lost"), 3, "nearfold: error: this is a fault of nearfold, please report it: KeyError: 'lost'"),
        (
            RuntimeError("shapes\ndo not fit"),
            3,
            "please report it: RuntimeError: shapes do not fit",
        ),
        (MemoryError(), 2, "not enough memory for this: MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory"),
        (ValueError("two\n\tlines"), 2, "nearfold: error: two lines"),
        (PermissionError(13, "Permission denied", "x"), 2, "Permission denied"),
    ],
)
def test_every_error_has_its_code_and_one_line(error, code, says, capsys, monkeypatch):
    monkeypatch.setattr("nearfold.periodic.run", raising(error))
    assert main(["ops"]) == code
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1
    monkeypatch.setenv("NEARFOLD_DEBUG", "1")
    assert main(["ops"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_is_one_whatever_fails_on_the_way_out(capsys, monkeypatch):
    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        finally:
            raise OSError("no room for the report")

    monkeypatch.setattr("nearfold.periodic.run", interrupted)
    assert main(["ops"]) == 130
    assert "interrupted; then: no room for the report" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["conv_strided", "pool_max", "pool_mean"])
def test_operators_with_a_stride_train(op, capsys, tmp_path):
    assert main(["train", "--op", op, "--epochs", "1", "--limit", "40", "--width", "8", "--device", "cpu"]) == 0
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_every_operator_that_has_a_name_trains_or_says_why_not(capsys):
    """On torch's meta device, as `train` tries it before it begins."""
    from nearfold.grammar import CATALOGUE
    from nearfold.models import SpectrumNet
    from nearfold.train import require_trainable

    refused = {}
    for name, entry in CATALOGUE.items():
        try:
            require_trainable(lambda entry=entry: SpectrumNet(entry.notation, 1, 10), (1, 8, 8))
        except ValueError as error:
            refused[name] = str(error)
    assert refused.keys() == {
        "conv_causal",
        "sliding_window",
        "sinks",
        "moba",
        "nsa_compressed",
        "nsa",
        "cross_attention",
        "sapa",
    }
    assert all(word in refused[name] for name, word in (("conv_causal", "axes"), ("cross_attention", "context")))


@pytest.fixture
def ctrl_c_is_heard():
    """A shell starts what it puts in the background deaf to Ctrl-C, and what that starts is deaf, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_at_any_moment_of_training_is_130(tmp_path):
    """Checkpoints are written all the time: a good part of the interruptions meets one."""
    for pause in (0.0, 0.05, 0.1, 0.3):
        out = tmp_path / str(pause)
        command = ["train", "--epochs", "5000", "--checkpoint-every", "1", "--limit", "300", "--width", "4"]
        process = subprocess.Popen(
            [sys.executable, "-m", "nearfold", *command, "--device", "cpu", "--out", str(out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        give_up = time.monotonic() + 120
        while not (out / "checkpoint.json").exists():
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.01)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err[-500:]
        assert "Traceback" not in err and err.splitlines()[-1] == "nearfold: interrupted", err[-500:]
