"""The command line. TensorFlow is imported only when a command has work for it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passes.roles import MAX_BITS, MIN_BITS, ROLES
from rewriter.app.names import OPTIONS_OF, PASSES
from rewriter.app.show import show_inspection, show_rewrite, show_sensitivity
from rewriter.ir import Error
from rewriter.savedmodel.staging import refuse_existing, refuse_overlap, require_model

if TYPE_CHECKING:
    from rewriter.app.settings import Settings
    from rewriter.pipeline import Step

EXIT_FAILED = 2


class ByRole(click.ParamType[Any, Any]):
    """``8`` or ``gamma=4,beta=8``, with values of another type."""

    def __init__(self, name: str, of: Callable[[str], Any], wrong: str) -> None:
        """`of` makes a value of a text or raises ValueError; `wrong` says what one looks like."""
        self.name = name
        self.of = of
        self.wrong = wrong

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A value, or values by role."""
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",")] if "=" in value else [("", "", value)]
        found: dict[str, Any] = {}
        for role, _, text in ((role.strip(), sign, text.strip()) for role, sign, text in pairs):
            if "=" in value and role not in ROLES:
                self.fail(f"{role!r} is no variable of a batch norm; there are {', '.join(ROLES)}", param, ctx)
            if role in found:
                self.fail(f"{value!r} names {role} twice", param, ctx)
            try:
                found[role] = self.of(text)
            except ValueError:
                self.fail(f"{text!r}: {self.wrong}", param, ctx)
        return found.get("", found)


def _width(text: str) -> int:
    if not MIN_BITS <= int(text) <= MAX_BITS:
        raise ValueError(text)
    return int(text)


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return check


def _limits(text: str) -> str | list[float]:
    if text in RANGES:
        return text
    low, high = text.split(":")
    return [float(low), float(high)]


def _yes(text: str) -> bool:
    return {"yes": True, "no": False}[_one_of("yes", "no")(text)]


SCHEMES = ("affine", "symmetric", "power_of_two", "log", "none")
RANGES = ("dynamic", "ema", "learned")
BITS = ByRole("bits", _width, f"a width is a number from {MIN_BITS} to {MAX_BITS}, or a list like gamma=4,beta=8")
SCHEME = ByRole("scheme", _one_of(*SCHEMES), f"a scheme is one of {', '.join(SCHEMES)}")
RANGE = ByRole("range", _limits, f"a range is one of {', '.join(RANGES)}, or two limits like -1:1")
ROUNDING = ByRole("rounding", _one_of("nearest", "stochastic"), "rounding is nearest or stochastic")
NARROW = ByRole("yes|no", _yes, "it is yes or no")
QUANTIZER = ByRole("module:function", str, "")
STEPS = click.IntRange(min=0, max=2**63 - 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bnqat")
def main() -> None:
    """Rewrite a float TensorFlow SavedModel into a fine-tunable one with quantised batch norms.

    Nothing in a model is executed, but by `sensitivity`. Results go to stdout, progress to stderr. Exit code 0: done;
    2: wrong usage, unreadable input or nothing to rewrite. (1 is kept for checks that fail.)
    """


def _tags(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [tag for tag in value.split(",") if tag]


TAGS = click.option(
    "--tags", callback=_tags, help="Tags of the meta graph, comma-separated, where the model holds several."
)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@TAGS
def inspect(model: Path, as_json: bool, tags: list[str] | None) -> None:
    """Show the batch norms of MODEL, and which of them can be rewritten."""
    with _one_line(lambda: require_model(model)):
        from rewriter.app import api

        report = api.inspect(model, tags=tags)
        if as_json:
            click.echo(report.to_json())
        else:
            show_inspection(report)


@main.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC", required=False)
@click.argument("target", type=click.Path(path_type=Path), metavar="DST", required=False)
@click.option("--bits", type=BITS, help="Width of all codes (8 if not given), or by role: gamma=4,beta=8.")
@click.option("--scheme", type=SCHEME, help=f"How values are rounded, or by role: {', '.join(SCHEMES)}.")
@click.option("--range", type=RANGE, help="Between which limits, or by role: dynamic, ema, learned, or like -1:1.")
@click.option("--rounding", type=ROUNDING, help="nearest, or stochastic in training; or by role.")
@click.option("--narrow-range", type=NARROW, help="One code fewer; or by role.")
@click.option("--quantizer", type=QUANTIZER, help="Your own function in place of a scheme; or by role.")
@click.option(
    "--quantize-average",
    type=click.Choice(["statistic", "none", "stored"]),
    help="What is quantised of the moving averages' update: the batch's statistic (if not given), nothing, or what "
    "is stored.",
)
@click.option("--start-step", type=STEPS, help="First step that quantises (0 if not given).")
@click.option("--ramp-steps", type=STEPS, help="Steps from there on that blend float and quantised values.")
@click.option("--freeze-step", type=STEPS, help="First step of training with the moving statistics, not updated.")
@click.option("--momentum", type=float, help="Momentum of derived training where the model does not say it.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="TOML file with options and rules.")
@click.option("--print-config", is_flag=True, help="Print the options in force as such a file, and do nothing.")
@click.option(
    "--unfreeze-constants",
    is_flag=True,
    default=None,
    help="Make batch norms' parameters that are constants variables again.",
)
@click.option(
    "--no-fuse",
    "fuse",
    is_flag=True,
    flag_value=False,
    default=None,
    help="Leave batch norms that are in single ops, or computed in both modes, as they are.",
)
@click.option(
    "--keep-ref",
    is_flag=True,
    default=None,
    help="Leave TensorFlow 1's reference variables; the result trains in V1 sessions only.",
)
@TAGS
@click.option(
    "--passes",
    help="Passes to run instead of the default ones, in this order, comma-separated: "
    f"{', '.join(PASSES)}, or your own as module:Class.",
)
@click.option("--dry-run", is_flag=True, help="Report what would be done, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a SavedModel.")
@click.option(
    "--report", "report_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as JSON."
)
def rewrite(
    source: Path | None, target: Path | None, passes: str | None, report_file: Path | None, **options: Any
) -> None:
    """Write SRC to DST with switchable quantisers on every batch norm, ready to be fine-tuned."""
    names = None if passes is None else [p.strip() for p in passes.split(",") if p.strip()]
    _refuse_unused(names, options)
    if options.pop("print_config"):
        with _one_line(tensorflow=False):
            click.echo(_settings(options).to_toml(), nl=False)
        return
    if source is None or target is None:
        raise click.UsageError(f"Missing argument '{'SRC' if source is None else 'DST'}'.")
    if names or options["quantizer"] or options["config"]:
        # A pass or pipeline of one's own may lie in the current directory; last, so that nothing there hides what is
        # installed.
        sys.path.append(str(Path.cwd()))

    def check() -> None:
        _settings(options)
        require_model(source)
        if not options["dry_run"]:
            refuse_overlap(source, target)
            refuse_existing(target, options["overwrite"])
        if report_file is not None:
            _refuse_report(report_file, source, target)

    with _one_line(check):
        from rewriter.app import api

        report = api.rewrite(source, target, passes=names, observers=[_progress], **options)
        written = None if options["dry_run"] else target
        show_rewrite(report, written)
        if report_file is not None:
            try:
                report_file.write_text(report.to_json() + "\n", encoding="utf-8")
            except OSError as e:
                done = "nothing" if written is None else written
                raise Error(f"{done} was written, but the report {report_file} was not: {e.strerror}") from e


def _settings(options: dict[str, Any]) -> Settings:
    """The options in force, checked."""
    from rewriter.app import settings

    own = {k: v for k, v in options.items() if k in (*settings.OF_QUANTIZER, *settings.Settings.model_fields)}
    return settings.settings(options["config"], own)


def _refuse_unused(names: list[str] | None, options: dict[str, Any]) -> None:
    """Refuse options of passes that are not to run."""
    if names is not None and not names:
        raise click.UsageError("--passes names no pass")
    if names and options["fuse"] is False:
        raise click.UsageError("--no-fuse is about the default passes; leave the passes out that --passes names")
    for option, value in options.items():
        name = OPTIONS_OF.get(option)
        if value is not None and names and name is not None and name not in names:
            raise click.UsageError(f"--{option.replace('_', '-')} is an option of {name}, which --passes does not name")


@main.command()
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
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def sensitivity(model: Path, inputs_file: Path, bits: str, plot_file: Path | None, as_json: bool) -> None:
    """Show how much each quantiser of QAT_MODEL alone changes the outputs. This executes the model."""
    try:
        widths = [_width(text) for text in bits.split(",")]
    except ValueError:
        raise click.UsageError(f"--bits {bits}: widths are numbers from {MIN_BITS} to {MAX_BITS}, like 8,4") from None

    def check() -> None:
        require_model(model)
        if not inputs_file.is_file():
            raise Error(f"there is no file {inputs_file}")
        if plot_file is not None and not plot_file.absolute().parent.is_dir():
            raise Error(f"there is no directory {plot_file.parent} to draw to")

    with _one_line(check):
        from rich.console import Console
        from rich.progress import track

        from rewriter.app import sensitivity as measure

        click.echo(f"executing {model}", err=True)
        arrays = measure.arrays(inputs_file)
        console = Console(stderr=True)
        found = measure.sensitivity(
            model, arrays, bits=widths, progress=lambda runs: track(runs, "quantisers", console=console, transient=True)
        )
        if as_json:
            click.echo(found.to_json())
        else:
            show_sensitivity(found)
        if plot_file is not None:
            measure.plot(found, plot_file)
            click.echo(f"drawn to {plot_file}", err=True)


def _refuse_report(report: Path, source: Path, target: Path) -> None:
    if not report.absolute().parent.is_dir():
        raise Error(f"there is no directory {report.parent} to write the report to")
    for model in (source, target):
        if report.resolve().is_relative_to(model.resolve()):
            raise Error(f"the report {report} would lie in the model {model}; choose another file")


@contextmanager
def _one_line(*checks: Callable[[], object], tensorflow: bool = True) -> Iterator[None]:
    """Make the checks, which must not need TensorFlow, and import it quietly where it is needed.

    What a user can mend becomes one line and exit code 2.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for check in checks:
            check()
        if tensorflow:
            with _quiet():
                importlib.import_module("rewriter.app.api")
        yield
    except Error as e:
        _fail(str(e))
    except BrokenPipeError:
        raise  # the reader has had enough, which click knows how to end
    except OSError as e:
        _fail(f"{e.filename}: {e.strerror}" if e.filename else f"{e.strerror or e}")
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written")


def _fail(message: str) -> None:
    click.echo(f"bnqat: error: {' '.join(message.split())}", err=True)
    sys.exit(EXIT_FAILED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what TensorFlow's libraries print while they are loaded off stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Rewriting has no work for an accelerator, and should not take its memory from a training run.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    saved = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        importlib.import_module("tensorflow")

        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def _progress(step: Step) -> None:
    click.echo(f"{step.name}: {len(step.edits)} edits in {step.seconds:.2f} s", err=True)


if __name__ == "__main__":
    main()
