"""The console script ``maml``: train, evaluate, list experiments, and describe config keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import maml
from maml.errors import MamlError

_USAGE = """\
usage: maml COMMAND ...

  maml train ARGS...      train (or resume) and evaluate; ARGS as in `maml train +experiment=sinusoid_10shot seed=1`
  maml eval ARGS...       evaluate the newest checkpoint of the run with these ARGS
  maml list [TEXT]        list the experiments whose name or description contains TEXT
  maml describe [KEY]     describe a key (inner.step_size), group (domain), option (model=conv4) or experiment
                          both also take --config-dir DIR, for options and experiments of your own
  maml --version
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        arguments: command-line words without the script's name; None is ``sys.argv[1:]``.

    Raises:
        SystemExit: if the command fails, with status 2 for an unknown command and 1 for wrong arguments.
    """
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("train", "eval", "list", "describe"):
        sys.path.insert(0, os.getcwd())  # so that a user's classes can be imported, as with `python train.py`
    if command in ("train", "eval"):
        from maml.cli.train import main as train

        sys.argv[1:] = rest if command == "train" else eval_arguments(rest)
        train()
    elif command in ("-h", "--help") or (command in ("list", "describe") and rest in (["-h"], ["--help"])):
        print(_USAGE, end="")
    elif command in ("list", "describe"):
        from maml.cli import show
        from maml.cli.scripts import end_without_reader
        from maml.config.hints import split_config_dirs

        try:
            own, words = split_config_dirs(rest)
            if missing := [str(folder) for folder in own if not folder.is_dir()]:
                raise MamlError(f"--config-dir: there is no folder {' and no folder '.join(missing)}")
            if options := [word for word in words if word.startswith("-")]:
                raise MamlError(f"maml {command} has one option, --config-dir DIR; there is {' '.join(options)}")
            if len(words) > 1:
                raise MamlError(f"maml {command} takes one word, but there are {len(words)}: {' '.join(words)}")
            print((show.experiments if command == "list" else show.description)("".join(words), own), flush=True)
        except BrokenPipeError:
            end_without_reader()
        except MamlError as error:
            sys.exit(str(error))
    elif command == "--version":
        print(f"maml {maml.__version__}")
    else:
        print(f"maml: there is no command {command!r}\n\n{_USAGE}", end="", file=sys.stderr)
        sys.exit(2)


def eval_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of ``maml train`` that are equivalent to ``maml eval`` with these arguments."""
    # Before the first override: Hydra accepts no overrides after an option that follows other overrides.
    first = next((i for i, word in enumerate(arguments) if "=" in word and not word.startswith("-")), len(arguments))
    return [*arguments[:first], "mode=eval", *arguments[first:]]
