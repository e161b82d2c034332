"""Small exact changes of tensors that make a kept set expressible after all.

Everything here is algebra on weights: the pruned model computes what the original does with the other layers bypassed, up to
rounding. Each rule is for one piece of architecture and goes by its names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from .kinds import Kind, differing
from .refusal import Refusal

Tensors = Mapping[str, torch.Tensor]
Compute = Callable[[Tensors], torch.Tensor]

# Tables that the first layer holds and hands to all others (T5 and its family, WavLM).
FIRST_LAYER_TABLE = re.compile(r"(relative_attention_bias|rel_attn_embed|has_relative_(attention|position)_bias)")
# A bias that only the last layer has (GPT-NeoX Japanese): zeros are none.
LAST_LAYER_BIAS = re.compile(r"attention\.(dense_bias|use_bias)$")
# Tensors with a part for each layer: the dimension that holds the parts.
PACKED = {
    "embed_tokens_per_layer.weight": 1,
    "per_layer_model_projection.weight": 0,
    "contact_head.regression.weight": 1,
}
# Buffers with an entry for each of the last layers.
OF_LAST_LAYERS = "attn_mask_probs"
STATE_WEIGHTS = "layer_weights"
MID_POSITIONS = re.compile(r"encoder\.(interpolation\.)?mid_position_embeddings$")


class Rescue:
    """The changes for one list of layers, entered into `sources` and `computed` by the new model's names."""

    def __init__(self, path: str, keep: Sequence[int], before: Sequence[Kind], now: Sequence[Kind]):
        self.path, self.keep, self.before, self.now = path, keep, before, now
        self.sources: dict[str, str] = {}
        self.computed: dict[str, Compute] = {}

    def unsolved(self) -> list[str]:
        """Enters what can be rescued, and returns what still differs between a kept layer and its new place."""
        changed = differing([self.before[i] for i in self.keep], self.now, len(self.before))
        return [key for key in changed if not (self._moved(key) or self._zero(key) or self._folded(key))]

    def _moved(self, key: str) -> bool:
        if not FIRST_LAYER_TABLE.search(key) or any(self._value(i, key) for i in range(1, len(self.before))):
            return False
        if name := _tensor_name(key):
            self.sources[f"{self.path}.0.{name}"] = f"{self.path}.0.{name}"
        return True

    def _zero(self, key: str) -> bool:
        if not LAST_LAYER_BIAS.search(key) or any(self._value(i, key) for i in range(len(self.before) - 1)):
            return False
        if name := _tensor_name(key):
            like = f"{self.path}.{len(self.before) - 1}.{name}"
            self.computed[f"{self.path}.{len(self.keep) - 1}.{name}"] = lambda old: torch.zeros_like(old[like])
        return True

    def _folded(self, key: str) -> bool:
        module, _, attribute = key.rpartition(".")
        fold = FOLDS.get((self.before[0].get(f"class of {module or 'the layer'}"), attribute))
        if fold is None:
            return False
        for new, old in enumerate(self.keep):
            was, becomes = self.before[old][key], self.now[new][key]
            if was != becomes:
                prefix = f"{self.path}.{old}." + (f"{module}." if module else "")
                target = f"{self.path}.{new}." + (f"{module}." if module else "")
                for name, compute in fold(prefix, was, becomes).items():
                    self.computed[target + name] = compute
        return True

    def _value(self, layer: int, key: str):
        return self.before[layer].get(key)


def packed(
    name: str, shape: tuple[int, ...], old: tuple[int, ...], num_layers: int, keep: Sequence[int]
) -> Compute | None:
    """The parts of the kept layers, for a tensor that has one part a layer; None if this is no such tensor."""
    if name.endswith(OF_LAST_LAYERS):
        first = num_layers - old[0]
        entries = torch.tensor([i - first for i in keep if i >= first])
        return lambda tensors: tensors[name][entries.to(tensors[name].device)]
    dim = next((dim for end, dim in PACKED.items() if name == end or name.endswith(f".{end}")), None)
    if dim is None or old[dim] % num_layers or shape[dim] != old[dim] // num_layers * len(keep):
        return None
    kept = torch.tensor(list(keep))

    def compute(tensors: Tensors) -> torch.Tensor:
        parts = tensors[name].unflatten(dim, (num_layers, -1))
        return parts.index_select(dim, kept.to(parts.device)).flatten(dim, dim + 1)

    return compute


def mid_positions(name: str, num_layers: int, keep: Sequence[int]) -> dict[str, Compute]:
    """YOLOS adds a table of positions after every layer but the last: those of layers that go are added with the one before.

    Raises:
        Refusal: The last layer goes, and with it the place of the table before it.
    """
    if keep[-1] != num_layers - 1:
        raise Refusal(
            "position embeddings are added after every layer but the last, so the last layer must stay",
            needs=[{num_layers - 1}],
        )
    first = f"{MID_POSITIONS.sub('', name)}embeddings.position_embeddings"
    ends = [*keep[1:]]
    computed: dict[str, Compute] = {
        name: lambda old: torch.stack([old[name][i:end].sum(0) for i, end in zip(keep, ends, strict=False)])
    }
    if keep[0] > 0:
        computed[first] = lambda old: old[first] + old[name][: keep[0]].sum(0)
    return computed


def state_weights(name: str, num_layers: int, keep: Sequence[int], normed_last: bool) -> dict[str, Compute]:
    """Wav2Vec2 and its family can weigh all hidden states by a softmax: states that become one weigh what both did.

    Raises:
        Refusal: The last layer goes, after which the states are normalised, so that they do not become one.
    """
    if normed_last and keep[-1] != num_layers - 1:
        raise Refusal(
            f"{name} weighs the state before the final norm and the one after it, so the last layer must stay",
            needs=[{num_layers - 1}],
        )
    starts = [0, *(i + 1 for i in keep)]  # state i + 1 is the output of layer i, state 0 that of the embeddings
    ends = [*starts[1:], num_layers + 1]
    return {name: lambda old: torch.stack([old[name][i:end].logsumexp(0) for i, end in zip(starts, ends, strict=True)])}


def _tensor_name(key: str) -> str | None:
    """`shape of attn.bias` → `attn.bias`; None for what is no tensor."""
    return key.removeprefix("shape of ") if key.startswith("shape of ") else None


def _scaled(name: str, factor: float) -> Compute:
    return lambda old: old[name] * factor


def _query_scale(prefix: str, was: float, becomes: float) -> dict[str, Compute]:
    """Attention scores are (q · k) × scaling: what the new scaling lacks goes into the query third of the projection."""

    def compute(name: str) -> Compute:
        def scaled(old: Tensors) -> torch.Tensor:
            query, rest = old[name].tensor_split([old[name].shape[-1] // 3], dim=-1)
            return torch.cat([query * (was / becomes), rest], dim=-1)

        return scaled

    return {f"c_attn.{part}": compute(f"{prefix}c_attn.{part}") for part in ("weight", "bias")}


def _residual_scale(prefix: str, was: float, becomes: float) -> dict[str, Compute]:
    """What each branch adds is divided by the factor: the difference goes into the last matrix of the branch."""
    names = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    return {name: _scaled(prefix + name, becomes / was) for name in names}


def _differential(prefix: str, was: float, becomes: float) -> dict[str, Compute]:
    """Differential attention: λ = exp(q1·k1) − exp(q2·k2) + λ₀, and the result is multiplied by 1 − λ₀.

    λ₀ falls with a layer's index, so the new one is smaller; q1 becomes the multiple of k1 that makes up for it.
    """

    def query(old: Tensors) -> torch.Tensor:
        q, k = old[f"{prefix}lambda_q1"].double(), old[f"{prefix}lambda_k1"].double()
        wanted = torch.log(torch.exp(q @ k) + was - becomes)
        return (k * (wanted / (k @ k))).to(old[f"{prefix}lambda_q1"].dtype)

    output = _scaled(f"{prefix}o_proj.weight", (1 - was) / (1 - becomes))
    return {"lambda_q1": query, "o_proj.weight": output}


# (class of the module, its attribute) → what makes up for another value: the module's path in the original, the old value
# and the new one give its tensors.
FOLDS: dict[tuple[str, str], Callable[[str, float, float], dict[str, Compute]]] = {
    ("GPT2Attention", "scaling"): _query_scale,
    ("DecisionTransformerGPT2Attention", "scaling"): _query_scale,
    ("EsmcLayer", "scaling_factor"): _residual_scale,
    ("DiffLlamaAttention", "lambda_init"): _differential,
    # Before Transformers had one class for all kernels.
    ("DiffLlamaSdpaAttention", "lambda_init"): _differential,
    ("DiffLlamaFlashAttention2", "lambda_init"): _differential,
}
