"""The study engine: trials of configurations, asked of Optuna and told it, kept in a file that several processes may share.

What the k-th trial tries follows from the trials before it, the seed and k alone: Optuna's sampler is made anew for each. So one process
that was stopped, or killed, and goes on tries what it would have tried anyway; several processes see different histories.

Seeds (Eimer, Lindauer and Raileanu 2023, arXiv 2306.01324): a trial's value is the mean over the *tuning* seeds. What is chosen by it
looks better than it is, for it was chosen among noise; `judge` runs the chosen ones again on *test* seeds, which no choice has seen.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from .. import canon, xp
from ..engine.events import Events
from ..errors import InputError, MismatchError, MissingExtra, UsageError, WeftError
from ._front import Point, front, hypervolume

if TYPE_CHECKING:
    import optuna

Params = dict[str, Any]
Figures = dict[str, float]

_NAME = "weft"
_AGAIN = 200
"""Configurations known already, one after the other, after which a study is taken to be exhausted."""


class StudyConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of every method that tries things out."""

    trials: Annotated[int, msgspec.Meta(description="configurations to try, over all processes and sessions of the study", ge=1)] = 50
    sampler: Annotated[
        Literal["tpe", "gp", "nsga2", "random"],
        msgspec.Meta(description="who proposes: density estimates, a Gaussian process, evolution, or chance"),
    ] = "tpe"
    startup: Annotated[int, msgspec.Meta(description="trials by chance before that (nsga2: the size of a generation)", ge=1)] = 10
    tuning_seeds: Annotated[tuple[int, ...], msgspec.Meta(description="seeds that a trial is run with; its value is their mean", min_length=1)] = (0,)
    test_seeds: Annotated[tuple[int, ...], msgspec.Meta(description="seeds that only the chosen ones are run with, afterwards")] = (1, 2, 3)

    def problems(self) -> list[str]:
        """Seeds that choose must not judge."""
        both = sorted({*self.tuning_seeds} & {*self.test_seeds})
        return [f"test_seeds: {', '.join(map(str, both))} among the tuning seeds too; they must be others"] if both else []


@dataclass(frozen=True)
class Objective:
    """A figure to make large or small."""

    name: str
    larger: bool = False

    def down(self, value: float) -> float:
        """The figure as a number to make small."""
        return -value if self.larger else value


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried: `seeds` has the figures of each tuning seed, `values` the mean of each objective."""

    number: int
    params: Params
    seeds: list[Figures] = field(default_factory=list)
    values: Figures = field(default_factory=dict)
    why: str = ""
    """Why it failed, if it did."""

    def json(self) -> dict[str, Any]:
        return {"number": self.number, "params": self.params, "values": self.values, "seeds": self.seeds, "why": self.why}


Run = Callable[[Params, int], Figures]
"""Runs a configuration with a seed. With a WeftError the trial counts as failed; one of usage or input is raised if no trial has ever ended well."""


class Study:
    """Trials of one search. `choices` are Optuna's distributions by name (`choices`), `identity` is what must agree to go on with a file.

    meaning: what a configuration comes to: two with the same are tried once; None: it cannot be run, and is passed over. Neither counts
    """

    def __init__(
        self,
        choices: Mapping[str, Any],
        objectives: Sequence[Objective],
        cfg: StudyConfig,
        *,
        seed: int = 0,
        storage: str | None = None,
        identity: Mapping[str, Any] | None = None,
        meaning: Callable[[Params], Any] = dict,
    ) -> None:
        if not choices:
            raise UsageError("there is nothing to choose: the search space is empty")
        self.choices, self.objectives, self.cfg, self.seed, self.meaning = dict(choices), list(objectives), cfg, seed, meaning
        self._where = storage
        names = {name: optuna_module().distributions.distribution_to_json(each) for name, each in self.choices.items()}
        self._identity = sha256(canon.dumps({"choices": names, "objectives": [each.name for each in objectives], **(identity or {})})).hexdigest()
        with _quiet():
            self._study = self._opened()

    def _opened(self) -> optuna.Study:
        module = optuna_module()
        storage: Any = None
        if self._where is not None and "://" in self._where:
            storage = self._where
        elif self._where is not None:
            try:
                storage = module.storages.JournalStorage(module.storages.journal.JournalFileBackend(self._where))
            except OSError as error:
                raise InputError(f"cannot open the study {self._where}: {error.strerror or error}") from error
            except ValueError as error:
                raise InputError(f"{self._where} is no study: {error}", hint="another name: the file is made by the first search") from error
        directions: Any = ["maximize" if each.larger else "minimize" for each in self.objectives]
        with self._alone():
            try:
                study: optuna.Study = module.create_study(storage=storage, study_name=_NAME, directions=directions, load_if_exists=True)
            except ValueError as error:  # other directions
                raise MismatchError(f"{self._where} is the study of another search: {error}") from error
            known = study.user_attrs.get("identity")
            if known is None:
                study.set_user_attr("identity", self._identity)
            elif known != self._identity:
                raise MismatchError(
                    f"{self._where} is the study of another search: base, data, space or options differ", hint="another --study, or what it was begun with"
                )
        return study

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else who shares the file decides what to try meanwhile. Databases look after themselves, but for a trial too many."""
        from filelock import FileLock

        with nullcontext() if self._where is None or "://" in self._where else FileLock(f"{self._where}.asking"):
            yield

    # --- trying

    def run(self, run: Run, events: Events) -> None:
        """Try configurations until there have been as many as wanted, or nothing new is left."""
        events("start", done=len(self.trials), total=self.cfg.trials)
        with _quiet():
            self._bury()
            while (asked := self._ask()) is not None:
                try:
                    trial = self._tried(Trial(asked.number, asked.params), run)
                except BaseException:
                    self._study.tell(asked, state=_failed())
                    raise
                asked.set_user_attr("seeds", trial.seeds)
                asked.set_user_attr("why", trial.why)
                if trial.why:
                    self._study.tell(asked, state=_failed())
                else:
                    self._study.tell(asked, [trial.values[each.name] for each in self.objectives])
                events("trial", done=min(len(self.trials), self.cfg.trials), total=self.cfg.trials, **trial.json())

    def _tried(self, trial: Trial, run: Run) -> Trial:
        seeds: list[Figures] = []
        for seed in self.cfg.tuning_seeds:
            try:
                figures = {name: value for name, value in run(trial.params, seed).items() if isfinite(value)}
            except WeftError as error:
                if type(error) is not WeftError and not any(each.values for each in self.trials):
                    raise  # wrong usage or input, and perhaps of all trials
                return replace(trial, seeds=seeds, why=f"seed {seed}: {error.message}")
            if odd := [each.name for each in self.objectives if each.name not in figures]:
                return replace(trial, seeds=seeds, why=f"seed {seed}: {odd[0]} is not finite")
            seeds.append(figures)
        return self._told(replace(trial, seeds=seeds))

    def _told(self, trial: Trial) -> Trial:
        return replace(trial, values={} if trial.why else {each.name: fmean(seed[each.name] for seed in trial.seeds) for each in self.objectives})

    def _ask(self) -> optuna.Trial | None:
        """A configuration that nobody has tried and that is possible; None when there is no more to do."""
        with self._alone():
            for _ in range(_AGAIN):
                known = self._study.get_trials(deepcopy=False)
                if sum(map(_counts, known)) >= self.cfg.trials:
                    return None
                asked = [each for each in known if _counts(each) or _passed(each)]  # interrupted ones left no trace
                self._study.sampler = self._sampler(len(asked), by_chance=bool(asked) and _passed(asked[-1]))
                trial = self._study.ask(self.choices)
                meant = self.meaning(trial.params)
                if meant is not None and not any(self.meaning(each.params) == meant for each in known if _counts(each)):
                    trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")
                    return trial
                self._study.tell(trial, state=_failed())  # passed over
        return None

    def _sampler(self, number: int, *, by_chance: bool) -> Any:
        samplers = optuna_module().samplers
        seed = xp.key(self.seed, number) % 2**32
        if by_chance or self.cfg.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if self.cfg.sampler == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=self.cfg.startup)
        if self.cfg.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=max(2, self.cfg.startup))
        return samplers.TPESampler(seed=seed, n_startup_trials=self.cfg.startup, multivariate=True)

    def _bury(self) -> None:
        """Trials of processes of this machine that are gone will never end: they are given up, and do not count."""
        running = optuna_module().trial.TrialState.RUNNING
        with self._alone():
            for each in self._study.get_trials(deepcopy=False, states=(running,)):
                host, _, pid = str(each.user_attrs.get("process", "")).rpartition(":")
                if host == socket.gethostname() and not _alive(int(pid)):
                    self._study.tell(each.number, state=_failed())

    # --- what was found

    @property
    def trials(self) -> list[Trial]:
        """What was tried to its end, failed ones too, in the order of being asked."""
        ended = [each for each in self._study.get_trials(deepcopy=False) if "why" in each.user_attrs and each.state.is_finished()]
        return [self._told(Trial(each.number, dict(each.params), list(each.user_attrs["seeds"]), why=each.user_attrs["why"])) for each in ended]

    def point(self, values: Figures) -> Point:
        """Figures as numbers to make small, in the order of the objectives."""
        return tuple(each.down(values[each.name]) for each in self.objectives)

    @property
    def front(self) -> list[Trial]:
        """The trials that no other is better than in everything, the best by the first objective first."""
        done = [trial for trial in self.trials if trial.values]
        points = [self.point(trial.values) for trial in done]
        return [done[k] for k in sorted(front(points), key=lambda k: points[k])]

    def judge(self, chosen: Sequence[Trial], run: Callable[[Trial, int], Figures], events: Events) -> list[dict[str, Any]]:
        """Records of the chosen trials with their figures on test seeds, and the gap: how much better the first objective looked on tuning seeds."""
        first = self.objectives[0]
        records = []
        for done, trial in enumerate(chosen):
            tested = [run(trial, seed) for seed in self.cfg.test_seeds]
            values = {each.name: fmean(seed[each.name] for seed in tested) for each in self.objectives} if tested else {}
            gap = first.down(values[first.name]) - first.down(trial.values[first.name]) if values else None
            records.append({**trial.json(), "tested": {"values": values, "seeds": tested}, "gap": gap})
            events("final", done=done + 1, total=len(chosen), number=trial.number, gap=gap)
        return records

    def report(self) -> dict[str, Any]:
        """All that was tried; `hypervolume` is up to the worst value of each objective among all trials."""
        trials = self.trials
        points = [self.point(trial.values) for trial in trials if trial.values]
        worst = tuple(map(max, zip(*points, strict=True))) if points else ()
        return {
            "objectives": [{"name": each.name, "better": "larger" if each.larger else "smaller"} for each in self.objectives],
            "counts": {"done": len(trials), "failed": sum(not trial.values for trial in trials)},
            "trials": [trial.json() for trial in trials],
            "hypervolume": hypervolume(points, worst),
        }


def optuna_module() -> Any:
    """Optuna. MissingExtra without it."""
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "search", "searching by trials") from None
    return optuna


def choices(space: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's distributions from what people write: a list to choose from, or {low, high} with log and step.

    A range of two ints gives ints. UsageError with everything that is wrong.
    """
    kinds = optuna_module().distributions
    made, wrong = {}, []
    for name, said in space.items():
        try:
            if isinstance(said, list | tuple):
                made[name] = kinds.CategoricalDistribution(list(said))
            elif isinstance(said, Mapping) and {"low", "high"} <= set(said) <= {"low", "high", "log", "step"}:
                whole = all(isinstance(said[end], int) for end in ("low", "high"))
                made[name] = (kinds.IntDistribution if whole else kinds.FloatDistribution)(**said)
            else:
                wrong.append(f"{name}: expected a list or low, high and perhaps log or step, got {said!r}")
        except (ValueError, TypeError) as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise UsageError("the search space cannot be", problems=wrong, hint="lr: {low: 1e-4, high: 1e-2, log: true}")
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's own messages are ours to give; its level of logging is put back."""
    logging = optuna_module().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            warnings.filterwarnings("ignore", category=optuna_module().exceptions.ExperimentalWarning)
            yield
    finally:
        logging.set_verbosity(before)


def _failed() -> Any:
    return optuna_module().trial.TrialState.FAIL


def _counts(trial: Any) -> bool:
    """Whether a trial is one of those that were asked for: it runs, or came to an end; not one that was passed over or interrupted."""
    return "process" in trial.user_attrs and ("why" in trial.user_attrs or not trial.state.is_finished())


def _passed(trial: Any) -> bool:
    """Whether a trial was passed over: it could not be run, or was known."""
    return "process" not in trial.user_attrs and trial.state.is_finished()


def _alive(pid: int) -> bool:
    """Whether another process runs: this one has no trial when it begins."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()
