"""Tiny random models of the families that the tests cover, built from configs alone."""

from __future__ import annotations

import string
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=64)
GQA = dict(TEXT, num_key_value_heads=2)

# family → (model class, config)
FAMILIES = {
    "llama": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**GQA)),
    "qwen3": (tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**GQA, head_dim=8)),
    "gemma3": (tf.Gemma3ForCausalLM, lambda: tf.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=4)),
    "mistral": (tf.MistralForCausalLM, lambda: tf.MistralConfig(**GQA, head_dim=8)),
    "mixtral": (tf.MixtralForCausalLM, lambda: tf.MixtralConfig(**GQA, num_local_experts=3)),
    "gpt2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, n_positions=64)),
    "opt": (
        tf.OPTForCausalLM,
        lambda: tf.OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=64,
            word_embed_proj_dim=32, max_position_embeddings=64,
        ),
    ),
    "gpt_neox": (tf.GPTNeoXForCausalLM, lambda: tf.GPTNeoXConfig(**TEXT)),
    "bert": (tf.BertForMaskedLM, lambda: tf.BertConfig(**TEXT)),
    "t5": (
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=5, num_heads=4, vocab_size=64,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        ),
    ),
    "bart": (
        tf.BartForConditionalGeneration,
        lambda: tf.BartConfig(
            d_model=32, encoder_layers=4, decoder_layers=5, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64, max_position_embeddings=64,
        ),
    ),
    "vit": (
        tf.ViTForImageClassification,
        lambda: tf.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4
        ),
    ),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(
            d_model=32, encoder_layers=4, decoder_layers=5, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64, num_mel_bins=16,
            max_source_positions=24, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        ),
    ),
}  # fmt: skip


def tiny_model(family: str, seed: int = 0) -> tf.PreTrainedModel:
    """A random model in which every layer matters: matrices are N(0, 1 / fan_in) instead of the usual tiny values."""
    model_class, config = FAMILIES[family]
    return redrawn(model_class(config()), seed)


def redrawn(model: tf.PreTrainedModel, seed: int = 0) -> tf.PreTrainedModel:
    """The model with random matrices that matter, in evaluation mode."""
    torch.manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.tie_weights()
    return model


def tiny_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token a character, lower-case: 64 at most, as many as the tiny models know."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = [*special, *string.ascii_lowercase, *string.digits, *" .,;:!?'-()\n"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_folder(path: Path, family: str = "llama", seed: int = 0) -> Path:
    """A saved tiny model with the tiny tokenizer."""
    tiny_model(family, seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
