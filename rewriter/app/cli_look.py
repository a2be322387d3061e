"""Commands that look at models and write none."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from passes.quantization.roles import MAX_BITS, MIN_BITS
from rewriter.app.blocks import print_blocks, text_of
from rewriter.app.guard import refuse_files, report_errors, write_file
from rewriter.app.options import RUN_TRUSTED, TAGS, width
from rewriter.app.show_diff import diff_lines
from rewriter.app.show_inspection import inspection_blocks
from rewriter.app.waiting import waiting
from rewriter.ir import Error
from rewriter.savedmodel.source import require_model

SUFFIXES = {"text": ".txt", "json": ".json", "html": ".html", "svg": ".svg"}
"""File name suffixes of the formats of a comparison."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as a page.")
@click.option("-v", "--verbose", is_flag=True, help="Count and list sites, and list all weights.")
@TAGS
def inspect(*, model: Path, as_json: bool, page: Path | None, verbose: bool, tags: list[str] | None) -> None:
    """Show the batch norms and weights of MODEL, what is in them, and which of them can be rewritten."""

    def check() -> None:
        require_model(model)
        refuse_files({"page": page}, model)

    with report_errors(check):
        from rewriter.app import api

        with waiting(f"reading {model}"):
            report = api.inspect(model, tags=tags)
            text = report.to_html() if page is not None else ""
        if page is not None:
            write_file(page, text, "page")
        if as_json:
            click.echo(report.to_json())
        else:
            print_blocks(inspection_blocks(report, sites=verbose))


@click.command()
@click.argument("before", type=click.Path(path_type=Path), metavar="A")
@click.argument("after", type=click.Path(path_type=Path), metavar="B")
@click.option("--format", "form", type=click.Choice(list(SUFFIXES)), help="text, if -o does not say otherwise.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
@click.option("--values", is_flag=True, help="Compare the values of variables, too.")
@click.option("--full", is_flag=True, help="Describe added and removed nodes; let the page hold every node.")
@click.option("--site", help="What --format svg draws: a layer's or a node's name, or function:node.")
@click.option("--hops", type=click.IntRange(1, 3), default=1, show_default=True, help="How far --format svg goes.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the models differ.")
@click.option("-v", "--verbose", is_flag=True, help="List every op, place and change.")
@TAGS
def diff(
    *,
    before: Path,
    after: Path,
    form: str | None,
    output: Path | None,
    site: str | None,
    hops: int,
    exit_code: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Show what differs between the SavedModels A and B, and what of it the record of a rewrite does not explain."""
    if form is None:
        suffix = ".txt" if output is None else output.suffix.lower()
        form = next((f for f, s in SUFFIXES.items() if s == suffix), None)
    if form is None:
        suffixes = ", ".join(SUFFIXES.values())
        raise click.UsageError(
            f"what {output} is to hold does not follow from its name ({suffixes}): say it with --format"
        )
    if (site is None) == (form == "svg"):
        raise click.UsageError("--format svg draws one place: name it with --site, which is for that alone")

    def check() -> None:
        for model in (before, after):
            require_model(model)
        refuse_files({"comparison": output}, before, after)

    with report_errors(check):
        from rewriter.app.diff import diff as compare

        with waiting(f"comparing {before} and {after}"):
            comparison = compare(before, after, **options)
            if site is not None:
                text = comparison.to_svg(*comparison.site(site), hops)
            elif form != "text":
                text = comparison.to_json() if form == "json" else comparison.to_html()
        if form != "text":
            _write_comparison(text, output)
        else:
            lines = diff_lines(comparison.title, comparison.report, verbose=verbose)
            if output is None:
                print_blocks(lines)
            else:
                _write_comparison(text_of(lines) + "\n", output)
    if exit_code and comparison.report.changes:
        sys.exit(1)


def _write_comparison(text: str, output: Path | None) -> None:
    """Write a comparison to a file, or to stdout if none is given."""
    if output is None:
        click.echo(text, nl=not text.endswith("\n"))
    else:
        write_file(output, text, "comparison")


@click.command()
@click.argument("before", type=click.Path(path_type=Path), metavar="A")
@click.argument("after", type=click.Path(path_type=Path), metavar="B")
@click.option("--inputs", "inputs_file", type=click.Path(path_type=Path, dir_okay=False), help="Inputs, an .npz file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random inputs.")
@RUN_TRUSTED
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def verify(*, before: Path, after: Path, inputs_file: Path | None, seed: int, trust: bool, as_json: bool) -> None:
    """Check that B, which a rewrite made of A, does what it promises. This executes both models."""

    def check() -> None:
        for model in (before, after):
            require_model(model)
        if inputs_file is not None and not inputs_file.is_file():
            raise Error(f"there is no file {inputs_file}")

    with report_errors(check):
        from rewriter.app.arrays import arrays
        from rewriter.app.verification.claims import verify as claims

        logging.getLogger("tensorflow").setLevel(logging.ERROR)  # loading for V1 sessions is deprecated, and says so
        click.echo(f"executing {before} and {after}", err=True)
        inputs = None if inputs_file is None else arrays(inputs_file)
        with waiting("running both"):
            verification = claims(before, after, inputs=inputs, seed=seed, trust=trust)
        if as_json:
            click.echo(verification.to_json())
        else:
            print_blocks(verification.blocks())
    if not verification.ok:
        sys.exit(1)


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="QAT_MODEL")
@click.option(
    "--inputs",
    "inputs_file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Inputs, an .npz file.",
)
@click.option("--bits", default="8,6,4,3,2", show_default=True, help="Widths to try, comma-separated.")
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), help="Draw them: .svg, .png, .pdf."
)
@RUN_TRUSTED
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def sensitivity(
    *, model: Path, inputs_file: Path, bits: str, plot_file: Path | None, trust: bool, as_json: bool
) -> None:
    """Show how much each quantiser of QAT_MODEL alone changes the outputs. This executes the model."""
    try:
        widths = [width(text) for text in bits.split(",")]
    except ValueError:
        raise click.UsageError(f"--bits {bits}: widths are numbers from {MIN_BITS} to {MAX_BITS}, like 8,4") from None

    def check() -> None:
        require_model(model)
        if not inputs_file.is_file():
            raise Error(f"there is no file {inputs_file}")
        refuse_files({"plot": plot_file}, model)

    with report_errors(check):
        from rich.console import Console
        from rich.progress import track

        from rewriter.app import sensitivity as measure
        from rewriter.app.arrays import arrays

        click.echo(f"executing {model}", err=True)
        inputs = arrays(inputs_file)
        console = Console(stderr=True)
        measured = measure.sensitivity(
            model,
            inputs,
            bits=widths,
            trust=trust,
            progress=lambda runs: track(runs, "quantisers", console=console, transient=True),
        )
        if as_json:
            click.echo(measured.to_json())
        else:
            print_blocks(measured.blocks())
        if plot_file is not None:
            measure.plot(measured, plot_file)
            click.echo(f"drawn to {plot_file}", err=True)
