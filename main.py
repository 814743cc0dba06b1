"""Colorize: gray photographs in, believable colour out, lightness untouched.

    python main.py train                                  # learn from data/input
    python main.py inference --image x.png --model a.tar  # colour a photograph, or a folder
"""

import ast
import difflib
import importlib
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

# a command is a function of that module, its flags are its keyword-only parameters
COMMANDS = {"data": "colorize_data", "train": "train", "inference": "inference",
            "evaluate": "evaluate"}
HERE = Path(__file__).resolve().parent
RANGE = re.compile(r"\((-?\d[\d.e-]*?)\.\.(-?[\d.e-]*)\)$")  # (0..4) or (1..) ends a help
# what other programs call our flags; the first that the command has is meant
SYNONYMS = {"input": ["image", "data"], "learning_rate": ["lr"],
            "weights": ["model", "init"], "checkpoint": ["model", "init"]}
NO_MEMORY = "of memory|enough memory|allocate memory"  # in a RuntimeError of torch, too


class UsageError(Exception):
    """A mistake in the command line itself; exit 2."""


class Flag(NamedTuple):
    kind: str             # int, float, str, bool, Path; list: all words up to the next --
    choices: list | None  # of a Literal
    default: str
    help: str
    group: str = ""       # the heading that it stands under


def read_command(name: str) -> tuple[str, dict[str, Flag]]:
    """A command's summary and flags, from its function's docstring and signature."""
    # parsed, not imported: torch takes seconds, and help or a mistyped flag must not
    tree = ast.parse((HERE / f"{COMMANDS[name]}.py").read_text(encoding="utf-8"))
    function = next(node for node in tree.body if getattr(node, "name", "") == name)
    summary, _, lines = ast.get_docstring(function).partition("\n\n")
    parameters = zip(function.args.kwonlyargs, function.args.kw_defaults)
    arguments = {argument.arg: (argument, default) for argument, default in parameters}
    group, flags = "", {}
    for line in re.sub(r"\n +", " ", lines).splitlines():  # an indented line goes on
        flag, _, text = line.partition(": ")
        if flag not in arguments:
            group = line or group
            continue
        argument, default = arguments[flag]
        kind, choices = ast.unparse(argument.annotation).split(" | ")[0], None
        if kind.startswith("Literal"):  # what its brackets hold is a list, too
            choices = ast.literal_eval(kind.removeprefix("Literal"))
            kind = type(choices[0]).__name__
        # Path("a") has the value in its brackets
        default = ast.literal_eval(getattr(default, "args", [default])[0])
        default = " ".join(default) if isinstance(default, tuple) else str(default)
        flags[flag] = Flag(kind.partition("[")[0], choices, default, text, group)
    return summary, flags


def suggest(word: str, known, prefix: str = "") -> str:
    near = [name for name in SYNONYMS.get(word, ()) if name in known]
    near += difflib.get_close_matches(word, list(known), n=1)  # else what is spelt alike
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def convert(name: str, text: str, flag: Flag):
    """A flag's text as a value of its type, within its range; UsageError if it is none."""
    choices = [str(choice) for choice in flag.choices or [text]]
    if text not in choices:
        raise UsageError(f"--{name} {text}: choose one of {', '.join(choices)}"
                         + suggest(text, choices))
    wanted = "a whole number" if flag.kind == "int" else "a number"
    if limits := RANGE.search(flag.help):
        low, high = limits.groups()  # of (1..) the second is ""
        wanted += f", {low}..{high}" if high else f", {low} or more"
    try:
        value = {"int": int, "float": float, "str": str, "Path": Path}[flag.kind](text)
        if limits and not float(low) <= value <= float(high or "inf"):  # as nan is not
            raise ValueError
        return value
    except ValueError:
        raise UsageError(f"--{name} {text}: must be {wanted}") from None


def parse(arguments: list[str], flags: dict[str, Flag]) -> dict:
    """--flag value, --flag=value and --switch to keyword arguments."""
    groups, values = [], {}  # of a flag and the words up to the next one
    for argument in arguments:
        if argument.startswith("--"):  # only this begins a flag: -10,20 is a value
            word, *words = argument.split("=", 1)
            groups.append([word[2:].replace("-", "_"), *words])
        elif groups:
            groups[-1].append(argument)
        else:
            raise UsageError(remedy("", [argument], flags, values))
    for name, *words in groups:
        if name not in flags:
            raise UsageError(f"no flag --{name}{suggest(name, flags, '--')}")
        if name in values:
            raise UsageError(f"--{name} is given twice")
        kind = flags[name].kind
        if words and kind == "bool" or len(words) > 1 and kind != "list":
            raise UsageError(remedy(name, words, flags, values))
        if kind != "bool" and (not words or "" in words):
            raise UsageError(f"--{name} needs a value")
        if kind in ("bool", "list"):
            values[name] = words or True
        else:
            values[name] = convert(name, words[0], flags[name])
    return values


def remedy(name: str, words: list[str], flags: dict[str, Flag], values: dict) -> str:
    """Which of the words, after the flag `name`, is too much; what to write instead."""
    flag = flags.get(name, Flag("bool", None, "", ""))
    word = words[0] if flag.kind == "bool" else words[1]
    hints = [f"--{place} {word}" for place in ("image", "source", "data")
             if place in flags and place not in (name, *values)][:1]  # stands by itself
    if flag.kind in ("str", "Path") and not flag.choices:  # or a name with spaces
        hints.insert(0, f'--{name} "{" ".join(words)}"')
    text = f"write {' or '.join(hints)}" if hints else "a flag takes one value"
    if name and flag.kind == "bool" and word.lower() in ("true", "false", "yes", "no"):
        text = f"--{name} is a switch: write it alone, or leave it out"
    if word.startswith("-"):
        text = "flags begin with --" + suggest(word[1:], flags, "--")
    return f"'{word}' belongs to no flag; {text}"


def print_help(name: str | None) -> None:
    """One command's flags under their headings, or the commands, in 80 columns."""
    if name is None:
        commands = [f"  {command:<10} {read_command(command)[0]}" for command in COMMANDS]
        print(__doc__, "usage: python main.py COMMAND [--flag value | --switch]\n",
              *commands, "\npython main.py COMMAND --help lists its flags.", sep="\n")
        return
    summary, flags = read_command(name)
    print(f"{summary}\n\nusage: python main.py {name} [--flag value | --switch]\n")
    group = ""
    for flag_name, flag in flags.items():
        if flag.group != group:
            print(group := flag.group)
        kind = "|".join(map(str, flag.choices or [flag.kind]))
        kind = {"bool": "", "list": "str ..."}.get(kind, kind)
        default = "" if flag.default in ("None", "False") else f" [{flag.default}]"
        print(textwrap.fill(f"{f'  --{flag_name} {kind}':<22}  {flag.help}{default}", 80,
                            subsequent_indent=" " * 24, break_long_words=False,
                            break_on_hyphens=False))


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    name, *rest = arguments or ["help"]
    if name in ("--help", "-h", "help"):
        name, rest = rest[0] if rest else None, ["--help"]
    try:
        if name is not None and name not in COMMANDS:
            raise UsageError(f"no command '{name}'{suggest(name, COMMANDS)}; "
                             f"choose {', '.join(COMMANDS)}")
        if {"--help", "-h"} & set(rest):
            print_help(name)
        else:
            values = parse(rest, read_command(name)[1])
            if name == "train":  # resuming must tell what was typed from what is a default
                values["typed"] = tuple(values)
            getattr(importlib.import_module(COMMANDS[name]), name)(**values)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `| head`: the flush at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # by name: help and flags need no other module
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"UsageError", "ColorizeError"}:
            text = str(error)
        elif isinstance(error, ImportError):
            text = f"{error}; set up the environment first (README.md)"
        elif isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            text = "out of memory; a smaller --size, --batch_size or photograph needs less"
        elif isinstance(error, OSError):  # a disk or a permission that no command foresaw
            text = f"{error.filename or 'standard output'}: {error.strerror or error}"
        else:  # a defect
            raise
        if os.environ.get("COLORIZE_TRACEBACK"):
            raise
    # no name of a file can move the cursor
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    print(f"error: {text}", file=sys.stderr)
    return 2 if kinds & {"UsageError", "FlagError"} else 1


if __name__ == "__main__":
    for name in ("stdout", "stderr"):  # where closed, a photograph would get its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold any bytes
    sys.exit(main(sys.argv[1:]))
