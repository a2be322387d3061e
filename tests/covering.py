"""Pairwise covering: few cases of many options, in which every possible pair of two options' values occurs."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Options = Mapping[str, Sequence[Any]]
"""The values of each option, by its name."""
Case = dict[str, Any]
Pair = frozenset[tuple[str, Any]]


@dataclass(frozen=True)
class Exclusion:
    """A combination of values that no case has.

    Attributes:
        why: the reason, as a sentence.
        where: values by option; a case is excluded if it has one of them for every option named here.
    """

    why: str
    where: Mapping[str, Collection[Any]]

    def excludes(self, case: Mapping[str, Any]) -> bool:
        """Return true if the values that a case has so far exclude it, whatever the missing values are."""
        return all(name in case and case[name] in values for name, values in self.where.items())


def excluded(case: Mapping[str, Any], exclusions: Sequence[Exclusion]) -> bool:
    """Return true if the values that a case has so far match one of the exclusions."""
    return any(exclusion.excludes(case) for exclusion in exclusions)


def pairs(case: Mapping[str, Any]) -> set[Pair]:
    """Return all pairs of two options' values in a case."""
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def completed(start: Case, options: Options, exclusions: Sequence[Exclusion], missing: set[Pair]) -> Case | None:
    """Complete a case; each further value is chosen greedily to cover the most missing pairs.

    A choice that leaves an option without a possible value is taken back.

    Returns:
        The case, its options in their order; None if there is none with these values.
    """
    if excluded(start, exclusions):
        return None
    name = next((name for name in options if name not in start), None)
    if name is None:
        return {name: start[name] for name in options}

    def gain(value: Any) -> int:
        return sum(frozenset({(name, value), pair}) in missing for pair in start.items())

    for value in sorted(options[name], key=gain, reverse=True):  # sorting keeps the order of equals
        case = completed({**start, name: value}, options, exclusions, missing)
        if case is not None:
            return case
    return None


def covering(options: Options, exclusions: Sequence[Exclusion]) -> Iterator[Case]:
    """Yield cases that cover every possible pair; each starts from a pair that no earlier case covers."""
    every = (
        {first_name: a, second_name: b}
        for first_name, second_name in itertools.combinations(options, 2)
        for a, b in itertools.product(options[first_name], options[second_name])
    )
    missing = {frozenset(pair.items()): pair for pair in every}
    while missing:
        first = missing.pop(next(iter(missing)))
        case = completed(first, options, exclusions, set(missing))
        if case is not None:
            for pair in pairs(case):
                missing.pop(pair, None)
            yield case


def drawn(options: Options, exclusions: Sequence[Exclusion], random: Random) -> Case:
    """Draw a random case: first one value, uniformly among its option's values, then values that go with it."""
    name = random.choice(list(options))
    start = {name: random.choice(options[name])}
    while True:
        case = {name: random.choice(values) for name, values in options.items()} | start
        if not excluded(case, exclusions):
            return case


def assert_covering(cases: Sequence[Case], options: Options, exclusions: Sequence[Exclusion]) -> None:
    """Assert that no case is excluded, and that the cases hold exactly the pairs that some case can hold."""
    assert not [case for case in cases if excluded(case, exclusions)]
    covered = set().union(*map(pairs, cases))
    for first, second in itertools.combinations(options, 2):
        for a, b in itertools.product(options[first], options[second]):
            pair = {first: a, second: b}
            assert (frozenset(pair.items()) in covered) is (completed(pair, options, exclusions, set()) is not None), (
                pair
            )
