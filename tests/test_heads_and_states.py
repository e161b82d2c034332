"""Surgery on every head, dtype and kind of class: what is pruned is what is loaded again."""

import subprocess
import sys
import textwrap

import pytest
import torch
import transformers as tf
from tiny import FAMILIES, GQA, TEXT, redrawn, tiny_model
from torch import nn

from hf_layerprobe import PruningError, find_stacks, prune_layers
from hf_layerprobe.stacks import bypassed
from hf_layerprobe.surgery.inputs import example_inputs

IMAGES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4
)
SPEECH = dict(
    **TEXT, conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
)  # fmt: skip
HEADS = {
    "sequence classification": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**GQA, num_labels=3, pad_token_id=0)
    ),
    "token classification": lambda: tf.BertForTokenClassification(tf.BertConfig(**TEXT, num_labels=5)),
    "question answering": lambda: tf.RobertaForQuestionAnswering(tf.RobertaConfig(**TEXT)),
    "masked language model": lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT)),
    "regression": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, problem_type="regression")),
    "image classification": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGES, num_labels=7)),
    "connectionist temporal classification": lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SPEECH)),
    "classification of what stands at the end": lambda: tf.BartForSequenceClassification(
        tf.BartConfig(
            d_model=32, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64, max_position_embeddings=64,
        )
    ),
    "no head": lambda: tf.GPTNeoXModel(tf.GPTNeoXConfig(**TEXT)),
}  # fmt: skip


def saved_and_loaded(model, folder, **options):
    """Without layer 1, and what the original gives without it."""
    stack, inputs = find_stacks(model)[0], example_inputs(model)
    with torch.no_grad(), bypassed(stack, [1]):
        expected = model(**inputs)[0]
    pruned = prune_layers(model, remove=[1], output_dir=folder)
    reloaded = type(model).from_pretrained(folder, **options).eval()
    with torch.no_grad():
        for smaller in (pruned, reloaded):
            torch.testing.assert_close(smaller(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    return pruned, reloaded


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, tmp_path):
    model = redrawn(HEADS[head]())
    pruned, reloaded = saved_and_loaded(model, tmp_path / "out")
    assert type(pruned) is type(model) and find_stacks(reloaded)[0].num_layers == 3
    assert reloaded.config.architectures == [type(model).__name__]
    assert reloaded.config.id2label == model.config.id2label
    assert reloaded.config.problem_type == model.config.problem_type


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path / "in")
    model = tf.Qwen3ForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype).eval()
    pruned, reloaded = saved_and_loaded(model, tmp_path / "out", dtype="auto")
    assert {parameter.dtype for each in (pruned, reloaded) for parameter in each.parameters()} == {dtype}


def test_modules_kept_in_float32(tmp_path):
    tiny_model("t5").save_pretrained(tmp_path / "in")
    model = tf.T5ForConditionalGeneration.from_pretrained(tmp_path / "in", dtype=torch.float16).eval()
    dtypes = {name.split(".")[-2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["wo"] == torch.float32 and dtypes["wi_0"] == torch.float16
    pruned = prune_layers(model, remove=[1], output_dir=tmp_path / "out")
    reloaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.float16)
    for smaller in (pruned, reloaded):
        assert {name.split(".")[-2]: parameter.dtype for name, parameter in smaller.named_parameters()} == dtypes


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings(tied, tmp_path):
    model_class, config = FAMILIES["llama"]
    config = config()
    config.tie_word_embeddings = tied
    model = redrawn(model_class(config))
    for smaller in saved_and_loaded(model, tmp_path / "out"):
        assert (smaller.lm_head.weight is smaller.model.embed_tokens.weight) == tied
        assert torch.equal(smaller.lm_head.weight, model.lm_head.weight)


def test_generation_config(tmp_path):
    model = tiny_model("llama")
    model.generation_config = tf.GenerationConfig(max_new_tokens=7, repetition_penalty=1.3, pad_token_id=0)
    for smaller in saved_and_loaded(model, tmp_path / "out"):
        assert smaller.generation_config.repetition_penalty == 1.3 and smaller.generation_config.max_new_tokens == 7


def test_state_that_is_not_saved():
    """Tables that a constructor computes and no file has are the original's, and its own from then on."""
    model = tiny_model("llama")
    smaller = prune_layers(model, remove=[1])
    table = dict(smaller.named_buffers())["model.rotary_emb.inv_freq"]
    assert torch.equal(table, model.model.rotary_emb.inv_freq)
    assert table.data_ptr() != model.model.rotary_emb.inv_freq.data_ptr()


def test_a_device_map_with_everything_in_memory(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "in")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "in", device_map={"": "cpu"}).eval()
    saved_and_loaded(model, tmp_path / "out")


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_a_device_map_that_moves_layers_is_refused(place, tmp_path):
    """Offloaded weights are elsewhere, and only accelerate's hooks know where; `"cpu"` is offloaded if not the main device."""
    from accelerate import cpu_offload, disk_offload

    model = tiny_model("llama")
    if place == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path / "weights", execution_device="cpu")
    with pytest.raises(PruningError, match="offloaded to disk or CPU by a device_map"):
        prune_layers(model, remove=[1], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Judge(tf.LlamaForCausalLM):
    """A user's own class: another head beside the model's, and another forward."""

    def __init__(self, config):
        super().__init__(config)
        self.verdict = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **options):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        return self.verdict(hidden), self.lm_head(hidden)


def test_a_class_of_the_user(tmp_path):
    model = redrawn(Judge(FAMILIES["llama"][1]()))
    pruned, reloaded = saved_and_loaded(model, tmp_path / "out")
    assert type(pruned) is Judge and reloaded.config.architectures == ["Judge"]
    assert torch.equal(reloaded.verdict.weight, model.verdict.weight)


class Choosy(tf.LlamaForCausalLM):
    """Says of some tokens that they are not to be chosen."""

    def forward(self, input_ids=None, attention_mask=None, **options):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        output.logits[..., 5:9] = -torch.inf
        return output


def test_what_is_not_to_be_chosen():
    model = redrawn(Choosy(FAMILIES["llama"][1]()))
    assert len(prune_layers(model, remove=[1]).model.layers) == 3


def test_a_table_that_has_grown_in_use():
    config = tf.M2M100Config(
        vocab_size=64, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=16,
    )  # fmt: skip
    model = redrawn(tf.M2M100ForConditionalGeneration(config))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
    assert len(model.model.encoder.embed_positions.weights) > 40 > 16 + 2
    pruned = prune_layers(model, remove=[1])
    with torch.no_grad(), bypassed(find_stacks(model)[0], [1]):
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(pruned(input_ids=ids, decoder_input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected)


CODE = """
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    class NoviceConfig(PreTrainedConfig):
        model_type = "novice"

        def __init__(self, depth=4, width=16, vocab_size=64, scales=(1.0, 0.5), **options):
            self.depth, self.width, self.vocab_size, self.scales = depth, width, vocab_size, list(scales)
            super().__init__(**options)

    class NoviceLayer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, hidden_states):
            return hidden_states + torch.tanh(self.linear(hidden_states))

    class NoviceModel(PreTrainedModel):
        config_class = NoviceConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed = nn.Embedding(config.vocab_size, config.width)
            self.blocks = nn.ModuleList([NoviceLayer(config.width) for _ in range(config.depth)])
            self.post_init()

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden = block(hidden)
            return (hidden,)
"""


def test_code_that_came_with_the_model(tmp_path):
    """The user trusted it, so its class is there; its files go along, and the result loads the way the original did."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "modeling_novice.py").write_text(textwrap.dedent(CODE), encoding="utf-8")
    (folder / "config.json").write_text(
        '{"model_type": "novice", "auto_map": {"AutoConfig": "modeling_novice.NoviceConfig", '
        '"AutoModel": "modeling_novice.NoviceModel"}, "depth": 4}',
        encoding="utf-8",
    )
    config = tf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tf.AutoModel.from_config(config, trust_remote_code=True).save_pretrained(folder)
    model = redrawn(tf.AutoModel.from_pretrained(folder, trust_remote_code=True))
    saved_and_loaded(model, tmp_path / "out")
    assert (tmp_path / "out/modeling_novice.py").read_text(encoding="utf-8") == textwrap.dedent(CODE)
    reloaded = tf.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(reloaded).__name__ == "NoviceModel" and len(reloaded.blocks) == 3
    assert reloaded.config.auto_map["AutoModel"] == "modeling_novice.NoviceModel"


MEMORY = """
    import resource, sys, torch, transformers as tf
    from hf_layerprobe import prune_layers

    torch.set_num_threads(1)
    config = tf.LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, vocab_size=512)
    prune_layers(tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=3, vocab_size=512)),
                 remove=[1], output_dir=sys.argv[1] + "/warm")  # whatever code and caches take
    model = tf.LlamaForCausalLM(config)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1 / 1024)
    before = peak()
    pruned = prune_layers(model, remove=[1, 3], output_dir=sys.argv[1] + "/out")
    kept = sum(p.numel() * p.element_size() for p in pruned.parameters())
    print(peak() - before, kept)
"""


def test_memory_beside_the_original(tmp_path):
    """Checked and saved, at most the kept tensors; a tenth more for what the process takes to run."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)], capture_output=True, text=True, check=True
    )
    extra, kept = map(float, done.stdout.split())
    assert extra < 1.1 * kept
