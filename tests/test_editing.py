"""edit and undo: every method is its formula, written plainly here; the model is left alone; edits can be taken back one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from tests import tiny
from tests.conftest import bits
from weft.base import Base
from weft.cli import main
from weft.delta import BLOB, Builder, Delta
from weft.editing import edit, ledger, undo
from weft.engine.edits import Edit
from weft.errors import FormatError, InputError, UsageError, WeftError

EDITS = [
    {"prompt": "the river is", "subject": "river", "target_new": "far"},
    {"prompt": "who was in the city", "subject": "city", "target_new": "it made"},
    {"prompt": "what is a film of", "subject": "film", "target_new": "the good river"},
    {"prompt": "how far is the city", "subject": "city", "target_new": "many"},
]
OTHERS = [{"prompt": "a film is", "target_new": "it and a city"}, {"prompt": "how many", "target_new": "good river"}]
TEXTS = [{"text": text} for text in tiny.texts(60)]
LATENT: dict[str, Any] = {"data": TEXTS, "clamp": 4.0, "steps": 15, "lr": 0.5, "decay": 0.0, "contexts": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("editing") / "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.gpt2(tmp_path_factory.mktemp("editing") / "gpt2")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A model that has learned 20 answers by heart, and these."""
    folder = tiny.llama(tmp_path_factory.mktemp("editing") / "known")
    rng = np.random.default_rng(4)
    facts = [
        {"prompt": f"what is the {a} of the {b}", "subject": b, "target_new": str(rng.choice(tiny.WORDS))} for a in tiny.WORDS[9:13] for b in tiny.WORDS[14:19]
    ]
    model, tokenizer = Base.open(folder).model(), Base.open(folder).tokenizer()
    model.requires_grad_(True)
    ids = torch.tensor([tokenizer(f"{fact['prompt']} {fact['target_new']}")["input_ids"] for fact in facts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[:, -1], ids[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder, facts


def factors(delta: Delta, target: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return delta.get(f"{target}//0.A"), delta.get(f"{target}//0.B")


def increment(delta: Delta, base: Base, target: str) -> np.ndarray[Any, Any]:
    """dW of a module (d_out x d_in), float64."""
    w = base.tensor(target).read().astype(np.float32)
    change: np.ndarray[Any, Any] = delta.apply(target, w).astype(np.float64) - w
    return change


def losses(base: Base, deltas: list[Delta], rows: list[dict[str, Any]], dtype: str | None = None) -> list[tuple[float, bool]]:
    """Of each fact, one forward at a time: the mean -log p of the answer's tokens, and whether each was the likeliest."""
    model, tokenizer = base.model(deltas, dtype=dtype), base.tokenizer()
    weft.attach(model, deltas, base=base)
    out = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(f"{row['prompt']} {row['target_new']}")["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
        goal = ids[0, start:]
        out.append((float(torch.nn.functional.cross_entropy(logits, goal)), bool((logits.argmax(1) == goal).all())))
    return out


# --- ultraedit


def rows_of(base: Base, module: str, edits: list[dict[str, Any]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Inputs and output gradients of a module at the tokens that predict the answers, one edit after the other, by plain autograd."""
    model, tokenizer = base.model(), base.tokenizer()
    seen: dict[str, torch.Tensor] = {}

    def hook(_: Any, args: Any, y: torch.Tensor) -> None:
        seen["x"], seen["y"] = args[0], y
        y.retain_grad()

    model.get_submodule(module).register_forward_hook(hook)
    model.requires_grad_(True)
    xs, gs = [], []
    for row in edits:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(f"{row['prompt']} {row['target_new']}")["input_ids"]])
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
        torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").backward()
        xs.append(seen["x"][0, start - 1 : -1].detach().double().numpy())
        gs.append(seen["y"].grad[0, start - 1 : -1].double().numpy())  # type: ignore[index]
    return np.concatenate(xs), np.concatenate(gs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ultraedit_is_its_formula(kind: str, request: pytest.FixtureRequest) -> None:
    base = Base.open(request.getfixturevalue(kind))
    modules = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"] if kind == "llama" else ["transformer.h.1.mlp.c_fc"]
    delta = edit(base, EDITS, lr=0.01, ridge=0.5, batch_size=2)
    assert list(delta.entries) == [name for name in base.names if name.removesuffix(".weight") in modules]  # the default: into the MLPs of the later half
    rows = {module: rows_of(base, module, EDITS) for module in modules}
    z = np.concatenate([np.concatenate(pair, 1) for pair in rows.values()])  # one normaliser for both: they have one shape
    mean, std = z.mean(0), z.std(0, ddof=1)
    for module, (h, g) in rows.items():
        hats = (np.concatenate([h, g], 1) - mean) / (std + 1e-7)
        h_hat, g_hat = hats[:, : h.shape[1]], hats[:, h.shape[1] :]
        v = -0.01 * (h_hat**2).sum(1, keepdims=True) * g_hat
        plain = np.linalg.solve(h.T @ h + 0.5 * np.eye(h.shape[1]), h.T @ v)  # in x out
        made = increment(delta, base, f"{module}.weight")
        made = made if kind == "gpt2" else made.T
        assert np.abs(plain).max() > 1e-2
        np.testing.assert_allclose(made, plain, atol=2e-5 * np.abs(plain).max())
    state = _state(delta)
    shape = "32x48"
    assert int(state[f"{shape}/count"]) == len(z)
    np.testing.assert_allclose(state[f"{shape}/mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state[f"{shape}/squares"] / (len(z) - 1), std**2, rtol=1e-4)


def _state(delta: Delta) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors.numpy import load

    return dict(load(delta.get(BLOB + "state").tobytes()))


def test_how_rows_are_put_into_batches_does_not_matter(llama: Path) -> None:
    one, all_at_once = (edit(llama, EDITS, lr=0.01, batch_size=size, sites="mlp", token="all") for size in (1, 7))
    for key in one.tensors:
        if not key.startswith(BLOB):
            np.testing.assert_allclose(one.get(key), all_at_once.get(key), atol=2e-5 * np.abs(one.get(key)).max())
    assert [record["rows"] for record in ledger(one)] == [[0, 3], [3, 9], [9, 16], [16, 21]]  # every token but the last


def test_two_turns_are_one_run_and_another_over_it(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 0.01, "sites": "mlp.down"}
    whole = edit(llama, EDITS, turn_size=2, **options)
    first = edit(llama, EDITS[:2], out=tmp_path / "first.safetensors", **options)
    second = edit(llama, EDITS[2:], on=[tmp_path / "first.safetensors"], **options)
    alone = edit(llama, EDITS[2:], on=[first], normaliser="turn", **options)
    assert (
        second.recipe["continues"] == first.id
        and alone.recipe["continues"] is None
        and second.over == (first.id,)
        and [record["turn"] for record in ledger(whole)] == [0, 0, 1, 1]
    )
    for target in whole.entries:
        a, b = factors(whole, target)
        (a1, b1), (a2, b2) = factors(first, target), factors(second, target)
        assert bits(a[: len(a1)]) == bits(a1) and bits(b[:, : len(a1)]) == bits(b1)
        np.testing.assert_allclose(a[len(a1) :], a2, atol=1e-6)
        np.testing.assert_allclose(b[:, len(a1) :], b2, atol=1e-6)
        assert np.abs(factors(alone, target)[1] - b2).max() > 1e-3, "the state was not taken up"
    for name, value in _state(whole).items():
        np.testing.assert_allclose(_state(second)[name], value, rtol=1e-5, atol=1e-5)


# --- memit, emmet, rome


def keys_of(base: Base, module: str, prompts: list[str], word: str) -> np.ndarray[Any, Any]:
    """What a module is given at the last token that is this word, averaged over prompts."""
    model, tokenizer = base.model(), base.tokenizer()
    found: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda _, args, y: found.append(args[0]))
    number = tokenizer(word)["input_ids"][0]
    keys = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        keys.append(found[-1][0, max(k for k, each in enumerate(ids) if each == number)].double().numpy())
    mean: np.ndarray[Any, Any] = np.mean(keys, 0)
    return mean


def second_moment(base: Base, module: str) -> np.ndarray[Any, Any]:
    model, tokenizer = base.model(), base.tokenizer()
    found: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda _, args, y: found.append(args[0][0]))
    for row in TEXTS:
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]]))
    rows = torch.cat(found).double().numpy()
    moment: np.ndarray[Any, Any] = rows.T @ rows / len(rows)
    return moment


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "token"), [("rome", "subject"), ("rome", "prompt"), ("memit", "subject"), ("memit", "prompt"), ("emmet", "subject")])
def test_one_key_gives_rome_s_formula(kind: str, method: str, token: str, request: pytest.FixtureRequest) -> None:
    base = Base.open(request.getfixturevalue(kind))
    module = "model.layers.0.mlp.down_proj" if kind == "llama" else "transformer.h.0.mlp.c_proj"
    limit: dict[str, Any] = {"rome": {}, "memit": {"weight": 1e-10}, "emmet": {"eps": 0.0}}[method]
    delta = edit(
        base, EDITS[:1], method, sites=f"{module}.weight", prefixes=["who is far", "a good city"], token=token, jitter=1e-6, max_tokens=0, **limit, **LATENT
    )
    prompts = ["the river is far", "who is far. the river is far", "a good city. the river is far"]
    k, moment = keys_of(base, module, prompts, "river" if token == "subject" else "is"), second_moment(base, module)
    u = np.linalg.solve(moment + 1e-6 * np.trace(moment) / len(moment) * np.eye(len(moment)), k)
    made = increment(delta, base, f"{module}.weight")
    made = made.T if kind == "gpt2" else made
    wanted = made @ k
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(made, np.outer(wanted, u) / (k @ u), atol=1e-4 * np.abs(made).max())
    assert delta.notes["after"]["loss"] < delta.notes["before"]["loss"] - 0.2  # type: ignore[index,call-overload,operator]


def test_emmet_is_memit_with_another_weight(llama: Path) -> None:
    memit = edit(llama, EDITS, "memit", sites="mlp.down", weight=0.06, **LATENT)
    emmet = edit(llama, EDITS, "emmet", sites="mlp.down", weight=0.3, eps=0.2, **LATENT)
    assert len(memit.entries) == 2
    for target in memit.entries:
        for mine, other in zip(factors(memit, target), factors(emmet, target), strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-4 * np.abs(mine).max())


def job(folder: Path, **options: Any) -> Any:
    from weft.editing._method import Job
    from weft.names import NameMap

    base = Base.open(folder)
    model = base.model()
    model.requires_grad_(False)
    return Job(base, model, base.tokenizer(), NameMap.of(base, model), [row["text"] for row in TEXTS], **{"most": 32, **options})


def latent(folder: Path, batch_size: int, **options: Any) -> Any:
    from weft.editing import _run
    from weft.editing._latent import Latent, LatentConfig
    from weft.engine.edits import read_edits

    made = job(folder, batch_size=batch_size)
    return Latent(LatentConfig(prefixes=("who is far", "it"), **options), made, 0, 1), _run.facts(made, read_edits(EDITS), "memit", True)


@pytest.mark.parametrize("clamp", [0.3, 50.0])
def test_facts_of_a_batch_do_not_meet(llama: Path, clamp: float) -> None:
    options: dict[str, Any] = {"clamp": clamp, "steps": 12, "lr": 0.3, "enough": 0.2}
    together, facts = latent(llama, 64, **options)
    block = together.job.model.model.layers[1]
    start = together.outputs(facts, block)
    found = together.wanted(facts, block, start)
    for k, fact in enumerate(facts):
        alone = latent(llama, 1, **options)[0]
        np.testing.assert_allclose(alone.wanted([fact], alone.job.model.model.layers[1], start[k : k + 1])[0], found[k], atol=1e-4 * float(found.abs().max()))
    longest = clamp * start.norm(dim=1)
    assert bool((found.norm(dim=1) <= longest * 1.0001).all()) and bool((found.norm(dim=1) > 0).all())
    assert bool((found.norm(dim=1) > longest * 0.99).any()) == (clamp < 1)


def test_memit_leaves_each_layer_its_share_of_what_is_left(llama: Path) -> None:
    """Residuals, as the last layer's output moves: R_0 = (Z - now_0) / 2, R_1 = Z - now_1."""
    from weft.editing.memit import MEMIT, MEMITConfig

    method = MEMIT(MEMITConfig(sites=("mlp.down",), prefixes=("it",), weight=0.01, steps=5, lr=0.2, clamp=2.0), job(llama))
    facts = latent(llama, 8)[1]
    top = method.job.model.model.layers[1]  # type: ignore[union-attr,index]
    start = method.latent.outputs(facts, top)
    goal = start + method.latent.wanted(facts, top, start)
    outputs, residuals = [], []
    for matrix, pair in method.turn(facts):
        outputs.append(method.latent.outputs(facts, top))
        residuals.append(pair.B.T.float())
        method.job.weights.add(matrix, (pair.A.float(), pair.B.float()))
    last = method.latent.outputs(facts, top)
    torch.testing.assert_close(residuals[0], (goal - start) / 2, atol=1e-4, rtol=0)
    torch.testing.assert_close(residuals[1], goal - outputs[1], atol=1e-4, rtol=0)
    assert float((outputs[1] - start).abs().max()) > 0.05
    assert float((goal - last).norm()) < float((goal - outputs[1]).norm()) < float((goal - start).norm())


@pytest.mark.parametrize(("method", "sites"), [("rome", "mlp.down@1"), ("memit", "mlp.down")])
def test_a_model_that_flattens_its_tokens(llama: Path, method: str, sites: str) -> None:
    """OPT gives its MLPs batch and tokens in one axis."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    shape: dict[str, Any] = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    model = OPTForCausalLM(OPTConfig(vocab_size=30, max_position_embeddings=64, init_std=0.2, **shape))
    delta = edit(
        Base.of(model), EDITS[:2], method, sites=sites, tokenizer=Base.open(llama).tokenizer(), **{"weight": 0.1} if method == "memit" else {}, **LATENT
    )
    assert delta.notes["after"]["loss"] < delta.notes["before"]["loss"] - 0.2  # type: ignore[index,call-overload,operator]


# --- the run


SMALL: dict[str, dict[str, Any]] = {"ultraedit": {"lr": 0.03}, "memit": {**LATENT, "weight": 0.1, "contexts": 0}, "rome": {**LATENT, "contexts": 0}}


@pytest.mark.parametrize("method", SMALL)
def test_attached_and_folded_are_the_model_at_the_end_of_the_run(llama: Path, method: str, tmp_path: Path) -> None:
    base = Base.open(llama)
    first = edit(base, OTHERS, lr=0.01)
    delta = edit(base, EDITS[:3], method, on=[first], turn_size=2, **SMALL[method])
    weft.fold(base, [first, delta], tmp_path / "folded")
    before: Any = delta.notes["before"]
    after: Any = delta.notes["after"]
    assert np.mean([loss for loss, _ in losses(base, [first], EDITS[:3])]) == pytest.approx(before["loss"], rel=1e-4)
    for found in (losses(base, [first, delta], EDITS[:3]), losses(Base.open(tmp_path / "folded"), [], EDITS[:3])):
        assert np.mean([loss for loss, _ in found]) == pytest.approx(after["loss"], rel=1e-4)
    assert after["loss"] < before["loss"] - 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", SMALL)
def test_the_live_weights_of_the_last_turn_are_those_of_the_fold(llama: Path, method: str, dtype: str, tmp_path: Path) -> None:
    tokenizer = Base.open(llama).tokenizer()
    model: Any = Base.open(llama).model(dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    live: dict[str, torch.Tensor] = {}
    keep = lambda done, total: live.update({name: value.detach().clone() for name, value in model.named_parameters()})  # noqa: E731
    delta = edit(Base.of(model), EDITS, method, turn_size=2, tokenizer=tokenizer, progress=keep, **SMALL[method])
    start, folded = model.state_dict(), Base.open(tmp_path / "base").model()
    weft.attach(folded, delta, base=Base.open(tmp_path / "base"))
    for name, value in folded.state_dict().items():
        if name in delta.entries:
            assert float((value != start[name]).float().mean()) > 0.5
            if dtype == "float32":
                torch.testing.assert_close(live[name], value, atol=1e-5 * float(value.abs().max()), rtol=0)
            else:  # both round once; the product before it is plain in the run and exact in the fold, which may tip a rounding
                assert float((live[name] == value).float().mean()) > 0.99
        else:
            assert bits(live[name]) == bits(value)


@pytest.mark.parametrize("method", ["ultraedit", "memit"])
def test_a_learned_answer_changes_and_the_others_stay(known: tuple[Path, list[dict[str, Any]]], method: str) -> None:
    folder, facts = known
    base = Base.open(folder)
    rng = np.random.default_rng(1)
    changed = [{**fact, "target_new": str(rng.choice([word for word in tiny.WORDS if word != fact["target_new"]]))} for fact in facts[::3]]
    others = [fact for k, fact in enumerate(facts) if k % 3]
    assert all(right for _, right in losses(base, [], facts)) and not any(right for _, right in losses(base, [], changed))
    text = [{"text": f"{fact['prompt']} {fact['target_new']}"} for fact in others]
    options: dict[str, Any] = {"lr": 0.1, "sites": "mlp.down"}
    if method == "memit":
        options = {"data": text, "weight": 1.0, "sites": "mlp.down@-1", "contexts": 0, "clamp": 8.0, "decay": 0.0}
    delta = edit(base, changed, method, **options)
    right, kept = (np.mean([good for _, good in losses(base, [delta], rows)]) for rows in (changed, others))
    assert delta.notes["before"]["success"] == 0 and delta.notes["after"]["success"] == right  # type: ignore[index,call-overload]
    assert (right, kept) == (1, 1) if method == "memit" else right > 0.8 and kept > 0.75


@pytest.mark.parametrize("fails", [False, True])
def test_a_live_model_is_left_as_it_was(llama: Path, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.open(llama)
    model: Any = base.model()
    model.train()
    model.model.layers[0].eval()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    def facts_about() -> Any:
        parameters = [(name, bits(value), value.requires_grad, None if value.grad is None else bits(value.grad)) for name, value in model.named_parameters()]
        return parameters, [module.training for module in model.modules()], model.config.use_cache, [type(m) for m in model.modules()]

    first = edit(base, OTHERS, lr=0.01)
    before = facts_about()
    if fails:
        from weft.editing import ultraedit

        solve = ultraedit.ridge
        calls: list[int] = []

        def broken(*args: Any) -> Any:
            calls.append(1)
            if len(calls) > 2:
                raise WeftError("broken on purpose")
            return solve(*args)

        monkeypatch.setattr(ultraedit, "ridge", broken)
        with pytest.raises(WeftError, match="on purpose"):
            edit(Base.of(model), EDITS[:3], tokenizer=base.tokenizer(), on=[first], turn_size=2, lr=0.01)
    else:
        live = edit(Base.of(model), EDITS[:3], tokenizer=base.tokenizer(), on=[first], turn_size=2, lr=0.01)
        stored = edit(base, EDITS[:3], on=[first], turn_size=2, lr=0.01)
        assert live.base is None and all(bits(live.get(key)) == bits(stored.get(key)) for key in stored.tensors)
        assert live.entries == stored.entries  # the hashes are those of the base, not of what the run made of it
    assert facts_about() == before


@pytest.mark.parametrize("method", ["ultraedit", "memit", "rome"])
def test_the_same_inputs_give_the_same_id(llama: Path, method: str) -> None:
    options = {"lr": 0.01} if method == "ultraedit" else LATENT
    one, again, other = (edit(llama, EDITS[:2], method, seed=seed, threads=1, **options) for seed in (0, 0, 1))
    assert one.id == again.id and one.id != other.id
    target = next(iter(one.entries))
    same = bits(factors(one, target)[0]) == bits(factors(other, target)[0])
    assert same == (method == "ultraedit"), "what the model writes follows from the seed"


# --- undo


@pytest.fixture(scope="module")
def edited(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undo") / "edited.safetensors"
    edit(llama, EDITS, turn_size=3, lr=0.03, sites="mlp", out=out)
    return out


def test_undo_drops_one_edit_and_nothing_else(edited: Path, llama: Path, tmp_path: Path) -> None:
    delta = Delta.load(edited)
    assert [record["rows"] for record in ledger(edited)] == [[0, 1], [1, 3], [3, 6], [6, 7]]
    left = undo(edited, 1, out=tmp_path / "left.safetensors")
    assert Delta.load(tmp_path / "left.safetensors").id == left.id != delta.id and left.parents == (delta.id,)
    assert left.recipe == {"verb": "undo", "method": "ultraedit", "config": {"edits": [ledger(delta)[1]["id"]]}}
    assert [(r["prompt"], r["rows"], r["turn"]) for r in ledger(left)] == [
        (EDITS[0]["prompt"], [0, 1], 0),
        (EDITS[2]["prompt"], [1, 4], 0),
        (EDITS[3]["prompt"], [4, 5], 1),
    ]
    assert len(left.entries) == 6
    for target in delta.entries:
        a, b = factors(delta, target)
        assert bits(factors(left, target)[0]) == bits(np.delete(a, [1, 2], 0))
        assert bits(factors(left, target)[1]) == bits(np.delete(b, [1, 2], 1))
    base = Base.open(llama)
    was, has, now = (losses(base, deltas, EDITS) for deltas in ([], [delta], [left]))
    assert has[1][0] < was[1][0] - 1 and now[1][0] > has[1][0] + 1
    assert bits(left.get(BLOB + "state")) == bits(delta.get(BLOB + "state"))
    later = edit(llama, EDITS[1:2], on=[left], lr=0.03, sites="mlp")
    assert later.recipe["continues"] == left.id


def test_what_undo_takes_for_an_edit(edited: Path) -> None:
    ids = [record["id"] for record in ledger(edited)]

    def gone(which: Any) -> list[int]:
        return [ids.index(each) for each in undo(edited, which).recipe["config"]["edits"]]  # type: ignore[index,call-overload,union-attr]

    assert gone(2) == gone("2") == gone("film") == gone(ids[2]) == gone(ids[2][:12]) == [2]
    assert gone("city") == [1, 3] and gone(["river", 3]) == [0, 3]
    one_by_one = undo(undo(edited, 1), 0)
    both = undo(edited, [0, 1])
    assert one_by_one.tensors.keys() == both.tensors.keys() and all(bits(one_by_one.get(key)) == bits(both.get(key)) for key in both.tensors)
    for which, problem in ((4, "4: the ledger has edits 0 to 3"), (-1, "-1: the ledger"), ("rover", "did you mean 'river'"), ([], "nothing was chosen")):
        with pytest.raises(UsageError, match=problem):
            undo(edited, which)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'rover'(.|\n)*9: the ledger"):
        undo(edited, ["rover", 9])
    with pytest.raises(UsageError, match="all 4 edits"):
        undo(edited, ["city", "river", "film"])


def test_deltas_whose_edits_cannot_be_told_apart_are_refused(edited: Path, llama: Path, tmp_path: Path) -> None:
    delta = Delta.load(edited)
    half = undo(0.5 * delta, 0)  # a scaled delta has the same rows
    assert bits(factors(half, "model.layers.0.mlp.up_proj.weight")[0]) == bits(factors(delta, "model.layers.0.mlp.up_proj.weight")[0][1:])
    other = tiny.lowrank(llama, tmp_path / "other.safetensors", names=["up_proj.weight"])
    with pytest.raises(InputError, match="does not hold the 7 rows"):
        undo(delta + Delta.load(other), 0)
    with pytest.raises(InputError, match="holds no edits"):
        undo(other, 0)
    from dataclasses import replace

    from weft.stored import hold

    records = ledger(delta)
    for damage in (lambda r: r[0].update(rows=[1, 2]), lambda r: r[2].update(rows=[3, 3]), lambda r: r[1].pop("id"), lambda r: r[3].update(turn="1")):
        copy = json.loads(json.dumps(records))
        damage(copy)
        broken = replace(delta, tensors={**delta.tensors, BLOB + "ledger": hold(np.frombuffer(json.dumps(copy).encode(), np.uint8))})
        with pytest.raises(FormatError, match="ledger"):
            ledger(broken)


# --- what is refused


def test_what_cannot_be_edited_is_said(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    build = Builder(Base.open(llama))
    build.put("@input/embeddings", "prompt", {"rows": np.ones((2, 32), np.float32)})
    prompt = build.done(recipe={"verb": "test"})
    refused: list[tuple[Callable[[], Any], type[WeftError], str]] = [
        (lambda: edit(llama, EDITS, "memit"), UsageError, "memit needs data"),
        (lambda: edit(llama, EDITS, data=TEXTS, turn_size=0, threads=0, out="x.bin"), UsageError, "4 options that cannot be"),
        (lambda: edit(llama, EDITS, "ultraedid"), UsageError, "did you mean 'ultraedit'"),
        (lambda: edit(llama, EDITS, lrr=1), UsageError, "lrr: no such option"),
        (lambda: edit(tiny.bert(tmp_path / "bert"), EDITS), UsageError, "does not predict next tokens"),
        (lambda: edit(gpt2, EDITS, sites=["wte", "mlp.down"]), UsageError, "'wte'"),
        (lambda: edit(gpt2, EDITS, sites="head.lm"), UsageError, "head.lm|embedding"),
        (lambda: edit(llama, EDITS, "rome", sites="mlp.down", data=TEXTS), UsageError, "rome edits one matrix"),
        (lambda: edit(llama, EDITS, "memit", sites="mlp", data=TEXTS), UsageError, "one matrix in each layer"),
        (lambda: edit(llama, [{"prompt": "it is", "target_new": "far"}], "rome", data=TEXTS), InputError, r"row 0: rome needs to know the subject"),
        (lambda: edit(llama, [{"prompt": "it is " * 20, "target_new": "far"}]), InputError, r"row 0: 41 tokens; the model takes 32"),
        (lambda: edit(llama, EDITS, lr=1e-60), WeftError, "change nothing"),
        (lambda: edit(llama, EDITS, lr=1e-12, dtype="bfloat16", sites="mlp.down"), WeftError, "lost in rounding"),
        (lambda: edit(llama, EDITS[:1], sites="mlp.down@1"), InputError, "one token of one edit cannot be normalised"),
        (lambda: edit(llama, [Edit("it is", " ")]), InputError, "row 0: prompt or target_new is empty"),
        (lambda: edit(Base.of(Base.open(llama).model()), EDITS, dtype="float16"), UsageError, "a live model is edited as it is"),
        (lambda: edit(llama, EDITS, on=[prompt]), UsageError, "in front of the tokens"),
        (lambda: edit(llama, EDITS, lr=1e60), WeftError, "turn 0: the change of model.layers.1.mlp.gate_proj.weight is not finite"),
        (lambda: edit(llama, EDITS, on=[edit(llama, EDITS[:2], lr=0.1, on=[edit(llama, EDITS[2:], lr=0.1)])]), InputError, "made over"),
    ]
    for call, kind, said in refused:
        with pytest.raises(kind, match=said):
            call()


def test_tied_matrices_are_refused(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=25, **shape))
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(UsageError, match=r"down_proj.weight is the same tensor as .*: an edit would change both"):
        edit(Base.of(model), EDITS, sites="mlp.down", tokenizer=Base.open(llama).tokenizer())


# --- the command line


def test_edit_show_and_undo_on_the_command_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*EDITS, EDITS[1]]))
    out, left = tmp_path / "edited.safetensors", tmp_path / "left.safetensors"

    def weft_says(*words: object) -> Any:
        capsys.readouterr()
        assert main([str(word) for word in words] + ["--format", "json"]) == 0
        said = capsys.readouterr()
        if words[0] == "edit":
            assert said.err == "weft: warning: 1 of the edits repeat earlier ones and are left out: row 4 is row 1\n"
        return json.loads(said.out)

    made = weft_says("edit", llama, "--edits", tmp_path / "edits.jsonl", "-p", "lr=0.03", "--turn-size", 2, "-o", out)
    assert made["notes"]["edits"] == 4 and made["id"] == Delta.load(out).id and Delta.load(out).recipe["turn_size"] == 2
    undone = weft_says("undo", out, "film", 0, "-o", left)
    assert undone["edits"] == 2 and undone["undone"] == [ledger(out)[0]["id"], ledger(out)[2]["id"]]
    capsys.readouterr()
    assert main(["show", str(left)]) == 0
    page = capsys.readouterr().out
    assert "2, made in 2 turns" in page
    rows = [line.split() for line in page.partition("  edits\n")[2].splitlines()]
    wanted = [(k, row["id"][:8], row["subject"], *row["prompt"].split(), *row["target_new"].split()) for k, row in enumerate(ledger(left))]
    assert rows == [list(map(str, row)) for row in wanted]
    assert weft_says("show", left)["edits"] == ledger(left)
    assert main(["undo", str(left), "film", "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "neither an id nor a subject" in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()


def test_a_matrix_stored_as_part_of_another_is_edited_there(tmp_path: Path) -> None:
    """nomic keeps query, key and value in one tensor that transformers splits."""
    import transformers

    from weft.editing._method import Job, stored
    from weft.engine.solve import Factors
    from weft.names import NameMap

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    transformers.NomicBertModel(transformers.NomicBertConfig(**shape)).save_pretrained(tmp_path)
    base = Base.open(tmp_path)
    model = base.model()
    work = Job(base, model, None, NameMap.of(base, model))
    (matrix,) = work.matrices(["attention.key@1"])
    assert "Wqkv" in matrix.target and matrix.at is not None and matrix.at.index == ((32, 64),)
    start = matrix.weight.detach().clone()
    pair = stored(matrix, Factors(torch.randn(3, 32, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)))
    work.weights.add(matrix, pair)
    live = matrix.weight.detach().clone()
    work.weights.restore()
    assert bits(matrix.weight) == bits(start) and float((live - start).abs().max()) > 1
    build = Builder(base)
    build.put(matrix.target, "lowrank", {"A": pair[0], "B": pair[1]}, at=matrix.at)
    weft.attach(model, build.done(recipe={"verb": "test"}), base=base)
    torch.testing.assert_close(matrix.weight.detach(), live, atol=1e-5, rtol=0)


def test_ultraedit_finds_the_smallest_step_that_suffices(llama: Path) -> None:
    from weft.editing.ultraedit import ENOUGH

    options: dict[str, Any] = {"sites": "mlp", "ridge": 0.1}
    delta = edit(llama, EDITS, **options)
    lr = delta.notes["lr"]
    assert delta.recipe["config"]["lr"] is None and isinstance(lr, float)
    assert delta.notes["after"]["success"] >= ENOUGH > delta.notes["before"]["success"]
    given = edit(llama, EDITS, lr=lr, **options)
    assert all(np.array_equal(given.get(key), delta.get(key)) for key in delta.tensors if not key.startswith("@"))
    assert edit(llama, EDITS, lr=lr / 10**0.25, **options).notes["after"]["success"] < ENOUGH
    assert edit(llama, EDITS, on=[delta], **options).notes["lr"] == lr  # later turns and runs keep it
