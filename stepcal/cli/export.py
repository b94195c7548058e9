"""``stepcal export``: coefficients as files for others, and others' coefficients as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepcal.cli.output import Json, emit
from stepcal.errors import InputError
from stepcal.files import refuse_unwritable, write_atomically

FORMATS = ("json", "csv", "blis", "go")


def export(
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    to: Annotated[str, typer.Option("--to", help="json, csv, blis or go.")] = "json",
    stepml_model: Annotated[
        str,
        typer.Option(
            "--stepml-model",
            "--coefficients",
            help="global9, model36, phase16, default, a coefficient file (JSON, CSV), or a BLIS block (YAML).",
        ),
    ] = "global9",
    architecture: Annotated[
        str | None, typer.Option("--architecture", help="For BLIS: the model, by name or config.json.")
    ] = None,
    accelerator: Annotated[str | None, typer.Option("--accelerator", help="For BLIS: GPU, by name.")] = None,
    tp: Annotated[int, typer.Option("--tp", help="For BLIS: tensor-parallel degree.")] = 1,
    kv_blocks: Annotated[int | None, typer.Option("--kv-blocks", help="For BLIS: KV blocks of the server.")] = None,
    json_out: Json = None,
) -> None:
    """Write coefficients as JSON by the published schema, as CSV, as a BLIS block, or as a Go file.

    Examples: stepcal export --to go --out stepml.go; stepcal export --coefficients defaults.yaml --architecture
    llama-2-7b --accelerator h100-sxm --out mine.json
    """
    from stepcal.exchange.convert import converted

    if to not in FORMATS:
        raise InputError(f"`--to {to}` is unknown. Known: {', '.join(FORMATS)}.")
    refuse_unwritable(out)
    options = {
        "architecture": architecture,
        "accelerator": accelerator,
        "tensor_parallel_size": tp,
        "kv_blocks": kv_blocks,
    }
    result = converted(stepml_model, to, options)
    write_atomically(out, result.text)
    about = {"to": to, "file": str(out), "variant": result.variant, "overheads_us": result.overheads_us}
    lines = [f"{out}: {result.variant} as {to}", *(f"  {note}" for note in result.notes)]
    emit({**about, "notes": list(result.notes), "errors": result.errors}, json_out, "\n".join(lines))
