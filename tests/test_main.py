"""The command line: parsing, help, mistakes, exit codes; and the lists that must stay together."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import colorize_data
import main
from photo import ColorizeError, FlagError

ROOT = Path(main.__file__).parent
FLAGS = {"count": main.Flag("int", None, "", ""),
         "learning_rate": main.Flag("float", None, "", "peak (0..10)"),
         "mean_color": main.Flag("str", None, "", ""), "out": main.Flag("Path", None, "a", ""),
         "flip": main.Flag("bool", None, "", ""), "stages": main.Flag("int", [2, 3], "3", ""),
         "loss": main.Flag("str", ["mse", "l1"], "mse", ""),
         "images": main.Flag("list", None, "None", ""),
         "share": main.Flag("float", None, "0.5", "of all (0..1)"),
         "epochs": main.Flag("int", None, "20", "how many (1..)")}


def raises(error):
    def command(*_, **__):
        raise error
    return command


@pytest.mark.parametrize("line, values", [
    ("", {}), ("--count=5", {"count": 5}), ("--mean-color #ff0000", {"mean_color": "#ff0000"}),
    ("--count -5", {"count": -5}), ("--mean_color=--x=y", {"mean_color": "--x=y"}),
    ("--learning-rate 2", {"learning_rate": 2.0}), ("--out a/b", {"out": Path("a/b")}),
    ("--flip", {"flip": True}), ("--flip --count 2", {"flip": True, "count": 2}),
    ("--stages 3 --loss l1", {"stages": 3, "loss": "l1"}),
    ("--share 0 --epochs 1", {"share": 0.0, "epochs": 1}), ("--share 1", {"share": 1.0}),
    ("--images a b -c --flip", {"images": ["a", "b", "-c"], "flip": True}),
    ("--images=a b", {"images": ["a", "b"]})])
def test_flags_become_values_of_their_types(line, values):
    assert repr(main.parse(line.split(), FLAGS)) == repr(values)


@pytest.mark.parametrize("line, said", [
    ("photo.png", "'photo.png' belongs to no flag"), ("-5", "'-5' belongs to no flag"),
    ("--cuont 3", "no flag --cuont; did you mean --count?"), ("--zebra 3", "no flag --zebra"),
    ("--learning-rat 3", "did you mean --learning_rate?"), ("--", "no flag --"),
    ("--count --flip", "--count needs a value"), ("--flip --flip", "--flip is given twice"),
    ("--count 1.5", "must be a whole number"), ("--learning_rate nan", "nan: must be a number, 0"),
    ("--stages 5", "choose one of 2, 3"), ("--loss mze", "mse, l1; did you mean mse?"),
    ("--flip=yes", "--flip is a switch"), ("--share 2", "--share 2: must be a number, 0..1"),
    ("--share=-1e-9", "--share -1e-9: must be a number, 0..1"), ("--share inf", "0..1"),
    ("--epochs 0", "--epochs 0: must be a whole number, 1 or more"),
    ("--share x", "must be a number"),
    ("--images", "--images needs a value"), ("--images a --images b", "given twice"),
    ("--flip false", "--flip is a switch: write it alone, or leave it out"),
    ("--count 3 b.png", "a flag takes one value"),
    ("--out my own model --flip", 'write --out "my own model"'),
    ("-count 3", "flags begin with --; did you mean --count?")])
def test_a_mistake_in_a_flag_is_named(line, said):
    with pytest.raises(main.UsageError, match=rf"^.*{re.escape(said)}.*\Z"):
        main.parse(line.split(), FLAGS)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_explains_every_flag_and_default_of_the_function_in_80_columns(command, capsys):
    """Read from the source, they agree with what Python itself finds in the imported function."""
    assert main.main([command, "--wrong", "--help"]) == 0
    out = capsys.readouterr().out
    defaults = dict(getattr(__import__(main.COMMANDS[command]), command).__kwdefaults__)
    defaults.pop("typed", None)  # what main tells train
    flags = main.read_command(command)[1]
    assert sorted(flags) == sorted(defaults) and max(map(len, out.splitlines())) <= 80
    for name, flag in flags.items():
        assert re.search(rf"^  --{name}\b", out, re.MULTILINE) and flag.help, name
        # nan and what else no loop can count with is refused by its range
        assert flag.kind != "float" or main.RANGE.search(flag.help), name
        assert flag.kind != "bool" or flag.default == "False", "there is no --no-flag"
        several = isinstance(defaults[name], tuple)
        assert flag.default == (" ".join(defaults[name]) if several else str(defaults[name]))
        if defaults[name] is not None and flag.kind not in ("bool", "list"):
            assert main.convert(name, flag.default, flag) == defaults[name]
            assert f"[{defaults[name]}]" in out
    assert command != "train" or "--stages 2|3|4" in out


def test_a_docstring_gives_headings_continued_lines_and_ranges(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text('''
def train(*, a: int = 1, b: float | None = None, c: list[str] | str = "x") -> None:
    """What it does.

    a: first
    How it ends:
    b: of a length that
        two lines take (0..1)
    Where to:
    c: files
    """''')
    monkeypatch.setattr(main, "HERE", tmp_path)
    assert main.read_command("train") == ("What it does.", {
        "a": main.Flag("int", None, "1", "first"),
        "b": main.Flag("float", None, "None", "of a length that two lines take (0..1)",
                       "How it ends:"),
        "c": main.Flag("list", None, "x", "files", "Where to:")})
    main.print_help("train")
    assert [re.sub(r"  +", "  ", line) for line in capsys.readouterr().out.splitlines()[4:]] == [
        "  --a int  first [1]", "How it ends:", "  --b float  of a length that two lines take (0..1)",
        "Where to:", "  --c str ...  files [x]"]
    assert main.main(["train", "--b", "2"]) == 2
    assert capsys.readouterr().err == "error: --b 2: must be a number, 0..1\n"


@pytest.mark.parametrize("line, said", [
    ("inference --input a.png", "no flag --input; did you mean --image?"),
    ("data --input a", "did you mean --data?"), ("train --learning_rate 1", "did you mean --lr?"),
    ("inference foto.tif", "'foto.tif' belongs to no flag; write --image foto.tif"),
    ("inference --overwrite foto.tif", "write --image foto.tif"),
    ("data photos.zip", "write --source photos.zip"),
    ("data --data a --source my photo.zip", 'write --source "my photo.zip"'),
    ("train --out my model", 'write --out "my model" or --data model'),
    ("inference --compare false", "--compare is a switch: write it alone"),
    ("help tarin", "no command 'tarin'; did you mean train?")])
def test_what_newcomers_type_gets_the_hint_they_need(line, said, capsys):
    assert main.main(line.split()) == 2
    assert said in capsys.readouterr().err


def test_help_of_a_command_is_the_same_however_one_asks_and_fits_a_screen(capsys):
    for command in main.COMMANDS:
        said = set()
        for line in ([command, "--help"], ["help", command], ["--help", command]):
            assert main.main(line) == 0
            said.add(capsys.readouterr().out)
        assert len(said) == 1 and 5 < said.pop().count("\n") <= 49


def test_nothing_that_a_name_holds_reaches_the_terminal_as_control_characters(monkeypatch, capsys):
    monkeypatch.setattr(colorize_data, "data", raises(ColorizeError("a\x1b[2J\nb\udcff\u202e")))
    assert main.main(["data"]) == 1
    assert capsys.readouterr().err == "error: a\\x1b[2J\\nb\\udcff\\u202e\n"
    assert main.main(["data", "--\x1b]0;x\a"]) == 2 and main.main(["data", "\r\x9b"]) == 2
    assert capsys.readouterr().err.replace("\n", "").isprintable()


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't "
                                "allocate memory: you tried to allocate 1 bytes."),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")])
def test_memory_that_runs_out_is_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr(colorize_data, "data", raises(error))
    assert main.main(["data"]) == 1
    assert capsys.readouterr().err.startswith("error: out of memory; a smaller --size")


@pytest.mark.parametrize("command", ["data --help", "help", "--help", "evaluate --help"])
def test_a_reader_that_has_had_enough_ends_a_command_quietly(command):
    line = f"{sys.executable} main.py {command}"
    for shell, said in ((f"{line} | true", b""), (f"{line} | head -1", b""),
                        (f"{line} > /dev/full", b"error: standard output: No space left")):
        done = subprocess.run(["sh", "-c", f"sleep 0.1; {shell}"], cwd=ROOT, capture_output=True)
        assert done.stderr.startswith(said) and done.stderr.count(b"\n") <= bool(said), done.stderr


def test_help_and_mistakes_import_nothing_slow():
    code = """import sys, main
lines = [[], ["--help"], ["train", "-h"], ["tarin"], ["train", "--epoch", "3"], ["data", "x"]]
print([main.main(line) for line in lines])
print(sorted({"torch", "numpy", "PIL", "torchvision"} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 0, 2, 2, 2]", "[]"], done.stderr
    for command in main.COMMANDS:
        assert re.search(rf"^  {command} +\S", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("effect, code, said", [
    (lambda **_: None, 0, ""), (raises(KeyboardInterrupt()), 130, "interrupted\n"),
    (raises(ColorizeError("x.png: broken")), 1, "error: x.png: broken\n"),
    (raises(FlagError("--lr 0: too low")), 2, "error: --lr 0: too low\n")])
def test_how_a_command_ends_is_the_exit_code(monkeypatch, capsys, effect, code, said):
    monkeypatch.setattr(colorize_data, "data", effect)
    assert main.main(["data"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("line, code, said", [
    ("inferense", 2, "did you mean inference?"), ("evaluate --size 9999", 2, "--size 9999"),
    ("data --data nowhere", 1, "nowhere"), ("data --val_fraction 2", 2, "--val_fraction 2"),
    ("inference --size 5", 2, "--size 5"), ("train --epochs 0", 2, "--epochs 0")])
def test_a_mistake_is_one_line_and_its_exit_code(line, code, said, capsys):
    assert main.main(line.split()) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_missing_package_points_to_the_set_up(monkeypatch, capsys):
    monkeypatch.setattr(main.importlib, "import_module", raises(ImportError("No module 'torch'")))
    assert main.main(["train"]) == 1 and "set up the environment first" in capsys.readouterr().err


def test_a_defect_is_never_hidden_nor_a_traceback_that_was_asked_for(monkeypatch):
    for error, asked in ((ZeroDivisionError, ""), (ColorizeError, "1")):
        monkeypatch.setenv("COLORIZE_TRACEBACK", asked)
        monkeypatch.setattr(colorize_data, "data", raises(error()))
        with pytest.raises(error):
            main.main(["data"])


def test_values_reach_the_command_and_a_name_of_any_bytes_can_be_printed():
    """As in a plain terminal: standard output of ASCII, a file name that is no UTF-8."""
    code = ("import runpy, sys, types\n"  # two modules that need no torch
            "sys.modules['evaluate'] = sys.modules['colorize_data'] = types.SimpleNamespace(\n"
            "    data=lambda data: print(data), ColorizeError=ValueError, FlagError=ValueError)\n"
            "sys.argv = ['main.py', 'data', '--data', '\\udcff \\u4e2d']\n"
            "runpy.run_path('main.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"\\udcff \\u4e2d\n"), done.stderr


@pytest.mark.parametrize("command, module", main.COMMANDS.items())
def test_a_module_run_by_itself_says_what_to_type(command, module):
    done = subprocess.run([sys.executable, f"{module}.py"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"type: python main.py {command} --help\n"


def test_environment_readme_and_imports_name_the_same_packages():
    def packages(text):
        return set(re.findall(r"([a-z-]+>=[\d.]+)", text))
    listed = packages((ROOT / "environment.yml").read_text().partition("- pip:")[2])
    lines = re.findall(r"^pip install .*>=.*$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert len(listed) == 6 and lines and all(packages(line) == listed for line in lines)
    names = {"PIL": "pillow", "skimage": "scikit-image", "tifffile": "scikit-image"}
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
                known = {item.split(">=")[0] for item in listed} | {file.stem for file in files}
                assert names.get(top, top) in known, f"{path.name} imports {top}"


def test_the_sample_photographs_are_those_whose_sources_are_named():
    folder = ROOT / "data" / "input"
    sources = (folder / "SOURCES.md").read_text("utf-8")
    named = re.findall(r"^\| ((?:train|val)/\S+) \|", sources, re.MULTILINE)
    assert len(named) == len(set(named)) == 65 and all((folder / name).is_file() for name in named)
    # a user's own photographs may lie beside them: only those that git tracks need a source
    tracked = subprocess.run(["git", "ls-files", "-z", "train", "val"], cwd=folder,
                             capture_output=True, text=True)
    assert set(filter(None, tracked.stdout.split("\0"))) <= set(named)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("command, code", [("help", 0), ("data --wrong 1", 2)])
def test_closed_streams_are_no_traceback(command, code, closed):
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} main.py {command} {closed}"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr + done.stdout
    assert "error" not in done.stdout
