"""Python imports this at its start: with --help, the flags of the parser are written to the file DUMP_FLAGS."""

import argparse
import json
import os


def describe_flag(parser, action):
    """Describe an argument in JSON: enum members by their value, other objects by their name."""
    default = parser.get_default(action.dest)
    default = getattr(default, "value", default)
    entry = {"default": default, "nargs": action.nargs, "required": action.required}
    entry["repeatable"] = isinstance(action, argparse._AppendAction)
    if action.choices is not None:
        entry["choices"] = [str(choice) for choice in action.choices]
    return entry


original = argparse.ArgumentParser.print_help


def print_help(parser, file=None):
    flags = {}
    for action in parser._actions:
        for name in action.option_strings or [action.dest]:
            flags[name] = describe_flag(parser, action)
    with open(os.environ["DUMP_FLAGS"], "w") as stream:
        json.dump(flags, stream, default=str)
    original(parser, file)


argparse.ArgumentParser.print_help = print_help
