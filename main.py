"""Colorize: gray photographs in, believable colour out, lightness untouched.

    python main.py train                                     # learn from data/input
    python main.py inference --image x.png --model ckpt.tar  # colour a photograph, or a folder

The command line is read from the commands' own signatures and docstrings, with ast, so that help
and every mistake in a flag answer before torch is imported.
"""

import ast
import difflib
import importlib
import math
import os
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

COMMANDS = {"data": "colorize_data", "train": "train", "inference": "inference", "evaluate": "evaluate"}
HERE = Path(__file__).resolve().parent


class UsageError(Exception):
    """A mistake in the command line itself; exit 2."""


class Flag(NamedTuple):
    kind: str             # int, float, str, bool or Path
    choices: list | None
    default: str          # as the source has it
    help: str


def read_command(name: str) -> tuple[str, dict[str, Flag]]:
    """A command's summary and flags, from the source of its function."""
    tree = ast.parse((HERE / f"{COMMANDS[name]}.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    summary, _, lines = ast.get_docstring(function).partition("\n\n")
    explained = dict(line.split(": ", 1) for line in lines.splitlines() if ": " in line)
    flags = {}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults):
        kind, choices = argument.annotation, None
        if isinstance(kind, ast.BinOp):  # X | None
            kind = kind.left
        if isinstance(kind, ast.Subscript):  # Literal[...]
            elements = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
            choices = [element.value for element in elements]
        kind = type(choices[0]).__name__ if choices else kind.id
        if isinstance(default, ast.Call):  # Path("data/input")
            default = default.args[0]
        flags[argument.arg] = Flag(kind, choices, ast.unparse(default).strip("'"),
                                   explained.get(argument.arg, ""))
    return summary, flags


def suggest(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def convert(name: str, text: str, flag: Flag):
    """A flag's text as a value of its type; UsageError if it is none."""
    if flag.choices:
        for choice in flag.choices:
            if text == str(choice):
                return choice
        raise UsageError(f"--{name} {text}: choose one of {', '.join(map(str, flag.choices))}"
                         + suggest(text, map(str, flag.choices)))
    try:
        value = {"int": int, "float": float, "str": str, "Path": Path}[flag.kind](text)
        if flag.kind == "float" and not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        kind = {"int": "a whole number", "float": "a number"}[flag.kind]
        raise UsageError(f"--{name} {text}: must be {kind}") from None


def parse(arguments: list[str], flags: dict[str, Flag]) -> dict:
    """--flag value, --flag=value, --switch and --no-switch to keyword arguments."""
    values, waiting = {}, list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"'{word}' belongs to no flag; flags begin with --")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        off = name.startswith("no_") and name not in flags and name[3:] in flags
        name = name[3:] if off else name
        if name not in flags:
            raise UsageError(f"no flag --{name}" + suggest(f"--{name}", [f"--{f}" for f in flags]))
        if name in values:
            raise UsageError(f"--{name} is given twice")
        if flags[name].kind == "bool":
            if equals:
                raise UsageError(f"--{name} is a switch: --{name} or --no-{name}")
            values[name] = not off
            continue
        if off:
            raise UsageError(f"--{name} is no switch: it takes a value")
        if not equals and waiting and not waiting[0].startswith("--"):
            text = waiting.pop(0)
        if not text:
            raise UsageError(f"--{name} needs a value")
        values[name] = convert(name, text, flags[name])
    return values


def print_help(name: str | None = None) -> None:
    """The commands, or one command's flags, a line each."""
    if name is None:
        print(__doc__.split("\n\n")[0])
        print("\nusage: python main.py COMMAND [--flag value | --switch]\n")
        for command in COMMANDS:
            print(f"  {command:<10} {read_command(command)[0]}")
        print("\npython main.py COMMAND --help lists a command's flags.")
        return
    summary, flags = read_command(name)
    indent = " " * 29
    print(f"{summary}\n\nusage: python main.py {name} [--flag value | --switch]\n")
    for flag_name, flag in flags.items():
        kind = "|".join(map(str, flag.choices or [])) or {"bool": ""}.get(flag.kind, flag.kind)
        left = f"  --{flag_name} {kind}".rstrip()
        default = "" if flag.default in ("None", "False") else f" [{flag.default}]"
        default = " [on; --no-...]" if flag.default == "True" else default
        left = f"{left:<29}" if len(left) < 29 else f"{left}\n{indent}"
        lines = textwrap.wrap(flag.help + default, 71, break_on_hyphens=False)
        print(left + f"\n{indent}".join(lines))


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print_help()
        return 0
    name = arguments[0]
    try:
        if name not in COMMANDS:
            raise UsageError(f"no command '{name}'{suggest(name, COMMANDS)}; "
                             f"choose {', '.join(COMMANDS)}")
        if {"--help", "-h"} & set(arguments):
            print_help(name)
            return 0
        values = parse(arguments[1:], read_command(name)[1])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return run(name, values)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(name: str, values: dict) -> int:
    """Import a command and call it; returns the exit status."""
    try:
        module = importlib.import_module(COMMANDS[name])
        from photo import ColorizeError, FlagError
    except ImportError as error:
        print(f"error: {error}; set up the environment first (README.md)", file=sys.stderr)
        return 1
    try:
        getattr(module, name)(**values)
    except ColorizeError as error:
        if os.environ.get("COLORIZE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, FlagError) else 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold any bytes
    sys.exit(main(sys.argv[1:]))
