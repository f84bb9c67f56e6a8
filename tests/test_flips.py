"""Flips: counts, McNemar's exact test against values worked out by hand, bootstrap intervals; gates."""

from __future__ import annotations

from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest

from weft.checking import flips
from weft.checking.gates import judge, names, read_limits
from weft.checking.tasks import Task, cut, goes_on
from weft.errors import UsageError


@pytest.mark.parametrize(
    ("base", "delta", "same", "wanted"),
    [
        (True, False, False, "negative"),
        (False, True, False, "positive"),
        (True, True, True, "both_right"),
        (False, False, True, "both_wrong"),
        (False, False, False, "changed"),
    ],
)
def test_an_outcome_is_told_from_who_is_right(base: bool, delta: bool, same: bool, wanted: str) -> None:
    assert flips.outcome(base, delta, same) == wanted


@pytest.mark.parametrize(
    ("negative", "positive", "wanted"),
    [
        (0, 0, Fraction(1)),
        (0, 1, Fraction(1)),
        (0, 5, Fraction(2, 32)),  # 2 * C(5, 0) / 2^5
        (1, 5, Fraction(14, 64)),  # 2 * (1 + 6) / 2^6
        (2, 9, Fraction(2 * (1 + 11 + 55), 2048)),
        (3, 3, Fraction(1)),  # the tail is more than half
        (10, 25, Fraction(2 * sum(comb(35, k) for k in range(11)), 2**35)),
    ],
)
def test_mcnemar_is_the_exact_binomial(negative: int, positive: int, wanted: Fraction) -> None:
    assert flips.mcnemar(negative, positive) == flips.mcnemar(positive, negative) == float(wanted)


def test_mcnemar_of_many_flips_neither_overflows_nor_loses_its_tail() -> None:
    assert flips.mcnemar(0, 5000) == 0.0  # below the smallest double
    assert flips.mcnemar(4900, 5100) == pytest.approx(0.04659, abs=2e-5)  # the normal approximation with its correction gives 0.04657
    assert flips.mcnemar(0, 1000) == pytest.approx(2.0**-999)


def test_counts_and_rates() -> None:
    rows = ["negative"] * 3 + ["positive"] * 5 + ["both_right"] * 8 + ["both_wrong"] * 2 + ["changed"] * 2
    found = flips.count(rows, samples=400, seed=3)
    assert {name: found[name] for name in flips.OUTCOMES} == {"negative": 3, "positive": 5, "changed": 2, "both_wrong": 2, "both_right": 8}
    assert (found["nfr"], found["pfr"], found["mcnemar_p"]) == (3 / 20, 5 / 20, flips.mcnemar(3, 5))
    assert found["interval"] == flips.interval(3, 5, 20, samples=400, seed=3)


def test_the_interval_is_the_bootstrap_of_rows() -> None:
    """Against the percentiles of the distribution itself, worked out exactly for few rows."""
    low, high = flips.interval(2, 6, 40, samples=40000, seed=0)
    exact: dict[int, float] = {}
    for losses in range(41):
        for gains in range(41 - losses):
            ways = comb(40, losses) * comb(40 - losses, gains)
            exact[gains - losses] = exact.get(gains - losses, 0.0) + ways * 0.05**losses * 0.15**gains * 0.8 ** (40 - losses - gains)

    def quantile(share: float) -> float:
        total = 0.0
        for change in sorted(exact):
            total += exact[change]
            if total >= share:
                return change / 40
        raise AssertionError

    assert (low, high) == pytest.approx((quantile(0.025), quantile(0.975)))
    assert low < 4 / 40 < high


def test_the_interval_depends_on_the_seed_alone() -> None:
    drawn = [flips.interval(30, 50, 1000, samples=99, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert flips.interval(0, 0, 10, samples=50, seed=0) == [0.0, 0.0]
    assert flips.interval(10, 0, 10, samples=50, seed=0) == [-1.0, -1.0]


def test_the_rule_of_three() -> None:
    assert flips.bound(300) == 0.01 and flips.bound(2) == 1.0


# --- where answers end


def test_an_answer_ends_at_the_first_stop_text() -> None:
    assert cut("  Paris. It is\nnice", ("\n", ".")) == "Paris" and cut(" a\nb.", ("\n", ".")) == "a" and cut(" all of it ", ()) == "all of it"
    assert cut(".", (".",)) == "" and cut("one END two", (".", "END")) == "one"
    assert [goes_on(text, ("\n", ".")) for text in ("Paris", "Paris.", "Paris.\n", "U.S.", "3.14", "a\nb")] == [False, False, False, True, True, True]


# --- gates


def task(name: str, kind: str, *rows: dict[str, Any]) -> Task:
    return Task(name, kind, rows or ({},), tuple(range(len(rows or ({},)))))


TASKS = [
    task("edits/efficacy", "generation"),
    task("edits/locality", "agreement", {"prompt": "a"}),
    task("trec", "classification"),
    task("held-out", "text"),
]


def told(**over: Any) -> list[dict[str, Any]]:
    """Tasks of a report with a value of their own for everything."""
    flip = {"negative": 1, "positive": 2, "nfr": 0.02, "pfr": 0.04, "mcnemar_p": 0.5}
    out: list[dict[str, Any]] = []
    for number, each in enumerate(TASKS):
        metrics = {name: {"base": 0.25, "delta": 0.5 + number / 10, "change": 0.25 + number / 10, "better": b} for name, b in each.metrics.items()}
        parts = {"flips": flip if each.answers else None, "against_base": None, "ratio": None}
        if each.kind == "agreement":
            parts["against_base"] = {"agreement": 0.96, "kl_mean": 0.01, "kl_max": 0.3, "kl_rows": 1}
        if each.kind == "generation":
            parts["against_base"] = {"agreement": 0.625, "kl_mean": None, "kl_max": None, "kl_rows": 0}
        if each.kind == "text":
            parts["ratio"] = {"pooled": 1.02, "mean": 1.04, "median": 1.03}
        out.append({"name": each.name, "metrics": metrics, **parts})
    out[2]["metrics"]["nll"]["delta"] = over.get("nll", 0.7)
    return out


LAYERS = [
    {"relative": 0.02, "norm": 3.0, "max_abs": 0.5, "finite": True},
    {"relative": 0.09, "norm": 1.0, "max_abs": 0.7, "finite": True},
    {"relative": None, "norm": None, "max_abs": None, "finite": True},
]


def judged(gate: dict[str, Any], tasks: list[dict[str, Any]] | None = None, layers: list[dict[str, Any]] | None = None) -> list[tuple[Any, ...]]:
    found = judge(read_limits(gate, TASKS), tasks or told(), layers or LAYERS)
    return [(each["where"], each["metric"], each["limit"], each["value"], each["passed"]) for each in found]


def test_limits_hold_the_delta_s_side() -> None:
    assert judged({"edits/efficacy": {"exact_match": {"min": 0.5, "max": 0.4}, "change.exact_match": {"min": 0.3}, "mcnemar_p": {"min": 0.1}}}) == [
        ("edits/efficacy", "exact_match", ">= 0.5", 0.5, True),
        ("edits/efficacy", "exact_match", "<= 0.4", 0.5, False),
        ("edits/efficacy", "change.exact_match", ">= 0.3", 0.25, False),
        ("edits/efficacy", "mcnemar_p", ">= 0.1", 0.5, True),
    ]
    assert judged({"held-out": {"perplexity_ratio": {"max": 1.02}, "perplexity_ratio_mean": {"max": 1.03}, "perplexity_ratio_median": {"max": 1.03}}}) == [
        ("held-out", "perplexity_ratio", "<= 1.02", 1.02, True),
        ("held-out", "perplexity_ratio_mean", "<= 1.03", 1.04, False),
        ("held-out", "perplexity_ratio_median", "<= 1.03", 1.03, True),
    ]
    assert [each[3:] for each in judged({"edits/l*": {"agreement": {"min": 0.95}, "kl_mean": {"max": 0.01}, "kl_max": {"max": 0.2}}})] == [
        (0.96, True),
        (0.01, True),
        (0.3, False),
    ]


def test_a_glob_means_the_tasks_that_have_the_metric() -> None:
    assert [each[0] for each in judged({"*": {"nfr": {"max": 0.01}, "nll": {"max": 9}}})] == ["edits/efficacy", "trec", "edits/efficacy", "trec", "held-out"]


def test_limits_on_layers_hold_the_worst_one() -> None:
    assert judged({"layers": {"relative": {"max": 0.1}, "norm": {"min": 2}, "max_abs": {"max": 0.6}}}) == [
        ("layers", "relative", "<= 0.1", 0.09, True),
        ("layers", "norm", ">= 2", 1.0, False),
        ("layers", "max_abs", "<= 0.6", 0.7, False),
    ]
    wild = [*LAYERS, {"relative": None, "norm": None, "max_abs": None, "finite": False}]
    assert judged({"layers": {"relative": {"max": 0.1}}}, layers=wild) == [("layers", "relative", "<= 0.1", 0.09, False)]
    assert judged({"layers": {"relative": {"max": 0.1}}}, layers=LAYERS[2:]) == [("layers", "relative", "<= 0.1", None, False)]


def test_no_number_keeps_no_limit() -> None:
    assert [each[3:] for each in judged({"trec": {"nll": {"max": 9, "min": -9}}}, told(nll=None))] == [(None, False), (None, False)]


def test_everything_that_can_be_named_has_a_value() -> None:
    for each in TASKS:
        assert len(judged({each.name: {name: {"min": -1.0} for name in names(each)}})) == len(names(each))
    assert "exact_match" not in names(TASKS[1]) and "nfr" not in names(TASKS[1])  # nobody knows the right answers
    assert {"exact_match", "nfr", "kl_max"} <= set(names(task("x", "agreement", {"prompt": "a", "completion": " b"})))


def test_all_that_is_wrong_with_a_gate_is_told_at_once() -> None:
    gate = {
        "edits/eficacy": {"exact_match": {"min": 0.9}},
        "trec": {"acuracy": {"min": 0.9}, "nll": {"mx": 3}, "nfr": 0.01, "pfr": {"max": "low"}},
        "held-out": {"nfr": {"max": 0.1}},
        "edits/*": ["exact_match"],
        "layers": {"relativ": {"max": 0.1}},
    }
    with pytest.raises(UsageError) as error:
        read_limits(gate, TASKS)
    wanted = ["'edits/efficacy'", "'accuracy'", "{'mx': 3}", "0.01", "'low'", "'nfr'", "['exact_match']", "'relative'"]
    assert len(error.value.problems) == len(wanted)
    for said, part in zip(error.value.problems, wanted, strict=True):
        assert part in said
    with pytest.raises(UsageError, match="it has no limit"):
        read_limits({}, TASKS)
    assert read_limits(None, TASKS) == []


def test_a_gate_file_is_yaml(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text('"*": {nfr: {max: 1e-2}}\nlayers:\n  relative: {max: 0.1}\n')
    assert [(limit.where, limit.text) for limit in read_limits(tmp_path / "gate.yaml", TASKS)] == [
        ("edits/efficacy", "<= 0.01"),
        ("trec", "<= 0.01"),
        ("layers", "<= 0.1"),
    ]
    (tmp_path / "gate.yaml").write_text("trec: {nll: {max: .nan}}\n")
    with pytest.raises(UsageError, match=r"gate\.yaml: 1 problem"):
        read_limits(tmp_path / "gate.yaml", TASKS)
