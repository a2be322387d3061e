"""Options of a rewrite: options given directly override those of a TOML file, which override the defaults.

They are checked without importing TensorFlow, so that a mistake is reported at once.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator
from pydantic_core import InitErrorDetails

from passes import GROUPS, OrderOptions, roles
from passes.batch_norm.options import AverageOptions
from passes.frontend.options import ReferenceOptions
from passes.options import options_of, refusal
from passes.quantization.options import QuantizerOptions, ScheduleOptions
from passes.quantization.roles import MAX_BITS, MIN_BITS
from passes.training.options import DeriveOptions, FreezeOptions, LayerOptions, MomentumValue, Trained
from rewriter.ir import Error

REMEDIES = {
    "bits": f"a width is a whole number from {MIN_BITS} to {MAX_BITS}; to leave something float, scheme = 'none'",
}
"""Advice for keys whose value is wrong."""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


if TYPE_CHECKING:

    class QuantizerTable(_Options):
        """Options of quantisers; one that is None is not set, and has the value of the more general table."""
else:
    QuantizerTable = create_model(
        "QuantizerTable",
        __base__=_Options,
        **{option.name: (option.annotation | None, None) for option in options_of(QuantizerOptions)},
    )

OF_QUANTIZER = tuple(option.name for option in options_of(QuantizerOptions))
"""Names of the options of a quantiser."""
OF_TRAINING = frozenset(option.name for option in options_of(LayerOptions))
"""Names of the options of training that rules may have."""


class Defaults(QuantizerTable):
    """Options of all roles, and tables that override them for one role, such as `gamma`."""

    model_config = ConfigDict(extra="allow")
    # `init` has no effect, but on type checkers.
    __pydantic_extra__: dict[str, QuantizerTable] = Field(init=False)

    @model_validator(mode="before")
    @classmethod
    def _tables(cls, table: Any) -> Any:
        """Return the table in the order of fields and roles; refuse keys that are neither."""
        if not isinstance(table, Mapping):
            return table
        keys = [*cls.model_fields, *roles()]
        unknown = next((key for key in table if key not in keys), None)
        if unknown is not None:
            error = InitErrorDetails(type="extra_forbidden", loc=(unknown,), input=table[unknown])
            raise ValidationError.from_exception_data(cls.__name__, [error])
        return {key: table[key] for key in keys if key in table}

    @property
    def tables(self) -> Mapping[str, QuantizerTable]:
        """The tables for single roles."""
        return self.__pydantic_extra__

    def of(self, role: str) -> dict[str, Any]:
        """Return the options that are set for a role, its own and those of all roles."""
        common = self.model_dump(exclude_none=True, include=set(OF_QUANTIZER))
        return {**common, **self.tables.get(role, QuantizerTable()).model_dump(exclude_none=True)}


class RuleOptions(Defaults):
    """Options for the layers that a rule matches.

    Attributes:
        match: a regular expression, searched in the layer's name and in those of its variables.
        momentum, train_batch_norm: as for all layers.
    """

    match: str
    momentum: MomentumValue | None = None
    train_batch_norm: Trained | None = None

    @field_validator("match")
    @classmethod
    def _match(cls, value: str) -> str:
        try:
            regex.compile(value)
        except regex.error as e:
            raise ValueError(f"it is no regular expression: {e}") from e
        except RecursionError:
            raise ValueError("it is no regular expression that Python takes, as it is nested too deep") from None
        return value


class Settings(
    BaseModel,
    ReferenceOptions,
    OrderOptions,
    AverageOptions,
    DeriveOptions,
    FreezeOptions,
    ScheduleOptions,
    extra="forbid",
    frozen=True,
):
    """All options of a rewrite: those of `passes.OPTIONS`, the quantisers' and the rules.

    Pydantic takes the fields of the base classes from the last to the first, so their order is the reverse.
    """

    defaults: Defaults = Defaults()
    rules: tuple[RuleOptions, ...] = ()

    @model_validator(mode="after")
    def _check_combinations(self) -> Settings:
        tables = {f"defaults.{role}": self.defaults.of(role) for role in self.quantized}
        for number, rule in enumerate(self.rules):
            tables |= {f"rules.{number}.{role}": rule.of(role) for role in self.quantized}
        for place, options in tables.items():
            unsuited = roles()[place.rpartition(".")[2]].unsuited
            for option in (options.get("scheme"), options.get("range"), options.get("granularity")):
                if isinstance(option, str) and option in unsuited:
                    raise ValueError(f"{place}: {unsuited[option]}")
        averages = any(options.get("range") == "ema" for options in tables.values())
        for place, options in tables.items():
            if options.get("range_momentum") is not None and not averages:
                raise ValueError(f"{place}.range_momentum has no effect, as no range is 'ema'; leave it out")
            unused = [name for name in options if name not in ("quantizer", "bits")]
            if options.get("quantizer") is not None and unused:
                raise ValueError(
                    f"{place}.quantizer takes the place of a scheme, so {unused[0]} has no effect; leave it out"
                )
        return self

    @property
    def notes(self) -> list[str]:
        """Sentences on a combination of options that is allowed, but often a mistake.

        A freeze step of 0 is no mistake: moving statistics then stay those of the source.
        """
        whole = self.start_step + self.ramp_steps
        if self.freeze_step is None or not 0 < self.freeze_step <= whole:
            return []
        when = f"from step {self.start_step} on" + (f", wholly from step {whole} on" if self.ramp_steps else "")
        adapted = "only in part" if self.freeze_step > self.start_step else "never"
        return [
            f"statistics are frozen from step {self.freeze_step} on, and quantisers act {when}: moving statistics "
            f"adapt to the quantised model {adapted}; a --freeze-step later than {whole} lets them adapt, and 0 "
            "keeps those of the source"
        ]

    @property
    def quantized(self) -> list[str]:
        """The roles that have quantisers, unless their scheme is "none": the usual ones, and those that are named."""
        named = {*self.defaults.tables, *(role for rule in self.rules for role in rule.tables)}
        return [role.name for role in roles().values() if role.always or role.name in named]

    def quantizer(self, role: str) -> dict[str, Any]:
        """Return all options of a role's quantiser, with the built-in values of those that are not set."""
        known = roles()[role]
        scheme = known.scheme if known.always or role in self.defaults.tables else "none"
        usual = {option.name: option.default for option in options_of(QuantizerOptions) if option.default is not None}
        momentum = usual.pop("range_momentum")
        options = {"scheme": scheme, **usual, **self.defaults.of(role)}
        if "quantizer" in options:  # which takes the place of a scheme
            return {name: options[name] for name in ("quantizer", "bits")}
        return {"range_momentum": momentum, **options} if options["range"] == "ema" else options

    def to_toml(self) -> str:
        """Return the options in force as the text of a configuration file."""
        import tomli_w

        options = self.model_dump(exclude={"defaults", "rules"})
        plain = {k: v for k, v in options.items() if v not in ({}, None)}
        # A role that only rules name has no table: with one, it would count as named for all layers.
        listed = [role for role in self.quantized if roles()[role].always or role in self.defaults.tables]
        plain["defaults"] = {role: self.quantizer(role) for role in listed}
        rules = [{k: v for k, v in r.model_dump(exclude_none=True).items() if v not in ({}, None)} for r in self.rules]
        return tomli_w.dumps(_with_function_names({**plain, **({"rules": rules} if rules else {})}))


def _with_function_names(value: Any) -> Any:
    """Return a value with names in place of functions, as TOML has no functions."""
    if isinstance(value, dict):
        return {k: _with_function_names(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_function_names(v) for v in value]
    return f"{value.__module__}:{value.__qualname__}" if callable(value) else value


def settings(config: str | Path | Mapping[str, Any] | None, given: Mapping[str, Any]) -> Settings:
    """Return the options in force: those in `given` override those of `config`, which override the defaults.

    An option of quantisers in `given` also overrides that option in rules.

    Args:
        config: a TOML file, or a dict of its content.
        given: options by name; None for one that is not given. An option of quantisers is one value, or values by role.

    Raises:
        Error: the file cannot be read, or an option is unknown or out of range; the message names it.
    """
    if config is not None and not isinstance(config, str | Path | Mapping):
        raise Error(f"config is a TOML file's path or a dict, not {config!r}")
    where = "" if config is None or isinstance(config, Mapping) else f"{config}: "
    file_options = {} if config is None else dict(config) if isinstance(config, Mapping) else _read_toml(Path(config))
    file_options = _with_roles(file_options)
    checked(file_options, where)
    direct = {k: v for k, v in given.items() if v is not None}
    for option in OF_TRAINING & direct.keys():
        file_options["rules"] = [
            {k: v for k, v in rule.items() if k != option} for rule in file_options.get("rules", ())
        ]
    defaults = {**file_options.get("defaults", {})}
    usual = _usual(defaults, file_options.get("rules", ()), direct)
    for option in OF_QUANTIZER:
        if option not in direct:
            continue
        value = direct.pop(option)
        by_role = _by_role(value) if isinstance(value, Mapping) else dict.fromkeys(usual, value)
        unknown = set(by_role) - set(roles())
        if unknown:
            raise Error(f"{option}: {min(unknown)!r} is no role; there are {', '.join(roles())}")
        defaults |= {role: {**defaults.get(role, {}), option: v} for role, v in by_role.items()}
        if "rules" in file_options:
            file_options["rules"] = [_without(rule, option, by_role, usual) for rule in file_options["rules"]]
    return checked({**file_options, **direct, "defaults": defaults})


def _by_role(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by role; that of a group is for each of its roles that has none of its own."""
    of_groups = {role: value for name, value in values.items() for role in GROUPS.get(name, ())}
    return {**of_groups, **{name: value for name, value in values.items() if name not in GROUPS}}


def _with_roles(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a file with tables of single roles in place of those of groups."""

    def expanded(table: Any) -> Any:
        if not isinstance(table, Mapping) or not set(table) & set(GROUPS):
            return table
        result = {name: value for name, value in table.items() if name not in GROUPS}
        for name in (name for name in table if name in GROUPS):
            for role in GROUPS[name]:
                own = result.get(role, {})
                both = isinstance(own, Mapping) and isinstance(table[name], Mapping)
                result[role] = {**table[name], **own} if both else table[name]
        return result

    rules = options.get("rules", ())
    return {
        **options,
        **({"defaults": expanded(options["defaults"])} if "defaults" in options else {}),
        **({"rules": [expanded(rule) for rule in rules]} if isinstance(rules, list | tuple) and rules else {}),
    }


def _usual(defaults: Mapping[str, Any], rules: Iterable[Mapping[str, Any]], direct: Mapping[str, Any]) -> list[str]:
    """Return the roles that an option without a role is for: the usual ones, and those that another option names."""
    mappings = (_by_role(direct[option]) for option in OF_QUANTIZER if isinstance(direct.get(option), Mapping))
    named = {*defaults, *(key for table in (*rules, *mappings) for key in table)}
    return [role.name for role in roles().values() if role.always or role.name in named]


def _without(rule: Mapping[str, Any], option: str, by_role: Iterable[str], usual: Iterable[str]) -> dict[str, Any]:
    """Return a rule without an option for some roles; what it says of all roles is written out by role."""
    common = {k: v for k, v in rule.items() if k in OF_QUANTIZER}
    tables = {role: {**common, **rule.get(role, {})} for role in roles() if role in usual or role in rule}
    for role in by_role:
        tables.get(role, {}).pop(option, None)
    rule_keys = {k: v for k, v in rule.items() if k == "match" or k in OF_TRAINING}
    return {**rule_keys, **{role: table for role, table in tables.items() if table}}


def checked(options: Mapping[str, Any], where: str = "") -> Settings:
    """Return settings from plain values.

    Raises:
        Error: an option is unknown or out of range; the message begins with `where` and names it.
    """
    try:
        return Settings.model_validate(options)
    except ValidationError as e:
        raise Error(where + _sentence(e.errors()[0])) from e


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise Error(f"the configuration {file} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    except (ValueError, RecursionError) as e:  # not TOML, or numbers too long or tables too deep for Python
        raise Error(f"the configuration {file} is not TOML: {e}") from e


def _sentence(error: Any) -> str:
    """Return a sentence that names the wrong key, and says what to do."""
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    name = place[-1] if place else ""
    value_text = "" if error["type"] in ("extra_forbidden", "missing") else f" = {error['input']!r:.100}"
    if name in REMEDIES and error["type"] != "value_error" and place[1:]:
        return f"{key}{value_text}: {REMEDIES[name]}"
    if error["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {"defaults": Defaults, "rules": RuleOptions}
        inner = QuantizerTable if set(place[:-1]) & set(roles()) else tables.get(place[0], Settings)
        fields = [*(inner if place[1:] else Settings).model_fields, *(roles() if issubclass(inner, Defaults) else ())]
        if not place[1:] and name in OF_QUANTIZER:
            return f"{key} is an option of quantisers; it belongs under [defaults], [defaults.gamma] or a rule"
        close = difflib.get_close_matches(name, fields, n=1)
        return f"{key}: there is no such option; " + (
            f"did you mean {close[0]}?" if close else f"there are {', '.join(fields)}"
        )
    if not place:
        return str(error["msg"].removeprefix("Value error, "))
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] in ("model_type", "tuple_type"):
        return f"{key}{value_text}: it is a {'table' if error['type'] == 'model_type' else 'list of tables'}"
    return refusal(key, error)
