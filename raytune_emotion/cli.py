"""Define what all commands share: their names, the types of their arguments, and the exit codes of errors."""

import argparse
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from raytune_emotion.errors import Breakdown, Incomplete, UserError, suggest, suggest_or_list
from raytune_emotion.interruption import end_without_handlers, handle_signals
from raytune_emotion.known_errors import known_error
from raytune_emotion.storage.locations import Location, parse_location
from raytune_emotion.terminal import any_encoding, discard_output, open_missing_streams, typed_command, warn, warn_error

#: Purpose of each command, by its verb. The module of that name has `add_arguments` and `run`.
COMMANDS = {
    "search": "search for the best model for a set of annotated faces",
    "status": "show what a running or finished study has reached",
    "confirm": "train the best configurations of a study again with new seeds",
    "pack": "pack a folder of annotated faces into a store for fast loading",
    "train": "train one configuration, without a search",
    "report": "write the tables, plots and report of a study again",
    "export": "export a trial of a study, or a run of train, for timm, as ONNX or for torch.export",
    "predict": "predict the distribution over emotions of images",
    "demo": "try an export on pictures of your own, in a browser",
}


class CommandParser(argparse.ArgumentParser):
    """Parse a command line. Report each error in one sentence, with the nearest known name."""

    def __init__(self, **options: Any) -> None:
        """Make a parser that takes no shortened names: `confirm --seed 7` is not `--seeds 7`."""
        super().__init__(allow_abbrev=False, **options)

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all words of a command line; end the process with exit code 2 if one is wrong."""
        args, unknown = self.parse_known_args(argv)
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        known = [option for action in self._actions for option in action.option_strings]
        faults = [f"{option}: unknown option{suggest(option, known)}" for option in options]
        if unknown and not options:  # otherwise, the other words are values of the unknown options
            faults = [f"{word}: unexpected argument; leave it out" for word in unknown]
        if faults:
            self.refuse(faults)
        return args

    def error(self, message: str) -> NoReturn:
        """Report an error that argparse has found."""
        self.refuse([message.removeprefix("argument ")])

    def refuse(self, faults: Iterable[str]) -> NoReturn:
        """Report errors and the command for help, and end the process with exit code 2."""
        for fault in faults:
            warn_error(fault)
        self.exit(2, f"see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = suggest_or_list(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"unknown value {value!r}{near}")


def run_guarded(action: Callable[[], None]) -> int:
    """Run an action and return the exit code.

    0: done; 1: a breakdown; 2: wrong input; 3: done except for a part of the input, whose errors were printed;
    130: interrupted.
    """
    try:
        action()
    except UserError as error:
        for fault in error.faults:
            warn_error(fault)
        return 2
    except Breakdown as error:
        warn_error(str(error))
        return 1
    except Incomplete as error:
        warn(str(error))
        return 3
    except KeyboardInterrupt:
        warn("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it. Discard the rest without an error.
        discard_output(sys.stdout)
        return 1
    except Exception as error:
        known = known_error(error)
        if known is None:
            raise
        code, sentence = known
        warn_error(sentence)
        return code
    return 0


def location(text: str) -> Location:
    """Parse a folder of this machine or a URI."""
    try:
        return parse_location(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path(text: str) -> Path:
    """Parse a path of this machine; refuse URIs."""
    try:
        return location(text).require_folder("name a path of this machine")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_training_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options on data and starting weights that `search` and `train` share."""
    parser.add_argument(
        "--weights-dir",
        type=local_path,
        metavar="DIR",
        help="folder of pretrained weights, for machines without access to the hub",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of refusing the data")


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the Ray cluster of a study."""
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="address of a running Ray cluster, or auto (default: start Ray on this machine)",
    )


def positive_integer(text: str) -> int:
    """Parse a number of trials, epochs, workers or the like. A number above a million is taken for a typing error."""
    if not re.fullmatch("[0-9]{1,7}", text) or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 1000000, got {text!r}")
    return int(text)


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to {2**16 - 1}, got {text!r}")
    return int(text)


def natural_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {2**31 - 1}, got {text!r}")
    return int(text)


def gpu_share(text: str) -> float:
    """Parse a worker's share of a GPU. A worker trains on at most one."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    if number > 1:
        raise argparse.ArgumentTypeError(
            f"a worker trains on one GPU; ask for more --workers-per-trial (in train --workers), got {text!r}"
        )
    return number


def folder_name(text: str) -> str:
    if not re.fullmatch(r"[\w][\w.=,+-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"expected up to 100 letters, digits and . _ - = , +, got {text!r}")
    return text


def command_main(verb: str, argv: list[str] | None = None) -> int:
    """Run a command, as `python -m raytune_emotion.<verb>` does."""
    parser = CommandParser(prog=typed_command(verb), description=COMMANDS[verb])

    def action() -> None:
        # Imported only now, so that `predict` does not wait for Ray.
        module = importlib.import_module(f"raytune_emotion.{verb}")
        module.add_arguments(parser)
        args = parser.parse_all(sys.argv[1:] if argv is None else argv)
        # It also flushes the output, and raises an error if the disk of the output is full.
        with any_encoding():
            module.run(args)

    open_missing_streams()
    # This covers everything: imports take seconds, and a signal may come while the last messages are written.
    with handle_signals():
        code = run_guarded(action)
        end_without_handlers(code)
        return code
