"""Colorize: gray photographs in, believable colour out, lightness untouched.

    python main.py train                                     # learn from data/input
    python main.py inference --image x.png --model ckpt.tar  # colour a photograph, or a folder

A command is a function, its flags are the function's keyword-only parameters. Both are read from
the source with ast, so that help and every mistake in a flag answer before torch is imported.
"""

import ast
import difflib
import importlib
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

COMMANDS = {"data": "colorize_data", "train": "train", "inference": "inference",
            "evaluate": "evaluate"}
HERE = Path(__file__).resolve().parent
RANGE = re.compile(r"\((-?\d[\d.e-]*?)\.\.(-?[\d.e-]*)\)$")  # (0..4), or (1..), ends a help text
SAFE = "backslashreplace"  # a file's name may hold bytes that a terminal cannot show


class UsageError(Exception):
    """A mistake in the command line itself; exit 2."""


class Flag(NamedTuple):
    kind: str             # int, float, str, bool, Path; list: of str, all words up to the next --
    choices: list | None  # of a Literal
    default: str          # as the source has it
    help: str
    group: str = ""       # the heading that it stands under


def read_command(name: str) -> tuple[str, dict[str, Flag]]:
    """A command's summary and flags, from the source of its function.

    Its docstring is a summary, an empty line, then "flag: help" each (indented lines go on with
    the one above); a line that ends with a colon is the heading of those below it.
    """
    tree = ast.parse((HERE / f"{COMMANDS[name]}.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    summary, _, lines = ast.get_docstring(function).partition("\n\n")
    explained, group = {}, ""
    for line in re.sub(r"\n +", " ", lines).splitlines():
        flag, colon, text = line.partition(": ")
        if colon:
            explained[flag] = text, group
        elif line.endswith(":"):
            group = line
    flags = {}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults):
        kind, choices = argument.annotation, None
        if isinstance(kind, ast.BinOp):  # X | None
            kind = kind.left
        if isinstance(kind, ast.Subscript) and kind.value.id == "Literal":
            elements = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
            choices = [element.value for element in elements]
        elif isinstance(kind, ast.Subscript):  # list[str]
            kind = kind.value
        kind = type(choices[0]).__name__ if choices else kind.id
        if isinstance(default, ast.Call):  # Path("data/input")
            default = default.args[0]
        flags[argument.arg] = Flag(kind, choices, ast.unparse(default).strip("'"),
                                   *explained.get(argument.arg, ("",)))
    return summary, flags


def suggest(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def convert(name: str, text: str, flag: Flag):
    """A flag's text as a value of its type and range; UsageError if it is none."""
    if flag.choices:
        for choice in flag.choices:
            if text == str(choice):
                return choice
        raise UsageError(f"--{name} {text}: choose one of {', '.join(map(str, flag.choices))}"
                         + suggest(text, map(str, flag.choices)))
    if flag.kind in ("str", "Path"):
        return Path(text) if flag.kind == "Path" else text
    try:
        value = int(text) if flag.kind == "int" else float(text)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        kind = "a whole number" if flag.kind == "int" else "a number"
        raise UsageError(f"--{name} {text}: must be {kind}") from None
    limits = RANGE.search(flag.help)
    low, high = limits.groups() if limits else ("-inf", "")
    if not float(low) <= value <= float(high or "inf"):
        raise UsageError(f"--{name} {text}: must be " + (limits[0][1:-1] if high else f"{low} or more"))
    return value


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
        several = flags[name].kind == "list"
        words = [text] if equals else []
        while waiting and not waiting[0].startswith("--") and (several or not words):
            words.append(waiting.pop(0))
        if not words or "" in words:
            raise UsageError(f"--{name} needs a value")
        values[name] = words if several else convert(name, words[0], flags[name])
    return values


def print_help(name: str | None = None) -> None:
    """The commands, or one command's flags under their headings, in 80 columns."""
    if name is None:
        print(__doc__.split("\n\n")[0])
        print("\nusage: python main.py COMMAND [--flag value | --switch]\n")
        for command in COMMANDS:
            print(f"  {command:<10} {read_command(command)[0]}")
        print("\npython main.py COMMAND --help lists a command's flags.")
        return
    summary, flags = read_command(name)
    print(f"{summary}\n\nusage: python main.py {name} [--flag value | --switch]\n")
    for group in dict.fromkeys(flag.group for flag in flags.values()):
        print(group + "\n" * bool(group), end="")
        for flag_name, flag in flags.items():
            if flag.group == group:
                print_flag(flag_name, flag)


def print_flag(name: str, flag: Flag) -> None:
    """Name, type or choices, meaning, range and default."""
    kind = "|".join(map(str, flag.choices or [flag.kind]))
    left = f"  --{name} " + {"bool": "", "list": "str ..."}.get(kind, kind)
    default = "" if flag.default in ("None", "False") else f" [{flag.default}]"
    default = f" [on; --no-{name}]" if flag.default == "True" else default
    print(*textwrap.wrap(f"{left:<24}  {flag.help}{default}", 80, break_on_hyphens=False,
                         break_long_words=False, subsequent_indent=" " * 26), sep="\n")


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
