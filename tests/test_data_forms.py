"""Conversations, images, audio, a Trainer's loader and budgets of tokens as calibration data, on tiny models."""

from itertools import chain

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from datasets import Dataset, IterableDataset
from PIL import Image
from tiny import TEXT, redrawn, tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader

from hf_layerprobe import LayerProbeError, PruningPlan, avss, find_stacks, plan_pruning, score_layers
from hf_layerprobe.activations import batches

TEXTS = ["what is it?", "a pear", "an apple a day."]
CHATS = [
    [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a pear"}],
    [{"role": "user", "content": "and that?"}, {"role": "assistant", "content": "an apple"}],
]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
RANDOM = np.random.default_rng(0)
IMAGES = [RANDOM.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8) for i in range(3)]
SOUNDS = [RANDOM.normal(0, 0.1, 4000 + 800 * i).astype(np.float32) for i in range(3)]


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rendered(chat):
    return "".join(f"{m['role']}: {m['content']}\n" for m in chat)


def image_processor(**options):
    processor = tf.ViTImageProcessorPil if hasattr(tf, "ViTImageProcessorPil") else tf.ViTImageProcessor  # older
    return processor(size={"height": 16, "width": 16}, **options)


@pytest.mark.parametrize("processor", [chat_tokenizer, lambda: tf.LlavaProcessor(image_processor(), chat_tokenizer())])
@pytest.mark.parametrize(
    "data",
    [
        CHATS,
        Dataset.from_dict({"messages": CHATS, "source": ["a", "b"]}),
        Dataset.from_dict({"messages": CHATS}).with_format("numpy"),
        Dataset.from_dict({"messages": CHATS}).to_iterable_dataset().with_format("numpy"),
        Dataset.from_dict({"messages": CHATS}).with_format("pandas"),
        IterableDataset.from_generator(lambda: iter({"messages": chat} for chat in CHATS)),
        [{"messages": chat} for chat in CHATS],
    ],
    ids=["lists", "dataset", "numpy", "numpy stream", "pandas", "stream", "rows"],
)
def test_conversations_go_through_the_chat_template(data, processor):
    model, tokenizer = tiny_model("llama"), chat_tokenizer()
    expected = [tokenizer(rendered(chat))["input_ids"] for chat in CHATS]
    rows = [b["input_ids"][0].tolist() for b in batches(data, model, processor(), pack=False, batch_size=1)]
    assert rows == expected
    (packed,) = batches(data, model, processor())
    assert packed["input_ids"].tolist() == [list(chain(*expected))]  # the template frames them: no separator
    scores = avss(model, data, tokenizer=processor())
    assert scores.data["tokens"] == sum(map(len, expected)) and scores.data["packed"] is True


def test_images_from_a_data_set_and_from_rows():
    model, processor = tiny_model("vit"), image_processor()
    expected = processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    pictures = [Image.fromarray(image) for image in IMAGES]
    dataset = Dataset.from_dict({"img": pictures, "label": [0, 1, 1], "file": ["a", "b", "c"]})
    for data in (
        dataset,
        dataset.to_iterable_dataset(),
        [{"image": image, "label": 1} for image in IMAGES],
        pictures,
        IMAGES,
    ):
        found = list(batches(data, model, processor, batch_size=2))
        torch.testing.assert_close(torch.cat([b["pixel_values"] for b in found]), expected)
        assert [len(b["labels"]) for b in found if "labels" in b] == (
            [2, 1] if data is not pictures and data is not IMAGES else []
        )
    scores = avss(model, dataset, tokenizer=processor)
    np.testing.assert_allclose(scores.values, avss(model, [{"pixel_values": expected}]).values, rtol=1e-5)
    assert scores.data["sequences"] == 3 and scores.data["tokens"] == 3 * 17
    grey = [{"image": picture.convert("L")} for picture in pictures]
    assert avss(model.bfloat16(), grey, tokenizer=processor).data["tokens"] == 3 * 17


def test_a_transform_that_leaves_pixels_alone():
    model, processor = tiny_model("vit"), image_processor()
    data = Dataset.from_dict({"img": [Image.fromarray(image) for image in IMAGES], "label": [0, 1, 1]})

    def pixels(rows):
        return {**processor(images=rows["img"], return_tensors="pt"), "label": rows["label"]}

    with pytest.raises(LayerProbeError, match=r"columns \['pixel_values', 'label'\].* pass batches, .*DataLoader\("):
        avss(model, data.with_transform(pixels), tokenizer=processor)
    loader = DataLoader(data.with_transform(pixels), batch_size=4, collate_fn=tf.default_data_collator)
    expected = avss(model, data, tokenizer=processor).values
    np.testing.assert_allclose(avss(model, loader).values, expected, rtol=1e-5)
    added = data.with_transform(lambda rows: {**rows, **pixels(rows)})  # the images are still there
    np.testing.assert_allclose(avss(model, added, tokenizer=processor).values, expected, rtol=1e-5)


def test_rows_without_the_label_of_the_first():
    labels = [{"image": image, "label": label} for image, label in zip(IMAGES, (1, 0, None), strict=True)]
    with pytest.raises(LayerProbeError, match="Row 2 of the data has no label, and the first row has one"):
        list(batches(labels, tiny_model("vit"), image_processor(), batch_size=2))
    found = batches(labels[::-1], tiny_model("vit"), image_processor(), batch_size=2)
    assert not any("labels" in batch for batch in found)


def test_images_with_their_captions():
    config = tf.CLIPConfig(
        text_config=dict(TEXT, max_position_embeddings=16, eos_token_id=2),
        vision_config=dict(TEXT, image_size=16, patch_size=8),
        projection_dim=16,
    )
    model = redrawn(tf.CLIPModel(config))
    processor = tf.CLIPProcessor(image_processor(), tiny_tokenizer())
    data = Dataset.from_dict({"image": [Image.fromarray(i) for i in IMAGES], "text": TEXTS})
    inputs = processor(images=IMAGES, text=TEXTS, return_tensors="pt", padding=True)
    for stack in find_stacks(model):
        found = avss(model, data, tokenizer=processor, stack=stack).values
        np.testing.assert_allclose(found, avss(model, [dict(inputs)], stack=stack).values, rtol=1e-4)


def test_conversations_about_images():
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
        "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endfor %}"
    )
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**dict(TEXT, vocab_size=80)),
        vision_config=tf.CLIPVisionConfig(**TEXT, image_size=16, patch_size=8),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = redrawn(tf.LlavaForConditionalGeneration(config))
    processor = tf.LlavaProcessor(
        image_processor(), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    rows = [{"messages": messages, "images": [Image.fromarray(image)]} for image in IMAGES]
    for stack in find_stacks(model):
        assert np.isfinite(avss(model, rows, tokenizer=processor, stack=stack).values).all()
    with pytest.raises(LayerProbeError, match=r"Conversation 0 has parts of type \['image'\]"):
        avss(model, [messages], tokenizer=processor)


@pytest.mark.parametrize("texts", [True, False])
def test_speech(texts):
    model = tiny_model("whisper")
    extractor = tf.WhisperFeatureExtractor(feature_size=16, chunk_length=1, n_fft=400, hop_length=333)
    processor = tf.WhisperProcessor(extractor, tiny_tokenizer())
    audio = [{"array": sound, "sampling_rate": 16000} for sound in SOUNDS]
    data = Dataset.from_dict({"audio": audio, "sentence": TEXTS} if texts else {"audio": audio})
    (batch,) = batches(data if texts else audio, model, processor if texts else extractor, batch_size=3)
    features = extractor(SOUNDS, sampling_rate=16000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(batch["input_features"], features)
    if texts:
        assert [row[row != -100].tolist() for row in batch["labels"]] == [
            tiny_tokenizer()(t)["input_ids"] for t in TEXTS
        ]
    for stack in find_stacks(model):
        scores = avss(model, data, tokenizer=processor if texts else extractor, stack=stack)
        tokens = sum(map(len, TEXTS)) if texts else 3
        assert scores.data["tokens"] == (3 * features.shape[-1] // 2 if "encoder" in stack.path else tokens)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("masked", [True, False])
def test_sounds_of_different_lengths(norm, masked):
    """With a mask they are padded; where padding would count, or enter a group norm, only equal lengths share a batch."""
    config = tf.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
        conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", vocab_size=32,
    )  # fmt: skip
    model = redrawn(tf.Wav2Vec2ForCTC(config))
    extractor = tf.Wav2Vec2FeatureExtractor(return_attention_mask=masked)
    rows = [{"audio": {"array": sound, "sampling_rate": 16000}} for sound in [*SOUNDS, SOUNDS[-1][::-1]]]
    shapes = [tuple(batch["input_values"].shape) for batch in batches(rows, model, extractor, batch_size=3)]
    assert shapes == ([(3, 5600), (1, 5600)] if masked and norm == "layer" else [(1, 4000), (1, 4800), (2, 5600)])
    one, together = (avss(model, rows, tokenizer=extractor, batch_size=size) for size in (1, 4))
    assert one.data["tokens"] == together.data["tokens"]
    np.testing.assert_allclose(one.values, together.values, rtol=1e-5)


def test_an_extractor_that_cannot_be_told_how_to_pad():
    """The spectrograms of an Audio Spectrogram Transformer all have one length."""
    part = dict(num_mel_bins=16, max_length=64)
    config = tf.ASTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, patch_size=8, **part
    )
    model, extractor = redrawn(tf.ASTForAudioClassification(config)), tf.ASTFeatureExtractor(**part)
    rows = [{"audio": {"array": sound, "sampling_rate": 16000}} for sound in SOUNDS]
    (batch,) = batches(rows, model, extractor)
    assert batch["input_values"].shape == (3, 64, 16)
    one, together = (avss(model, rows, tokenizer=extractor, batch_size=size).values for size in (1, 3))
    np.testing.assert_allclose(one, together, rtol=1e-5)


def test_the_trainers_own_loader(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows = [dict(tokenizer(text)) for text in TEXTS]
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(tmp_path, per_device_eval_batch_size=2, use_cpu=True, report_to=[]),
        eval_dataset=Dataset.from_list(rows),
        data_collator=tf.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    found = avss(model, trainer.get_eval_dataloader())
    expected = avss(model, TEXTS, tokenizer=tokenizer, pack=False)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)
    assert found.data["fingerprint"] == expected.data["fingerprint"] and found.data["tokens"] == expected.data["tokens"]


@pytest.mark.parametrize("pack, expected", [(True, [8, 8, 4]), (False, [11, 6])])
def test_a_budget_of_tokens(pack, expected):
    """Packed sequences are cut where the budget ends; others are taken whole, as long as they fit."""
    options = dict(max_length=8 if pack else 20, max_tokens=20, batch_size=1, pack=pack)
    lengths = [len(b["input_ids"][0]) for b in batches(TEXTS, tiny_model("llama"), tiny_tokenizer(), **options)]
    assert lengths == expected
    scores = avss(tiny_model("llama"), TEXTS, tokenizer=tiny_tokenizer(), **options)
    assert scores.data["tokens"] == sum(expected) and scores.data["packed"] is pack
    assert scores.data["max_length"] == options["max_length"]


def test_the_fingerprint_is_that_of_the_data():
    """Neither the batch size nor padding changes it; another text, another order or another cut does."""
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()

    def of(texts, **options):
        return avss(model, texts, tokenizer=tokenizer, **options).data["fingerprint"]

    assert of(TEXTS, batch_size=1) == of(TEXTS, batch_size=3)
    assert len({of(TEXTS), of(TEXTS[::-1]), of(TEXTS[:2]), of(["".join(TEXTS)]), of(TEXTS, max_length=5)}) == 5


def test_a_plan_holds_the_fingerprint_of_its_data(tmp_path):
    """Also where the best of several rules is one that needs none."""
    model, options = tiny_model("llama"), dict(num_layers=1, tokenizer=tiny_tokenizer())
    plan = plan_pruning(model, TEXTS, by="influence", **options)
    used = score_layers(model, TEXTS, by="influence", tokenizer=tiny_tokenizer()).data
    assert plan.data == {"calibration": used} and plan.scores["data"] == used and len(used["fingerprint"]) == 64
    assert plan_pruning(model, num_layers=1, by="last").data == plan_pruning(model, remove=[1]).data == {}
    texts = [*TEXTS, *(text[::-1] for text in TEXTS)]
    for by in ("auto", "greedy"):
        plan = plan_pruning(model, texts, by=by, **options)
        calibration = texts[::2] if by == "auto" else texts
        expected = score_layers(model, calibration, by="influence", tokenizer=tiny_tokenizer()).data
        assert {"packed", "max_length"} < expected.keys() and plan.data["calibration"].items() >= expected.items()
        assert PruningPlan.load(plan.save(tmp_path / "plan.json")) == plan
    # A text that is there twice is not in both halves.
    auto = plan_pruning(model, [text for text in texts for _ in range(2)], by="auto", **options)
    held_out = score_layers(model, texts[1::2], by="influence", tokenizer=tiny_tokenizer()).data
    assert auto.data["held_out"] == held_out
    with pytest.raises(LayerProbeError, match="are the same"):
        plan_pruning(model, TEXTS[:1] * 4, by="auto", **options)


def test_padding_on_the_left_is_none():
    """GPT-2 counts positions from the first column on, padding or not."""
    model, rows = tiny_model("gpt2"), [torch.arange(1, 1 + length) for length in (3, 7, 5, 8)]
    padded = []
    for left in (True, False):
        place = (lambda row: slice(8 - len(row), 8)) if left else (lambda row: slice(0, len(row)))
        batch = {name: torch.zeros(4, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        for row, ids, mask in zip(rows, *batch.values(), strict=True):
            ids[place(row)], mask[place(row)] = row, 1
        padded.append([{**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}])
    scores = ["influence", "avss-relative", "bypass", "taylor", "angular"]
    for name in scores:
        left, right = (score_layers(model, batches, by=name).values for batches in padded)
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-8)
    # Whoever says the positions has them.
    positions = (padded[0][0]["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    said = score_layers(model, [{**padded[0][0], "position_ids": positions}], by="influence").values
    np.testing.assert_allclose(said, score_layers(model, padded[1], by="influence").values, rtol=1e-4)


SILENT = {"array": np.zeros(800, np.float32), "sampling_rate": 8000}


@pytest.mark.parametrize(
    "family, data, processor, message",
    [
        ("llama", CHATS, tiny_tokenizer(), "no chat template"),
        ("llama", pd.DataFrame({"text": TEXTS}), tiny_tokenizer(), "a pandas DataFrame; pass a column"),
        ("llama", CHATS, None, "a tokenizer is needed"),
        ("llama", TEXTS, image_processor(), "a tokenizer is needed, and ViTImageProcessor(Pil)? has none"),
        ("llama", CHATS[0], chat_tokenizer(), r"data is one conversation.*\[data\]"),
        ("llama", [*CHATS, "text"], chat_tokenizer(), r"mixes conversations with str \(row 2\)"),
        ("llama", [{"text": "a pear"}, {"body": "x"}], tiny_tokenizer(), r"Row 1 .* no text under 'text': it has \['body'\]"),
        ("llama", [{"text": "a pear"}, {"text": None}], tiny_tokenizer(), "Row 1 .* no text under 'text': it is NoneType"),
        ("llama", [{"messages": CHATS[0]}, {"messages": []}], chat_tokenizer(), "Row 1 .* no messages .* list of none"),
        ("llama", [{"input_ids": [3, 4]}, {"ids": [3]}], None, r"Row 1 .* no 'input_ids' .* \['ids'\]"),
        ("vit", [{"image": IMAGES[0]}], None, "data holds images, so the model's processor is needed, and none was passed"),
        ("vit", [{"image": IMAGES[0]}], tiny_tokenizer(), "TokenizersBackend reads none"),
        ("vit", [{"image": IMAGES[0]}, {"label": 1}], image_processor(), r"Row 1 .* no image under 'image'"),
        ("whisper", [{"audio": SILENT}], image_processor(), "data holds audio, .* ViTImageProcessor(Pil)? reads none"),
        ("whisper", [{"audio": SILENT}], tf.WhisperFeatureExtractor(), "8000 samples a second, .* expects 16000"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read(family, data, processor, message):
    with pytest.raises(LayerProbeError, match=message):
        avss(tiny_model(family), data, tokenizer=processor)


def test_a_template_that_refuses():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(LayerProbeError, match="refuses conversation 0: roles must alternate"):
        avss(tiny_model("llama"), CHATS, tokenizer=tokenizer)


@pytest.mark.parametrize("data", [TEXTS, [{"input_ids": [5] * 11}]])
def test_a_budget_below_one_sequence(data):
    with pytest.raises(LayerProbeError, match="max_tokens=7 is less than the first sequence, which has 11 tokens"):
        avss(tiny_model("llama"), data, tokenizer=tiny_tokenizer(), pack=False, max_tokens=7)
