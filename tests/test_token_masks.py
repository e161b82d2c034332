"""Which tokens count, where the stack does not see the tokens that the model's mask is about."""

import numpy as np
import pytest
import torch
import transformers as tf
from test_activation_scores import all_scores, assert_same, expected_scores
from tiny import TEXT, tiny_model
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_layerprobe import LayerProbeError, avss, find_stacks
from hf_layerprobe.activations import LayerStream
from hf_layerprobe.scores.eavss import SequenceMoments
from hf_layerprobe.scores.registry import SCORES
from hf_layerprobe.stacks import LayerStack

AUDIO = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, conv_dim=(8, 8), conv_stride=(2, 2),
    conv_kernel=(3, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
)  # fmt: skip


class Masks:
    """An accumulator that keeps the masks."""

    def __init__(self):
        self.seen = []

    def update(self, layer, before, after, mask):
        self.seen.append((layer, before, mask))


class Blocks(nn.Module):
    """Embeds tokens, keeps every `stride`-th, and runs two layers, each on its own device."""

    class Block(nn.Module):
        def __init__(self, device):
            super().__init__()
            self.linear = nn.Linear(4, 4, device=device)

        def forward(self, hidden_states):
            return hidden_states.to(self.linear.weight.device) + 1

    def __init__(self, stride=1, devices=("cpu", "cpu")):
        super().__init__()
        self.embed = nn.Embedding(9, 4, device=devices[0])
        self.layers = nn.ModuleList(self.Block(device) for device in devices)
        self.stride = stride
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)[:, :: self.stride]
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def lively(model):
    """Random weights with which every layer changes what it gets a good deal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


def lengths_mask(lengths, longest):
    return (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_window_that_is_filled_up(with_mask, token_batches):
    """Longformer pads 7, 9 and 6 tokens to 8, 16 and 8."""
    model = lively(tf.LongformerForMaskedLM(tf.LongformerConfig(**TEXT, attention_window=[8] * 4, pad_token_id=1)))
    batches = token_batches if with_mask else [{"input_ids": batch["input_ids"]} for batch in token_batches]
    masks = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        masks.append(nn.functional.pad(mask, (0, -mask.shape[1] % 8)).numpy())
    assert_same(all_scores(model, batches), expected_scores(model, batches, masks))
    assert avss(model, batches).data["tokens"] == sum(mask.sum() for mask in masks)


@pytest.mark.filterwarnings("ignore:divide by zero")  # the transcription also divides what is padding
@pytest.mark.parametrize("add_adapter", [False, True])
def test_samples_and_frames(add_adapter):
    model = lively(tf.Wav2Vec2Model(tf.Wav2Vec2Config(**AUDIO, add_adapter=add_adapter)))
    samples = lengths_mask([61, 30], 61)
    batches = [{"input_values": torch.randn(2, 61) * samples, "attention_mask": samples}]
    frames = model._get_feature_vector_attention_mask(14, samples, add_adapter=False).numpy()
    assert frames.sum() == 14 + 6
    assert_same(all_scores(model, batches), expected_scores(model, batches, [frames]))
    assert avss(model, batches).data["tokens"] == 20


def test_frames_of_a_model_that_ignores_the_mask():
    """Whisper's encoder attends to padding, which does not make it count."""
    model = tiny_model("whisper")
    mask = lengths_mask([48, 21], 48)
    batches = [
        {
            "input_features": torch.rand(2, 16, 48, generator=torch.Generator().manual_seed(0)),
            "attention_mask": mask,
            "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]]),
        }
    ]
    encoder, decoder = find_stacks(model)
    for stack, expected in ((encoder, lengths_mask([24, 11], 24)), (decoder, torch.ones(2, 3))):
        scores = all_scores(model, batches, stack=stack)
        assert_same(scores, expected_scores(model, batches, [expected.numpy()], stack))


def test_choices_become_rows(token_batches):
    model = lively(tf.BertForMultipleChoice(tf.BertConfig(**TEXT)))
    choices = [{name: value[None] for name, value in batch.items()} for batch in token_batches]
    masks = [batch["attention_mask"].numpy() for batch in token_batches]
    assert_same(all_scores(model, choices), expected_scores(model, choices, masks))


def test_the_mask_of_a_text_is_not_about_its_images():
    part = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = dict(part, vocab_size=64, max_position_embeddings=20)
    vision = dict(part, image_size=16, patch_size=8)
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision)).eval()
    batch = {
        "pixel_values": torch.rand(2, 3, 16, 16),
        "input_ids": torch.randint(3, 60, (2, 5)),  # as many as patches
        "attention_mask": lengths_mask([5, 2], 5),
    }
    text, vision = (next(s for s in find_stacks(model) if name in s.path) for name in ("text", "vision"))
    assert avss(model, [batch], stack=text).data["tokens"] == 7
    assert avss(model, [batch], stack=vision).data["tokens"] == 10


def test_tokens_after_a_cache():
    model = tiny_model("llama")
    masks = Masks()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with LayerStream(find_stacks(model)[0], [masks]):
        model.generate(
            torch.randint(3, 60, (2, 4)), attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
    seen = [mask.tolist() for layer, _, mask in masks.seen if layer == 0]
    assert seen == [mask.bool().tolist(), *[[[True], [True]]] * 2]


def test_padding_that_cannot_be_told_apart_is_refused(caplog):
    model = Blocks(stride=2)
    ids, mask = torch.ones(2, 6, dtype=torch.long), lengths_mask([6, 3], 6)
    with pytest.raises(
        LayerProbeError, match=r"shape \[2, 6\] leaves out padding, .* see \[2, 3\] tokens.* one sequence"
    ):
        avss(model, [{"input_ids": ids, "attention_mask": mask}])
    assert avss(model, [{"input_ids": ids, "attention_mask": torch.ones_like(mask)}]).data["tokens"] == 6
    masks = Masks()
    with LayerStream(LayerStack(model, "layers"), [masks], guest=True), caplog.at_level("WARNING", "hf_layerprobe"):
        model.eval()(ids, mask)
    assert not masks.seen and "not measured" in caplog.text


def test_masks_and_inputs_follow_the_layers_to_their_devices():
    model, masks = Blocks(devices=("cpu", "meta")), Masks()
    with LayerStream(LayerStack(model, "layers"), [masks]):
        model(torch.ones(2, 6, dtype=torch.long), lengths_mask([6, 3], 6))
        model(torch.ones(2, 6, dtype=torch.long), lengths_mask([6, 3], 6))
    assert [mask.device.type for _, _, mask in masks.seen] == ["cpu", "meta"] * 2
    assert [before.device.type for _, before, _ in masks.seen] == ["cpu", "meta"] * 2


def test_a_mask_that_fits_waits_for_no_device():
    """A meta tensor has no values to wait for."""
    model, masks = Blocks(devices=("meta", "meta")), Masks()
    with LayerStream(LayerStack(model, "layers"), [masks]):
        model(torch.ones(2, 6, dtype=torch.long, device="meta"), lengths_mask([6, 3], 6).to("meta"))
    (_, _, first), (_, _, second) = masks.seen
    assert first.is_meta and second is first


class WithoutFloat64(torch.Tensor):
    """A tensor on a device that knows no float64, as MPS; copies to the CPU are plain tensors."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")
        target = [*args[1:], *(kwargs or {}).values()]
        home = func is torch.Tensor.cpu or (func is torch.Tensor.to and torch.device("cpu") in target)
        args = [torch.device("cpu") if type(arg) is torch.device else arg for arg in args]
        result = super().__torch_function__(func, types, args, kwargs or {})
        wide = (torch.float64 in target) if home else getattr(result, "dtype", None) == torch.float64
        if wide and isinstance(result, torch.Tensor):
            raise TypeError("this device has no float64")
        return result.as_subclass(torch.Tensor) if home else result


class FactoriesWithoutFloat64(TorchFunctionMode):
    """Makes tensors for that device where they are asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to or getattr(kwargs.get("device"), "type", None) != "mps":
            return func(*args, **kwargs)
        assert kwargs.get("dtype") is not torch.float64
        return func(*args, **{**kwargs, "device": "cpu"}).as_subclass(WithoutFloat64)


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if score.streams])
def test_a_device_without_float64(name):
    before, after = torch.randn(2, 3, 5, 8).unbind(0)
    mask = lengths_mask([5, 2, 4], 5).bool()
    found, expected = SCORES[name].make(2), SCORES[name].make(2)
    attention = torch.randn(3, 5, 8)
    for layer in range(2):
        left = after * (1 + layer)
        sites = {"attention": attention, "mlp": left - before - attention} if getattr(found, "sites", ()) else {}
        expected.update(layer, before, left, mask, **sites)
        with FactoriesWithoutFloat64():
            moved = [t.as_subclass(WithoutFloat64) for t in (before, left, mask, *sites.values())]
            found.update(layer, *moved[:3], **dict(zip(sites, moved[3:], strict=True)))
    read = SCORES[name].read
    np.testing.assert_allclose(read(found)[0], read(expected)[0], rtol=1e-4)


def test_eavss_on_a_device_without_float64():
    before, after = torch.randn(2, 3, 5, 8).unbind(0)
    found, expected = SequenceMoments(1, 0.05), SequenceMoments(1, 0.05)
    found.tokens = expected.tokens = lengths_mask([5, 2, 4], 5).bool()
    expected.update(0, before, after, None)
    found.tokens = found.tokens.as_subclass(WithoutFloat64)
    found.update(0, before.as_subclass(WithoutFloat64), after.as_subclass(WithoutFloat64), None)
    np.testing.assert_allclose(found.moments(), expected.moments(), rtol=1e-4, atol=1e-4)
