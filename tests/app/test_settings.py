from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bnqat
from rewriter.app.settings import settings
from tests.reliability.forks import Server

Paths = Callable[..., Path]
FILE = """
start_step = 100
quantize_average = "none"

[defaults]
bits = 6

[defaults.gamma]
bits = 4
scheme = "symmetric"

[[rules]]
match = "norm_1|_1"
bits = 3
[rules.beta]
scheme = "none"
"""


def command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    line = [str(Path(sys.executable).with_name("bnqat")), "rewrite", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "bnqat.toml").write_text(FILE)
    return tmp_path / "bnqat.toml"


def test_what_is_given_counts_over_the_file_and_the_file_over_defaults(config: Path) -> None:
    plain = settings(config, {})
    assert (plain.start_step, plain.quantize_average, plain.fuse) == (100, "none", True)
    assert plain.quantizer("gamma") == {"scheme": "symmetric", "bits": 4, "range": "dynamic", "rounding": "nearest"}
    assert plain.quantizer("moving_variance")["bits"] == 6
    over = settings(config, {"bits": 5, "start_step": 7, "scheme": {"beta": "power_of_two"}, "momentum": None})
    assert [over.quantizer(r)["bits"] for r in ("gamma", "beta", "moving_mean")] == [5, 5, 5]
    assert over.quantizer("beta")["scheme"] == "power_of_two"
    assert over.start_step == 7
    assert over.rules[0].of("beta") == {}
    assert plain.rules[0].of("gamma") == {"bits": 3}
    some = settings(config, {"bits": {"gamma": 5}}).rules[0]
    assert (some.of("gamma"), some.of("moving_mean")) == ({}, {"bits": 3})


def test_rules_keep_what_they_say_of_training_unless_it_is_given(tmp_path: Path) -> None:
    table = {"rules": [{"match": "a", "bits": 4, "momentum": 0.5, "train_batch_norm": "none"}]}
    assert settings(table, {"bits": 5}).rules[0].momentum == 0.5
    overridden = settings(table, {"momentum": 0.9})
    assert (overridden.momentum, overridden.rules[0].momentum, overridden.rules[0].train_batch_norm) == (
        0.9,
        None,
        "none",
    )
    assert overridden.rules[0].of("gamma") == {"bits": 4}
    (tmp_path / "file.toml").write_text(settings(table, {"train_outputs": {"boxes": "heads/boxes:1"}}).to_toml())
    printed = command("--config", tmp_path / "file.toml", "--train-batch-norm", "all", "--print-config")
    plain = tomllib.loads(printed.stdout)
    assert plain["train_outputs"] == {"boxes": "heads/boxes:1"}
    assert plain["train_batch_norm"] == "all"
    assert plain["rules"] == [{"match": "a", "bits": 4, "momentum": 0.5}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-output", "boxes"], "'boxes' is not NAME=NODE"),
        (["--train-output", "a=b", "--train-output", "a=c"], "the name a is given twice"),
        (["--train-batch-norm", "some"], "'some' is not one of 'as-source', 'all', 'none'"),
        (
            ["--train-output", "a=b", "--passes", "quantize"],
            "--train-output is an option of derive-training",
        ),
    ],
)
def test_options_of_training_on_the_command_line(options: list[str], message: str, tmp_path: Path) -> None:
    done = command(tmp_path / "a", tmp_path / "b", *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_what_is_printed_is_a_file_that_says_the_same(config: Path, tmp_path: Path) -> None:
    first = command("--config", config, "--print-config", "--bits", "moving_mean=12", "--range", "beta=-1:1")
    assert first.returncode == 0, first.stderr
    printed = tomllib.loads(first.stdout)
    assert printed["defaults"]["moving_mean"]["bits"] == 12
    assert printed["defaults"]["beta"]["range"] == [-1.0, 1.0]
    assert printed["defaults"]["gamma"] == {"scheme": "symmetric", "bits": 4, "range": "dynamic", "rounding": "nearest"}
    (rule,) = printed["rules"]  # but for the moving mean, which is given
    assert rule["beta"] == {"scheme": "none", "bits": 3}
    assert (rule["gamma"], rule.get("moving_mean")) == ({"bits": 3}, None)
    (tmp_path / "printed.toml").write_text(first.stdout)
    assert command("--config", tmp_path / "printed.toml", "--print-config").stdout == first.stdout


def test_rules_and_defaults_reach_the_quantizers(forks: Server, config: Path, model: Paths, tmp_path: Path) -> None:
    done = forks.cli("rewrite", model("module"), tmp_path / "out", "--config", config)
    assert done.code == 0, done.err
    tags = [t for bn in bnqat.inspect(tmp_path / "out").batch_norms for s in bn.sites for t in s.quantizers]
    assert {(t["layer"], t["role"], t["scheme"], t["bits"]) for t in tags} == {
        (0, "gamma", "symmetric", 4),
        (0, "beta", "affine", 6),
        (0, "moving_mean", "affine", 6),
        (0, "moving_variance", "log", 6),
        (1, "gamma", "symmetric", 3),
        (1, "moving_mean", "affine", 3),
        (1, "moving_variance", "log", 3),
    }
    assert {t["use"] for t in tags} == {"parameter"}


def test_a_rule_for_all_leaves_nothing_to_rewrite(model: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.NothingToRewriteError, match="the scheme none leaves it as it is"):
        bnqat.rewrite(model("module"), tmp_path / "out", scheme="none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = 3", "bits is an option of quantisers; it belongs under [defaults]"),
        ("bitz = 3", "bitz: there is no such option; there are start_step"),
        ("start_stp = 3", "start_stp: there is no such option; did you mean start_step?"),
        ("[defaults]\nbits = 1", "defaults.bits = 1: a width is a whole number from 2 to 16"),
        ("[defaults.gamma]\nbits = 17", "defaults.gamma.bits = 17: a width is"),
        ("[defaults.gama]\nbits = 4", "defaults.gama: there is no such option; did you mean gamma?"),
        (
            "[defaults.gamma]\ngranularity = 'per_channel'",
            "defaults.gamma: a range for each channel changes nothing",
        ),
        ("[defaults]\nrange = [1, 1]", "defaults.range = [1, 1]: "),
        ("[defaults]\nscheme = 'afine'", "defaults.scheme = 'afine': it is to be 'affine', 'symmetric'"),
        ("[[rules]]\nbits = 3", "rules.0.match is missing"),
        ("[[rules]]\nmatch = '('", "is no regular expression"),
        ("rules = 3", "rules = 3: it is a list of tables"),
        ("defaults = 3", "defaults = 3: it is a table"),
        ("start_step = -1", "start_step = -1: it is to be greater than or equal to 0"),
        ("quantize_average = 'all'", "quantize_average = 'all': it is to be 'statistic', 'none' or 'stored'"),
        ("[defaults.gamma]\nscheme = 'log'", "gamma: the scheme log is for moving_variance"),
        ("[defaults.gamma]\nquantizer = 'x'", "it is a function, or the name of one as module:function"),
        ("bits = ", "is not TOML"),
        ("train_batch_norm = 'some'", "train_batch_norm = 'some': it is to be 'as-source', 'all' or 'none'"),
        ("[train_outputs]\na = 3", "train_outputs.a = 3: it is to be a valid string"),
        ("[[rules]]\nmatch = ''\nmomentum = 1.5", "rules.0.momentum = 1.5: it is to be less than 1"),
        ("[[rules]]\nmatch = ''\nmomentun = 0.5", "rules.0.momentun: there is no such option; did you mean momentum?"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(text: str, message: str, model: Paths, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(bnqat.Error) as raised:
        bnqat.rewrite(model("module"), tmp_path / "out", config=tmp_path / "c.toml")
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "afine"], "it is one of affine"),
        (["--range", "gamma=1"], "or two limits like -1:1"),
        (["--range", "1:1"], "the first limit is less than the second"),
        (["--bits", "gamma=4,gamma=5"], "names gamma twice"),
        (["--rounding", "up"], "it is one of nearest, stochastic"),
        (["--narrow-range", "maybe"], "it is yes or no"),
        (["--quantizer", "mine"], "module:function"),
        (["--freeze-step", "-1"], "-1 is not in the range"),
        (["--config", "nowhere.toml"], "cannot be read"),
        (["--freeze-step", "3", "--passes", "quantize"], "is an option of freeze-statistics"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    """The model does not exist; the mistake on the command line is reported first, without TensorFlow."""
    done = command("m", "out", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_python_takes_mappings(model: Paths, tmp_path: Path) -> None:
    options: dict[str, Any] = {"defaults": {"gamma": {"bits": 5}}}
    bnqat.rewrite(model("module"), tmp_path / "out", config=options, bits={"beta": 3}, ramp_steps=4)
    tags = [t for bn in bnqat.inspect(tmp_path / "out").batch_norms for s in bn.sites for t in s.quantizers]
    assert {t["role"]: t["bits"] for t in tags} == {"gamma": 5, "beta": 3, "moving_mean": 8, "moving_variance": 8}
    with pytest.raises(bnqat.Error, match="bits: 'scale' is no role"):
        bnqat.rewrite(model("module"), tmp_path / "x", bits={"scale": 3})


@pytest.mark.parametrize(
    ("steps", "noted"),
    [
        ((100, 0, 50), "adapt to the quantised model never"),
        ((100, 0, 100), "adapt to the quantised model never"),  # the first quantised step is the first frozen one
        ((100, 50, 120), "adapt to the quantised model only in part"),
        ((100, 50, 150), "adapt to the quantised model only in part"),
        ((100, 50, 151), ""),
        ((100, 0, 101), ""),
        ((100, 0, 0), ""),  # the source's statistics, all along
        ((0, 0, 1), ""),
        ((100, 50, None), ""),
    ],
)
def test_statistics_that_are_frozen_before_quantisers_act(
    steps: tuple[int, int, int | None], noted: str, model: Paths, tmp_path: Path
) -> None:
    """`steps` is the start step, the ramp steps and the freeze step."""
    start, ramp, freeze = steps
    options: dict[str, Any] = {"start_step": start, "ramp_steps": ramp, "freeze_step": freeze}
    all_notes = bnqat.rewrite(model("module"), tmp_path / "target", dry_run=True, **options).notes
    notes = [note for note in all_notes if note.startswith("statistics are frozen from step ")]
    assert bool(notes) is bool(noted)
    if notes:
        assert noted in notes[0]
        assert f"--freeze-step later than {start + ramp} " in notes[0]
