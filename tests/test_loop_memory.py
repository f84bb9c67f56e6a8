"""Memory in the event log; gradient checkpointing: the same results from less."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests import tiny
from tests.test_loop import Guess, make
from weft.attaching import attach, probe
from weft.base import Base
from weft.engine.checkpointing import checkpointed
from weft.engine.events import Events
from weft.engine.loop import train
from weft.engine.memory import peak_memory
from weft.errors import UsageError
from weft.tuning import tune

ROWS = [{"text": " ".join(tiny.WORDS[(k * j + k) % len(tiny.WORDS)] for j in range(5 + k % 6))} for k in range(12)]
QUICK: dict[str, Any] = {"batch_size": 4, "steps": 3, "lr": 0.01, "progress": lambda event: None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llama": tiny.llama(root / "llama"), "bert": tiny.bert(root / "bert"), "gpt2": tiny.gpt2(root / "gpt2")}


# --- the log


def test_steps_and_the_end_say_how_much_memory_and_how_fast(tmp_path: Path) -> None:
    with Events(tmp_path / "log") as events:
        train(make(), events)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    steps, end = [line for line in lines if line["event"] == "step"], lines[-1]
    peaks = [line["memory"] for line in [*steps, end]]
    assert peaks == sorted(peaks) and peaks[0] > 50e6 and peaks[-1] <= peak_memory(torch.device("cpu"))
    assert end["event"] == "end" and all(line["tokens_per_s"] > 0 for line in steps)
    assert end["tokens_per_s"] > 0 and end["tokens"] / end["tokens_per_s"] <= end["time"] + 0.01


def test_the_peak_follows_what_a_process_takes() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 100_000_000)  # four bytes each: more than all there was
    assert peak_memory(torch.device("cpu")) > before + 100_000_000
    del held
    assert peak_memory(torch.device("cpu")) > before + 100_000_000


# --- checkpointing


class Kept:
    """How many bytes the graph keeps for the backward pass, each storage once."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    @contextmanager
    def counting(self, model: torch.nn.Module) -> Iterator[None]:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(value: torch.Tensor) -> torch.Tensor:
            if value.untyped_storage().data_ptr() not in own:
                self.bytes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with saved_tensors_hooks(pack, lambda value: value):
            yield


OBJECTIVES = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "masked-lm"}
SPACES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "dropout": 0.2},  # on activations
    "lora-dora": {"rank": 2, "dora": True},  # w' in each forward
    "full": {},
    "bitfit": {"norms": True},  # a norm's weight is set in its place while it runs
    "pst": {},  # listens to gradients of outputs
    "adalora": {},
}


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("space", SPACES)
def test_recomputing_changes_no_bit(folders: dict[str, Path], kind: str, space: str) -> None:
    losses: dict[bool, list[float]] = {True: [], False: []}
    made = []
    for on in (False, True):

        def progress(event: dict[str, Any], on: bool = on) -> None:
            if event["event"] == "step":
                losses[on] += [event["loss"], event["grad_norm"]]

        options = {**QUICK, **SPACES[space], "progress": progress, "checkpointing": on, "dtype": "float32"}
        made.append(tune(folders[kind], ROWS, method=space.partition("-")[0], objective=OBJECTIVES[kind], **options))
    assert losses[True] == losses[False] and losses[True][0] != losses[True][2]
    assert {key: t.sha256 for key, t in made[0].tensors.items()} == {key: t.sha256 for key, t in made[1].tensors.items()}
    assert made[0].id != made[1].id and made[1].recipe["config"]["loop"]["checkpointing"] is True


@pytest.mark.parametrize(("optimizer", "options"), [("mkor", {}), ("sso", {}), ("sophia", {"estimator": "hutchinson"}), ("sophia", {})])
def test_optimizers_that_look_into_the_passes_see_the_same(folders: dict[str, Path], optimizer: str, options: dict[str, Any]) -> None:
    one, two = (tune(folders["llama"], ROWS, optimizer=optimizer, rank=2, checkpointing=on, **QUICK, **options) for on in (False, True))
    assert {key: t.sha256 for key, t in one.tensors.items()} == {key: t.sha256 for key, t in two.tensors.items()}


def test_less_is_kept_for_the_backward_pass(folders: dict[str, Path]) -> None:
    base = Base.open(folders["llama"])
    model = base.model()
    model.train()
    attach(model, tune(base, ROWS, rank=2, **QUICK), base=base, trainable=True)
    handle_tensors = [p for name, p in model.named_parameters() if ".delta." in name]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in handle_tensors))
    ids = torch.arange(4 * 24).reshape(4, 24) % 20
    kept, grads = {}, {}
    for on in (False, True):
        counter = Kept()
        with checkpointed(model, on):
            with counter.counting(model):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        kept[on] = sum(counter.bytes.values())
        grads[on] = [p.grad for p in handle_tensors]
        model.zero_grad(set_to_none=True)
        assert model.get_input_embeddings().weight.grad is None
    assert kept[True] < 0.4 * kept[False]
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(grads[False], grads[True], strict=True))


def test_nothing_is_computed_below_the_lowest_trained_layer(folders: dict[str, Path]) -> None:
    """transformers' own switch makes the embeddings' output take a gradient."""
    model: Any = Base.open(folders["llama"]).model()
    model.train().requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    wanted: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda m, i, y: wanted.append((y if isinstance(y, torch.Tensor) else y[0]).requires_grad))
    with checkpointed(model, True):
        ids = torch.arange(12)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert wanted == [False] and model.model.layers[1].mlp.up_proj.weight.grad.abs().max() > 0


def test_a_borrowed_model_has_its_own_settings_again(folders: dict[str, Path]) -> None:
    model: Any = Base.open(folders["llama"]).model()
    layers = model.model.layers
    layers[0].gradient_checkpointing, layers[0]._gradient_checkpointing_func = True, "mine"
    before = [dict(module.__dict__) for module in model.modules()]
    seen: list[Any] = []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            seen.append([(layer.gradient_checkpointing, layer._gradient_checkpointing_func != "mine") for layer in layers])

    options = {**QUICK, "progress": look, "tokenizer": Base.open(folders["llama"]).tokenizer()}
    tune(Base.of(model), ROWS, checkpointing=True, **options)
    assert seen == [[(True, True)] * 2] * 3
    assert [dict(module.__dict__) for module in model.modules()] == before
    with pytest.raises(UsageError, match="no layers that can be recomputed"):
        run = make(checkpointing=True)
        run.objective = Guess()
        train(run, Events())


def test_an_op_that_reaches_over_a_layer_is_refused(folders: dict[str, Path]) -> None:
    """A weight that stands in while the whole model runs would be gone when a layer runs by itself."""
    base = Base.open(folders["llama"])
    model: Any = base.model()
    handle = attach(model, tune(base, ROWS, method="bitfit", norms=True, targets=("norm.attention", "norm.mlp"), **QUICK), base=base, trainable=True)
    probe(model, lambda: model(input_ids=torch.arange(6)[None]))
    with checkpointed(model, True):
        pass
    state = model.__dict__["_weft"]
    for _ in range(3):  # as the search for who reads a weight would: to the parent, and its parent
        state.widen([(w.target.name, spot) for w in handle._weights for spot in w.target.spots])
    with pytest.raises(UsageError, match="from outside of it"), checkpointed(model, True):
        pass
