import dataclasses
import subprocess
import sys

import pytest

import nearfold
from nearfold.cli import COMMANDS, main
from nearfold.grammar import CATALOGUE
from nearfold.grammar.complexity import c_d
from nearfold.study.commands import COMMANDS as STUDIES
from nearfold.train import Recipe
from nearfold.train.command import attribute_docs


def fails(capsys, *argv):
    """Run, expect exit code 2 and nothing but one message on stderr; return the message."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert ": error: " in err.splitlines()[0]
    return err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nearfold {nearfold.__version__}\n"


@pytest.mark.parametrize(
    "command", [[], ["ops"], ["explain"], ["train"], ["study"], ["study", "spectrum"]], ids=" ".join
)
def test_help_teaches_by_examples(command, capsys):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "nearfold " + " ".join(command) in out
    assert "example" in out or "start here" in out


def test_help_and_errors_load_no_torch():
    """Only what is asked for is loaded: who mistypes a command does not wait."""
    code = (
        "import sys; from nearfold.cli import main\n"
        "codes = [main([]), main(['trian']), main(['--help'])]\n"
        "print(codes, sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy', 'nearfold'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[2, 2, 0] ['nearfold']"


ALL = {(name,): summary for name, (summary, _) in COMMANDS.items()}
ALL |= {("study", name): summary for name, (summary, _) in STUDIES.items()}


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_command_is_told_and_tells(command, capsys):
    main([*command[:-1], "--help"])
    assert ALL[command].split(",")[0] in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--help"]) == 0
    assert f"nearfold {' '.join(command)}" in capsys.readouterr().out.split("example")[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "nearfold: error: argument COMMAND: invalid choice: 'trian' (choose from"),
        (["trian"], "; did you mean train?"),
        (["study", "spectrm"], "did you mean spectrum?"),
        (["train", "--widht", "3"], "nearfold train: error: unrecognized arguments: --widht; did you mean --width?"),
        (["train", "--widht=3"], "unrecognized arguments: --widht=3; did you mean --width?"),
        (["train", "--no-deterministc"], "did you mean --no-deterministic?"),
        (["explain", "conv", "--shpe", "1,8,8,8"], "did you mean --shape?"),
        (["train", "--parallel", "fspd"], "did you mean fsdp?"),
        (["study", "run", "ratio", "--engine", "rya"], "did you mean ray?"),
        (["ops", "--zzzz"], "unrecognized arguments: --zzzz (see nearfold ops --help)"),
        (["models", "a", "b"], "nearfold models: error: unrecognized arguments: b (see"),
    ],
)
def test_what_is_misspelt_is_guessed(argv, said, capsys):
    assert said in fails(capsys, *argv)


def test_help_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "nearfold", "ops", "--nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--nonsense" in done.stderr


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error():
    script = f"{sys.executable} -m nearfold ops | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_ops_lists_the_catalogue(capsys):
    assert main(["ops"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 125
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and line[2] != " "}
    assert rows.keys() == CATALOGUE.keys()
    for name, entry in CATALOGUE.items():
        if len(entry.operation.parts) == 1:
            (part,) = entry.operation.parts
            score = f"{c_d(entry.operation):g}"
            assert all(f" {word} " in rows[name] for word in (part.path, part.shape, score)), rows[name]
    assert "oracle" not in out, "every operator that has a name has a fast backend"


def test_ops_of_a_family_and_of_late(capsys):
    assert main(["ops", "--family", "neighbours", "--since", "2025"]) == 0
    out = capsys.readouterr().out
    assert "moba" in out and "kvt" not in out and "conv_strided" not in out
    assert main(["ops", "--family", "nosuch"]) == 2
    assert "fixed window" in capsys.readouterr().err
    assert main(["ops", "--since", "2999"]) == 2
    assert "the latest is of 20" in capsys.readouterr().err
    assert main(["ops", "conv", "--since", "2020"]) == 2


def test_ops_tells_all_about_one(capsys):
    for entry in CATALOGUE.values():
        assert main(["ops", entry.name]) == 0
        out = capsys.readouterr().out
        for part in (entry.name, entry.title, entry.notation, entry.source, *entry.words, "C_D", "->"):
            assert part in out
    assert "did you mean swin?" in fails(capsys, "ops", "swim")


@pytest.mark.parametrize("notation", ["window(3) | box | kernel", "conv"])
def test_explain_takes_a_notation_or_a_name(notation, capsys):
    assert main(["explain", notation, "--shape", "2x8x8x8"]) == 0
    out = capsys.readouterr().out
    assert "window(3) | box | kernel" in out and "oracle" in out


@pytest.mark.parametrize("shape", ["", "3", "2,3", "2,3,0", "a,b,c", "2,3,4,", "2;3;4"])
def test_explain_refuses_a_wrong_shape_in_one_line(shape, capsys):
    err = fails(capsys, "explain", "conv", "--shape", shape)
    assert "--shape" in err and err.count("\n") == 1


def test_a_wrong_notation_is_pointed_at(capsys):
    err = fails(capsys, "explain", "windw(3) | box | kernel", "--shape", "2,8,8,8")
    assert "windw(3) | box | kernel" in err and "^" in err and "window" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["explain", "conv", "--shape", "2,8,8,8", "--dtype", "float99"], ["--dtype", "float99"]),
        (["explain", "conv"], ["--shape"]),
        (["train", "--data", "nowhere"], ["nowhere", "does not exist"]),
        (["train", "--lr", "-1"], ["lr", "-1"]),
        (["train", "--lr", "fast"], ["--lr", "fast"]),
        (["train", "--optimizer", "adam"], ["optimizer", "adamw", "adam"]),
        (["train", "--resume"], ["--resume", "--out"]),
        (["train", "--width", "0"], ["--width", "0"]),
        (["train", "--op", "conv", "--device", "cuda:97"], ["cuda:97"]),
        (["study", "spectrum", "--only", "conv,nothing"], ["nothing", "choose from", "convnn"]),
        (["study", "spectrum", "--seeds", "0"], ["--seeds", "0"]),
        (["study", "spectrum", "--data", "nowhere"], ["nowhere", "does not exist"]),
        (["study"], ["STUDY"]),
        (["study", "everything"], ["everything", "spectrum"]),
        ([], ["COMMAND"]),
    ],
)
def test_bad_input_is_one_clear_line(argv, words, capsys):
    err = fails(capsys, *argv)
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_every_recipe_field_is_a_documented_flag(capsys):
    main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    documented = attribute_docs(Recipe)
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in out
        assert documented[field.name].split(".")[0].split(",")[0] in out


def test_train_trains_saves_and_resumes(tmp_path, capsys):
    argv = ["train", "--limit", "60", "--epochs", "1", "--width", "8", "--depth", "1", "--device", "cpu",
            "--op", "convnn", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out and CATALOGUE["convnn"].notation in out
    assert (tmp_path / "run" / "weights.safetensors").exists()
    assert "holds a run already" in fails(capsys, *argv)
    assert main([*argv, "--resume"]) == 0


def test_study_ends_with_a_table_and_a_report(tmp_path, capsys):
    argv = ["study", "spectrum", "--limit", "60", "--epochs", "1", "--seeds", "1", "--width", "8",
            "--only", "conv, kvt", "--out", str(tmp_path), "--device", "cpu", "--jobs", "1"]  # fmt: skip
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "convolution 3x3" in out and str(tmp_path / "report.html") in out
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert main(argv) == 0
    assert "4 of 4 runs have finished before" in capsys.readouterr().out


def test_train_reads_files_as_they_are_needed(tmp_path, capsys):
    from PIL import Image

    for label in ("dark", "light"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (20 + i, 24), (200 * (label == "light"),) * 3).save(tmp_path / "data" / label / f"{i}.png")
    command = ["train", "--data", str(tmp_path / "data"), "--stream", "16", "--workers", "1", "--epochs", "1"]
    command += ["--batch-size", "8", "--width", "8", "--augment", "resized_crop", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "data: test accuracy" in capsys.readouterr().out
    assert main([*command, "--limit", "5"]) == 2
    assert "--limit is for data held in memory" in capsys.readouterr().err
