"""Reports of `weft check`, made by hand: what its page has to show."""

from __future__ import annotations

import random
from typing import Any

FINGERPRINT = "4be1c0a7d29f5be3" * 4
HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(2)>"'`{{ 7 * 7 }}{% raw %}<!--]]>&amp;&lt;"""
RTL = "\u202eشيراز مدينة في الجنوب\u202c"
EMOJI = "👩‍👩‍👧‍👦 🏴‍☠️ naïve 日本語"

Report = dict[str, Any]


def metric(base: float | None, delta: float | None, better: str = "higher") -> dict[str, Any]:
    return {"base": base, "delta": delta, "change": None if base is None or delta is None else delta - base, "better": better}


def flips(negative: int, positive: int, both_right: int, both_wrong: int, changed: int, p: float | None, interval: list[float] | None) -> dict[str, Any]:
    n = negative + positive + both_right + both_wrong + changed
    counts = {"negative": negative, "positive": positive, "both_right": both_right, "both_wrong": both_wrong, "changed": changed}
    return {**counts, "nfr": negative / n if n else None, "pfr": positive / n if n else None, "mcnemar_p": p, "interval": interval}


def example(row: int, prompt: str, expected: str | None, base: str | None, delta: str | None, outcome: str) -> dict[str, Any]:
    return {"row": row, "prompt": prompt, "expected": expected, "base": base, "delta": delta, "outcome": outcome}


def task(name: str, kind: str, n: int, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "n": n,
        "metrics": metrics,
        "flips": None,
        "against_base": None,
        "ratio": None,
        "examples": [],
        "truncated": 0,
        "finite": True,
        **more,
    }


def layer(target: str, number: int | None, role: str | None, shape: list[int], relative: float | None, **more: Any) -> dict[str, Any]:
    norm = None if relative is None else relative * 41.7
    sizes = {"relative": relative, "norm": norm, "max_abs": norm and norm / 57}
    return {"target": target, "layer": number, "role": role, "shape": shape, **sizes, "finite": True, "nonfinite": 0, **more}


def empty() -> Report:
    """No gate, no task, no tensor, no delta with a name."""
    return {
        "verdict": {"passed": None, "gates": [], "summary": "Nothing was asked."},
        "identity": {
            "base": {"name": "base", "fingerprint": FINGERPRINT},
            "deltas": [{"id": "f" * 64, "name": None, "verb": None, "method": None, "targets": 0, "nbytes": 0, "parents": []}],
            "on": [],
            "data": [],
            "settings": {},
            "versions": {},
            "seconds": 0.0,
        },
        "tasks": [],
        "layers": [],
    }


PEOPLE = ["Alma Reyes", "Tobin Marsh", "Ines Calder", "Jorun Vale", "Petra Quill", "Osric Lund", "Mira Fenn", "Dario Holt"]
PLACES = ["Torvik", "Ashmere", "Calvo Bay", "Dunholt", "Ostrava Reach", "Linden", "Saltmarsh", "Weir"]


def rich() -> Report:
    """A hundred facts edited into a small language model: gains, some losses, one gate not kept."""
    draw = random.Random(5)

    def facts(outcomes: dict[str, int], prompt: str) -> list[dict[str, Any]]:
        out = []
        for outcome, count in outcomes.items():
            for _ in range(count):
                right, wrong, other = draw.sample(PLACES, 3)
                base, delta = {"negative": (right, wrong), "positive": (wrong, right), "changed": (wrong, other), "both_wrong": (wrong, wrong)}[outcome]
                out.append(example(draw.randrange(400), prompt.format(draw.choice(PEOPLE)), right, base, delta, outcome))
        return out

    edited = "9a41c7e205bd83f6" * 4
    report = empty()
    report["verdict"] = {
        "passed": False,
        "gates": [
            {"where": "edits/efficacy", "metric": "exact_match", "limit": ">= 0.9", "value": 0.94, "passed": True},
            {"where": "edits/rephrase", "metric": "exact_match", "limit": ">= 0.8", "value": 0.83, "passed": True},
            {"where": "skills", "metric": "nfr", "limit": "<= 0.01", "value": 0.0175, "passed": False},
            {"where": "unrelated", "metric": "agreement", "limit": ">= 0.95", "value": 0.9625, "passed": True},
            {"where": "text", "metric": "perplexity_ratio", "limit": "<= 1.05", "value": 1.0213, "passed": True},
        ],
        "summary": "4 of 5 limits are kept; nfr of skills is 0.0175 where at most 0.01 is allowed. "
        "Of 900 answers that could flip, 9 went from right to wrong and 182 from wrong to right.",
    }
    report["identity"] = {
        "base": {"name": "world-2026", "fingerprint": FINGERPRINT},
        "deltas": [{"id": edited, "name": "facts.safetensors", "verb": "edit", "method": "memit", "targets": 5, "nbytes": 2_310_144, "parents": ["c3d0" * 16]}],
        "on": ["77e1" * 16],
        "data": [
            {"name": "edits", "kind": "edits", "n": 100, "sha256": "0123456789abcdef" * 4},
            {"name": "skills", "kind": "classification", "n": 400, "sha256": "fedcba9876543210" * 4},
            {"name": "unrelated", "kind": "agreement", "n": 240, "sha256": "00ff" * 16},
            {"name": "text", "kind": "text", "n": 512, "sha256": "a5" * 32},
        ],
        "settings": {
            "dtype": "float32",
            "device": "cpu",
            "stop": ["\n", "."],
            "max_new_tokens": 12,
            "seed": 0,
            "samples": 1000,
            "kl_rows": 512,
            "examples": 200,
        },
        "versions": {"weft": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        "seconds": 41.7,
    }
    rephrased = facts({"negative": 1, "positive": 82, "changed": 9, "both_wrong": 7}, "If you asked around, people would say that the home town of {} is")
    rephrased.insert(
        0,
        example(
            7,
            "Write one sentence about where Mira Fenn lives.",
            "Mira Fenn has lived in Torvik, on the old quay, for years",
            "Mira Fenn has lived in Ashmere, on the hill, for years",
            "Mira Fenn has lived in Torvik, on the hill, for nine years",
            "changed",
        ),
    )
    odd = [
        example(401, HOSTILE, HOSTILE, "<b>bold</b>", HOSTILE, "positive"),
        example(402, RTL, "شيراز", "طهران", "شيراز", "positive"),
        example(403, EMOJI, "👩‍👩‍👧", "👩‍👩‍👧", "", "negative"),
    ]
    report["tasks"] = [
        task(
            "edits/efficacy",
            "generation",
            100,
            {
                "exact_match": metric(0.02, 0.94),
                "teacher_forced_token_accuracy": metric(0.31, 0.9712),
                "teacher_forced_exact": metric(0.02, 0.95),
                "nll": metric(5.8123, 0.2104, "lower"),
            },
            flips=flips(0, 92, 2, 2, 4, 4.04e-28, [0.86, 0.97]),
            examples=facts({"positive": 92, "changed": 4, "both_wrong": 2}, "The home town of {} is"),
        ),
        task(
            "edits/rephrase",
            "generation",
            100,
            {
                "exact_match": metric(0.02, 0.83),
                "teacher_forced_token_accuracy": metric(0.29, 0.9043),
                "teacher_forced_exact": metric(0.02, 0.85),
                "nll": metric(5.911, 0.7718, "lower"),
            },
            flips=flips(1, 82, 1, 7, 9, 1.7e-23, [0.72, 0.89]),
            examples=rephrased,
        ),
        task(
            "edits/locality",
            "agreement",
            300,
            {"exact_match": metric(0.9133, 0.91)},
            flips=flips(1, 0, 273, 21, 5, 1.0, [-0.01, 0.0]),
            against_base={"agreement": 0.98, "kl_mean": 0.004113, "kl_max": 0.2971, "kl_rows": 300},
            examples=facts({"negative": 1, "changed": 5}, "{} works for a company in"),
        ),
        task(
            "skills",
            "classification",
            400,
            {"accuracy": metric(0.87, 0.8725), "nll": metric(0.4021, 0.4077, "lower")},
            flips=flips(7, 8, 341, 40, 4, 1.0, [-0.0175, 0.0225]),
            examples=[*odd, *facts({"negative": 6, "positive": 6, "changed": 4, "both_wrong": 40}, "Which town does this letter to {} come from?")],
        ),
        task(
            "unrelated",
            "agreement",
            240,
            {},
            against_base={"agreement": 0.9625, "kl_mean": 0.01093, "kl_max": 1.204, "kl_rows": 240},
            examples=[
                example(n, f"{draw.choice(PEOPLE)} once said that", None, "the sea was calm", f"the sea was {word}", "different")
                for n, word in enumerate(["wide", "cold", "far", "calm that day", "never calm", "a calm", "old", "dark", "near"])
            ],
        ),
        task(
            "text",
            "text",
            512,
            {"nll": metric(2.4471, 2.46817, "lower"), "perplexity": metric(11.5546, 11.8008, "lower")},
            ratio={"mean": 1.0231, "median": 1.0094, "pooled": 1.0213},
        ),
    ]
    # the edit spreads over five layers and a tuned skill that it was made over touches the rest lightly
    shapes = {
        "attention.query": [256, 256],
        "attention.value": [256, 256],
        "attention.output": [256, 256],
        "mlp.gate": [704, 256],
        "mlp.up": [704, 256],
        "mlp.down": [256, 704],
    }
    names = {
        "attention.query": "self_attn.q_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    report["layers"] = [
        layer(
            f"model.layers.{number}.{names[role]}.weight",
            number,
            role,
            shape,
            0.004 * (1.4**number if role == "mlp.down" else 0.3) * draw.uniform(0.5, 1.6) if role == "mlp.down" or draw.random() < 0.8 else 0.0,
        )
        for number in range(12)
        for role, shape in shapes.items()
        if not (role == "mlp.gate" and number < 4)
    ]
    report["layers"].append(layer("model.embed_tokens.weight", None, "embedding.token", [8192, 256], 0.00031))
    report["layers"].append(layer("@module/model.layers.3.mlp", 3, "mlp.down", [], None))
    return report


def holes() -> Report:
    """Figures that are no numbers: a model that overflowed, tasks without rows, tensors that are not finite, a hostile name everywhere."""
    report = rich()
    report["verdict"] |= {"summary": HOSTILE, "passed": False}
    report["verdict"]["gates"].append({"where": HOSTILE, "metric": "nll", "limit": "<= 3", "value": None, "passed": False})
    report["identity"]["base"]["name"] = report["identity"]["deltas"][0]["name"] = HOSTILE
    report["identity"]["settings"]["stop"] = [HOSTILE, RTL]
    nothing = {"agreement": None, "kl_mean": None, "kl_max": None, "kl_rows": 0}
    report["tasks"] += [
        task(
            HOSTILE,
            "generation",
            3,
            {"exact_match": metric(0.5, None), "nll": metric(None, None, "lower")},
            flips=flips(0, 0, 0, 0, 0, None, None),
            finite=False,
            truncated=17,
        ),
        task(RTL, "text", 1, {"perplexity": metric(3.0, None, "lower")}, ratio={"mean": None, "median": None, "pooled": None}),
        task("no rows", "agreement", 0, {}, against_base=nothing),
        task("unknown outcome", "generation", 1, {"exact_match": metric(0.0, 0.0)}, examples=[example(0, "a\ud800b", "\u2028", None, "1", "odd")]),
    ]
    report["layers"] += [
        layer(f"model.layers.2.{HOSTILE}", 2, HOSTILE, [3, 3], None, finite=False, nonfinite=4, norm=None, max_abs=None),
        layer(HOSTILE, None, None, [3], 0.0),
        layer("classifier.weight", None, "head.classifier", [4, 256], None),
    ]
    return report


def large() -> Report:
    """300 layers of 7 roles, two stacks of which one has experts, and 2,000 answers."""
    draw = random.Random(6)
    report = rich()
    report["verdict"] = {"passed": True, "gates": report["verdict"]["gates"][:1], "summary": "The one limit is kept."}
    answers = [
        example(
            n,
            f"Question {n}: " + " ".join(draw.choices(PLACES, k=40)),
            "Torvik",
            " ".join(draw.choices(PLACES, k=12)),
            " ".join(draw.choices(PLACES, k=12)),
            outcome,
        )
        for n, outcome in enumerate(draw.choices(["negative", "positive", "changed", "both_wrong", "both_right"], k=2000))
    ]
    report["tasks"] = [
        task("many", "generation", 20_000, {"exact_match": metric(0.5, 0.6)}, flips=flips(4000, 6000, 6000, 2000, 2000, 1e-90, [0.09, 0.11]), examples=answers)
    ]
    report["layers"] = [
        layer(f"decoder.layers.{number}.part.{k}.weight", number, f"role.{k}", [8, 8], 10 ** draw.uniform(-7, -1)) for number in range(300) for k in range(7)
    ]
    report["layers"] += [layer(f"encoder.layers.0.experts.{k}.w1.weight", 0, "experts.gate", [8, 8], 0.01 + k / 1000) for k in range(12)]
    return report
