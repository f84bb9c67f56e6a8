"""Attach on plain modules: the three ways agree with the oracle, gradients, stacking, detaching, refusals."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from weft import xp
from weft.attaching import attach, attached, check_ran, detach, handles, probe
from weft.attaching.swap import Attached
from weft.base import Base
from weft.delta import Builder, Delta
from weft.errors import MismatchError, UsageError, WeftError
from weft.ops import At, Generator, Op, Ref, chain
from weft.ops import get as op_named
from weft.stored import hold


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Scaled(nn.Embedding):
    """A lookup that does more than nn.Embedding's: adding to its output is not changing its weight."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3.0


class Net(nn.Module):
    """One module `m`, and `delta` as an attribute of its own in the way."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.m(x)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: floats(2, 3, 6)),
    "square, no bias": (lambda: nn.Linear(6, 6, bias=False), lambda: floats(2, 6)),
    "conv1d": (lambda: randomised(Conv1D(6, 4)), lambda: floats(2, 3, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: floats(2, 4, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), lambda: floats(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(8, 6, padding_idx=0), lambda: torch.tensor([[0, 3, 7], [2, 2, 5]])),
    "scaled embedding": (lambda: Scaled(8, 6), lambda: torch.tensor([[0, 3, 7]])),
    "norm": (lambda: randomised(nn.LayerNorm(6)), lambda: floats(2, 6)),
}


def randomised(m: nn.Module) -> nn.Module:
    for p in m.parameters():
        nn.init.normal_(p)
    return m


OPS = ("dense", "assign", "sparse", "lowrank", "svd", "bilinear", "kron", "tucker", "scale_shift", "magnitude", "permute", "seeded")


def random_fields(kind: str, shape: tuple[int, ...], gen: Generator) -> dict[str, Any]:
    """Tensors far from the identity for any op."""
    op = op_named(kind)
    if kind == "permute":
        return {"perm": gen.permutation(shape[0])}
    if kind == "assign":
        return {"index": np.sort(gen.permutation(int(np.prod(shape)))[:5]), "values": gen.normal((5,))}
    sizes = {"count": 3} if kind == "seeded" else {"rank": 2} if kind in ("lowrank", "svd", "bilinear", "tucker") else {}
    fields = op.init(shape, gen, **sizes)
    return {name: gen.normal(v.shape) if v.dtype.kind == "f" else v for name, v in fields.items()}


def random_delta(model: nn.Module, targets: dict[str, list[str]], seed: int = 1, **more: Any) -> Delta:
    """A delta with random tensors: op kinds by target."""
    build, gen = Builder(Base.of(model)), Generator(seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for target, kinds in targets.items():
        for kind in kinds:
            cfg = {"scale": 0.5} if "scale" in op_named(kind).defaults else {}
            build.put(target, kind, random_fields(kind, shapes[target], gen), **cfg)
    return build.done(recipe={"seed": seed}, **more)


def oracle(model: nn.Module, deltas: list[Delta], *args: Any, **kwargs: Any) -> Any:
    """torch.func.functional_call with apply(w) for every target."""
    new = {}
    for delta in deltas:
        for target in delta.entries:
            w = new.get(target, model.get_parameter(target).detach())
            new[target] = delta.apply(target, w.float()).to(w.dtype)
    return torch.func.functional_call(model, new, args, kwargs)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: xp.to_numpy(value).tobytes() for name, value in model.state_dict().items()}


def form(model: nn.Module) -> Any:
    """Everything that detaching must bring back."""
    modules = list(model.named_modules(remove_duplicate=False))
    return (
        [(name, type(m), sorted(m.__dict__), list(m._modules), {k: id(p) for k, p in m._parameters.items()}) for name, m in modules],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._state_dict_hooks)) for _, m in modules],
        bits(model),
    )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


CASES = [(name, "m.weight", kind) for name in MODULES for kind in OPS]
CASES += [(name, "m.bias", kind) for name in ("linear", "conv1d", "conv2d", "norm") for kind in ("dense", "scale_shift", "sparse")]
PLAIN = ("linear", "square, no bias", "conv1d", "conv2d", "embedding")


def is_fast(name: str, target: str, kind: str) -> bool:
    """What the ops declare; never for a module whose forward is its own."""
    if target == "m.bias":
        return kind == "dense" and name in PLAIN
    return name in PLAIN and (kind in ("lowrank", "svd", "bilinear") or (kind == "tucker" and name != "conv2d"))


@pytest.mark.parametrize(("name", "target", "kind"), CASES)
def test_every_way_agrees_with_the_oracle(name: str, target: str, kind: str) -> None:
    make, data = MODULES[name]
    model, x = Net(make()), data()
    delta = random_delta(model, {target: [kind]})
    want, plain, before = oracle(model, [delta], x), model(x), form(model)
    assert not torch.allclose(want, plain, atol=1e-3)
    ways = []
    for mode in ("fast", "functional", "materialised"):
        try:
            handle = attach(model, delta, mode=mode)
        except UsageError:
            assert form(model) == before
            continue
        ways.append(mode)
        close(model(x), want)
        assert handle.unused() == []
        assert list(model.state_dict()) == list(before[2])
        detach(model, handle)
        assert form(model) == before
        assert torch.equal(model(x), plain)
    assert ways == ["fast"] * is_fast(name, target, kind) + ["functional", "materialised"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", [["lowrank", "magnitude"], ["scale_shift", "permute", "sparse"], ["lowrank", "assign"], ["kron", "svd"]])
def test_materialised_bytes_are_those_of_folding(dtype: torch.dtype, kinds: list[str]) -> None:
    model = Net(nn.Linear(6, 4)).to(dtype)
    with torch.no_grad():
        model.m.weight[0, 0] = float("nan")
    first = random_delta(model, {"m.weight": [k for k in kinds if k != "assign"]})
    second = random_delta(model, {"m.weight": ["lowrank"], "m.bias": ["dense"]}, seed=2)
    stored, before = xp.to_numpy(model.m.weight).copy(), form(model)
    attach(model, [first, second])
    ops = [op.renamed({k: f"{n}{k}" for k in op.tensor_keys()}) for n, d in enumerate((first, second)) for op in d.entries["m.weight"].ops]
    want = chain.rewrite(stored, ops, lambda key: (first, second)[int(key[0])].get(key[1:]))
    assert xp.to_numpy(model.m.weight).tobytes() == want.tobytes() != stored.tobytes()
    detach(model)
    assert form(model) == before


# --- gradients


def shared_delta(model: nn.Module) -> Delta:
    """One pool of rows for two modules, picked by an index and reshaped; own B; one permutation for both."""
    build, gen = Builder(Base.of(model)), Generator(3)
    pool = build.share("pool", gen.normal((7, 3)))
    perm = build.share("perm", gen.permutation(6))
    for name in ("a", "b"):
        index = build.share(f"index_{name}", gen.permutation(7)[:4])
        build.put(f"{name}.weight", "lowrank", {"A": Ref(pool.key, index.key, (2, 6)), "B": gen.normal((6, 2))}, scale=0.5)
        if name == "b":
            build.put("b.weight", "permute", {"perm": perm})
            build.put("b.weight", "permute", {"perm": perm}, axis=1)
    return build.done()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.delta = nn.Identity()  # a name that is taken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("mode", ["auto", "functional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_delta_alone_and_shared_tensors_once(mode: Any, dtype: torch.dtype) -> None:
    model = Two().to(dtype).requires_grad_(False)
    x = floats(5, 6).to(dtype)
    delta = shared_delta(model)
    handle = attach(model, delta, trainable=True, mode=mode)
    tensors = handle.tensors()
    assert set(tensors) == set(delta.tensors)
    assert {key for key, t in tensors.items() if t.requires_grad} == {"@shared/pool", "a.weight//0.B", "b.weight//0.B"}
    assert all(t.dtype == torch.float32 for t in tensors.values() if t.requires_grad)
    assert len([p for p in model.parameters() if p is tensors["@shared/pool"]]) == 1
    model(x).float().square().sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "delta" not in name)

    leaves = {key: t.detach().clone().requires_grad_() for key, t in tensors.items() if t.requires_grad}
    get = {**tensors, **leaves}.__getitem__
    new = {t: chain.apply_chain(model.get_parameter(t).float(), e.ops, get).to(dtype) for t, e in delta.entries.items()}
    torch.func.functional_call(model.__class__().to(dtype), {**dict(model.state_dict()), **new}, (x,)).float().square().sum().backward()
    for key, leaf in leaves.items():
        error = (tensors[key].grad - leaf.grad).norm() / leaf.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.03), key


def test_training_gives_a_delta_with_the_new_values() -> None:
    model = Two()
    delta = shared_delta(model)
    handle = attach(model, delta, trainable=True)
    x = floats(5, 6)
    assert handle.delta().id == delta.id
    optimizer = torch.optim.SGD(handle.parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    trained, out = handle.delta(), model(x)
    assert trained.id != delta.id and not np.array_equal(trained.get("@shared/pool"), delta.get("@shared/pool"))
    detach(model)
    attach(model, trained)
    close(model(x), out)
    assert np.array_equal(delta.get("@shared/pool"), shared_delta(Two()).get("@shared/pool"))  # the delta itself is as it was


def test_what_is_trainable_is_what_ops_declare() -> None:
    model, gen = Net(nn.Linear(6, 4)), Generator(1)
    build = Builder(Base.of(model))
    fields = {"A": gen.normal((2, 6)), "B": gen.normal((4, 2)), "A0": gen.normal((2, 6)), "B0": gen.normal((4, 2))}
    build.put("m.weight", "lowrank", fields)
    build.put("m.bias", "assign", {"values": gen.normal((4,))})
    handle = attach(model, build.done(), trainable=True)
    assert {key for key, t in handle.tensors().items() if t.requires_grad} == {"m.weight//0.A", "m.weight//0.B", "m.bias//0.values"}
    handle.trainable = False
    assert handle.parameters() == [] and handle.tensors() == {}  # written in place again
    handle.trainable = True
    assert len(handle.parameters()) == 3


def test_half_precision_masters_and_their_delta() -> None:
    model = Net(nn.Linear(6, 4)).to(torch.bfloat16)
    build, gen = Builder(Base.of(model)), Generator(1)
    build.put("m.weight", "lowrank", {"A": torch.randn(2, 6).bfloat16(), "B": torch.randn(4, 2).bfloat16()})
    build.put("m.bias", "assign", {"values": torch.randn(4).bfloat16()})
    handle = attach(model, build.done(), trainable=True)
    assert {t.dtype for t in handle.tensors().values()} == {torch.float32}
    made = handle.delta()
    assert {key: t.dtype for key, t in made.tensors.items()} == {"m.weight//0.A": "F32", "m.weight//0.B": "F32", "m.bias//0.values": "BF16"}
    made.validate()
    assert gen.seed == 1


def test_dropout_acts_on_the_input_while_training() -> None:
    model, x = Net(nn.Linear(64, 4)), floats(3, 64)
    delta = random_delta(model, {"m.weight": ["lowrank"]})
    handle = attach(model, delta, trainable=True)
    exact = model(x)
    handle.dropout = 0.5
    model.eval()
    assert torch.equal(model(x), exact)
    model.train()
    torch.manual_seed(1)
    noisy = model(x)
    torch.manual_seed(1)
    x_dropped, t = F.dropout(x, 0.5), handle.tensors()
    close(noisy, F.linear(x, model.m.weight, model.m.bias) + 0.5 * x_dropped @ t["m.weight//0.A"].T @ t["m.weight//0.B"].T)
    with pytest.raises(UsageError, match="dropout"):
        handle.dropout = 1.0


def test_autocast_does_not_touch_the_arithmetic_of_weights() -> None:
    model, x = Net(nn.Linear(6, 4)), floats(3, 6)
    delta = random_delta(model, {"m.weight": ["lowrank", "magnitude"]})
    new = delta.apply("m.weight", model.m.weight.detach())
    attach(model, delta, mode="functional")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16 and torch.equal(out, F.linear(x, new, model.m.bias))


# --- several deltas


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), randomised(nn.LayerNorm(6)), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


def three(model: nn.Module) -> list[Delta]:
    return [
        random_delta(model, {"a.weight": ["lowrank"], "norm.weight": ["scale_shift"]}, 1),
        random_delta(model, {"a.weight": ["lowrank", "magnitude"], "a.bias": ["dense"], "b.weight": ["svd"]}, 2),
        random_delta(model, {"a.weight": ["permute"], "norm.weight": ["dense"], "b.weight": ["lowrank"]}, 3),
    ]


MIXES: list[tuple[Any, ...]] = [("materialised",) * 3, ("auto", "fast", "auto"), ("auto", "functional", "fast"), ("functional", "auto", "functional")]


@pytest.mark.parametrize("modes", [m for m in MIXES if m != ("auto", "fast", "auto")])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_three_deltas_come_off_in_any_order(modes: tuple[Any, ...], order: tuple[int, ...]) -> None:
    model, x = Three(), floats(4, 6)
    before, deltas = form(model), three(model)
    for delta, mode in zip(deltas, modes, strict=True):
        if mode == "fast":
            with pytest.raises(UsageError, match=r"no fast way for 2 targets.*a.weight"):
                attach(model, delta, mode="fast")
            mode = "auto"
        attach(model, delta, mode=mode)
    assert attached(model) == [delta.id for delta in deltas]
    left = list(deltas)
    reference = Three()
    reference.load_state_dict(dict(zip(before[2], _values(model, before[2]), strict=True)))
    for number in order:
        close(model(x), oracle(reference, left, x))
        left.remove(deltas[number])
        detach(model, deltas[number].id[:16])
        assert attached(model) == [delta.id for delta in left]
    assert form(model) == before


def _values(model: nn.Module, saved: dict[str, bytes]) -> list[torch.Tensor]:
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return [torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shapes[name]) for name, data in saved.items()]


def test_active_and_trainable_are_separate_facts() -> None:
    model, x = Three(), floats(4, 6)
    plain, before, deltas = model(x), form(model), three(model)
    wants = {n: oracle(model, [d for k, d in enumerate(deltas) if n >> k & 1], x) for n in range(8)}
    for trainable in (False, True):
        hs = attach(model, deltas, trainable=trainable)
        for n in (7, 5, 3, 0, 6, 1):
            for k, handle in enumerate(hs):
                handle.active = bool(n >> k & 1)
            close(model(x), wants[n])
            assert attached(model) == [delta.id for delta in deltas]
            assert all(bool(handle.parameters()) == trainable for handle in hs)
        hs[1].active, hs[1].trainable = True, not trainable
        close(model(x), wants[3])
        detach(model)
        assert form(model) == before and torch.equal(model(x), plain)


def test_a_later_delta_on_a_live_one_is_live_too_and_settles_when_it_may() -> None:
    model, x = Three(), floats(4, 6)
    first, second, third = three(model)
    attach(model, first, trainable=True)
    before = bits(model)
    handle = attach(model, third)
    assert bits(model) == before and handle.tensors()
    with pytest.raises(UsageError, match="cannot be materialised"):
        attach(model, second, mode="materialised")
    assert attached(model) == [first.id, third.id] and bits(model) == before
    detach(model, first)
    assert bits(model) != before and not handle.tensors() and type(model.a) is nn.Linear
    detach(model)
    assert bits(model) == before
    close(model(x), oracle(model, [], x))


# --- copies


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_run_and_detach_on_their_own(copied: Any, trainable: bool) -> None:
    model, x = Two(), floats(4, 6)
    before, plain = form(model)[2], model(x)
    delta = shared_delta(model)
    attach(model, delta, trainable=trainable)
    out, twin = model(x), copied(model)
    assert torch.equal(twin(x), out) and attached(twin) == [delta.id]
    tensors, theirs = handles(model)[0].tensors(), handles(twin)[0].tensors()
    assert set(tensors) == set(theirs) and not {id(t) for t in tensors.values()} & {id(t) for t in theirs.values()}
    with torch.no_grad():
        for t in theirs.values():
            t.mul_(2) if t.is_floating_point() else None
    assert torch.equal(model(x), out) and (not trainable or not torch.equal(twin(x), out))
    detach(twin)
    assert bits(twin) == before and type(twin.a) is nn.Linear and "delta_" not in twin.a._modules and isinstance(twin.delta, nn.Identity)
    assert torch.equal(twin(x), plain) and torch.equal(model(x), out)


def test_moving_and_loading_while_attached() -> None:
    model, x = Two(), floats(4, 6)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    handle = attach(model, shared_delta(model), trainable=True)
    out = model(x)
    with torch.no_grad():
        model.a.weight.zero_()
    assert not torch.allclose(model(x), out)
    assert str(model.load_state_dict(saved, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(model(x), out)
    model.double()
    assert {t.dtype for t in handle.tensors().values()} == {torch.float64, torch.int64}
    torch.testing.assert_close(model(x.double()).float(), out)


def test_one_class_for_a_module_type_and_its_ops() -> None:
    model = Two()
    attach(model, random_delta(model, {"a.weight": ["lowrank"], "b.weight": ["lowrank"]}), trainable=True)
    assert type(model.a) is type(model.b) and isinstance(model.a, Attached) and isinstance(model.a, nn.Linear)
    assert (type(model.a).__name__, type(model.a).__module__) == ("Linear", "torch.nn.modules.linear")
    assert isinstance(model.delta, nn.Identity)


# --- compile


@pytest.mark.parametrize("kinds", [["lowrank"], ["lowrank", "magnitude"], ["sparse", "permute"], ["seeded"]])
def test_compiles_without_a_break(kinds: list[str]) -> None:
    model, x = Three(), floats(4, 6)
    delta = random_delta(model, {"a.weight": kinds, "b.weight": kinds, "norm.weight": ["scale_shift"]})
    attach(model, delta, trainable=True)
    model(x)  # tables of random numbers are made in the first call
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out = compiled(x)
    assert torch.equal(out, model(x))
    out.square().sum().backward()
    assert all(p.grad is not None for p in handles(compiled)[0].parameters())
    detach(compiled)
    assert torch.equal(compiled(x), model(x))


# --- weights that other code than their own module's forward reads


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


FUSED_TARGETS = {"inner.out_proj.weight": ["lowrank"], "inner.in_proj_weight": ["lowrank"], "inner.out_proj.bias": ["dense"]}


@pytest.mark.parametrize("train", [False, True])
def test_fused_attention_sees_the_output_projection(train: bool) -> None:
    model, x = Attention().train(train), floats(2, 5, 8)
    nn.init.normal_(model.inner.out_proj.bias)
    delta, before, plain = random_delta(model, FUSED_TARGETS), form(model), model(x)
    want = oracle(model, [delta], x)
    handle = attach(model, delta, trainable=True)
    close(model(x), want)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in handle.parameters()) and handle.unused() == []
    detach(model)
    assert form(model) == before and torch.equal(model(x), plain)


@pytest.mark.parametrize("train", [False, True])
def test_the_fused_encoder_layer_sees_all_its_weights(train: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = Net(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train(train), floats(2, 5, 8)
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    assert len(names) == 8
    delta = random_delta(model, {name: ["lowrank"] for name in names})
    with torch.no_grad():
        want = oracle(model, [delta], x)
        attach(model, delta, mode="functional")
        close(model(x), want)


class Reader(nn.Module):
    """Reads the weight of a child of a child, which never runs itself; its norm's forward runs without its weight."""

    class Norm(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(x, self.normalized_shape)

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.norm, self.scales = self.Middle(), randomised(self.Norm(6)), nn.ParameterList([floats(6)])
        self.never = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(x) * self.norm.weight, self.middle.proj.weight) * self.scales[0]


def test_probing_widens_the_scope_until_the_op_runs() -> None:
    model, x = Net(Reader()), floats(3, 6)
    delta = random_delta(model, {"m.middle.proj.weight": ["lowrank"], "m.norm.weight": ["scale_shift"], "m.scales.0": ["dense"]})
    want, before, plain = oracle(model, [delta], x), form(model), model(x)
    handle = attach(model, delta, trainable=True)
    assert not torch.allclose(model(x), want)
    assert handle.unused() == ["m.middle.proj.weight"] and "m.scales.0" in handle.ran()
    with pytest.raises(WeftError, match=r"1 attached ops did not run: m.middle.proj.weight"):
        check_ran(model)
    with pytest.warns(UserWarning, match="did not run"):
        check_ran(model, error=False)
    with torch.no_grad():
        probe(model, lambda: model(x))
    close(model(x), want)
    model(x).sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_ran(model, error=False)
    detach(model)
    assert form(model) == before and torch.equal(model(x), plain)


def test_probing_names_what_nothing_uses() -> None:
    model, x = Net(Reader()), floats(3, 6)
    attach(model, random_delta(model, {"m.never.weight": ["lowrank"]}), mode="functional")
    with pytest.raises(WeftError, match=r"no forward in the model uses m.never.weight"):
        probe(model, lambda: model(x))
    probe(nn.Linear(2, 2), lambda: None)


def test_one_parameter_in_views_and_a_buffer() -> None:
    """Ops on parts of one tensor, reshaped and transposed; a batch norm's running mean."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    build, gen = Builder(Base.of(model)), Generator(1)
    build.put("0.weight", "lowrank", {"A": gen.normal((2, 3)), "B": gen.normal((2, 2))}, at=At(index=((1, 3), (0, 3))))
    build.put("0.weight", "dense", {"values": gen.normal((12, 2))}, at=At(reshape=(2, 12), transpose=(1, 0)))
    build.put("1.running_mean", "dense", {"values": gen.normal((4,))})
    delta, x = build.done(), floats(3, 6)
    want = torch.func.functional_call(model, {t: delta.apply(t, model.state_dict()[t]) for t in delta.entries}, (x,))
    before = form(model)
    for mode in ("functional", "materialised"):
        attach(model, delta, mode=mode)
        close(model(x), want)
        detach(model)
        assert form(model) == before


def test_sums_of_chains() -> None:
    model, x = Net(nn.Linear(6, 4)), floats(3, 6)
    delta = random_delta(model, {"m.weight": ["lowrank", "magnitude"]}).scaled(0.3)
    want = oracle(model, [delta], x)
    handle = attach(model, delta, trainable=True)
    close(model(x), want)
    model(x).sum().backward()
    assert len(handle.parameters()) == 3 and all(p.grad is not None for p in handle.parameters())


# --- ops on modules


@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("parallel", [False, True])
def test_adapter(act: str, parallel: bool) -> None:
    model, x, gen = Two(), floats(4, 6), Generator(1)
    build = Builder(Base.of(model))
    t = {name: gen.normal(v.shape) for name, v in op_named("adapter").init((6,), gen, rank=3).items()}
    build.put("@module/a", "adapter", t, act=act, parallel=parallel, scale=0.5)
    build.put("a.weight", "lowrank", {"A": gen.normal((2, 6)), "B": gen.normal((6, 2))})
    delta, before, plain = build.done(), form(model), model(x)
    new = delta.apply("a.weight", model.a.weight)
    for trainable in (False, True):
        handle = attach(model, delta, trainable=trainable)
        assert set(handle.tensors()) == set(delta.tensors) if trainable else len(handle.tensors()) == 4
        y = F.linear(x, new, model.a.bias)
        up, down, up_bias, down_bias = (torch.from_numpy(t[name]) for name in ("up", "down", "up_bias", "down_bias"))
        inner = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}[act]((x if parallel else y) @ down.T + down_bias)
        close(model(x), model.b(torch.tanh(y + 0.5 * (inner @ up.T + up_bias))))
        assert handle.unused() == [] and handle.ran() == ["@module/a", "a.weight"]
        detach(model)
        assert form(model) == before and torch.equal(model(x), plain)
    assert delta.unfoldable == ["@module/a"]


def test_an_adapter_starts_as_the_identity_and_takes_tuples() -> None:
    model, x = Attention(), floats(2, 5, 8)
    build = Builder(Base.of(model))
    build.put("@module/inner", "adapter", op_named("adapter").init((8,), Generator(1), rank=3))
    handle = attach(model, build.done(), trainable=True)
    plain = model.inner._weft_key[0].forward(model.inner, x, x, x, need_weights=False)[0]
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        for p in handle.parameters():
            nn.init.normal_(p)
    assert not torch.allclose(model(x), plain)
    handle.active = False
    assert torch.equal(model(x), plain) and attached(model)


def test_adapters_are_checked() -> None:
    model, gen = Two(), Generator(1)
    for fields, cfg, said in (
        ({"down": (3, 6), "up": (6, 2)}, {}, "field up"),
        ({"down": (3, 6), "up": (5, 3)}, {}, "field up"),
        ({"down": (3, 6), "up": (6, 3), "down_bias": (2,)}, {}, "down_bias"),
        ({"down": (3, 6), "up": (6, 3)}, {"act": "sine"}, "act"),
    ):
        build = Builder(Base.of(model))
        build.put("@module/a", "adapter", {name: gen.normal(shape) for name, shape in fields.items()}, **cfg)
        with pytest.raises(WeftError, match=said):
            build.done()


# --- structure


def test_added_tensors_start_from_zeros_and_need_their_place() -> None:
    small, model, x = Three(), Three(), floats(3, 6)
    model.head = nn.Linear(6, 3)
    small.forward = None  # type: ignore[assignment]
    base = Base.of(small)
    build, gen = Builder(base), Generator(1)
    build.add("head.weight", gen.normal((3, 6)))
    delta = build.done()
    with pytest.raises(MismatchError, match=r"head.weight(.|\n)*base.model"):
        attach(Three(), delta)
    for trainable in (False, True):
        before = bits(model)
        handle = attach(model, delta, trainable=trainable)
        close(model.head(x), x @ torch.from_numpy(delta.get("head.weight//0.values")).T + model.head.bias)
        assert len(handle.parameters()) == int(trainable)
        detach(model)
        assert bits(model) == before
    with pytest.raises(MismatchError, match=r"head.weight"):
        model.head = nn.Linear(5, 3)
        attach(model, delta)


def test_copied_replaced_and_removed_tensors() -> None:
    model = Three()
    build = Builder(Base.of(model))
    build.copy("c.weight", "a.weight")
    copied = build.done()
    model.c = nn.Linear(6, 6)
    with pytest.raises(MismatchError, match=r"copies a.weight here"):
        attach(model, copied)
    with torch.no_grad():
        model.c.weight.copy_(model.a.weight)
    attach(model, copied)
    detach(model)
    build = Builder(Base.of(model))
    build.remove("b.weight")
    with pytest.raises(MismatchError, match=r"b.weight: the delta removes"):
        attach(model, build.done())
    build = Builder(Base.of(model))
    build.add("b.weight", np.ones((2, 6), np.float32), kind="replace")
    with pytest.raises(MismatchError, match=r"b.weight"):
        attach(model, build.done())
    assert attached(model) == []


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("kinds", [["lowrank"], ["lowrank", "magnitude"]])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_tied_tensors_are_changed_together(kinds: list[str], name: str) -> None:
    model, ids = Tied(), torch.tensor([[1, 5, 7]])
    delta, before = random_delta(model, {name: kinds}), form(model)
    new = delta.apply(name, model.embed.weight.detach())
    for mode in ("auto", "functional", "materialised"):
        handle = attach(model, delta, mode=mode, trainable=mode != "materialised")
        close(model(ids), torch.tanh(new[ids]) @ new.T)
        assert model.embed.weight is model.head.weight and handle.unused() == []
        detach(model)
        assert form(model) == before


def test_two_names_of_a_tied_tensor_must_agree() -> None:
    loose, model, ids = Tied(), Tied(), torch.tensor([[1, 5, 7]])
    loose.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    with torch.no_grad():
        loose.embed.weight.copy_(model.embed.weight)
    values = floats(8, 6)
    for second, fits in ((values, True), (values + 1, False)):
        build = Builder(Base.of(loose))
        build.put("embed.weight", "dense", {"values": values})
        build.put("head.weight", "dense", {"values": second})
        delta = build.done()
        if not fits:
            with pytest.raises(MismatchError, match="are one tensor in this model"):
                attach(model, delta)
            continue
        new = model.embed.weight.detach() + values
        for trainable in (False, True):
            attach(model, delta, trainable=trainable)
            close(model(ids), torch.tanh(new[ids]) @ new.T)
            detach(model)


# --- refusals


def test_a_wrong_base_and_a_missing_delta_are_refused() -> None:
    model, before_model = Three(), Three()
    delta = random_delta(model, {"a.weight": ["lowrank"]})
    with pytest.raises(MismatchError, match=r"a.weight.*is not the one it was made for"):
        attach(before_model, delta)
    over = random_delta(model, {"a.weight": ["dense"]}, 2, over=(delta.id,))
    before = form(model)
    with pytest.raises(MismatchError, match=f"missing: {delta.id[:12]}"):
        attach(model, over)
    assert form(model) == before
    attach(model, [delta, over])
    assert attached(model) == [delta.id, over.id]
    detach(model)
    attach(model, delta)
    attach(model, over)  # the bytes it is checked against are those before the first was written
    detach(model)
    assert form(model) == before


def test_misuse_is_named_and_changes_nothing() -> None:
    model = Three()
    first, second, _ = three(model)
    attach(model, first)
    now = form(model)
    wrong = random_delta(Two(), {"a.weight": ["lowrank"]})
    for call, error, said in (
        (lambda: attach(model, first), UsageError, "attached already"),
        (lambda: attach(model, second, mode="quick"), UsageError, "unknown mode"),  # type: ignore[call-overload]
        (lambda: attach(model, second, mode="materialised", trainable=True), UsageError, "cannot be trained"),
        (lambda: attach(model, [second, wrong]), MismatchError, "a.weight"),
        (lambda: attach(model.a, second), WeftError, "weight"),
        (lambda: detach(model, second), UsageError, "is not attached; attached: " + first.id[:12]),
        (lambda: detach(Three(), second), UsageError, "nothing is"),
        (lambda: setattr(attach(model, second, mode="materialised"), "trainable", True), UsageError, "cannot be trained"),
    ):
        with pytest.raises(error, match=said):
            call()
    detach(model, second)
    assert form(model) == now
    assert repr(handles(model)[0]) == f"<Handle {first.id[:12]}: materialised>"
    detach(Three())


def put(model: nn.Module, target: str, op: str, *shapes: tuple[str, tuple[int, ...]]) -> Delta:
    build, gen = Builder(Base.of(model)), Generator(1)
    build.put(target, op, {name: gen.normal(shape) for name, shape in shapes})
    return build.done()


def test_modules_that_cannot_be_changed() -> None:
    adapter = ("down", (3, 6)), ("up", (6, 3))
    model = nn.Sequential(Three(), nn.Linear(6, 6))
    with pytest.raises(MismatchError, match="cannot sit on a container"):
        attach(model, put(model, "@module/", "adapter", *adapter))
    with pytest.raises(MismatchError, match=r"no module '0.aa'"):
        attach(model, put(model, "@module/0.aa", "adapter", *adapter))
    with pytest.raises(MismatchError, match=r"get_input_embeddings"):
        attach(model, put(model, "@input/embeddings", "prompt", ("rows", (2, 6))))
    attach(model, put(model, "@module/1", "adapter", *adapter))
    with pytest.raises(UsageError, match="attached to another"):
        attach(model[1], put(nn.Linear(6, 6), "@module/", "adapter", *adapter))
    detach(model)

    delta = random_delta(model, {"1.weight": ["lowrank"]})
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(MismatchError, match="carries a `forward` of its own"):
        attach(model, delta, mode="functional")
    attach(model, delta)  # in place is fine
    detach(model)
    del model[1].forward
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(MismatchError, match="parametrizations"):
        attach(model, delta)
    assert attached(model) == []


def test_split_tensors_are_put_together() -> None:
    """One checkpoint tensor that lies in two live ones."""
    from weft.names import NameMap, Place

    class Halves(NameMap):
        def __init__(self, model: nn.Module) -> None:
            super().__init__({name: ("F32", tuple(p.shape)) for name, p in model.named_parameters()} | {"ab": ("F32", (12, 6))}, model)

        def live(self, name: str) -> list[Place]:
            return [Place("a.weight", None, At(index=((0, 6),))), Place("b.weight", None, At(index=((6, 12),)))] if name == "ab" else super().live(name)

    class Joined:
        fingerprint = "f" * 64

        def tensor(self, name: str) -> Any:
            return hold(whole)

        def sha256(self, name: str) -> str:
            return hold(whole).sha256

        def layout(self, deltas: Any) -> Any:
            return {}

    model, x, gen = Two(), floats(4, 6), Generator(1)
    whole = torch.cat([model.a.weight, model.b.weight]).detach()
    build = Builder(Joined())
    build.put("ab", "lowrank", {"A": gen.normal((2, 6)), "B": gen.normal((12, 2))})
    build.put("ab", "magnitude", {"m": gen.normal((6,))}, axis=1)  # the norm runs over both halves
    delta = build.done()
    new = delta.apply("ab", whole)
    want = torch.func.functional_call(model, {"a.weight": new[:6], "b.weight": new[6:]}, (x,))
    before, base, names = form(model), Joined(), Halves(model)
    for mode in ("functional", "materialised", "auto"):
        handle = attach(model, delta, mode=mode, base=base, names=names, trainable=mode == "auto")  # type: ignore[call-overload]
        close(model(x), want)
        if mode == "auto":
            model(x).sum().backward()
            assert all(p.grad is not None and p.grad.norm() > 0 for p in handle.parameters())
        detach(model)
        assert form(model) == before


def test_shadows_hold_in_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, x = Three(), floats(64, 6)
    delta = random_delta(model, {"norm.weight": ["scale_shift"]})
    want = oracle(model, [delta], x).detach()
    attach(model, delta, mode="functional")
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        outs = list(pool.map(lambda _: model(x), range(200)))
    assert all(torch.equal(out, outs[0]) for out in outs)
    close(outs[0], want)
    assert "weight" not in model.norm.__dict__


# --- what ops are told, and corners


class Spy(Op):
    """An op on a module that adds its context to a list."""

    kind = "spy"
    fields = ("w",)
    on = "module"
    seen: list[Any] = []

    def check(self, shape: Any, cfg: Any, t: Any) -> None:
        pass

    def forward(self, m: Any, x: Any, y: Any, t: Any, cfg: Any, ctx: Any) -> Any:
        ctx.losses.append(t["w"].sum())
        self.seen.append((ctx.param, ctx.phase, ctx.mask))
        return y + t["w"]


def test_ops_are_told_phase_and_mask_and_may_add_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as hf

    from weft import ops

    monkeypatch.setitem(ops._LOADED, "spy", Spy())
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    ).eval()
    build = Builder(Base.of(model))
    for path in ("model.layers.0", "model.layers.1.mlp", "model"):
        build.put(f"@module/{path}", "spy", {"w": np.full(8, 0.5, np.float32)})
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long)
    plain = model(ids, mask).logits
    handle = attach(model, build.done(), trainable=True)
    Spy.seen.clear()
    out = model(ids, mask)
    assert [(param, phase) for param, phase, _ in Spy.seen] == [("", "prefill")] * 3 and all(m is mask for _, _, m in Spy.seen)
    assert not torch.allclose(out.logits, plain) and len(handle.losses) == 3
    torch.stack(handle.losses).sum().backward()
    assert all(torch.equal(p.grad, torch.ones(8)) for p in handle.parameters())
    model(ids[:, :1], past_key_values=out.past_key_values)
    assert Spy.seen[-1] == ("", "decode", None) and len(handle.losses) == 3


class Again(nn.Module):
    """Calls itself, with an argument that only the inner call understands."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(floats(6))

    def forward(self, x: torch.Tensor, depth: int = 1) -> torch.Tensor:
        return self(x, depth - 1) * self.scale if depth else x * self.scale


def test_a_module_that_calls_itself() -> None:
    model, x = Net(Again()), floats(3, 6)
    delta = random_delta(model, {"m.scale": ["scale_shift"]})
    attach(model, delta, trainable=True)
    close(model(x), x * delta.apply("m.scale", model.m.scale.detach()) ** 2)
    detach(model)
    close(model(x), x * model.m.scale**2)


def test_probing_gives_up_at_the_root_and_for_modules() -> None:
    model, x = Net(nn.Linear(6, 6)), floats(3, 6)
    model.m.inner = nn.Linear(6, 6)
    delta = random_delta(model, {"m.weight": ["lowrank", "magnitude"], "m.inner.weight": ["lowrank"]})
    want = model(x) * 0 + F.linear(x, delta.apply("m.weight", model.m.weight), model.m.bias)
    handle = attach(model, delta, trainable=True)
    with pytest.raises(WeftError, match=r"m.inner.weight: no forward in the model uses"):
        probe(model, lambda: close(model(x), want))
    handle.active = False
    assert handle.unused() == handle.ran() == [] and not handle.active and handle.trainable and handle.dropout == 0
    detach(model)
    attach(model, put(model, "@module/m.inner", "adapter", ("down", (3, 6)), ("up", (6, 3))))
    with pytest.raises(WeftError, match=r"@module/m.inner: the module did not run"):
        probe(model, lambda: model(x))
    detach(model)
    alone = nn.ParameterList([floats(3)])
    with pytest.raises(MismatchError, match="no module runs"):
        attach(alone, put(alone, "0", "dense", ("values", (3,))), mode="functional")
    assert attached(alone) == [] and not alone._modules


def test_what_is_not_trained_comes_back_as_it_was() -> None:
    model = Three()
    first, second, _ = three(model)
    one, two = attach(model, [first, second], mode="functional")
    assert one.delta() is first and two.delta() is second
    with pytest.raises(UsageError, match="is not attached; attached: "):
        detach(model, "")
    del model.norm.weight
    with pytest.raises(WeftError, match="lost its tensor 'weight'"):
        model(floats(2, 6))


def test_removed_tensors_that_are_absent_and_strange_shapes() -> None:
    model = Three()
    build = Builder(Base.of(model))
    build.remove("b.bias")
    build.put("a.weight", "lowrank", {"A": floats(2, 6), "B": floats(6, 2)})
    delta, base = build.done(), Base.of(copy.deepcopy(model))
    model.b = nn.Linear(6, 6, bias=False)
    attach(model, delta, base=base)
    detach(model)
    with pytest.raises(MismatchError, match="nothing"):
        attach(model, replace(delta, entries={"nothing": delta.entries["a.weight"]}, base="f" * 64), base=base)
    with pytest.raises(MismatchError, match=r"the delta's tensor is \[6, 6\], the live norm.weight is \[6\]"):
        attach(model, replace(delta, entries={"norm.weight": delta.entries["a.weight"]}, base="f" * 64), base=Fingerprinted(base))
    model.a.weight.device_mesh = "as of a DTensor"  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match="sharded already"):
        attach(model, delta, base=base, mode="functional")


class Fingerprinted:
    """A base that a delta may name by its fingerprint."""

    fingerprint = "f" * 64

    def __init__(self, base: Any) -> None:
        self.layout = base.layout


def test_what_ran_before_a_delta_came_does_not_count_for_it() -> None:
    model, x = Net(nn.Linear(8, 4)), floats(3, 8)
    first, second = (random_delta(model, {"m.weight": ["lowrank"]}, seed=seed) for seed in (1, 2))
    one = attach(model, first, mode="functional")
    model(x)
    assert one.unused() == []
    two = attach(model, second, mode="functional")
    assert two.unused() == ["m.weight"] and two.ran() == []
    with pytest.raises(WeftError, match="did not run"):
        check_ran(model)
    two.active = False
    model(x)
    assert one.unused() == [] and two.unused() == []
    two.active = True
    assert two.unused() == ["m.weight"]
    model(x)
    assert two.unused() == [] and one.unused() == []


def test_dropout_that_does_nothing_is_said() -> None:
    model = Net(nn.Linear(8, 4))
    chain = attach(model, random_delta(model, {"m.weight": ["lowrank", "magnitude"]}), trainable=True)
    with pytest.warns(UserWarning, match=r"dropout does nothing for 1 targets.*m\.weight"):
        chain.dropout = 0.5
    chain.dropout = 0.0
    detach(model)
    others = attach(model, random_delta(model, {"m.weight": ["kron"], "m.bias": ["dense"]}), trainable=True)
    others.dropout = 0.5  # ops without dropout have none to lose


def test_attach_takes_objects_and_not_paths() -> None:
    model = Net(nn.Linear(8, 4))
    delta = random_delta(model, {"m.weight": ["lowrank"]})
    for deltas, base in (("a.safetensors", None), ([delta, "a.safetensors"], None), (delta, "a.safetensors")):
        with pytest.raises(UsageError, match=r"a\.safetensors") as error:
            attach(model, deltas, base=base)  # type: ignore[call-overload]
        assert "Delta.load" in error.value.hint and "Base.open" in error.value.hint
