"""Which module of a layer holds which matrix: the naming conventions of Transformers in one table.

The kinds are those of the DOCS paper (q, k, v, o, up, down) and the MLP's gate. Cross-attention is not among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .packed import is_packed

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
MLP_KINDS = frozenset(("gate", "up", "down"))

CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn|EncDecAttention|encoder_decoder", re.IGNORECASE)
# What is named like a matrix of the MLP in there is the attention's own: the gate on its output, the output of a second one.
_IN_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention|att)\.(?!(.*\.)?mlp\.)", re.IGNORECASE)

# (end of the module's name inside the layer, kinds it holds, how they are packed). The first match wins.
# "rows": whole matrices one below the other; "heads": query, key and value rows alternate head by head;
# "experts": one matrix for each expert in a 3-D parameter of that name.
NAMES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (r"experts\.gate_up_proj", ("gate", "up"), "experts"),
    (r"experts\.up_proj", ("up",), "experts"),
    (r"experts\.down_proj", ("down",), "experts"),
    (r"q_proj|q_lin|query|query_proj|\w*SelfAttention\.q|attn\.q|Wq|linear_q|q_head", ("q",), "rows"),
    (r"k_proj|k_lin|key|key_proj|\w*SelfAttention\.k|attn\.k|Wk|linear_k|k_head", ("k",), "rows"),
    (r"v_proj|v_lin|value|value_proj|\w*SelfAttention\.v|attn\.v|Wv|linear_v|v_head", ("v",), "rows"),
    (r"c_attn|qkv_proj|qkv|Wqkv|att_proj", ("q", "k", "v"), "rows"),
    (r"query_key_value", ("q", "k", "v"), "heads"),
    (
        r"\w*(attn|attention)\.(o_proj|out_proj|output_proj|out_lin|c_proj|dense|proj|projection|projection_layer|Wo|o|output)"
        r"|attention\.output\.dense|\w*SelfAttention\.o|\w*attn\.linear_out|attention\.post_proj",
        ("o",),
        "rows",
    ),
    (r"gate_up_proj|mlp\.Wi|shared_mlp\.input_linear", ("gate", "up"), "rows"),
    (r"gate_proj|wi_0|feed_forward\.w1", ("gate",), "rows"),
    (
        r"up_proj|fc1|linear_fc1|c_fc|fc_in|dense_h_to_4h|intermediate[._]dense|wi_1|wi|lin1|mlp\.dense1|(feed_forward\d?|ffn)\.linear_?1"
        r"|ffw_layer_1|feed_forward\.(w3|intermediate)|mlp\.(in_proj|proj_in)|feed_forward\.dense\.dense|ff\.layer_1|ffn?\.0",
        ("up",),
        "rows",
    ),
    (
        r"down_proj|fc2|linear_fc2|mlp\.c_proj|fc_out|dense_4h_to_h|output[._]dense|wo|lin2|mlp\.dense2|(feed_forward\d?|ffn)\.linear_?2|mlp\.Wo"
        r"|ffw_layer_2|feed_forward\.(w2|output)|mlp\.(out_proj|proj_out)|ff\.layer_2|ffn\.2|ff\.3|shared_mlp\.output_linear",
        ("down",),
        "rows",
    ),
)
# Model types whose fused query, key and value rows are packed in another way than their module's name says.
OTHER_PACKING = {"gpt_bigcode": "heads", "codegen": "unknown"}
# Where PEFT, and some layers of Transformers, keep the module that they have wrapped.
_BASE_LAYER = re.compile(r"(\.base_layer)+$")
_WRAPPED = re.compile(r"\.linear$")
_PATTERNS = tuple((re.compile(rf"(^|\.)({name})$"), kinds, packing) for name, kinds, packing in NAMES)


@dataclass(frozen=True)
class NamedWeight:
    """One parameter of a layer and the matrix kinds inside it.

    Attributes:
        owner: The module that holds the parameter (for `"experts"`, the module of all experts).
        parameter: The parameter's name in that module.
        kinds: The kinds it holds, in storage order.
        packing: `"rows"`, `"heads"` or `"experts"`; see `NAMES`.
        adapter: The PEFT layer around the owner, if there is one.
    """

    owner: nn.Module
    parameter: str
    kinds: tuple[str, ...]
    packing: str
    adapter: nn.Module | None = None


def find_modules(layer: nn.Module) -> list[NamedWeight]:
    """The named matrices of one layer, in module order."""
    found = []
    for name, dims in _tensors(layer):
        is_matrix = dims == 2 and name.endswith(".weight")
        if not (is_matrix or dims == 3) or CROSS_ATTENTION.search(name):
            continue
        owner, _, attribute = name.rpartition(".")
        wrapped = _BASE_LAYER.sub("", owner)
        target = _WRAPPED.sub("", wrapped) if is_matrix else f"{wrapped}.{attribute}"
        for pattern, kinds, packing in _PATTERNS:
            if pattern.search(target) and (packing == "experts") == (not is_matrix):
                if not (MLP_KINDS.issuperset(kinds) and _IN_ATTENTION.search(target)):
                    adapter = layer.get_submodule(wrapped) if wrapped != owner else None
                    found.append(NamedWeight(layer.get_submodule(owner), attribute, kinds, packing, adapter))
                break
    return found


def _tensors(layer: nn.Module) -> Iterator[tuple[str, int]]:
    """The name of each parameter and how many dimensions it has; of a packed module, those of the weight it stands for."""
    once = {id(parameter) for parameter in layer.parameters()}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        if is_packed(module):
            yield f"{prefix}weight", 2
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in once:  # two modules may share it
                once.remove(id(parameter))
                # Under ZeRO-3 parameters are empty, and have their shape in `ds_shape`.
                yield f"{prefix}{name}", len(getattr(parameter, "ds_shape", parameter.shape))
