"""What a parameter is, according to the module that holds it: its role, and which blocks of it are matrices.

The layouts of fused weights come from the modelling code of transformers 5, whose modules are recognized by class name; the
package is never imported. If the module's class does not tell, the role is guessed by name, with a note, or left open.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from polargrad_dist.errors import ConfigError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_GATES = ((nn.LSTM, 4), (nn.LSTMCell, 4), (nn.GRU, 3), (nn.GRUCell, 3))


class Home(NamedTuple):
    """Where a parameter is held: it is ``module.leaf``, and the module is ``parent.attribute``."""

    module: nn.Module
    leaf: str
    parent: nn.Module | None = None
    attribute: str = ""


@dataclass(frozen=True)
class Place:
    """A parameter's role, None if unknown; how it splits into matrices; what was guessed, in ``note``."""

    role: str | None
    split_sizes: tuple[int, ...] | None = None
    num_heads: int | None = None
    flatten: bool = False
    transposed: bool = False
    note: str = ""


Sizes = Callable[[Any, int], tuple[int, ...]]


def _equal(parts: int) -> Sizes:
    return lambda module, length: (length // parts,) * parts


def _grouped(module: Any, length: int) -> tuple[int, ...]:
    """Rows of query, key and value, where key and value have fewer heads."""
    heads = getattr(module, "num_key_value_heads", None) or module.config.num_key_value_heads
    kv = heads * module.head_dim
    return length - 2 * kv, kv, kv


def _time_b_c(module: Any, length: int) -> tuple[int, ...]:
    return module.time_step_rank, module.ssm_state_size, module.ssm_state_size


def _latent_and_position(module: Any, length: int) -> tuple[int, ...]:
    return module.kv_lora_rank, module.qk_rope_head_dim


# Linear layers of transformers that stack several matrices: attribute, sizes, classes that own it.
_FUSED: tuple[tuple[str, Sizes, str], ...] = (
    ("qkv_proj", _grouped, "Phi3Attention Phi4MultimodalAttention"),
    ("Wqkv", _grouped, "DbrxAttention"),
    ("Wqkv", _equal(3), "MptAttention ModernBertAttention"),
    (
        "qkv",
        _equal(3),
        "BlipAttention Blip2Attention InstructBlipAttention SamVisionAttention TimesformerSelfAttention VitDetAttention "
        "HieraMaskUnitAttention VisionAttention Qwen2_5_VLVisionAttention Qwen3VLVisionAttention Glm4vVisionAttention",
    ),
    (
        "gate_up_proj",
        _equal(2),
        "Phi3MLP Phi4MultimodalMLP GlmMLP Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmOcrTextMLP DiaMLP Zamba2MLP",
    ),
    ("in_proj", _equal(2), "MambaMixer FalconMambaMixer"),
    ("x_proj", _time_b_c, "MambaMixer FalconMambaMixer"),
    ("kv_a_proj_with_mqa", _latent_and_position, "DeepseekV2Attention DeepseekV3Attention"),
)
# Also fused, but interleaved by head: one matrix.
_INTERLEAVED = {
    "BloomAttention",
    "GPTNeoXAttention",
    "FalconAttention",
    "CodeGenAttention",
    "PersimmonAttention",
}
_NO_VOCABULARY = re.compile(r"pos|wpe|type|segment|bias", re.IGNORECASE)
_LOOKS_FUSED = re.compile(r"qkv|query_key_value|gate_up|c_attn", re.IGNORECASE)
_MATRIX_NAME = re.compile(r"(weight|proj|kernel|matrix)$", re.IGNORECASE)
_ELEMENTWISE_NAME = re.compile(
    r"bias|(^|_)pos|token|^quer|^latent|embed|table|mask|scale|gamma|gain|norm|^A_log$|^D$", re.IGNORECASE
)


def place(home: Home, p: torch.Tensor, heads: dict[nn.Module, str]) -> Place:
    """The place of a parameter ``p`` of ``home``; ``heads`` are the output layers, each with a note of what was guessed.

    A parameter in which no matrix has two rows and two columns is a scalar. Raises ``ConfigError`` for parameters of lazy
    modules and for sparse embeddings.
    """
    if isinstance(p, nn.parameter.UninitializedParameter):
        raise ConfigError(
            f"{home.attribute}.{home.leaf} has no shape yet, expected an initialized parameter: run one batch through "
            "the lazy module first"
        )
    found = _place(home, p, heads)
    if found.role not in (None, "scalar") and not _has_matrix(p.shape, found.flatten):
        return Place("scalar")
    return found


def _has_matrix(shape: Sequence[int], flatten: bool) -> bool:
    if len(shape) == 3 and not flatten:
        return min(shape[1:]) > 1
    return len(shape) >= 2 and shape[0] > 1 and max(shape[1:]) > 1


def _place(home: Home, p: torch.Tensor, heads: dict[nn.Module, str]) -> Place:
    module, leaf = home.module, home.leaf
    if p.ndim < 2 or isinstance(module, _NORMS) or p.numel() == max(p.shape, default=1):
        return Place("scalar")
    if isinstance(module, _EMBEDDINGS):
        return _embedding(home, module)
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED_CONVOLUTIONS)):
        return _convolution(module, p)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        gates = next((count for kind, count in _GATES if isinstance(module, kind)), 1)
        fused = gates > 1 and not leaf.startswith("weight_hr")
        return Place("hidden", (p.shape[0] // gates,) * gates if fused else None)
    if isinstance(module, nn.MultiheadAttention):
        return Place("hidden", (p.shape[0] // 3,) * 3 if leaf == "in_proj_weight" else None)
    if module in heads and leaf == "weight":
        return Place("head", transposed=_is_conv1d(module), note=heads[module])
    if _is_conv1d(module):
        rows, columns = p.shape
        fused = home.attribute == "c_attn" and columns % rows == 0
        return Place("hidden", (rows,) * (columns // rows) if fused else None, transposed=True)
    if isinstance(module, nn.Bilinear):
        return Place("hidden")
    if isinstance(module, nn.Linear):
        return _linear(home, p)
    return _bare(home, p)


def _embedding(home: Home, module: Any) -> Place:
    if module.sparse:
        raise ConfigError(
            f"an {type(module).__name__} of {module.num_embeddings} rows has sparse=True, expected sparse=False: the "
            "optimizer takes dense gradients"
        )
    if not home.attribute.endswith("bias"):
        return Place("embed")
    known = home.attribute == "relative_attention_bias" and _kinds(home.parent)
    return Place(
        "scalar",
        note="" if known else "an embedding with the name of a bias: taken for biases of attention scores",
    )


def _convolution(module: Any, p: torch.Tensor) -> Place:
    """Each group is a matrix with its filters as rows; a group with one channel in or out (depthwise) is none."""
    if module.groups > 1 and min(p.shape[0] // module.groups, p.shape[1]) == 1:
        return Place("scalar", flatten=True)
    upwards = isinstance(module, _TRANSPOSED_CONVOLUTIONS)
    if module.groups == 1:
        return Place("hidden", flatten=True, transposed=upwards)
    note = "a grouped transposed convolution: scaled as (in, out)" if upwards else ""
    return Place("hidden", (p.shape[0] // module.groups,) * module.groups, flatten=True, note=note)


def _linear(home: Home, p: torch.Tensor) -> Place:
    kinds = _kinds(home.parent)
    for attribute, sizes, owners in _FUSED:
        if home.attribute == attribute and kinds.intersection(owners.split()):
            split = sizes(home.parent, p.shape[0])
            if sum(split) == p.shape[0] and min(split) > 0:
                return Place("hidden", split)
    if _LOOKS_FUSED.search(home.attribute) and not kinds & _INTERLEAVED:
        return Place(
            "hidden", note="fused according to its name, but the split is unknown: stepped as one matrix"
        )
    return Place("hidden")


def _bare(home: Home, p: torch.Tensor) -> Place:
    """A parameter of a module that is not from torch: experts, routers, state-space layers, embeddings, or a guess."""
    module, leaf = home.module, home.leaf
    name = home.attribute if leaf.isdigit() else leaf
    kind, kinds = type(module).__name__.removeprefix("FSDP"), _kinds(module)
    experts = isinstance(getattr(module, "is_transposed", None), bool) or "Llama4TextExperts" in kinds
    if kinds and experts:
        return _experts(module, leaf, p)
    if kinds and (kind.endswith("Embeddings") or (leaf == "A_log" and kind.endswith("Mixer"))):
        return Place("scalar")
    if leaf == "weight" and p.ndim == 2 and re.search(r"(Router|Gate|Gating)$", kind):
        return Place("hidden")
    if _ELEMENTWISE_NAME.search(name) and not _MATRIX_NAME.search(name):
        return Place("scalar", note=f"a parameter of {kind}: not a matrix, according to its name")
    if p.ndim == 2:
        return Place("hidden", note=f"a parameter of {kind}: taken for one matrix (out, in)")
    if p.ndim == 3 and "Expert" in kind:
        return Place("hidden", note=f"a parameter of {kind}: taken for experts (experts, out, in)")
    return Place(None)


def _experts(module: Any, leaf: str, p: torch.Tensor) -> Place:
    """Transformers' expert modules state their layout; a two-dimensional parameter is one vector per expert."""
    if p.ndim != 3:
        return Place("scalar")
    # Llama 4's experts don't state it: (experts, in, out), gate and up in halves.
    transposed = getattr(module, "is_transposed", True)
    length = p.shape[2 if transposed else 1]
    halves = leaf == "gate_up_proj" and getattr(module, "is_concatenated", True)
    return Place("hidden", (length // 2,) * 2 if halves else None, transposed=transposed)


def _kinds(module: nn.Module | None) -> set[str]:
    """Names of a module's classes, without those that FSDP2 and parametrizations put in front."""
    classes = type(module).__mro__
    return {c.__name__ for c in classes if c.__module__.startswith("transformers.")}


def _is_conv1d(module: nn.Module) -> bool:
    return "Conv1D" in _kinds(module)


def output_layers(model: nn.Module, homes: Iterable[Home]) -> dict[nn.Module, str]:
    """The output layers of a model, each with a note of what was guessed.

    The model may name one (``get_output_embeddings``). In addition, the last linear layer is guessed to be one if it has as
    many rows as ``config.num_labels``; if the model names none and it has about as many rows as an embedding; or, in a
    model with convolutions and no embeddings, if no linear layer has as many columns as it has rows.
    """
    homes = list(homes)
    said = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[nn.Module, str] = {} if said is None else {said: ""}
    linears = [home.module for home in homes if isinstance(home.module, nn.Linear)]
    if not linears or linears[-1] in found:
        return found
    last = linears[-1]
    rows = last.out_features
    tables: list[Any] = [
        home.module
        for home in homes
        if isinstance(home.module, _EMBEDDINGS) and not _NO_VOCABULARY.search(home.attribute)
    ]
    sizes = [table.num_embeddings for table in tables if _padded(rows, table.num_embeddings)]
    if rows == getattr(getattr(model, "config", None), "num_labels", None):
        found[last] = "the last linear layer, with config.num_labels rows: taken for the head"
    elif said is None and sizes:
        found[last] = f"the last linear layer, with rows for a vocabulary of {sizes[0]}: taken for the head"
    elif not hasattr(model, "get_output_embeddings") and not tables and _ends_convolutions(homes, rows):
        found[last] = "the last linear layer, after convolutions: taken for the head"
    return found


def _ends_convolutions(homes: Sequence[Home], rows: int) -> bool:
    """Whether the model has convolutions, and no linear layer has as many columns as the last one has rows."""
    columns = {home.module.in_features for home in homes if isinstance(home.module, nn.Linear)}
    return rows not in columns and any(isinstance(home.module, _CONVOLUTIONS) for home in homes)


def _padded(rows: int, vocabulary: int) -> bool:
    """Whether ``rows`` is about the size of a vocabulary: within a tenth, or rounded up to a multiple of a power of two."""
    multiples = (-(-vocabulary // 2**i) * 2**i for i in range(11))
    near = 10 * abs(rows - vocabulary) <= vocabulary
    return near or (rows <= 1.5 * vocabulary and rows in multiples)
