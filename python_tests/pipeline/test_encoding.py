"""Samples and batches: which tokens count, and that nothing is lost on the way."""

import pytest
import torch

from floe_kernels.pipeline.data import Record
from floe_kernels.pipeline.encoding import (
    IGNORE,
    Samples,
    draw,
    encode_records,
    encode_texts,
    plain_prompt,
)


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def plain(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    return tokenizer


def test_padding_is_masked_and_has_no_label():
    samples = Samples.of([([5, 6, 7, 8], 2), ([9, 10], 1)])
    batch = samples.batch([0, 1], pad=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 3, 3]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7, 8], [IGNORE, 10, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert samples.loss_tokens() == 3
    assert samples.loss_tokens([1]) == 1


def test_equal_lengths_need_no_mask():
    assert "attention_mask" not in Samples.of([([1, 2], 1), ([3, 4], 1)]).batch([0, 1])


def test_subsets_keep_samples_whole():
    samples = Samples.of([(range(n), n // 2) for n in (3, 5, 2, 9)])
    part = samples.subset([3, 0])
    assert part.batch([0])["labels"].tolist() == samples.batch([3])["labels"].tolist()
    assert part.loss_tokens() == samples.loss_tokens([3, 0])
    assert part.digest() != samples.digest() == samples.subset(range(4)).digest()


def test_draws_are_repeatable_and_differ_by_name_and_seed():
    samples = Samples.of([([i, i], 1) for i in range(50)])

    def drawn(seed, name):
        return draw(samples, 10, seed, name).tokens[::2].tolist()

    assert drawn(0, "a") == drawn(0, "a")
    assert len(set(drawn(0, "a"))) == 10
    assert drawn(0, "a") != drawn(1, "a") != drawn(1, "b")
    assert draw(samples, 0, 0, "a") is draw(samples, 99, 0, "a") is samples


def test_the_chat_template_is_used_and_only_the_answer_counts(tokenizer):
    samples, cut = encode_records([Record("Add 1 and 2 .", "w3", "w4")], tokenizer, 64)
    batch = samples.batch([0])
    text = tokenizer.decode(batch["input_ids"][0]).replace("<unk>", "?")
    # "user" and "assistant" are not in the vocabulary
    assert " ".join(text.split()) == "? ? Add 1 and 2 . w3 </s> ? ? w4 </s>"
    counted = batch["labels"][0]
    assert tokenizer.decode(counted[counted != IGNORE]).split() == ["w4", "</s>"]
    assert cut == 0


def test_a_template_that_rewrites_the_past_still_gives_the_answer(tokenizer, monkeypatch):
    rewriting = "{{ messages | length }} {{ messages[-1]['content'] }}"
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    samples, _ = encode_records([Record("Add .", "", "w4")], tokenizer, 64)
    labels = samples.batch([0])["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORE]).split() == ["w4", "</s>"]


def test_without_a_template_there_is_a_plain_prompt(plain):
    record = Record("Add .", "w1", "w2")
    samples, _ = encode_records([record], plain, 64)
    ids = samples.batch([0])["input_ids"][0]
    expected = plain(plain_prompt(record) + "w2</s>", add_special_tokens=False)["input_ids"]
    assert ids.tolist() == expected
    assert samples.loss_tokens() == 2


def test_long_samples_lose_the_start_of_the_prompt_then_the_end_of_the_answer(plain):
    record = Record("w1 " * 30, "", "w2 w3 w4")
    whole, _ = encode_records([record], plain, 64)
    samples, cut = encode_records([record], plain, 10)
    assert cut == 1
    assert samples.tokens.tolist() == whole.tokens.tolist()[-10:]
    assert samples.loss_tokens() == 4
    samples, _ = encode_records([Record("Add .", "", "w2 " * 50)], plain, 10)
    assert len(samples.tokens) == 10
    assert samples.loss_tokens() == 9


def test_texts_become_full_blocks_with_ends_between(tokenizer):
    samples = encode_texts(["w1 w2 w3", "w4 w5 w6 w7"], tokenizer, 3)
    assert len(samples) == 3  # 9 tokens with the two ends
    text = " ".join(tokenizer.decode(samples.tokens).split())
    assert text == "w1 w2 w3 </s> w4 w5 w6 w7 </s>"
    assert samples.loss_tokens() == 6
    assert len(encode_texts(["w1 w2 w3 w4"], tokenizer, 3)) == 1  # what is left over goes
    assert len(encode_texts(["w1"], tokenizer, 30).tokens) == 2  # unless it is all there is


def test_long_texts_are_tokenised_as_a_whole_would_be(tokenizer):
    text = "\n".join("w1 w2 w3" for _ in range(6_000))
    samples = encode_texts([text], tokenizer, 2)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert samples.tokens.tolist() == whole
    assert samples.tokens.dtype == torch.int32


def test_a_text_without_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        encode_texts([""], tokenizer, 8)
