"""What people see: aligned text, in colour on a terminal, plain everywhere else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

from hardware.errors import UsageError


@attrs.frozen
class Table:
    """Rows of text under a title; the columns named in `right` are right-aligned."""

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    right: frozenset[int] = frozenset()


def show_json(data: Any) -> None:
    """JSON on standard output."""
    with _until_the_reader_leaves():
        print(json.dumps(data, indent=2))


@contextmanager
def _until_the_reader_leaves() -> Iterator[None]:
    """A reader such as `head` may stop early: that is no error, and the exit code stays that of the answer.

    Raises:
        UsageError: nothing can be written: standard output is closed, or its disk is full.
    """
    if not sys.stdout:  # None where the process began without one
        raise UsageError("standard output is closed: leave it open or send it to a file")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # what is still buffered must not be flushed once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UsageError(
                f"standard output cannot be written: {error.strerror}; free space or redirect it"
            ) from None


def show(tables: Sequence[Table]) -> None:
    """Tables on standard output: rich ones on a terminal, aligned text elsewhere or with NO_COLOR set."""
    with _until_the_reader_leaves():
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            _show_rich(tables)
        else:
            print("\n\n".join(_plain(table) for table in tables))


def size(nbytes: int) -> str:
    """GiB for what counts, smaller units for what would read 0.00 GiB."""
    from hardware.units import GIB, MIB, gib, mib

    if nbytes >= GIB // 10:
        return gib(nbytes)
    return mib(nbytes) if nbytes >= MIB // 10 else f"{nbytes} B"


def _plain(table: Table) -> str:
    rows = [table.header, *table.rows] if table.header else list(table.rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = [table.title] if table.title else []
    for row in rows:
        cells = [_aligned(cell, widths[i], right=i in table.right) for i, cell in enumerate(row)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _aligned(cell: str, width: int, *, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _show_rich(tables: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for index, table in enumerate(tables):
        if index:
            console.print()
        grid = RichTable(
            title=Text(table.title), title_justify="left", title_style="bold", box=None, show_header=bool(table.header)
        )
        for column in range(len((table.header or table.rows[0]) if table.rows or table.header else ())):
            head = table.header[column] if table.header else ""
            grid.add_column(Text(head), justify="right" if column in table.right else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
