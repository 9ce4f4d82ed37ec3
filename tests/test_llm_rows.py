"""Rows for training a language model: their content, the positions with loss, and packed examples that do not mix."""

import pickle

import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from language_models import byte_level, tiny_llama
from transformers import DataCollatorForSeq2Seq, default_data_collator

from wavtokenizer_hf.llm import APERTUS_1_5, AudioVocabulary, PackedRows, Template, TrainingRows


CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT
    AudioVocabulary.add_to(tokenizer, 64, codebook_fingerprint="f" * 16)
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return AudioVocabulary.from_tokenizer(tokenizer)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def rows(*audio_codes, text="say hello") -> dict:
    return {"audio_codes": list(audio_codes), "text": [text] * len(audio_codes)}


def test_text_to_audio_has_loss_on_the_audio(tokenizer, vocabulary):
    batch = TrainingRows(tokenizer, vocabulary, Template("<s>{text}", "{audio}</s>"))(rows([1, 2, 63]))
    first = vocabulary.first_token_id
    prompt = ids(tokenizer, "<s>say hello")
    span = [first + 64, first + 1, first + 2, first + 63, first + 65]  # begin and end come after the codes
    assert batch["input_ids"] == [[*prompt, *span, tokenizer.eos_token_id]]
    assert batch["labels"] == [[-100] * len(prompt) + [*span, tokenizer.eos_token_id]]


def test_audio_to_text_has_loss_on_the_text(tokenizer, vocabulary):
    batch = TrainingRows(tokenizer, vocabulary, Template("{audio} so:", "{text}</s>"))(rows([5, 5]))
    first = vocabulary.first_token_id
    prompt = [first + 64, first + 5, first + 5, first + 65, *ids(tokenizer, " so:")]
    assert batch["input_ids"] == [[*prompt, *ids(tokenizer, "say hello"), tokenizer.eos_token_id]]
    assert batch["labels"][0][: len(prompt)] == [-100] * len(prompt)
    assert batch["labels"][0][len(prompt) :] == batch["input_ids"][0][len(prompt) :]


def test_audio_only_and_loss_on_everything(tokenizer, vocabulary):
    only = TrainingRows(tokenizer, vocabulary, Template("", "{audio}"))(rows([1], [2]))
    assert only["labels"] == only["input_ids"] == [vocabulary.span([1]), vocabulary.span([2])]
    template = Template("{text}", "{audio}", loss_on_prompt=True)
    both = TrainingRows(tokenizer, vocabulary, template)(rows([1]))
    assert both["labels"] == both["input_ids"] == [ids(tokenizer, "say hello") + vocabulary.span([1])]


def test_the_task_both_gives_two_examples_per_row(tokenizer, vocabulary):
    templates = [Template("{text}", "{audio}"), Template("{audio}", "{text}")]
    batch = TrainingRows(tokenizer, vocabulary, templates)(rows([1], [2]))
    text = ids(tokenizer, "say hello")
    one, two = vocabulary.span([1]), vocabulary.span([2])
    assert batch["input_ids"] == [text + one, one + text, text + two, two + text]


def test_a_chat_template_has_loss_on_the_answer(tokenizer, vocabulary):
    messages = [{"role": "user", "content": "Say: {text}"}, {"role": "assistant", "content": "{audio}"}]
    template = Template.from_chat(tokenizer, messages)
    assert (template.prompt, template.response) == ("<s>user:Say: {text}</s><s>assistant:", "{audio}</s>")
    batch = TrainingRows(tokenizer, vocabulary, template)(rows([1], text="the dog"))
    # the tokenizer's own ids of the whole conversation
    filled = [
        {"role": "user", "content": "Say: the dog"},
        {"role": "assistant", "content": "<|audio_begin|><|audio_1|><|audio_end|>"},
    ]
    assert batch["input_ids"] == [tokenizer.apply_chat_template(filled, return_dict=False)]
    prompt = tokenizer.apply_chat_template(filled[:1], add_generation_prompt=True, return_dict=False)
    assert batch["labels"][0] == [-100] * len(prompt) + batch["input_ids"][0][len(prompt) :]


def test_a_generation_prompt_equals_the_beginning_of_an_example(tokenizer, vocabulary):
    speak, transcribe = Template("<s>{text}", " so: {audio}"), Template("{audio} so:", "it is {text}")
    training = TrainingRows(tokenizer, vocabulary, [speak, transcribe])
    row = {"text": "the dog", "audio_codes": [7, 8]}
    spoken, written = training(rows([7, 8], text="the dog"))["input_ids"]
    prompt = training.prompt({"text": "the dog"})  # no codes are needed
    assert prompt == training.prompt(row) == spoken[:-3]  # 7, 8, end
    assert prompt[-1] == vocabulary.begin_token_id
    # one token spans the seam between "it is " and the text, so the prompt cannot end there
    assert len(ids(tokenizer, "it is the dog")) < len(ids(tokenizer, "it is ") + ids(tokenizer, "the dog"))
    prompt = training.prompt(row, transcribe)
    assert prompt == vocabulary.span([7, 8]) + ids(tokenizer, " so:") == written[: len(prompt)]


def test_datasets_map_accepts_the_row_builder_and_hits_its_cache(tokenizer, vocabulary):
    training = TrainingRows(tokenizer, vocabulary, Template("{text}", "{audio}"))
    before = Hasher.hash(training)
    dataset = Dataset.from_dict({**rows([1, 2], [3]), "id": ["a", "b"]})
    mapped = dataset.map(training, batched=True, remove_columns=dataset.column_names)
    assert mapped.column_names == ["input_ids", "labels"] and len(mapped) == 2
    assert mapped[1]["input_ids"] == ids(tokenizer, "say hello") + vocabulary.span([3])
    assert Hasher.hash(training) == before == Hasher.hash(pickle.loads(pickle.dumps(training)))
    collated = DataCollatorForSeq2Seq(tokenizer)([mapped[0], mapped[1]])
    assert collated["labels"][1, -1] == -100 and collated["attention_mask"][1, -1] == 0


class TestRefused:
    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({"audio_codes": [[1]]}, "no column 'text', but audio_codes"),
            ({"text": ["a"], "codes": [[1]]}, "no column 'audio_codes', but codes, text"),
            (rows([64]), "code 64 at index 0, expected 0 to 63"),
            (rows(None), "without codes.*filter"),
            (rows([]), "without codes.*filter"),
            ({"audio_codes": [1], "text": ["a"]}, "batched=True"),
            ({"audio_codes": [1], "text": "a", "codebook_fingerprint": "f" * 16}, "batched=True"),
            ({"audio_codes": None, "text": "a"}, "batched=True"),
            (rows([1], text=None), "NoneType in the column 'text', expected text"),
            (rows([1], text="a <|audio_3|> b"), "finds audio tokens in the text '<s>a <"),
            (rows([1], text="<|audio_end|>"), "finds audio tokens"),
            ({**rows([1]), "codebook_fingerprint": ["0" * 16]}, "codebook 0000000000000000.*ffffffffffffffff"),
        ],
    )
    def test_rows(self, tokenizer, vocabulary, batch, message):
        with pytest.raises(ValueError, match=message):
            TrainingRows(tokenizer, vocabulary, Template("<s>{text}", "{audio}"))(batch)

    def test_templates(self, tokenizer, vocabulary):
        with pytest.raises(ValueError, match="response of the template is empty"):
            Template("{audio}", "")
        with pytest.raises(ValueError, match=r"without \{audio\}"):
            Template("{text}", "{text}")
        with pytest.raises(ValueError, match="no template"):
            TrainingRows(tokenizer, vocabulary, [])
        with pytest.raises(ValueError, match="last message to be the assistant's"):
            Template.from_chat(tokenizer, [{"role": "user", "content": "{audio}"}])

    def test_a_chat_template_whose_prompt_differs_from_its_rendered_answer(self):
        tokenizer = byte_level()
        tokenizer.chat_template = CHAT.replace("<s>assistant:{%", "<s>assistant:<think></think>{%")
        messages = [{"role": "user", "content": "{text}"}, {"role": "assistant", "content": "{audio}"}]
        with pytest.raises(ValueError, match="does not begin with the rendered prompt"):
            Template.from_chat(tokenizer, messages)

    def test_packing(self):
        examples = {"input_ids": [[1] * 5, [2] * 3], "labels": [[1] * 5, [2] * 3]}
        with pytest.raises(ValueError, match="example of 5 tokens, expected at most 4"):
            PackedRows(4, 0)(examples)
        with pytest.raises(ValueError, match="no pad_token_id"):
            PackedRows(4, None)
        with pytest.raises(ValueError, match="too_long='cut'"):
            PackedRows(4, 0, too_long="cut")


def test_apertus_rows_use_the_published_audio_ids():
    """Its tokenizer is needed only for the text beside the audio."""
    training = TrainingRows(byte_level(), APERTUS_1_5, Template("{audio}", "{text}</s>"))
    (example,) = training(rows([0, 4095]))["input_ids"]
    assert example[:4] == [131080, 262344, 266439, 131081]


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=15))
def test_packed_rows_hold_every_example_once_and_whole(lengths):
    examples = [
        [100 * number + position for position in range(length)] for number, length in enumerate(lengths, start=1)
    ]
    packed = PackedRows(12, 0)({"input_ids": examples, "labels": examples})
    found = []
    for input_ids, labels, position_ids in zip(*packed.values(), strict=True):
        assert len(input_ids) == len(labels) == len(position_ids) == 12
        for id, label, position in zip(input_ids, labels, position_ids, strict=True):
            if id == 0:
                assert label == -100
                continue
            assert id % 100 == position and label == (id if position else -100)
            found.append(id)
    assert sorted(found) == sorted(id for example in examples for id in example)


def test_packed_rows_waste_little_space():
    """The best fit of 7, 5, 4, 4, 3, 1 into rows of 12 wastes nothing: by hand, 7 + 5 and 4 + 4 + 3 + 1."""
    lengths = [3, 7, 1, 4, 5, 4]
    examples = [[1] * length for length in lengths]
    assert PackedRows(12, 0)({"input_ids": examples, "labels": examples})["input_ids"] == [[1] * 12] * 2


def test_examples_that_are_too_long_are_dropped_on_request_and_counted(caplog):
    examples = {"input_ids": [[1] * 5, [2] * 3], "labels": [[1] * 5, [2] * 3]}
    assert PackedRows(4, 0, too_long="drop")(examples)["input_ids"] == [[2, 2, 2, 0]]
    assert "1 of 2 examples are longer than 4 tokens" in caplog.text


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_examples_give_the_logits_and_the_loss_that_they_give_alone(implementation):
    model = tiny_llama(200)
    model.set_attn_implementation(implementation)
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(1, 200, (length,), generator=generator).tolist() for length in (9, 5, 4, 1)]
    labels = [[-100] * len(example[:2]) + example[2:] for example in examples]
    packed = PackedRows(24, 0)({"input_ids": examples, "labels": labels})
    batch = default_data_collator([{name: values[0] for name, values in packed.items()}])
    assert batch["input_ids"].shape == (1, 24)
    with torch.no_grad():
        together = model(**batch, use_cache=False)
        losses, count, start = 0.0, 0, 0
        for example, label in zip(examples, labels, strict=True):
            alone = model(torch.tensor([example]))
            # 1e-5: different float32 sums, for logits around 1
            torch.testing.assert_close(
                together.logits[:, start : start + len(example)], alone.logits, atol=1e-5, rtol=0
            )
            start += len(example)
            targets = torch.tensor(label[1:], dtype=torch.long)
            losses += torch.nn.functional.cross_entropy(alone.logits[0, :-1], targets, reduction="sum").item()
            count += int((targets != -100).sum())
    assert together.logits.std() > 0.1
    assert together.loss.item() == pytest.approx(losses / count, rel=1e-5)
