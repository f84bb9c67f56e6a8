"""Data for training: reading, hashing, order, padding, packing, and what objectives make of rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import config, methods, xp
from weft.engine.data import IGNORE, batches, data_hash, pack, packed, padded, read_rows, tokenizer_hash
from weft.errors import FormatError, InputError, MissingExtra, WeftError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- reading


def test_json_lines_json_and_rows_read_alike(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b", "label": 1}, {"text": "c", "label": 2}]
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    listed = write(tmp_path / "b.json", json.dumps(rows))
    assert read_rows(lines) == read_rows(str(listed)) == read_rows(rows) == read_rows(iter(rows)) == rows
    assert read_rows([lines, listed]) == rows + rows


class Dataset:
    """What `datasets.Dataset` looks like from here: rows by iteration."""

    def __iter__(self) -> Any:
        return iter([{"text": "x"}, {"text": "y"}])


def test_an_iterable_of_mappings_is_a_dataset() -> None:
    assert read_rows(Dataset()) == [{"text": "x"}, {"text": "y"}]


@pytest.mark.parametrize(
    ("name", "text", "kind", "said"),
    [
        ("a.jsonl", '{"text": 1}\n{"text": \n', FormatError, "line 2"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', FormatError, "line 2"),
        ("a.jsonl", '{"text": "x", "text": "y"}', FormatError, "twice"),
        ("a.jsonl", "\n\n", InputError, "no rows"),
        ("a.json", '[{"text": "x"}, 3]', FormatError, "item 1"),
        ("a.csv", "text\nx", InputError, "expected a .jsonl"),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path: Path, name: str, text: str, kind: type[WeftError], said: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(kind, match=said) as caught:
        read_rows(path)
    assert name in str(caught.value)


def test_other_bad_sources_are_refused(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "absent.jsonl", 3, ["text"], [["text"]], {"text": "x"}):
        with pytest.raises(InputError):
            read_rows(source)


def test_parquet_is_read_or_names_its_extra(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(MissingExtra, match="pyarrow"):
            read_rows(path)
    else:
        parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [1, 2]}), path)
        assert read_rows(path) == [{"text": "a", "label": 1}, {"text": "b", "label": 2}]


# --- hashes


def test_the_data_hash_is_of_canonical_rows_in_order(tmp_path: Path) -> None:
    rows = [{"b": 1, "a": "x"}, {"a": "é", "b": 2.0}]
    assert data_hash(rows) == hashlib.sha256('{"a":"x","b":1}\n{"a":"é","b":2}\n'.encode()).hexdigest()
    path = write(tmp_path / "a.jsonl", '{ "a": "x", "b": 1 }\n{"b": 2.0, "a": "\\u00e9"}')
    assert data_hash(read_rows(path)) == data_hash(rows)
    assert data_hash(rows[::-1]) != data_hash(rows)
    assert data_hash([{"a": "x", "b": 1, "c": None}]) != data_hash([{"a": "x", "b": 1}])
    with pytest.raises(InputError, match="row 1"):
        data_hash([{"a": 1}, {"a": float("nan")}])


WORDS = ["who", "what", "where", "the", "a", "city", "person", "is", "name", "of", "old", "new", "river", "born", "did", "in", "on", "one", "two", "three"]


def tokenizer(**special: Any) -> Any:
    """A word tokenizer made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: k for k, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<mask>", "<u>", "<b>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", mask_token="<mask>", **special
    )


def test_the_tokenizer_hash_forgets_call_settings_and_nothing_else() -> None:
    one, two = tokenizer(), tokenizer()
    first = tokenizer_hash(one)
    one(["who is"], truncation=True, max_length=1, padding="max_length")
    assert tokenizer_hash(one) == first == tokenizer_hash(two)
    two.chat_template = "{{ messages }}"
    assert tokenizer_hash(two) != first
    two = tokenizer()
    two.add_tokens(["four"])
    assert tokenizer_hash(two) != first


# --- order


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=300), size=st.integers(1, 17), seed=st.integers(0, 2**40), bucket=st.booleans())
def test_batches_hold_every_example_once_and_depend_on_seed_and_epoch_alone(lengths: list[int], size: int, seed: int, bucket: bool) -> None:
    got = batches(lengths, size, seed, 0, bucket=bucket)
    assert sorted(k for batch in got for k in batch) == list(range(len(lengths)))
    assert len(got) == -(-len(lengths) // size) and max(map(len, got)) <= size and sum(len(b) < size for b in got) <= 1
    assert got == batches(lengths, size, seed, 0, bucket=bucket)


def test_seed_epoch_and_buckets_change_the_order() -> None:
    lengths = [(7 * k) % 60 + 1 for k in range(400)]
    orders = [batches(lengths, 8, seed, epoch, bucket=bucket) for seed in (0, 1) for epoch in (0, 1) for bucket in (True, False)]
    assert len({json.dumps(order) for order in orders}) == 8
    waste = [sum(max(lengths[k] for k in b) * len(b) - sum(lengths[k] for k in b) for b in batches(lengths, 8, 0, 0, bucket=x)) for x in (True, False)]
    assert waste[0] < waste[1] / 5


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 40), max_size=80))
def test_packs_hold_each_example_once_and_are_no_two_half_empty(lengths: list[int]) -> None:
    groups = pack(lengths, 40)
    assert sorted(k for group in groups for k in group) == list(range(len(lengths)))
    loads = [sum(lengths[k] for k in group) for group in groups]
    assert all(load <= 40 for load in loads)
    assert sum(load <= 20 for load in loads) <= 1  # first fit would have joined them


def test_an_example_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="41 tokens"):
        pack([3, 41], 40)


def test_packing_keeps_positions_apart_and_takes_no_loss_across_seams() -> None:
    joined = packed([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [IGNORE, 9]}])
    assert joined == {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORE, 6, 7, IGNORE, 9], "position_ids": [0, 1, 2, 0, 1]}


def test_padding_is_on_the_right_and_masked() -> None:
    batch = padded([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}], 1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORE, IGNORE]]
    assert padded([{"input_ids": [5], "labels": 3}, {"input_ids": [5, 6], "labels": 0}], 0)["labels"].tolist() == [3, 0]


# --- objectives


class FakeBase:
    """As much of a base as encoding needs."""

    def __init__(self, **settings: Any) -> None:
        self.config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, **settings}


def make(kind: str, rows: list[dict[str, Any]], base: Any = None, tok: Any = None, **options: Any) -> Any:
    found = methods.get("objective", kind)
    return found.run(config.make(found.config, options, kind), base or FakeBase(), tok or tokenizer(), rows)


def words(ids: list[int], tok: Any = None) -> str:
    return " ".join((tok or tokenizer()).convert_ids_to_tokens(ids))


def targets(example: dict[str, Any]) -> str:
    return " ".join("_" if label == IGNORE else tokenizer().convert_ids_to_tokens([label])[0] for label in example["labels"])


def test_text_is_closed_with_the_end_token() -> None:
    (example,) = make("causal-lm", [{"text": "who is old"}]).examples
    assert words(example["input_ids"]) == targets(example) == "who is old </s>"


def test_the_prompt_is_masked_and_loses_its_beginning_if_too_long() -> None:
    rows = [{"prompt": "where is the old city", "completion": "on the river"}]
    (example,) = make("causal-lm", rows).examples
    assert words(example["input_ids"]) == "where is the old city on the river </s>"
    assert targets(example) == "_ _ _ _ _ on the river </s>"
    (short,) = make("causal-lm", rows, max_length=6).examples
    assert words(short["input_ids"]) == "old city on the river </s>"
    assert targets(short) == "_ _ on the river </s>"
    (least,) = make("causal-lm", rows, max_length=3).examples
    assert words(least["input_ids"]) == targets(least) == "on the river"


CHAT = (
    "{% for m in messages %}{{ ('<u> ' if m.role == 'user' else '<b> ') + m.content + (' </s> ' if m.role == 'assistant' else ' ') }}{% endfor %}"
    "{% if add_generation_prompt %}<b> {% endif %}"
)


def test_only_the_assistant_speaks_in_the_labels_of_messages() -> None:
    tok = tokenizer(chat_template=CHAT)
    say = [("user", "who is old"), ("assistant", "the city"), ("user", "what river"), ("assistant", "one")]
    (example,) = make("causal-lm", [{"messages": [{"role": r, "content": c} for r, c in say]}], tok=tok).examples
    assert words(example["input_ids"], tok) == "<u> who is old <b> the city </s> <u> what river <b> one </s>"
    assert targets(example) == "_ _ _ _ _ the city </s> _ _ _ _ one </s>"


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    tok = tokenizer(chat_template="{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content + ' ' }}{% endif %}{% endfor %}")
    say = [("user", "who"), ("assistant", "the city"), ("user", "what"), ("assistant", "one")]
    with pytest.raises(InputError, match="rewrites earlier messages"):
        make("causal-lm", [{"messages": [{"role": r, "content": c} for r, c in say]}], tok=tok)
    with pytest.raises(InputError, match="no chat template"):
        make("causal-lm", [{"messages": []}])


def test_rows_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"row 1 of the data has no 'text'.*txt"):
        make("causal-lm", [{"text": "who"}, {"txt": "who"}])
    with pytest.raises(InputError, match="row 0 of the data has no 'completion'"):
        make("causal-lm", [{"prompt": "who"}])
    with pytest.raises(InputError, match="'text' must be text, got '3'"):
        make("causal-lm", [{"text": 3}])


def test_examples_without_a_target_are_left_out() -> None:
    assert len(make("causal-lm", [{"input_ids": [5, 6], "labels": [IGNORE, IGNORE]}, {"input_ids": [5, 6]}]).examples) == 1
    with pytest.raises(InputError, match="no row"):
        make("causal-lm", [{"input_ids": [5, 6], "labels": [5, IGNORE]}])


def test_a_batch_of_text_weighs_its_targets() -> None:
    goal = make("causal-lm", [{"prompt": "who", "completion": "is old"}, {"text": "the city"}])
    batch = goal.collate(goal.examples, [0, 0])
    assert goal.weight(batch) == 3 + 2  # is old </s>; city </s> (the first token has nothing before it)


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "max_position_embeddings": 64}


def test_labels_are_sorted_and_named_in_the_patch() -> None:
    rows = [{"text": "who", "label": "b"}, {"text": "what is", "label": "a"}, {"text": "old", "label": "b"}]
    goal = make("classification", rows, FakeBase(**BERT, id2label={"0": "x", "1": "y", "2": "z"}, label2id={"x": 0, "y": 1, "z": 2}))
    assert [example["labels"] for example in goal.examples] == [1, 0, 1]
    assert goal.patch["architectures"] == ["BertForSequenceClassification"]
    assert goal.patch["id2label"] == {"0": "a", "1": "b", "2": None}
    assert goal.patch["label2id"] == {"a": 0, "b": 1, "x": None, "y": None, "z": None}
    numbers = make("classification", [{"text": "who", "label": n} for n in (10, 9, 2)], FakeBase(**BERT))
    assert numbers.patch["id2label"] == {"0": "2", "1": "9", "2": "10"}
    with pytest.raises(InputError, match="two at least"):
        make("classification", rows[:1], FakeBase(**BERT))
    with pytest.raises(InputError, match="mix"):
        make("classification", [{"text": "a", "label": 1}, {"text": "a", "label": "1"}], FakeBase(**BERT))


def test_masking_depends_on_the_key_alone_and_keeps_its_shares() -> None:
    rows = [{"text": " ".join(WORDS[k % len(WORDS)] for k in range(j, j + 50))} for j in range(60)]
    goal = make("masked-lm", rows, FakeBase(**BERT))
    keys = [xp.key(3, k) for k in range(60)]
    batch = goal.collate(goal.examples, keys)
    alone = [goal.collate([example], [key]) for example, key in zip(goal.examples, keys, strict=True)]
    assert torch.equal(batch["input_ids"], torch.cat([one["input_ids"] for one in alone]))
    assert not torch.equal(batch["input_ids"], goal.collate(goal.examples, [key + 1 for key in keys])["input_ids"])
    chosen = batch["labels"] != IGNORE
    original = torch.tensor([example["input_ids"] for example in goal.examples])
    assert torch.equal(batch["labels"][chosen], original[chosen]) and torch.equal(batch["input_ids"][~chosen], original[~chosen])
    share, hidden, kept = chosen.float().mean(), (batch["input_ids"] == 4)[chosen].float().mean(), (batch["input_ids"] == original)[chosen].float().mean()
    assert abs(share - 0.15) < 0.02 and abs(hidden - 0.8) < 0.06 and abs(kept - 0.1) < 0.06  # 450 tokens: 4 standard errors
    assert goal.weight(batch) == chosen.sum()


def test_a_row_of_one_token_is_masked_too() -> None:
    goal = make("masked-lm", [{"text": "who"}], FakeBase(**BERT))
    assert all(goal.weight(goal.collate(goal.examples, [key])) == 1 for key in range(20))
