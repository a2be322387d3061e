"""Faults while a model is written, and the conditions that hold after each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.harness import digest
from tests.reliability.forks import CLI, Call, Outcome, Server
from tests.reliability.trials import BrokenPromiseError, judged

RANDOM = re.compile(r"(?<=\.target\.bnqat-)[0-9a-f]{8}")
OURS = re.compile(r"\.target\.bnqat-[0-9a-f]{8}(\.lock|-old)?")
HERE = "tests.reliability.conditions"


class Writing:
    """A command that writes a model, with its source and its result without a fault.

    Attributes:
        folder: the parent folder of the destination.
        target: the destination.
        expected: digests of the files of an undisturbed run.
        earlier: digests of the files to be overwritten; None if the destination is new.
    """

    def __init__(self, server: Server, command: str, source: Path, folder: Path, *, overwrite: bool = False) -> None:
        self.server = server
        self.source = source
        self.folder = folder
        self.target = folder / "target"
        self._before = digest(source)
        self._arguments: list[str | Path] = [command, source, self.target, *(["--overwrite"] if overwrite else [])]
        self._earlier = source if overwrite else None
        self._seen: set[tuple[Any, ...]] = set()
        self.earlier: Mapping[str, str] | None = self._before if overwrite else None
        self.reset()
        outcome = server.cli(*self._arguments)
        if judged(outcome, command) != "done":
            raise BrokenPromiseError(f"{command} of {source}: {outcome.err}")
        self.seconds = outcome.seconds
        self.expected = digest(self.target)

    def reset(self) -> None:
        """Restore the state before the command runs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self._earlier is not None:
            shutil.copytree(self._earlier, self.target)

    def run(self, *before: Call, **options: Any) -> Outcome:
        """Reset the destination and run the command."""
        self.reset()
        return self.server.cli(*self._arguments, before=before, **options)

    def run_twice(self) -> list[Outcome]:
        """Reset the destination and run the command in two processes at once."""
        self.reset()
        return self.server.run_twice(Call(CLI, [[str(a) for a in self._arguments]]))

    def checked(self, outcome: Outcome | None, what: str) -> str:
        """Check the conditions after any fault, run the command again, and check that no trace of the fault is left.

        The command depends on nothing but the folder, so it runs again once for each state in which faults leave that.

        Returns:
            The outcome: "before" or "after" the destination took its place, and "something left" or "nothing left".

        Raises:
            BrokenPromiseError: something is lost, half-written or left behind for good.
        """
        description = f"{what}: {outcome}"
        if digest(self.source) != self._before:
            raise BrokenPromiseError(f"the source was changed: {description}")
        target_digest = digest(self.target) if self.target.exists() else None
        if target_digest not in (self.expected, self.earlier):
            raise BrokenPromiseError(f"{self.target} is neither as before nor whole: {description}")
        leftovers = sorted(p.name for p in self.folder.iterdir() if p != self.target)
        if any(not OURS.fullmatch(name) for name in leftovers):
            raise BrokenPromiseError(f"left {leftovers}: {description}")
        writes = target_digest is None or self.earlier is not None
        state = (writes, *self._state())
        if state not in self._seen:
            self._run_again(description, writes)
            self._seen.add(state)
        moment = "after" if target_digest == self.expected and target_digest != self.earlier else "before"
        return f"{moment}, {'something' if leftovers else 'nothing'} left"

    def _state(self) -> list[tuple[str, str]]:
        """Return the paths in the folder, without what is random in their names, and the hashes of files."""
        hashes = digest(self.folder)
        paths = [str(p.relative_to(self.folder)) for p in self.folder.rglob("*")]
        return sorted((RANDOM.sub("", path), hashes.get(path, "")) for path in paths)

    def _run_again(self, description: str, writes: bool) -> None:
        """Run the command after a fault; it either writes the model, or refuses as the model is there."""
        again = self.server.cli(*self._arguments)
        if writes:
            if judged(again, f"again, after {description}") != "done" or digest(self.target) != self.expected:
                raise BrokenPromiseError(f"the next run did not write the model: {again}, after {description}")
        else:
            shutil.rmtree(self.target)
            again = self.server.cli(*self._arguments)
        if sorted(self.folder.iterdir()) != [self.target] or digest(self.target) != self.expected:
            raise BrokenPromiseError(f"the next run left {sorted(self.folder.iterdir())}: {again}, after {description}")

    def events(self, *before: Call) -> int:
        """Count the audit events about files in the folder that a run causes, after some calls."""
        outcome = self.run(*before, Call(f"{HERE}:counting", [str(self.folder)]))
        (count,) = re.findall(r"events: (\d+)", outcome.out)
        return int(count)

    def killed(self, share: float) -> str:
        """Kill the command at a moment, a share of its usual duration."""
        after = share * self.seconds
        return self.checked(self.run(after=after), f"killed after {after:.3f} s")

    def killed_at(self, moment: int) -> str:
        """Kill the command at the event of this number."""
        outcome = self.run(Call(f"{HERE}:killed_at", [str(self.folder), moment]))
        return self.checked(outcome, f"killed at event {moment}")

    def killed_everywhere(self, *before: Call) -> Iterator[str]:
        """Leave the folder as a kill would at each event about its files, and yield the moments as text.

        SIGKILL leaves files as they are and frees locks. So a single run, whose folder is copied at each event, gives
        the same folders as a run for each event, which is killed there. Some are compared with those of real kills.
        """
        states = self.folder.parent / f"{self.folder.name}_states"
        if judged(self.run(*before, Call(f"{HERE}:copied", [str(self.folder), str(states)])), "copied") != "done":
            raise BrokenPromiseError("a command that is only watched refused")
        moments = range(len(list(states.iterdir())))
        for moment in moments:
            shutil.rmtree(self.folder)
            (states / str(moment)).rename(self.folder)
            if moment in (len(moments) // 4, len(moments) // 2, len(moments) - 2):
                copied = self._state()
                self.run(*before, Call(f"{HERE}:killed_at", [str(self.folder), moment]))
                if self._state() != copied:
                    raise BrokenPromiseError(f"a kill at event {moment} leaves {self._state()}, not {copied}")
            yield f"killed at event {moment}"

    def interrupted(self, share: float) -> str:
        """Interrupt the command, as Ctrl-C does, at a share of its usual duration."""
        after = share * self.seconds
        outcome = self.run(after=after, by=2)
        said = judged(outcome, f"interrupted after {after:.3f} s")
        if said == "refused" and "interrupted" not in outcome.err:
            raise BrokenPromiseError(f"it does not say that it was interrupted: {outcome}")
        return f"{self.checked(outcome, f'interrupted after {after:.3f} s')}, {said}"


def writings(server: Server, model: Path, rewritten: Path, folder: Path) -> Iterator[tuple[str, Writing]]:
    """Yield the commands that write models, each to a new destination and over an old one."""
    for command, source in (("rewrite", model), ("finalize", rewritten)):
        for overwrite in (False, True):
            name = f"{command}{' --overwrite' if overwrite else ''}"
            yield name, Writing(server, command, source, folder / name.replace(" ", ""), overwrite=overwrite)
