"""The command that ends a fine-tuning."""

from __future__ import annotations

from pathlib import Path

import click

from rewriter.app.blocks import print_blocks
from rewriter.app.guard import check_parameters, progress, refuse_files, report_done, report_errors, write_file
from rewriter.app.options import TAGS, VERBOSE
from rewriter.app.show import finalize_blocks
from rewriter.app.waiting import waiting
from rewriter.ir import Error
from rewriter.savedmodel.source import require_model
from rewriter.savedmodel.staging import refuse_existing, refuse_overlap


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.argument("target", type=click.Path(path_type=Path), metavar="DST")
@click.option(
    "--params",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write codes, scales and zero points to this file, .npz or .json.",
)
@click.option(
    "--fold", is_flag=True, help="Let batch norms become part of the convolution before them; not with --params."
)
@click.option(
    "--inputs",
    "inputs_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A batch, an .npz file: execute SRC on it, and compare its statistics with the moving ones.",
)
@click.option("--trust", is_flag=True, help="Compute quantisers with ops that are not known to be harmless.")
@TAGS
@click.option("--dry-run", is_flag=True, help="Report what would be done, write nothing.")
@VERBOSE
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a SavedModel.")
@click.option(
    "--report", "report_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as JSON."
)
def finalize(
    *,
    source: Path,
    target: Path,
    params: Path | None,
    fold: bool,
    inputs_file: Path | None,
    trust: bool,
    tags: list[str] | None,
    dry_run: bool,
    verbose: bool,
    overwrite: bool,
    report_file: Path | None,
) -> None:
    """Write the fine-tuned SRC to DST as it is to be deployed: quantised values in the variables, no quantisers."""

    def check() -> None:
        require_model(source)
        if not dry_run:
            refuse_overlap(source, target)
            refuse_existing(target, overwrite)
        if params is not None:
            check_parameters(params, fold)
        if inputs_file is not None and not inputs_file.is_file():
            raise Error(f"there is no file {inputs_file}")
        refuse_files({"parameters": params, "report": report_file}, source, target)
        if params is not None and dry_run:
            raise Error("--params is written with the model, and --dry-run writes nothing; leave out one of them")

    with report_errors(check):
        from rewriter.app import finalize as api
        from rewriter.app.arrays import arrays

        inputs = None
        if inputs_file is not None:
            click.echo(f"executing {source}", err=True)
            inputs = arrays(inputs_file)
        with waiting(f"finalising {source}"):
            report = api.finalize(
                source,
                target,
                params=params,
                fold=fold,
                inputs=inputs,
                trust=trust,
                tags=tags,
                overwrite=overwrite,
                dry_run=dry_run,
                observers=[progress] if verbose else [],
            )
        done = report.target or "nothing"
        with report_done(done):
            print_blocks(finalize_blocks(report, sites=verbose))
        if report_file is not None:
            write_file(report_file, report.to_json() + "\n", "report", done)
