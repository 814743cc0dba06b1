"""The command line: parsing, help, mistakes, exit codes; and the lists that must stay together."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import main
from colorize_data import ColorizeError, FlagError

ROOT = Path(main.__file__).parent
FLAGS = {
    "count": main.Flag("int", None, "1", "how many"),
    "learning_rate": main.Flag("float", None, "None", "rate"),
    "mean_color": main.Flag("str", None, "None", "colour"),
    "out": main.Flag("Path", None, "a", "folder"),
    "flip": main.Flag("bool", None, "False", "mirror"),
    "stages": main.Flag("int", [2, 3, 4], "4", "depth"),
    "loss": main.Flag("str", ["mse", "l1"], "mse", "objective"),
}
every_command = pytest.mark.parametrize("command", main.COMMANDS)


# ------------------------------------------------------------------------------------ parsing

@pytest.mark.parametrize("line, values", [
    ("", {}),
    ("--count 5", {"count": 5}),
    ("--count=5", {"count": 5}),
    ("--count -5", {"count": -5}),
    ("--mean_color -10,20", {"mean_color": "-10,20"}),
    ("--mean-color #ff0000", {"mean_color": "#ff0000"}),
    ("--mean_color=a=b", {"mean_color": "a=b"}),
    ("--mean_color=--x", {"mean_color": "--x"}),
    ("--learning-rate 1e-3", {"learning_rate": 0.001}),
    ("--learning_rate 2", {"learning_rate": 2.0}),
    ("--out some/folder", {"out": Path("some/folder")}),
    ("--flip", {"flip": True}),
    ("--no-flip", {"flip": False}),
    ("--no_flip --count 2", {"flip": False, "count": 2}),
    ("--stages 3 --loss l1", {"stages": 3, "loss": "l1"}),
])
def test_flags_become_values_of_their_types(line, values):
    parsed = main.parse(line.split(), FLAGS)
    assert parsed == values
    assert {name: type(value) for name, value in parsed.items()} \
        == {name: type(value) for name, value in values.items()}


@pytest.mark.parametrize("line, said", [
    ("photo.png", "'photo.png' belongs to no flag"),
    ("-5", "'-5' belongs to no flag"),
    ("--", "no flag --"),
    ("--cuont 3", "no flag --cuont; did you mean --count?"),
    ("--learning-rat 3", "did you mean --learning_rate?"),
    ("--zebra 3", "no flag --zebra"),
    ("--count", "--count needs a value"),
    ("--count --flip", "--count needs a value"),
    ("--out=", "--out needs a value"),
    ("--count 1 --count 2", "--count is given twice"),
    ("--flip --no-flip", "--flip is given twice"),
    ("--count 1.5", "--count 1.5: must be a whole number"),
    ("--learning_rate fast", "--learning_rate fast: must be a number"),
    ("--learning_rate nan", "--learning_rate nan: must be a number"),
    ("--learning_rate inf", "--learning_rate inf: must be a number"),
    ("--stages 5", "--stages 5: choose one of 2, 3, 4"),
    ("--loss mze", "choose one of mse, l1; did you mean mse?"),
    ("--flip=yes", "--flip is a switch: --flip or --no-flip"),
    ("--no-count 5", "--count is no switch"),
])
def test_a_mistake_in_a_flag_is_named(line, said):
    with pytest.raises(main.UsageError) as error:
        main.parse(line.split(), FLAGS)
    assert said in str(error.value) and "\n" not in str(error.value)


@every_command
def test_flags_are_the_keyword_parameters_of_the_function(command):
    """Read from the source, they agree with what Python itself finds in the imported function."""
    module = __import__(main.COMMANDS[command])
    defaults = getattr(module, command).__kwdefaults__
    flags = main.read_command(command)[1]
    assert list(flags) == list(defaults)
    for name, flag in flags.items():
        default = defaults[name]
        assert flag.default == str(default)
        if default is not None and flag.kind != "bool":
            assert main.convert(name, flag.default, flag) == default


# --------------------------------------------------------------------------------------- help

@every_command
def test_every_flag_is_explained_within_100_columns(command, capsys):
    assert main.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    summary, flags = main.read_command(command)
    assert out.startswith(summary)
    assert max(map(len, out.splitlines())) <= 100
    for name, flag in flags.items():
        assert flag.help, name
        assert re.search(rf"^  --{name}\b", out, re.MULTILINE)
        assert flag.help.split()[0] in out


def test_help_shows_types_choices_and_defaults(capsys):
    main.main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for piece in ("--epochs int", "--loss mse|l1|huber|bins|gan", "[mse]", "[on; --no-...]"):
        assert piece in out
    assert "[None]" not in out and "[False]" not in out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_command_the_commands_are_listed(arguments, capsys):
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    for command in main.COMMANDS:
        assert re.search(rf"^  {command} +\S", out, re.MULTILINE)


def test_help_wins_over_mistakes_beside_it(capsys):
    assert main.main(["train", "--epochs", "many", "--help"]) == 0
    assert "--epochs int" in capsys.readouterr().out


WITHOUT_TORCH = """
import sys, main
lines = [[], ["--help"], ["tarin"], ["train", "--help"], ["inference", "-h"], ["data", "--help"],
         ["evaluate", "--help"], ["train", "--epoch", "3"], ["train", "--epochs", "x"],
         ["train", "--loss", "mze"], ["inference", "photo.png"], ["inference", "--size"]]
print([main.main(line) for line in lines], file=sys.stderr)
slow = {"torch", "numpy", "PIL", "torchvision"} & set(sys.modules)
sys.exit(f"imported: {slow}" if slow else 0)
"""


def test_help_and_mistakes_import_nothing_slow():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[0, 0, 2, 0, 0, 0, 0, 2, 2, 2, 2, 2]"


def test_the_script_itself_ends_with_the_exit_code_and_one_line():
    done = subprocess.run([sys.executable, "main.py", "inferense"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("error: no command 'inferense'; did you mean inference?; "
                           "choose data, train, inference, evaluate\n")


# --------------------------------------------------------------------------------- exit codes

def replaced(monkeypatch, effect):
    """Let the command `data` do this instead."""
    monkeypatch.setattr(evaluate, "data", effect)


def raises(error):
    def command(*_, **__):
        raise error
    return command


@pytest.mark.parametrize("effect, code, said", [
    (lambda **_: None, 0, ""),
    (raises(ColorizeError("x.png: broken; repair it")), 1, "error: x.png: broken; repair it\n"),
    (raises(FlagError("--lr 0: too low")), 2, "error: --lr 0: too low\n"),
    (raises(KeyboardInterrupt()), 130, "interrupted\n"),
])
def test_how_a_command_ends_is_the_exit_code(monkeypatch, capsys, effect, code, said):
    replaced(monkeypatch, effect)
    assert main.main(["data"]) == code
    assert capsys.readouterr().err == said


def test_an_interrupt_during_the_import_counts_too(monkeypatch, capsys):
    monkeypatch.setattr(main.importlib, "import_module", raises(KeyboardInterrupt()))
    assert main.main(["data"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_missing_package_points_to_the_set_up(monkeypatch, capsys):
    monkeypatch.setattr(main.importlib, "import_module",
                        raises(ModuleNotFoundError("No module named 'torch'")))
    assert main.main(["train"]) == 1
    assert capsys.readouterr().err \
        == "error: No module named 'torch'; set up the environment first (README.md)\n"


def test_values_reach_the_command(monkeypatch):
    seen = {}
    replaced(monkeypatch, lambda **values: seen.update(values))
    assert main.main(["data", "--data=here", "--val-fraction", "0.2", "--workers", "3"]) == 0
    assert seen == {"data": Path("here"), "val_fraction": 0.2, "workers": 3}


def test_the_traceback_is_shown_when_asked_for(monkeypatch):
    replaced(monkeypatch, raises(ColorizeError("broken")))
    monkeypatch.setenv("COLORIZE_TRACEBACK", "1")
    with pytest.raises(ColorizeError, match="broken"):
        main.main(["data"])


def test_a_defect_is_never_hidden_behind_one_line(monkeypatch):
    replaced(monkeypatch, raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main.main(["data"])


def test_a_missing_folder_is_one_line_and_exit_1(tmp_path, capsys):
    assert main.main(["data", "--data", str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert str(tmp_path / "nowhere") in err and "--data" in err


@pytest.mark.parametrize("line", ["data --val_fraction 2", "inference --size 5", "train --epochs 0",
                                  "evaluate --size 9999"])
def test_a_value_out_of_range_is_exit_2(line, capsys):
    assert main.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line.split()[1]} ") and err.count("\n") == 1


def test_a_name_of_any_bytes_can_be_printed(tmp_path):
    """As in a plain terminal: standard output of ASCII, a file name that is no UTF-8."""
    code = ("import runpy, sys, evaluate\n"
            "evaluate.data = lambda **_: print('\\udcff \\u4e2d')\n"
            "sys.argv = ['main.py', 'data']\n"
            "runpy.run_path('main.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout == b"\\udcff \\u4e2d\n", done.stderr


# ---------------------------------------------------------------------- lists that go together

def requirements(text: str) -> set[str]:
    return {re.sub(r"['\"]", "", word) for word in re.findall(r"['\"]?[a-z-]+>=[\d.]+['\"]?", text)}


def test_the_environment_and_the_one_line_of_the_readme_name_the_same_packages():
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8")
    listed = requirements(environment[environment.index("- pip:"):])
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
             if line.startswith("pip install ") and requirements(line)]
    assert len(listed) == 6
    assert lines and all(requirements(line) == listed for line in lines)


def test_every_third_party_import_is_among_the_packages():
    listed = {r.split(">=")[0] for r in requirements((ROOT / "environment.yml").read_text())}
    names = {"PIL": "pillow", "skimage": "scikit-image", "tifffile": "scikit-image"}
    own = {path.stem for path in ROOT.glob("*.py")} | {"conftest", "benchmark"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in {module.split(".")[0] for module in modules} - own - sys.stdlib_module_names:
                assert names.get(top, top) in listed, f"{path.name} imports {top}"


def test_the_sample_photographs_are_those_whose_sources_are_named():
    folder = ROOT / "data" / "input"
    sources = (folder / "SOURCES.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| ((?:train|val)/\S+) \|", sources, re.MULTILINE)
    assert len(named) == len(set(named)) == 65
    assert [name for name in named if not (folder / name).is_file()] == []
    # a user's own photographs may lie beside them: only those that git tracks need a source
    tracked = subprocess.run(["git", "ls-files", "-z", "train", "val"], cwd=folder,
                             capture_output=True, text=True)
    assert set(filter(None, tracked.stdout.split("\0"))) <= set(named)
