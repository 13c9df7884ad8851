"""``vramsim models``, ``vramsim strategies`` and ``vramsim gpus``: what is known by name."""

from __future__ import annotations

from typing import Annotated

import typer

from studies.cli.output import Table, show, show_json

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def models(json: Json = False) -> None:
    """List the model presets with their parameter counts."""
    from studies.catalogue import model_rows

    rows = model_rows()
    if json:
        show_json(rows)
        return
    cells = [(r["id"], r["family"], f"{r['params']:,}", str(r["layers"]), str(r["hidden"])) for r in rows]
    show([Table("models", cells, ("id", "family", "parameters", "layers", "hidden"), frozenset({2, 3, 4}))])


def strategies(json: Json = False) -> None:
    """List the strategies with their options, defaults and sources."""
    from studies.catalogue import strategy_rows

    rows = strategy_rows()
    if json:
        show_json(rows)
        return
    overview = Table("strategies", [(r["id"], r["axis"] or "-", r["summary"]) for r in rows], ("name", "axis", ""))
    options = [
        Table(f"{row['id']}: {row['source']}", [(o["name"], o["default"], o["help"]) for o in row["options"]])
        for row in rows
        if row["options"]
    ]
    show([overview, *options])


def frameworks(json: Json = False) -> None:
    """List the frameworks of --framework with their defaults and sources."""
    from studies.catalogue import framework_rows

    rows = framework_rows()
    if json:
        show_json(rows)
        return
    tables = []
    for row in rows:
        defaults = [(each["option"], each["where"], each["source"]) for each in row["defaults"]]
        notes = [("note", each["where"], each["text"]) for each in row["notes"]]
        tables.append(Table(f"{row['id']}: {row['version']}", [*defaults, *notes], ("option", "where", "source")))
    show(tables)


def gpus(json: Json = False) -> None:
    """List the GPUs with their capacity as the framework sees it."""
    from hardware.units import gib
    from studies.catalogue import gpu_rows

    rows = gpu_rows()
    if json:
        show_json(rows)
        return
    cells = []
    for row in rows:
        low, high = gib(row["capacity_low_bytes"]), gib(row["capacity_high_bytes"])
        cells.append((row["id"], row["vendor"], low if low == high else f"{low} to {high}", row["capacity_basis"]))
    show([Table("GPUs", cells, ("name", "vendor", "capacity", "basis"))])
