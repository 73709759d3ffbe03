"""The Hub's config.json and ours: every field is honoured, known to change nothing, or refused by its name."""

import json
from pathlib import Path
from typing import Any

from glax.errors import UserError
from glax.models import ModelConfig

# Fields that change no number of the model: bookkeeping, and how fla and transformers run it.
INDIFFERENT = frozenset({
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_mode",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_swiglu",
    "keys_to_ignore_at_inference",
    "max_position_embeddings",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_l2warp",
})  # fmt: skip

# What a field means where config.json leaves it out: the defaults of its class.
_FLA = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_kv_heads": None,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "initializer_range": 0.02,
    "norm_eps": 1e-6,
    "elementwise_affine": True,
    "fuse_norm": True,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "attnres_block_size": None,
}
_RECURRENT = _FLA | {
    "feature_map": None,
    "use_short_conv": False,
    "conv_size": 4,
    "use_output_gate": True,
    "attn": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gla": _RECURRENT
    | {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "clamp_min": None, "use_gk": True, "use_gv": False},
    "retnet": _RECURRENT | {"num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2},
    "transformer": _FLA
    | {"num_heads": 32, "window_size": None, "rope_theta": 10000.0, "qkv_bias": False, "qk_norm": False},
    "llama": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "intermediate_size": 11008,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": None,
    },
}
# Values that a field must have: ours is the model that has them.
REQUIRED: dict[str, dict[str, Any]] = {
    "gla": {
        "use_gk": True,
        "use_gv": False,
        "hidden_act": "swish",
        "elementwise_affine": True,
        "attnres_block_size": None,
    },
    "retnet": {
        "feature_map": None,
        "use_short_conv": False,
        "use_output_gate": True,
        "hidden_act": "swish",
        "elementwise_affine": True,
        "attnres_block_size": None,
    },
    "transformer": {
        "qkv_bias": False,
        "qk_norm": False,
        "hidden_act": "swish",
        "elementwise_affine": True,
        "attnres_block_size": None,
    },
    "llama": {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_scaling": None},
}
ARCHITECTURES = {
    "gla": "GLAForCausalLM",
    "retnet": "RetNetForCausalLM",
    "transformer": "TransformerForCausalLM",
    "llama": "LlamaForCausalLM",
}


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint as it is. Raises UserError where there is none, or of no known model."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the folder of a Hub checkpoint") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in DEFAULTS:
        raise UserError(f'{path} has model_type "{kind}": the models known here are {", ".join(DEFAULTS)}')
    return config


def model_config(config: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes, in bfloat16. Raises UserError that names a field it cannot honour."""
    kind = config["model_type"]
    fields = DEFAULTS[kind] | {name: value for name, value in config.items() if name not in INDIFFERENT}
    if kind != "llama" and "rms_norm_eps" in fields:  # its name before April 2024
        fields["norm_eps"] = fields.pop("rms_norm_eps")
    if fields.pop("share_conv_kernel", False) and fields.get("use_short_conv"):
        raise UserError("config.json has share_conv_kernel true: one convolution for q, k and v is not supported")
    _refuse_unknown(kind, fields)
    for name, value in REQUIRED[kind].items():
        if fields[name] != value:
            raise UserError(
                f"config.json has {name} {json.dumps(fields[name])}: only {json.dumps(value)} is supported for {kind}"
            )
    common = {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_layers": fields["num_hidden_layers"],
        "initializer_range": fields["initializer_range"],
        "tie_embeddings": fields["tie_word_embeddings"],
    }
    return ModelConfig(**common | (_of_llama(fields) if kind == "llama" else _of_fla(kind, fields)))


def _refuse_unknown(kind, fields):
    for name in sorted(fields):
        if name not in DEFAULTS[kind]:
            raise UserError(
                f"config.json has {name} {json.dumps(fields[name])}, which is not known for {kind}: remove it if it "
                "changes nothing"
            )


def _of_fla(kind, fields) -> dict[str, Any]:
    size, ratio = fields["intermediate_size"], fields["hidden_ratio"]
    if size is None:
        size = 256 * -(-int(fields["hidden_size"] * (4 if ratio is None else ratio) * 2 / 3) // 256)
    ours = {"num_heads": fields["num_heads"], "norm_eps": fields["norm_eps"], "mlp_size": size}
    kv_heads = fields["num_kv_heads"]
    if kind == "transformer":
        window, base = fields["window_size"], fields["rope_theta"]
        return ours | {
            "mixer": "attention",
            "attention_kv_heads": kv_heads,
            "attention_window": window,
            "rope_base": base,
        }
    ours |= {"mixer": kind, "expand_k": fields["expand_k"], "expand_v": fields["expand_v"]}
    if kind == "gla":
        ours |= {
            "num_kv_heads": kv_heads,
            "clamp_min": fields["clamp_min"],
            "feature_map": fields["feature_map"],
            "output_gate": fields["use_output_gate"],
            "short_conv_width": fields["conv_size"] if fields["use_short_conv"] else None,
        }
    elif kv_heads not in (None, fields["num_heads"]):
        raise UserError(f"config.json has num_kv_heads {kv_heads}: retnet is supported with as many as num_heads only")
    return ours | _hybrid(kind, fields["attn"])


def _hybrid(kind, attn) -> dict[str, Any]:
    """Fields of softmax attention at some depths: one specification, the same for all of them."""
    if attn is None:
        return {}
    if isinstance(attn, list) and len(attn) == 1:
        attn = attn[0]
    if not isinstance(attn, dict) or "layers" not in attn or "num_heads" not in attn:
        raise UserError("config.json has an attn that is not one specification with layers and num_heads")
    spec = {"num_kv_heads": None, "window_size": None, "rope_theta": 10000.0, "qkv_bias": False} | attn
    unknown = set(spec) - {"layers", "num_heads", "num_kv_heads", "window_size", "rope_theta", "qkv_bias"}
    if unknown or spec["qkv_bias"]:
        name = sorted(unknown)[0] if unknown else "qkv_bias"
        raise UserError(f"config.json has attn.{name} {json.dumps(spec[name])}: it is not supported")
    if kind == "retnet" and spec["rope_theta"] != 10000.0:
        raise UserError(f"config.json has attn.rope_theta {spec['rope_theta']}: retnet's own layers have 10000")
    return {
        "attention_layers": tuple(spec["layers"]),
        "attention_heads": spec["num_heads"],
        "attention_kv_heads": spec["num_kv_heads"],
        "attention_window": spec["window_size"],
        "rope_base": spec["rope_theta"],
    }


def _of_llama(fields) -> dict[str, Any]:
    base, heads = fields["rope_theta"], fields["num_attention_heads"]
    if (rope := fields["rope_parameters"]) is not None:
        kind = rope.get("rope_type", "default")
        if kind != "default" or set(rope) - {"rope_type", "rope_theta"}:
            raise UserError(f'config.json has rope_parameters of type "{kind}": only the default is supported')
        base = rope.get("rope_theta", base)
    if fields["head_dim"] not in (None, fields["hidden_size"] // heads):
        raise UserError(f"config.json has head_dim {fields['head_dim']}: only hidden_size / heads is supported")
    return {
        "mixer": "attention",
        "num_heads": heads,
        "attention_kv_heads": fields["num_key_value_heads"],
        "mlp_size": fields["intermediate_size"],
        "norm_eps": fields["rms_norm_eps"],
        "rope_base": base,
    }


def written_config(config: ModelConfig, kind: str, dtype: str, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model in the format ``kind``; fields that change nothing are taken from ``like``.

    Raises UserError that names what the format cannot hold.
    """
    if like is not None and like["model_type"] == kind:
        carried = {name: value for name, value in like.items() if name in INDIFFERENT}
    else:
        carried = {"use_cache": True, "max_position_embeddings": 2048}
        carried |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        if kind != "llama":
            fused = ("fuse_swiglu", "fuse_cross_entropy")
            carried |= dict.fromkeys(fused, True) | {"fuse_linear_cross_entropy": False, "use_l2warp": False}
        if kind in ("gla", "retnet"):
            carried["attn_mode"] = "chunk"
    carried["model_type"], carried["architectures"] = kind, [ARCHITECTURES[kind]]
    carried.pop("torch_dtype", None)
    fields = _to_llama(config) if kind == "llama" else _to_fla(config, kind)
    written = DEFAULTS[kind] | fields | carried | {"dtype": dtype}
    if kind == "llama":
        del written["rope_scaling"], written["rope_parameters"]
        if like is not None and like.get("rope_parameters") is not None:  # the base's place since transformers 5
            written["rope_parameters"] = {"rope_type": "default", "rope_theta": written.pop("rope_theta")}
    elif like is not None:
        # Two spellings of one width, and of how norms are run: what was there stays.
        if like.get("intermediate_size", 0) is None and model_config(like).mlp_width == config.mlp_width:
            written["intermediate_size"], written["hidden_ratio"] = None, like.get("hidden_ratio", 4)
        written["fuse_norm"] = like.get("fuse_norm", True)
        if like.get("num_kv_heads", 0) is None and written["num_kv_heads"] == written["num_heads"]:
            written["num_kv_heads"] = None
    again = model_config(written)
    for name in (*_MATTERS, *(_OF_GATES if kind == "gla" else ())):
        if getattr(again, name) != getattr(config, name):
            raise UserError(
                f"the model has {name} {getattr(config, name)}, which the {kind} format cannot hold: choose another"
            )
    return dict(sorted(written.items()))


# Fields that every format holds or that some cannot hold; a gate's are no part of RetNet's or a Transformer's.
_MATTERS = ("vocab_size", "hidden_size", "num_layers", "norm_eps", "tie_embeddings", "mlp_width", "mixers")
_OF_GATES = ("gate", "gate_rank", "gate_temperature")


def _to_fla(config: ModelConfig, kind) -> dict[str, Any]:
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "intermediate_size": config.mlp_width,
    }
    if kind == "transformer":
        return fields | {
            "num_heads": config.attention_heads or config.num_heads,
            "num_kv_heads": config.attention_kv_heads,
            "window_size": config.attention_window,
            "rope_theta": config.rope_base,
        }
    fields |= {"expand_k": config.expand_k, "expand_v": config.expand_v}
    if kind == "gla":
        fields |= {
            "num_kv_heads": config.num_kv_heads,
            "clamp_min": config.clamp_min,
            "feature_map": config.feature_map,
            "use_output_gate": config.output_gate,
            "use_short_conv": config.short_conv_width is not None,
            "conv_size": config.short_conv_width or 4,
        }
    if config.attention_layers:
        fields["attn"] = {
            "layers": list(config.attention_layers),
            "num_heads": config.attention_heads or config.num_heads,
            "num_kv_heads": config.attention_kv_heads,
            "window_size": config.attention_window,
            "rope_theta": config.rope_base,
        }
    return fields


def _to_llama(config: ModelConfig) -> dict[str, Any]:
    heads = config.attention_heads or config.num_heads
    if config.attention_window is not None:
        raise UserError("the model's attention has a window, which the llama format cannot hold: write transformer")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.attention_kv_heads or heads,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_base,
        "head_dim": config.hidden_size // heads,
    }
