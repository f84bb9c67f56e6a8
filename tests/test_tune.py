"""tune, end to end on tiny models: every space, objective and guard; exact resume; what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from weft import config, methods
from weft.attaching import attach, detach
from weft.base import Base
from weft.delta import Delta
from weft.engine.events import Event
from weft.errors import InputError, MismatchError, UsageError, WeftError
from weft.ops import OpEntry, Ref
from weft.tuning import tune
from weft.tuning.space import square_of_change

TEXT = "who what where the a city person is name of old new river born did in on one two three four five six"
WORDS = TEXT.split()
SPACES = {"lora": {"rank": 2}, "bitfit": {}, "full": {}}
OPTIMIZERS = ("adamw", "adamr")
QUICK = {"batch_size": 4, "steps": 4, "lr": 0.01, "progress": lambda event: None}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: k for k, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<mask>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def save_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    import transformers as t

    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.2}
    torch.manual_seed(7)
    if kind == "llama":
        model: Any = t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=2, attention_bias=True, mlp_bias=True, pad_token_id=0))
    elif kind == "mixtral":
        model = t.MixtralForCausalLM(t.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2))
    else:
        model = t.BertModel(t.BertConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {kind: save_model(root / kind, kind) for kind in ("llama", "bert", "mixtral")}
    made["llama16"] = save_model(root / "llama16", "llama", torch.bfloat16)
    return made


ROWS = [{"text": " ".join(WORDS[(k * j + k) % len(WORDS)] for j in range(3 + k % 6))} for k in range(18)]
LABELLED = [
    {"text": f"{WORDS[k % 20]} is {'old river old' if k % 2 else 'new born new'} {WORDS[(k * 7) % 19]}", "label": "o" if k % 2 else "n"} for k in range(24)
]


def logits(model: Any, base: Base) -> torch.Tensor:
    with torch.no_grad():
        batch = base.tokenizer()([row["text"] for row in ROWS[:5]], padding=True, return_tensors="pt")
        out: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return out.float()[batch["attention_mask"].bool()] if out.ndim == 3 else out.float()


class Watch:
    """The loss of each step, and what the model said after the last one."""

    def __init__(self, base: Base) -> None:
        self.losses: list[float] = []
        self.base = base
        self.last = torch.zeros(0)

    def progress(self, event: Event) -> None:
        if event["event"] == "step":
            self.losses.append(event["loss"])

    def evaluate(self, run: Any) -> dict[str, float]:
        self.last = logits(run.model, self.base)
        return {}


@pytest.mark.parametrize("dtype", ["llama", "llama16"])
@pytest.mark.parametrize("space", SPACES)
def test_every_space_learns_and_its_file_says_what_was_learnt(folders: dict[str, Path], tmp_path: Path, space: str, dtype: str) -> None:
    base = Base.open(folders[dtype])
    watch, out = Watch(base), tmp_path / "d.safetensors"
    options = {**QUICK, **SPACES[space], "steps": 12, "progress": watch.progress}
    delta = tune(base, ROWS, method=space, out=out, evaluate=watch.evaluate, evaluate_every=12, **options)
    assert sum(watch.losses[-3:]) < 0.9 * sum(watch.losses[:3])
    stored = Delta.load(out)
    assert stored.id == delta.id and stored.recipe["method"] == space and stored.recipe["config"]["space"]["name"] == space
    assert stored.foldable and stored.base == base.fingerprint
    kinds = {op.op for entry in stored.entries.values() for op in entry.ops}
    assert kinds == {{"lora": "lowrank", "bitfit": "dense", "full": "assign"}[space]}
    model = base.model()
    before = logits(model, base)
    attach(model, stored, base=base)
    after = logits(model, base)
    change = float((watch.last - before).abs().max())
    assert change > 0.05
    tolerance = 1e-4 if dtype == "llama" else 0.25 * change  # bfloat16: the file's float32 factors, or weights, are rounded once more
    assert float((after - watch.last).abs().max()) < tolerance


@pytest.mark.parametrize("space", SPACES)
def test_the_same_seed_gives_the_same_id(folders: dict[str, Path], space: str) -> None:
    one, two = (tune(folders["llama"], ROWS, method=space, **QUICK, **SPACES[space]) for _ in range(2))
    other = tune(folders["llama"], ROWS, method=space, seed=1, **QUICK, **SPACES[space])
    assert one.id == two.id != other.id
    assert {key: tensor.sha256 for key, tensor in one.tensors.items()} != {key: tensor.sha256 for key, tensor in other.tensors.items()}


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(folders: dict[str, Path]) -> None:
    losses: dict[bool, list[float]] = {}
    for on in (False, True):
        seen: list[dict[str, Any]] = []
        delta = tune(folders["llama"], ROWS, autocast=on, steps=8, batch_size=8, lr=1e-2, progress=seen.append)
        losses[on] = [event["loss"] for event in seen if event["event"] == "step"]
        assert {tensor.dtype for tensor in delta.tensors.values()} == {"F32"}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.05) and losses[True][-1] < 0.8 * losses[True][0]


def test_the_recipe_holds_all_that_matters(folders: dict[str, Path]) -> None:
    delta = tune(folders["llama"], ROWS, guards=["l2"], seed=5, rank=3, schedule="rex", **QUICK)
    recipe = delta.recipe
    assert (recipe["verb"], recipe["method"], recipe["seed"]) == ("tune", "lora", 5)
    assert {part: recipe["config"][part]["name"] for part in ("space", "objective", "optimizer", "schedule")} == {
        "space": "lora",
        "objective": "causal-lm",
        "optimizer": "adamw",
        "schedule": "rex",
    }
    assert recipe["config"]["space"]["rank"] == 3 and recipe["config"]["loop"]["steps"] == 4 and recipe["config"]["guards"][0]["name"] == "l2"
    assert len(recipe["data"]) == len(recipe["tokenizer"]) == 64 and set(recipe["versions"]) == {"weft", "torch", "transformers"}
    assert recipe["threads"] == torch.get_num_threads()
    assert set(delta.notes) == {"loss", "steps", "tokens", "seconds", "parameters"}


class Stop:
    """Interrupts a run at its first saved state."""

    def __call__(self, event: Event) -> None:
        if event["event"] == "save":
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("space", [*SPACES, "dora"])
def test_k_and_k_steps_are_2k_steps(folders: dict[str, Path], tmp_path: Path, space: str, optimizer: str) -> None:
    options: dict[str, Any] = {"method": space, **SPACES.get(space, {})}
    if space == "dora":
        options = {"method": "lora", "rank": 2, "dora": True, "dropout": 0.3, "guards": ["l2"]}
    options |= {**QUICK, "objective": "classification", "optimizer": optimizer, "steps": 8}
    whole = tune(folders["bert"], LABELLED, **options)
    out = tmp_path / "d.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tune(folders["bert"], LABELLED, out=out, save_every=4, **{**options, "progress": Stop()})
    state = tmp_path / "d.safetensors.state"
    assert state.exists() and not out.exists()
    assert tune(folders["bert"], LABELLED, out=out, resume=state, **options).id == whole.id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors"]


def test_a_state_goes_with_its_own_data_and_options(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(folders["llama"], ROWS, out=tmp_path / "d.safetensors", save_every=2, **{**QUICK, "progress": Stop()})
    with pytest.raises(MismatchError, match="data"):
        tune(folders["llama"], ROWS[1:], resume=tmp_path / "d.safetensors.state", **QUICK)
    with pytest.raises(MismatchError, match="seed"):
        tune(folders["llama"], ROWS, seed=2, resume=tmp_path / "d.safetensors.state", **QUICK)


@pytest.mark.slow
def test_a_killed_run_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    out, state = tmp_path / "d.safetensors", tmp_path / "d.safetensors.state"
    script = (
        "import sys, time; from weft.tuning import tune; from tests.test_tune import ROWS, QUICK\n"
        "tune(sys.argv[1], ROWS, out=sys.argv[2], save_every=1, **{**QUICK, 'steps': 40, 'progress': lambda e: time.sleep(0.05)})"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    running = subprocess.Popen([sys.executable, "-c", script, str(folders["llama"]), str(out)], env=env)
    end = time.monotonic() + 240
    while not state.exists() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.4)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert state.exists() and not out.exists()
    options = {**QUICK, "steps": 40}
    threads = torch.get_num_threads()
    resumed = tune(folders["llama"], ROWS, out=out, resume=state, threads=threads, **options)
    assert resumed.id == tune(folders["llama"], ROWS, threads=threads, **options).id
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


# --- objectives


@pytest.mark.parametrize("space", SPACES)
def test_classification_adds_a_head_and_names_its_labels(folders: dict[str, Path], tmp_path: Path, space: str) -> None:
    base = Base.open(folders["bert"])
    delta = tune(base, LABELLED, method=space, objective="classification", **{**QUICK, "steps": 100 if space == "bitfit" else 40}, **SPACES[space])
    delta.save(tmp_path / "d.safetensors")
    delta = Delta.load(tmp_path / "d.safetensors")
    assert delta.config["architectures"] == ["BertForSequenceClassification"] and delta.config["label2id"] == {"n": 0, "o": 1}
    added = {name: entry.shape for name, entry in delta.entries.items() if entry.change is not None}
    assert added == {"classifier.weight": (2, 32), "classifier.bias": (2,)}
    assert all(entry.change.kind == "add" for entry in delta.entries.values() if entry.change)
    assert abs(delta.get("classifier.bias//0.values")).max() > 0  # it starts at zero, so it was trained
    model = base.model([delta])
    attach(model, delta, base=base)
    batch = base.tokenizer()([row["text"] for row in LABELLED], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.argmax(-1).tolist()
    assert sum(model.config.id2label[k] == row["label"] for k, row in zip(said, LABELLED, strict=True)) >= 22


def test_the_head_starts_the_same_in_every_space_and_decoders_get_one_too(folders: dict[str, Path]) -> None:
    heads = [
        tune(folders["llama"], LABELLED, method=s, objective="classification", **{**QUICK, "lr": 1e-9, "steps": 1}, **SPACES[s]) for s in ("lora", "bitfit")
    ]
    first, second = (delta.get("score.weight//0.values") for delta in heads)
    assert first.shape == (2, 32) and abs(first).max() > 0.05
    torch.testing.assert_close(torch.tensor(first), torch.tensor(second), rtol=0, atol=1e-7)


def test_masked_lm_adds_the_head_that_the_encoder_lacks(folders: dict[str, Path]) -> None:
    losses: list[float] = []
    options = {**QUICK, "steps": 25, "progress": lambda event: losses.append(event["loss"]) if event["event"] == "step" else None}
    delta = tune(folders["bert"], ROWS, objective="masked-lm", rank=4, **options)
    added = {name for name, entry in delta.entries.items() if entry.change is not None}
    assert {"cls.predictions.transform.dense.weight", "cls.predictions.bias"} <= added and delta.config["architectures"] == ["BertForMaskedLM"]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_packed_examples_do_not_see_each_other(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    found = methods.get("objective", "causal-lm")
    apart, joined = (found.run(config.make(found.config, {"packing": p, "max_length": 24}, ""), base, base.tokenizer(), ROWS) for p in (False, True))
    assert len(joined.examples) < len(apart.examples)
    model = base.model()
    model.config.use_cache = False  # as tune sets it: with a cache transformers doesn't look at positions
    joined.check(model)
    batches = [goal.collate(goal.examples, [0] * len(goal.examples)) for goal in (apart, joined)]
    assert apart.weight(batches[0]) == joined.weight(batches[1])
    with torch.no_grad():
        one, two = apart.loss(model, batches[0]), joined.loss(model, batches[1])
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)

    class Blurred(torch.nn.Module):
        """Looks through the seam: ignores the positions."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = base.model()

        def forward(self, input_ids: torch.Tensor, position_ids: Any = None) -> Any:
            return self.inner(input_ids=input_ids)

    with pytest.raises(UsageError, match="see each other"):
        joined.check(Blurred())


def test_prompts_without_a_tokenizer_work_as_ids(folders: dict[str, Path]) -> None:
    rows = [{"input_ids": [5 + (k + j) % 20 for j in range(6)], "labels": [-100, -100, *[5 + (k + j) % 20 for j in range(2, 6)]]} for k in range(8)]
    assert tune(folders["llama"], rows, **QUICK).notes["steps"] == 4


# --- spaces


def test_lora_reaches_experts_that_live_stacked(folders: dict[str, Path]) -> None:
    base = Base.open(folders["mixtral"])
    delta = tune(base, ROWS, targets="experts", rank=2, **{**QUICK, "batch_size": 8})
    experts = [name for name in base.names if ".experts." in name]
    assert sorted(delta.entries) == experts and len(experts) == 2 * 3 * 3
    moved = [name for name in experts if abs(delta.get(f"{name}//0.B")).max() > 0]
    assert len(moved) >= len(experts) - 3  # an expert may see no token in so short a run


@pytest.mark.parametrize(("options", "rounding"), [({"init": "pissa"}, 0.0), ({"dora": True}, 2e-5), ({"rslora": True}, 0.0)])
def test_variants_of_lora_start_at_the_base(folders: dict[str, Path], options: dict[str, Any], rounding: float) -> None:
    base = Base.open(folders["llama"])
    first: list[float] = []
    progress = {"progress": lambda event: first.append(event["loss"]) if event["event"] == "step" else None}
    delta = tune(base, ROWS, rank=4, alpha=8, **{**QUICK, **progress}, **options)
    tune(base, ROWS, rank=4, alpha=8, **{**QUICK, **progress})
    assert first[0] == pytest.approx(first[4], rel=max(rounding, 2e-6)) and first[3] != pytest.approx(first[7], rel=1e-4)
    (op, *rest) = delta.entries["model.layers.0.mlp.up_proj.weight"].ops
    assert op.cfg["scale"] == (4.0 if options.get("rslora") else 2.0)
    assert [o.op for o in rest] == (["magnitude"] if options.get("dora") else []) and ("A0" in op.t) == ("init" in options)
    if "init" in options:
        w = torch.tensor(base.tensor("model.layers.0.mlp.up_proj.weight").read())
        left = w - 2.0 * torch.tensor(delta.get("model.layers.0.mlp.up_proj.weight//0.B0") @ delta.get("model.layers.0.mlp.up_proj.weight//0.A0"))
        assert float(torch.linalg.matrix_norm(left, 2)) == pytest.approx(float(torch.linalg.svdvals(w)[4]), rel=1e-4)
        assert not (delta.get("model.layers.0.mlp.up_proj.weight//0.A") == delta.get("model.layers.0.mlp.up_proj.weight//0.A0")).all()


def test_full_training_keeps_the_bases_dtype_and_what_did_not_change(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama16"])
    delta = tune(base, ROWS, method="full", targets="mlp@1", **QUICK)
    assert set(delta.entries) == {name for name in base.names if name.startswith("model.layers.1.mlp")}
    assert all(tensor.dtype == "BF16" for tensor in delta.tensors.values())
    with pytest.raises(WeftError, match="no tensor has changed"):
        tune(base, ROWS, method="full", targets="mlp@1", **{**QUICK, "lr": 1e-9})


def test_bitfit_may_take_the_norms_along(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    with_norms = set(tune(base, ROWS, method="bitfit", norms=True, **QUICK).entries)
    without = set(tune(base, ROWS, method="bitfit", exclude="attention", **QUICK).entries)
    assert without == {name for name in base.names if name.endswith(".bias") and "self_attn" not in name}
    assert with_norms == {name for name in base.names if name.endswith(".bias") or "norm" in name}


# --- guards


def test_the_l2_guard_measures_the_real_change() -> None:
    gen = torch.Generator().manual_seed(1)
    w, a, b, a0, b0, m, d = (torch.randn(shape, generator=gen) for shape in [(7, 5), (3, 5), (7, 3), (2, 5), (7, 2), (7,), (7, 5)])
    tensors = {"A": a, "B": b, "A0": a0, "B0": b0, "m": m, "d": d}
    factors = {"A": Ref("A"), "B": Ref("B")}

    def measured(*ops: OpEntry) -> float:
        return float(square_of_change(ops, tensors, lambda: w))

    both = {**factors, "A0": Ref("A0"), "B0": Ref("B0")}
    low = w + 2 * (b @ a)
    assert measured(OpEntry("lowrank", {"scale": 2.0}, factors)) == pytest.approx(float((2 * b @ a).square().sum()), rel=1e-5)
    assert measured(OpEntry("lowrank", {"scale": 2.0}, both)) == pytest.approx(float((2 * (b @ a - b0 @ a0)).square().sum()), rel=1e-5)
    assert measured(OpEntry("dense", {"scale": 0.5}, {"values": Ref("d")})) == pytest.approx(float((d / 2).square().sum()), rel=1e-5)
    dora = m[:, None] * low / low.norm(dim=1, keepdim=True)
    chain = (OpEntry("lowrank", {"scale": 2.0}, factors), OpEntry("magnitude", {"axis": 0}, {"m": Ref("m")}))
    assert measured(*chain) == pytest.approx(float((dora - w).square().sum()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_the_l2_guard_holds_the_weights_back(folders: dict[str, Path], space: str) -> None:
    base = Base.open(folders["bert"])

    def change(**options: Any) -> float:
        delta = tune(base, LABELLED, method=space, objective="classification", **{**QUICK, "steps": 10}, **SPACES[space], **options)
        total = 0.0
        for name, entry in delta.entries.items():
            if entry.change is None:
                w = torch.tensor(base.tensor(name).read())
                total += float((delta.apply(name, w) - w).square().sum())
        return total

    assert change(guards=["l2"], strength=30.0) < 0.3 * change()


# --- the edges


def test_a_delta_over_another_needs_it(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Base.open(folders["llama"])
    first = tune(base, ROWS, rank=2, **QUICK)
    first.save(tmp_path / "first.safetensors")
    watch = Watch(base)
    options = {**QUICK, "progress": watch.progress}
    second = tune(base, ROWS, method="bitfit", on=[tmp_path / "first.safetensors"], evaluate=watch.evaluate, evaluate_every=4, **options)
    assert second.over == (first.id,)
    model = base.model()
    with pytest.raises(MismatchError):
        attach(model, second, base=base)
    attach(model, [first, second], base=base)
    torch.testing.assert_close(logits(model, base), watch.last, rtol=1e-4, atol=1e-4)
    assert second.id != tune(base, ROWS, method="bitfit", **QUICK).id


def test_a_live_model_is_left_as_it_was(folders: dict[str, Path]) -> None:
    model = Base.open(folders["llama"]).model()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(type(m), m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    base = Base.of(model)
    delta = tune(base, ROWS, tokenizer=Base.open(folders["llama"]).tokenizer(), **QUICK)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert flags == ([(type(m), m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters()) and model.config.use_cache is True
    attach(model, delta)
    detach(model)
    with pytest.raises(UsageError, match="must be a checkpoint"):
        tune(base, ROWS, method="full", tokenizer=Base.open(folders["llama"]).tokenizer(), **QUICK)
    with pytest.raises(UsageError, match="LlamaForSequenceClassification"):
        tune(base, LABELLED, objective="classification", tokenizer=Base.open(folders["llama"]).tokenizer(), **QUICK)


def test_all_wrong_options_are_told_at_once(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError) as caught:
        tune(folders["llama"], ROWS, rank=0, lr=-1.0, warmup="x", batch_size=2.5)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {"space.rank", "optimizer.lr", "schedule.warmup", "loop.batch_size"}
    with pytest.raises(UsageError, match="did you mean 'rank'"):
        tune(folders["llama"], ROWS, rnk=3)
    with pytest.raises(UsageError, match="'lora'"):
        tune(folders["llama"], ROWS, method="loraa")


def test_parts_may_be_named(folders: dict[str, Path]) -> None:
    delta = tune(folders["llama"], ROWS, **{**QUICK, "lr": "0.02", "space.targets": ("attention.query",), "loop.epochs": 1})
    assert delta.recipe["config"]["optimizer"]["lr"] == 0.02 and len(delta.entries) == 2


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"out": "delta.bin"}, UsageError, "safetensors"),
        ({"save_every": 2}, UsageError, "save_every needs"),
        ({"targets": "nowhere"}, UsageError, "nowhere"),
        ({"threads": 0}, UsageError, "threads"),
        ({"objective": "classification"}, InputError, "has no 'label'"),
    ],
)
def test_what_cannot_be_is_refused_before_training(folders: dict[str, Path], options: dict[str, Any], kind: type[WeftError], said: str) -> None:
    with pytest.raises(kind, match=said):
        tune(folders["llama"], ROWS, **{**QUICK, **options})


def test_an_unfinished_run_leaves_no_delta(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="not finite"):
        tune(folders["llama"], ROWS, out=tmp_path / "d.safetensors", log=tmp_path / "log.jsonl", **{**QUICK, "lr": 1e30, "warmup": 0, "clip": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["event"] == "start"
