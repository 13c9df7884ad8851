"""The entry point: commands, and errors as one line with a documented exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from hardware.errors import UnsupportedError, UsageError
from studies.cli import catalogue, estimate, schedule, validate

OUR_ERROR = 1
USAGE = 2
UNSUPPORTED = 5
#: Characters of an error; what a user typed, and we repeat, may be endless.
LONGEST_ERROR = 600

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="GPU memory of LLM training, before anything runs on a GPU.",
    epilog="Exit codes: 0 fits, 1 our error, 2 usage, 3 does not fit (or a bound is not met), "
    "4 too little headroom, 5 unsupported under --strict.",
)
app.command("estimate")(estimate.command)
app.command("models")(catalogue.models)
app.command("gpus")(catalogue.gpus)
app.command("strategies")(catalogue.strategies)
app.command("frameworks")(catalogue.frameworks)
app.command("schedule")(schedule.command)
app.add_typer(validate.app, name="validate")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"vramsim {version('vramsim')}")
        except PackageNotFoundError:  # run from a checkout that was never installed
            print("vramsim (not installed)")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """GPU memory of LLM training, before anything runs on a GPU."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(run(arguments or ["--help"]))


def run(arguments: list[str]) -> int:
    """The exit code of one command; its one line of error goes to standard error."""
    try:
        result: Any = typer.main.get_command(app).main(arguments, prog_name="vramsim", standalone_mode=False)
    except UsageError as error:
        strict = "--strict" in arguments and isinstance(error, UnsupportedError)
        return _fail(str(error), UNSUPPORTED if strict else USAGE)
    except Exception as error:
        if getattr(error, "exit_code", None) == USAGE and hasattr(error, "format_message"):
            return _fail(_one_line(error.format_message()), USAGE)
        if type(error).__name__ == "Abort":
            return _fail("interrupted", OUR_ERROR)
        return _our_error(error)
    return result if isinstance(result, int) else 0


def _our_error(error: Exception) -> int:
    if os.environ.get("VRAMSIM_DEBUG"):
        raise error
    text = _one_line(f"{type(error).__name__}: {error}")
    return _fail(
        f"{text}; this is a bug of vramsim: please report it with the command (VRAMSIM_DEBUG=1 shows where)", 1
    )


def _fail(message: str, code: int) -> int:
    shown = message if len(message) <= LONGEST_ERROR else message[:LONGEST_ERROR] + " ..."
    print(f"error: {shown}", file=sys.stderr)
    return code


def _one_line(message: str) -> str:
    return " ".join(message.split()).rstrip(".")
