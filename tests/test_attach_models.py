"""Attach on transformers models: generation, checkpointing, copies, Accelerate, compile, FSDP2, soft prompts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from weft.attaching import attach, attached, check_ran, detach, handles, probe
from weft.base import Base
from weft.delta import Builder, Delta
from weft.errors import FormatError, MismatchError, WeftError
from weft.ops import Generator
from weft.ops import get as op_named

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TOKENS, **SIZE, max_position_embeddings=64, **more))


def gpt2(**more: Any) -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **more))


def mixtral(**more: Any) -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TOKENS, **SIZE, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2, **more))


TARGETS: dict[str, dict[str, list[str]]] = {
    "llama": {
        "model.layers.0.self_attn.q_proj.weight": ["lowrank"],
        "model.layers.0.self_attn.k_proj.weight": ["lowrank", "magnitude"],
        "model.layers.1.mlp.down_proj.weight": ["lowrank"],
        "model.layers.1.input_layernorm.weight": ["scale_shift"],
        "model.embed_tokens.weight": ["lowrank"],
        "lm_head.weight": ["sparse"],
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": ["lowrank"],
        "transformer.h.0.attn.c_attn.bias": ["dense"],
        "transformer.h.1.mlp.c_proj.weight": ["lowrank", "scale_shift"],
        "transformer.ln_f.bias": ["dense"],
        "transformer.wte.weight": ["lowrank"],
    },
    "mixtral": {
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": ["lowrank"],
        "model.layers.0.block_sparse_moe.experts.3.w3.weight": ["lowrank", "magnitude"],
        "model.layers.1.block_sparse_moe.experts.2.w2.weight": ["lowrank"],
        "model.layers.1.block_sparse_moe.gate.weight": ["dense"],
        "model.layers.0.self_attn.q_proj.weight": ["lowrank"],
    },
}
MAKERS = {"llama": llama, "gpt2": gpt2, "mixtral": mixtral}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(family: str, **more: Any) -> Any:
    model = MAKERS[family](**more).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))  # logits far apart, so that searches have one answer
    return model


def random_delta(model: nn.Module, family: str) -> Delta:
    base = Base.of(model)
    build, gen = Builder(base), Generator(7)
    for target, kinds in TARGETS[family].items():
        shape = base.tensor(target).shape
        for kind in kinds:
            fields = op_named(kind).init(shape, gen, **({"rank": 2} if kind == "lowrank" else {}))
            fields = {name: gen.normal(v.shape, 0.5) if v.dtype.kind == "f" else v for name, v in fields.items()}
            build.put(target, kind, fields)
    return build.done()


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


IDS = torch.tensor([[0, 0, 5, 9, 11, 4], [7, 3, 22, 41, 17, 60]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def generated(model: Any, **more: Any) -> torch.Tensor:
    made: torch.Tensor = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False, **more)
    return made


@pytest.mark.parametrize("family", MAKERS)
def test_live_generation_is_that_of_the_materialised_model(family: str) -> None:
    model = made(family)
    before, plain = saved(model), generated(model)
    classes = [type(m) for m in model.modules()]
    delta = random_delta(model, family)
    attach(model, delta)
    with torch.no_grad():
        want, greedy, beams = model(IDS, attention_mask=MASK).logits, generated(model), generated(model, num_beams=3)
    detach(model)
    assert same(saved(model), before) and not torch.equal(plain, greedy)
    for mode in ("auto", "functional"):
        handle = attach(model, delta, mode=mode, trainable=mode == "auto")
        with torch.no_grad():
            torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, want, rtol=1e-4, atol=1e-4)
        assert handle.unused() == []
        assert torch.equal(generated(model), greedy) and torch.equal(generated(model, num_beams=3), beams)
        assert same(saved(model), before)
        detach(model)
    assert [type(m) for m in model.modules()] == classes and torch.equal(generated(model), plain)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("mode", ["auto", "functional"])
def test_gradient_checkpointing(family: str, mode: Any) -> None:
    model = made(family).requires_grad_(False).train()
    handle = attach(model, random_delta(model, family), trainable=True, mode=mode)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        grads.append({key: t.grad.clone() for key, t in handle.tensors().items() if t.requires_grad})
        model.zero_grad()
    assert all(g.norm() > 0 for g in grads[0].values()) and set(grads[0]) == {key for key, t in handle.tensors().items() if t.is_floating_point()}
    for key in grads[0]:
        torch.testing.assert_close(grads[1][key], grads[0][key])


@pytest.mark.parametrize("family", MAKERS)
def test_copies_of_an_attached_model(family: str) -> None:
    model = made(family)
    before, delta = saved(model), random_delta(model, family)
    attach(model, delta, trainable=True)
    want = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, want)
        detach(twin)
        assert same(saved(twin), before) and attached(twin) == []
    assert torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize("family", MAKERS)
def test_saving_while_attached_saves_the_base(family: str, tmp_path: Path) -> None:
    model = made(family)
    model.save_pretrained(tmp_path / "before")
    attach(model, random_delta(model, family), trainable=True)
    model.save_pretrained(tmp_path / "while")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "while" / name).read_bytes()


def test_a_delta_of_a_checkpoint_fits_the_model_it_builds(tmp_path: Path) -> None:
    made("mixtral").save_pretrained(tmp_path)
    base = Base.open(tmp_path)
    model: Any = base.model()
    delta = random_delta(model, "mixtral")
    build = Builder(base)
    for target, entry in delta.entries.items():
        for number, op in enumerate(entry.ops):
            build.put(target, op.op, {name: delta.get(f"{target}//{number}.{name}") for name in op.t}, **op.cfg)
    opened = build.done()
    assert opened.base == base.fingerprint
    with torch.no_grad():
        attach(model, delta)
        want = model(IDS).logits
        detach(model)
        attach(model, opened, base=base, mode="functional")
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
    other = made("mixtral")
    with pytest.raises(MismatchError, match="is not the one it was made for"):
        attach(other, opened)
    half: Any = base.model(dtype="bfloat16")
    attach(half, opened, base=base)
    assert half.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16


def test_tied_embeddings_are_changed_together() -> None:
    model = made("llama", tie_word_embeddings=True)
    delta = Builder(Base.of(model))
    delta.put("model.embed_tokens.weight", "lowrank", {"A": torch.randn(2, 32), "B": torch.randn(64, 2)})
    with torch.no_grad():
        attach(model, delta.done())
        want = model(IDS).logits
        detach(model)
        for mode in ("fast", "functional"):
            handle = attach(model, delta.done(), mode=mode)
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
            assert len(handle.tensors()) == 2 and handle.unused() == []
            detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_probe_finds_nothing_to_widen_in_a_whole_model() -> None:
    model = made("mixtral")
    attach(model, random_delta(model, "mixtral"), trainable=True)
    with pytest.raises(WeftError, match="did not run"):
        check_ran(model)
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        probe(model, lambda: model(IDS))
    check_ran(model)
    assert [type(m) for m in model.modules()] == classes


# --- Accelerate, compile, FSDP2


def test_accelerate_prepares_an_attached_model() -> None:
    from accelerate import Accelerator

    model = made("llama").requires_grad_(False)
    delta = random_delta(model, "llama")
    handle = attach(model, delta, trainable=True)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(handle.parameters(), 0.05))
    loss = prepared(IDS, labels=IDS).loss
    accelerator.backward(loss)
    optimizer.step()
    assert prepared(IDS, labels=IDS).loss < loss
    assert handle.delta().id != delta.id
    detach(model)
    assert same(accelerator.unwrap_model(prepared).state_dict(), saved(model))


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("mode", ["auto", "functional"])
def test_dispatch_hooks_are_kept_and_restored(hooked_first: bool, mode: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return args, kwargs

    model = made("llama")
    delta, plain = random_delta(model, "llama"), model(IDS).logits
    attach(model, delta)
    want = model(IDS).logits
    detach(model)
    hooked = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    if not hooked_first:
        attach(model, delta, mode=mode, trainable=True)
    for m in hooked:
        add_hook_to_module(m, Counting())
    if hooked_first:
        attach(model, delta, mode=mode, trainable=True)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert Counting.calls == len(hooked)
    handles(model)[0].active = False
    assert torch.equal(model(IDS).logits, plain)
    handles(model)[0].active = True
    for m in hooked[:3]:
        remove_hook_from_module(m)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
    detach(model)
    assert torch.equal(model(IDS).logits, plain) and Counting.calls == 4 * len(hooked) - 6
    assert not any("_weft" in name for m in model.modules() for name in m.__dict__)


def test_offloaded_models() -> None:
    from accelerate import cpu_offload

    model = made("llama")
    base, delta = Base.of(copy.deepcopy(model)), random_delta(model, "llama")
    attach(model, delta)
    want = model(IDS).logits
    detach(model)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.lm_head.weight.device.type == "meta"
    handle = attach(offloaded, delta, base=base)
    assert handle.tensors()  # nothing can be written in place, so it runs live
    with torch.no_grad():
        torch.testing.assert_close(offloaded(IDS).logits, want, rtol=1e-4, atol=1e-4)
    detach(offloaded)
    assert type(offloaded.lm_head) is nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize("family", MAKERS)
def test_compiles_whole(family: str) -> None:
    model = made(family, **({"experts_implementation": "batched_mm"} if family == "mixtral" else {}))
    attach(model, random_delta(model, family), trainable=True)
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
        torch._dynamo.reset()
        out = torch.compile(model, fullgraph=True, backend="eager")(IDS, use_cache=False).logits
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def _sharded(rank: int, file: str, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = made("llama").requires_grad_(False)
    handle = attach(model, _with_shared(model), trainable=True)
    reference = copy.deepcopy(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    result: dict[str, Any] = {}
    for net in (reference, model):
        net.train()
        net.gradient_checkpointing_enable({"use_reentrant": False})
        logits = net(IDS, attention_mask=MASK, labels=IDS)
        logits.loss.backward()
    theirs = handles(reference)[0].tensors()
    for key, t in handle.tensors().items():
        if t.requires_grad:
            torch.testing.assert_close(t.grad.full_tensor(), theirs[key].grad, rtol=1e-4, atol=1e-5, msg=key)
    result["base without gradients"] = all(p.grad is None for name, p in model.named_parameters() if "delta" not in name)
    refused = []
    for call in (lambda: detach(model), lambda: attach(model, random_delta(reference, "llama"))):
        try:
            call()
        except WeftError as error:
            refused.append("was sharded" in str(error))
    result["refused"] = refused == [True, True] and attached(model) == [handle.id]
    handle.active = False
    result["inactive"] = not torch.allclose(model(IDS, attention_mask=MASK).logits, logits.logits, atol=0.1)
    result["same"] = handle.delta().id == handles(reference)[0].delta().id
    if rank == 0:
        torch.save({**result, "logits": logits.logits.detach(), "want": reference(IDS, attention_mask=MASK).logits.detach()}, out)
    dist.barrier()
    dist.destroy_process_group()


def _with_shared(model: nn.Module) -> Delta:
    """The usual targets, and one pair of factors shared by both layers' o_proj."""
    delta = random_delta(model, "llama")
    build, gen = Builder(Base.of(model)), Generator(9)
    a, b = build.share("A", gen.normal((2, 32), 0.3)), build.share("B", gen.normal((32, 2), 0.3))
    for layer in range(2):
        build.put(f"model.layers.{layer}.self_attn.o_proj.weight", "lowrank", {"A": a, "B": b})
    return delta.then(build.done())


@pytest.mark.slow
def test_fsdp2_with_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sharded, (str(tmp_path / "rendezvous"), str(tmp_path / "out.pt")), nprocs=2)
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(result["logits"], result["want"], rtol=1e-4, atol=1e-4)
    assert result["base without gradients"] and result["same"] and result["refused"] and result["inactive"]


# --- soft prompts


def prompt_delta(model: nn.Module, n: int = 3) -> Delta:
    build = Builder(Base.of(model))
    build.put("@input/embeddings", "prompt", {"rows": Generator(5).normal((n, 32))})
    return build.done()


def lengthened(model: Any, delta: Delta) -> dict[str, torch.Tensor]:
    """The same call by hand: embeddings, mask and positions with the prompt in front."""
    rows = torch.from_numpy(delta.get("@input/embeddings//0.rows")).expand(2, -1, -1)
    mask = torch.cat([torch.ones(2, rows.shape[1], dtype=torch.long), MASK], 1)
    return {"inputs_embeds": torch.cat([rows, model.get_input_embeddings()(IDS)], 1), "attention_mask": mask}


@pytest.mark.parametrize("family", MAKERS)
def test_a_soft_prompt_is_the_manual_call(family: str) -> None:
    model = made(family)
    delta, plain = prompt_delta(model), generated(model)
    inputs = lengthened(model, delta)
    labels = torch.cat([torch.full((2, 3), -100), IDS], 1)
    with torch.no_grad():
        want = model(**inputs, labels=labels, output_hidden_states=True)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    handle = attach(model, delta, trainable=True)
    out = model(input_ids=IDS, attention_mask=MASK, labels=IDS, output_hidden_states=True)
    torch.testing.assert_close(out.logits, want.logits[:, 3:])
    torch.testing.assert_close(out.loss, want.loss)
    assert [h.shape[1] for h in out.hidden_states] == [6] * 3 and handle.unused() == []
    out.loss.backward()
    assert handle.tensors()["@input/embeddings//0.rows"].grad.norm() > 0
    assert model(IDS, attention_mask=MASK, return_dict=False)[0].shape == (2, 6, 64)
    with torch.no_grad():
        moved = model(IDS, attention_mask=MASK, position_ids=positions).logits
    assert moved.shape == (2, 6, 64)
    detach(model)
    assert torch.equal(generated(model), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_after_a_soft_prompt(family: str, beams: int) -> None:
    model = made(family)
    delta = prompt_delta(model)
    inputs = lengthened(model, delta)
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=beams)
    plain = generated(model, num_beams=beams)
    attach(model, delta)
    out = generated(model, num_beams=beams)
    assert torch.equal(out[:, 6:], want[:, -(out.shape[1] - 6) :]) and not torch.equal(out, plain)
    assert torch.equal(generated(model, num_beams=beams, use_cache=False), out)


def test_a_soft_prompt_on_an_encoder() -> None:
    config = hf.BertConfig(**TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32, num_labels=6)
    model: Any = hf.BertForSequenceClassification(config).eval()
    delta = prompt_delta(model)
    labels, inputs = torch.tensor([1, 4]), lengthened(model.bert, delta)
    types = torch.cat([torch.zeros(2, 3, dtype=torch.long), MASK], 1)
    want = model(**inputs, token_type_ids=types, labels=labels)
    attach(model, delta)
    out = model(IDS, MASK, token_type_ids=MASK, labels=labels)
    torch.testing.assert_close(out.logits, want.logits)
    torch.testing.assert_close(out.loss, want.loss)
    with pytest.raises(MismatchError, match="2-d attention_mask"):
        model(IDS, MASK[:, None, None])


def test_soft_prompts_are_checked() -> None:
    model = made("llama")
    build = Builder(Base.of(model))
    build.put("@input/embeddings", "prompt", {"rows": Generator(5).normal((2, 31))})
    attach(model, build.done())
    with pytest.raises(MismatchError, match="31 wide"):
        model(IDS)
    with pytest.raises(MismatchError, match="input_ids or inputs_embeds"):
        model(attention_mask=MASK)
    detach(model)
    attach(model, prompt_delta(model))
    out = model(IDS)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, out.logits)
    assert model(IDS[:, :1], past_key_values=out.past_key_values).logits.shape == (2, 1, 64)
    with pytest.raises(MismatchError, match="2-d attention_mask"):
        model(IDS[:, :1], attention_mask=torch.ones(2, 1, 1, 11), past_key_values=out.past_key_values)
    build = Builder(Base.of(model))
    build.put("@input/embeddings", "prompt", {"rows": Generator(5).normal((2, 31, 1))})
    with pytest.raises(FormatError, match="field rows"):
        build.done()
    assert op_named("prompt").init((64, 32), Generator(1))["rows"].shape == (20, 32)
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    with pytest.raises(MismatchError, match="encoder and a decoder"):
        attach(t5, prompt_delta(t5))


def test_adapters_and_prompts_work_together() -> None:
    model = made("llama")
    gen, build = Generator(2), Builder(Base.of(model))
    for layer in range(2):
        fields = {name: gen.normal(v.shape, 0.5) for name, v in op_named("adapter").init((32,), gen, rank=4).items()}
        build.put(f"@module/model.layers.{layer}", "adapter", fields)
    deltas, plain = [build.done(), prompt_delta(model), random_delta(model, "llama")], generated(model)
    attach(model, deltas, trainable=True)
    live = generated(model)
    assert torch.equal(generated(model, use_cache=False), live) and all(not h.unused() for h in handles(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    assert all(p.grad is not None for h in handles(model) for p in h.parameters())
    model.eval()
    for delta in (deltas[1], deltas[0], deltas[2]):
        detach(model, delta)
    assert torch.equal(generated(model), plain)
