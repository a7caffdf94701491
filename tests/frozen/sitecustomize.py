"""Python imports this at its start: with --help, the flags of the parser are written to the file DUMP_FLAGS.

A parser that has no default of its own passes on only what was given, to the function that DEFAULTS_OF names.
"""

import argparse
import importlib
import inspect
import json
import os


def default_of_parameter(name):
    module, function = os.environ["DEFAULTS_OF"].split()
    parameter = inspect.signature(getattr(importlib.import_module(module), function)).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def describe_flag(parser, action):
    """Describe an argument in JSON: enum members by their value, other objects by their name."""
    default = parser.get_default(action.dest)
    default = getattr(default, "value", default)
    if default == argparse.SUPPRESS and action.dest != "help":
        default = default_of_parameter(action.dest)
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
