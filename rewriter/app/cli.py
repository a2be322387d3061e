"""The command line. TensorFlow is imported only when a command has work for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passes import FINALIZE, REWRITE, SWITCHED
from rewriter.app.blocks import print_blocks
from rewriter.app.cli_finalize import finalize
from rewriter.app.cli_look import diff, inspect, sensitivity, verify
from rewriter.app.guard import Commands, progress, refuse_files, report_done, report_errors, write_file
from rewriter.app.names import OPTIONS_OF
from rewriter.app.options import FLAGS, TAGS, VERBOSE, pass_options, quantizer_options
from rewriter.app.summary import rewrite_list
from rewriter.app.waiting import waiting
from rewriter.ir import Error
from rewriter.savedmodel.source import require_model
from rewriter.savedmodel.staging import refuse_existing, refuse_overlap

if TYPE_CHECKING:
    from rewriter.app.settings import Settings


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bnqat")
def main() -> None:
    """Rewrite a float TensorFlow SavedModel into a fine-tunable one with quantised batch norms.

    Nothing in a model is executed, but by `sensitivity`, `verify` and `finalize --inputs`, and quantisers by
    `finalize`. Results go to stdout, errors to stderr. Exit code 0: done; 1: a claim of `verify` failed, or
    `diff --exit-code` found differences; 2: wrong usage, unreadable input or nothing to rewrite.
    """


for _command in (inspect, diff, verify, sensitivity, finalize):
    main.add_command(_command)


@main.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC", required=False)
@click.argument("target", type=click.Path(path_type=Path), metavar="DST", required=False)
@quantizer_options
@pass_options
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="TOML file with options and rules.")
@click.option("--print-config", is_flag=True, help="Print the options in force as such a file, and do nothing.")
@TAGS
@click.option(
    "--passes",
    help=f"Passes to run instead of the default ones, comma-separated, in this order: of {', '.join(REWRITE)} (all but "
    f"unfreeze-constants are default), those of finalize ({', '.join(FINALIZE)}), or your own as module:Class.",
)
@click.option("--dry-run", is_flag=True, help="Report what would be done, write nothing.")
@VERBOSE
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a SavedModel.")
@click.option(
    "--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write a page that shows what changed."
)
@click.option(
    "--report", "report_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as JSON."
)
def rewrite(
    *,
    source: Path | None,
    target: Path | None,
    passes: str | None,
    report_file: Path | None,
    page: Path | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Write SRC to DST with switchable quantisers on every batch norm, ready to be fine-tuned."""
    names = None if passes is None else [p.strip() for p in passes.split(",") if p.strip()]
    _refuse_unused(names, options)
    if options.pop("print_config"):
        with report_errors(tensorflow=False):
            click.echo(_settings(options).to_toml(), nl=False)
        return
    if source is None or target is None:
        raise click.UsageError(f"Missing argument '{'SRC' if source is None else 'DST'}'.")
    if names or options["quantizer"] or options["config"]:
        # The user's own pass or quantiser function may lie in the current directory. That comes last, so that no file
        # there hides an installed module.
        sys.path.append(str(Path.cwd()))

    def check() -> None:
        _settings(options)
        require_model(source)
        if not options["dry_run"]:
            refuse_overlap(source, target)
            refuse_existing(target, options["overwrite"])
        refuse_files({"report": report_file, "page": page}, source, target)
        if page is not None and options["dry_run"]:
            raise Error("--html shows what was written, and --dry-run writes nothing; leave out one of them")

    with report_errors(check):
        from rewriter.app import api

        with waiting(f"rewriting {source}"):
            report = api.rewrite(source, target, passes=names, observers=[progress] if verbose else [], **options)
        done = report.target or "nothing"
        with report_done(done):
            print_blocks(rewrite_list(report) if verbose else report.blocks())
        if report_file is not None:
            write_file(report_file, report.to_json() + "\n", "report", done)
        if page is not None:
            from rewriter.app.diff import diff

            with waiting("making the page"):
                text = diff(source, target, tags=options["tags"]).to_html()
            write_file(page, text, "page", done)
            click.echo(f"what changed is in {page}")


def _settings(options: dict[str, Any]) -> Settings:
    """Return the options in force, checked."""
    from rewriter.app import settings

    values = {k: v for k, v in options.items() if k in (*settings.OF_QUANTIZER, *settings.Settings.model_fields)}
    return settings.settings(options["config"], values)


def _refuse_unused(names: list[str] | None, options: dict[str, Any]) -> None:
    """Refuse options of passes that are not to run."""
    if names is not None and not names:
        raise click.UsageError("--passes names no pass")
    for option in SWITCHED.keys() - OPTIONS_OF.keys():  # they only leave passes out
        if names and options[option] is not None:
            raise click.UsageError(
                f"{FLAGS[option]} is about the default passes; leave the passes out that --passes names"
            )
    for option, value in options.items():
        owners = OPTIONS_OF.get(option, ())
        if value is not None and names and owners and not set(owners) & set(names):
            flag = FLAGS.get(option, f"--{option.replace('_', '-')}")
            raise click.UsageError(f"{flag} is an option of {owners[0]}, which --passes does not name")


if __name__ == "__main__":
    main()
