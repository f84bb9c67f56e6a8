"""Spans by characters: tokenizers of every common make, seams that merge, repeated subjects, padding."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.engine.spans import Spans, batch, joined, rows, spans
from weft.errors import InputError, UsageError

CORPUS = [
    "The capital of Lorvia is Kessel and the capital of Noria is Zürich. It is 12 miles away, isn't it?",
    "Anna and Ann live in São Paulo; Ann-Marie Öberg lives in 東京 (Tokyo). Who lives there? Ann does, Zoë does not.",
] * 4


@cache
def tokenizer(kind: str) -> Any:
    """kind: bytes (GPT-2), bytes+bos (Llama 3), metaspace (Llama 2), pieces (BERT)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names = list(special.values())
    if kind == "pieces":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=160, special_tokens=names, show_progress=False)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
        alphabet = [f"<0x{k:02X}>" for k in range(256)] if kind == "metaspace" else []
        initial = [] if kind == "metaspace" else pre_tokenizers.ByteLevel.alphabet()
        if kind == "metaspace":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            made.decoder = decoders.Metaspace()
        elif kind == "words":  # merges run across spaces
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        else:
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=400 + len(alphabet), special_tokens=names + alphabet, initial_alphabet=initial, show_progress=False)
    if kind.startswith("bytes") or kind == "words":
        made.decoder = decoders.ByteLevel()
    made.train_from_iterator(CORPUS, trainer)
    both = [("<s>", made.token_to_id("<s>")), ("</s>", made.token_to_id("</s>"))]
    if kind == "pieces":
        made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=both)
    elif kind == "bytes":
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind in ("bytes+bos", "metaspace"):
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=both[:1])
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


KINDS = ("bytes", "bytes+bos", "metaspace", "pieces", "words")
FRONT = {"bytes": 0, "bytes+bos": 1, "metaspace": 1, "pieces": 1, "words": 0}


def text(tok: Any, ids: list[int]) -> str:
    return bare(tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).replace("##", ""))


def bare(words: str) -> str:
    """Without spaces, capitals and accents: what the lower-casing tokenizer keeps."""
    return "".join(c for c in unicodedata.normalize("NFD", words) if not c.isspace() and not unicodedata.combining(c)).lower()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "answer", "subject"),
    [
        ("The capital of Lorvia is", "Kessel", "Lorvia"),
        ("Ann-Marie Öberg lives in", "東京", "Öberg"),
        ("Who lives in São Paulo?", "Zoë", "São Paulo"),
        ("東京", "is 12 miles away", "東京"),
        ("Who lives there?\n", "Ann does", "Who"),
    ],
)
def test_the_tokens_are_those_of_the_words(kind, prompt, answer, subject):
    tok = tokenizer(kind)
    found = spans(tok, prompt, answer, subject)
    assert found.ids == tok(joined(prompt, answer))["input_ids"][: len(found.ids)]
    assert tok.unk_token_id not in found.ids and text(tok, found.ids) == bare(prompt + answer)
    assert found.ids[: FRONT[kind]] == [tok.bos_token_id] * FRONT[kind] and tok.eos_token_id not in found.ids
    if kind != "words":  # whose merges go over word ends
        assert text(tok, found.ids[: found.prompt]) == bare(prompt)
        assert text(tok, found.ids[slice(*found.subject)]) == bare(subject)
        assert found.subject[1] <= found.prompt
    assert list(found.predicts) == list(range(found.prompt - 1, len(found.ids) - 1)) != []
    assert found.prompt_last == found.prompt - 1 and found.subject_last == found.subject[1] - 1


def by_hand(kind: str, **words: int) -> Any:
    """A byte-level BPE with exactly these merges, so that it is known which token covers what."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.ByteLevel(trim_offsets=kind == "trimmed")
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("kind", ["trimmed", "untrimmed"])
def test_a_token_over_the_seam_is_an_answer_token(kind):
    tok = by_hand(kind, xyĠa=0)  # "xy a" is one token
    assert len(tok("xy ab")["input_ids"]) == 2
    found = spans(tok, "cxy", "ab", "xy")
    assert (len(found.ids), found.prompt, list(found.predicts)) == (3, 1, [0, 1])
    assert found.subject == (1, 2)  # the token that covers a part of it
    assert spans(tok, "cxy", "", "xy") == Spans(tok("cxy")["input_ids"], 2, (1, 2))


@pytest.mark.parametrize("kind", ["trimmed", "untrimmed"])
def test_where_the_prompt_alone_is_other_tokens(kind):
    tok = by_hand(kind, aĠb=0)
    alone, whole = tok("za")["input_ids"], spans(tok, "za", "bc")
    assert whole.ids[: len(alone)] != alone  # so that counting the prompt's own tokens would be wrong
    assert [tok.convert_ids_to_tokens(k) for k in whole.ids] == ["z", "aĠb", "c"] and whole.prompt == 1


@pytest.mark.parametrize("kind", ["trimmed", "untrimmed"])
def test_bytes_of_one_character_stay_together(kind):
    tok = by_hand(kind)
    found = spans(tok, "aöb", "ü", "ö")
    assert found.subject == (1, 3) and found.prompt == 4 and len(found.ids) == 4 + 3  # a space and two bytes


def test_the_last_occurrence_that_is_a_word():
    tok = by_hand("trimmed")
    assert spans(tok, "Ann and Ann", "x", "Ann").subject == (8, 11)
    assert spans(tok, "Ann or Anna", "x", "Ann").subject == (0, 3)
    assert spans(tok, "Hannah, Annas", "x", "Ann").subject == (8, 11)  # no word of its own: the last place
    assert spans(tok, "(C++) and C++.", "x", "C++").subject == (10, 13)
    assert spans(tok, "Ann is", "x", " Ann ").subject == (0, 3)
    assert spans(tok, "x Ann", "Ann", "Ann").subject == (2, 5)  # in the prompt, not in the answer


WORDS = st.sampled_from(["Ann", "Anna", "São", "東京", "is", "12", "isn't", "ß", "Zoë", "(Tokyo)", "é", "Paulo;"])
PHRASE = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)


@settings(max_examples=60)
@given(kind=st.sampled_from(KINDS), before=PHRASE, subject=PHRASE, after=st.one_of(st.just(""), PHRASE.map(" {}".format)), answer=PHRASE)
def test_any_words(kind, before, subject, after, answer):
    tok = tokenizer(kind)
    prompt = f"{before} {subject}{after}"
    found = spans(tok, prompt, answer, subject)
    encoded = tok(joined(prompt, answer), return_offsets_mapping=True)
    covers = encoded["offset_mapping"]
    front, end = FRONT[kind], len(found.ids)
    assert encoded["input_ids"][:end] == found.ids and all(k == tok.eos_token_id for k in encoded["input_ids"][end:])
    assert front < found.prompt < end
    assert all(covers[k][1] <= len(prompt) for k in range(found.prompt)) and all(covers[k][1] > len(prompt) for k in range(found.prompt, end))
    lo, hi = found.subject
    assert front <= lo < hi <= found.prompt or kind == "words"
    assert subject in prompt[covers[lo][0] : covers[hi - 1][1]]
    short = prompt[covers[lo][1] : covers[hi - 1][1]], prompt[covers[lo][0] : covers[hi - 1][0]]
    assert subject not in short[0] or covers[lo] == covers[lo + 1]  # nothing more than it takes (bytes of a character share a place)
    assert subject not in short[1] or covers[hi - 1] == covers[hi - 2]


@given(prompt=st.text(max_size=8), answer=st.text(max_size=8))
def test_joined(prompt, answer):
    whole = joined(prompt, answer)
    assert whole.startswith(prompt)
    assert "".join(whole.split()) == "".join((prompt + answer).split())
    if prompt and answer.strip():
        assert whole[len(prompt) - 1 :][:2].strip() != whole[len(prompt) - 1 :][:2]  # some whitespace at the seam


def test_joined_does_not_double_whitespace():
    assert [joined("a", "b"), joined("a ", "b"), joined("a", " b"), joined("a ", " b"), joined("a\n", "b"), joined("a", ""), joined("", "b")] == [
        "a b",
        "a b",
        "a b",
        "a b",
        "a\nb",
        "a",
        "b",
    ]


def test_padding_and_truncation_left_on_do_not_reach_in():
    tok = tokenizer("bytes+bos")
    plain = spans(tok, "The capital of Lorvia is", "Kessel", "Lorvia")
    tok("some text", padding="max_length", truncation=True, max_length=4)
    assert spans(tok, "The capital of Lorvia is", "Kessel", "Lorvia") == plain


def test_batch_and_rows():
    items = [spans(tokenizer("pieces"), "The capital of Lorvia is", answer, "Lorvia") for answer in ("Kessel", "Zürich and Kessel", "")]
    made = batch(items, 2, "cpu")
    longest = max(len(item.ids) for item in items)
    assert set(made) == {"input_ids", "attention_mask"} and made["input_ids"].shape == (3, longest)
    for item, ids, mask in zip(items, made["input_ids"].tolist(), made["attention_mask"].tolist(), strict=True):
        assert ids == item.ids + [2] * (longest - len(item.ids)) and mask == [1] * len(item.ids) + [0] * (longest - len(item.ids))
    where = rows(items, lambda item: item.predicts)
    assert where.dtype == torch.bool and where.shape == made["input_ids"].shape
    assert [line.nonzero().flatten().tolist() for line in where] == [list(item.predicts) for item in items]
    assert rows(items, lambda item: item.subject_last).sum(1).tolist() == [1, 1, 1]
    following = made["input_ids"].roll(-1, 1)[where]
    assert following.tolist() == [token for item in items for token in item.ids[item.prompt :]]


def test_what_cannot_be_found_is_told():
    from transformers import ByT5Tokenizer

    tok = tokenizer("bytes")
    with pytest.raises(InputError, match=r"the subject 'Noria' is not in the prompt 'Lorvia is'"):
        spans(tok, "Lorvia is", "x", "Noria")
    with pytest.raises(InputError, match="the subject '  ' is not in"):
        spans(tok, "Lorvia is", "x", "  ")
    with pytest.raises(InputError, match="the prompt '' has no token"):
        spans(tok, "", "x")
    assert spans(tokenizer("bytes+bos"), "", "x").prompt == 1  # here something is in front
    with pytest.raises(InputError, match="the answer ' ' to"):
        spans(tokenizer("pieces"), "Lorvia is", " ")
    with pytest.raises(UsageError, match="ByT5Tokenizer cannot tell which characters"):
        spans(ByT5Tokenizer(), "Lorvia is", "x")
    with pytest.raises(UsageError, match="without a subject"):
        _ = Spans([1, 2], 1).subject_last
