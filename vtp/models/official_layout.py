"""The layout in which VTP's authors publish models: `config.json` of VTPConfig, flat, and `model.safetensors` of VTPModel.

Which values exist stands in the records of the parts (`VisionConfig`, `DecoderConfig`, `TextConfig`); here stands how the
official code understands them. What it has no name for is written under `vtp_pipeline`, which it ignores: its rotary
positions are always in bfloat16, its decoder always makes 16 x 16 pixels of a latent.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from vtp.artefact import ArtefactError
from vtp.config import Config
from vtp.models.vit import RopeDtype

FORMAT_VERSION = 1
OFFICIAL_UPSCALE = 16

# Defaults of VTPConfig, for files that leave keys out.
OFFICIAL_DEFAULTS: Mapping[str, Any] = {
    "image_size": 256,
    "train_clip": True,
    "train_reconstruction": True,
    "vision_patch_size": 16,
    "vision_embed_dim": 768,
    "vision_depth": 12,
    "vision_num_heads": 12,
    "vision_mlp_ratio": 4.0,
    "vision_ffn_layer": "swiglu",
    "vision_norm_layer": "rmsnorm",
    "vision_init_values": None,
    "vision_use_qk_norm": False,
    "vision_feature_bottleneck": 64,
    "vision_bottleneck_ae_only": True,
    "vision_clip_feat": "cls",
    "text_context_length": 77,
    "text_vocab_size": 49408,
    "text_embed_dim": 768,
    "text_num_heads": 12,
    "text_depth": 12,
    "text_mlp_ratio": 4.0,
    "text_ls_init_value": None,
    "text_embed_cls": False,
    "text_pad_id": 0,
    "text_no_causal_mask": False,
    "text_pool_type": "argmax",
    "text_proj_type": "linear",
    "text_proj_bias": False,
    "text_output_tokens": False,
    "text_quick_gelu": False,
    "decoder_embed_dim": 768,
    "decoder_num_heads": 12,
    "decoder_depth": 12,
    "decoder_ffn_layer": "swiglu",
    "decoder_norm_layer": "layernorm",
    "decoder_init_values": None,
    "decoder_use_qk_norm": False,
    "init_logit_scale": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
}
_TOP = ("image_size", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
_PARTS = {"vision": None, "decoder": "train_reconstruction", "text": "train_clip"}  # and what says that there is one


class PipelineOrigin(Config):
    """`vtp_pipeline`: what the official code has no name for."""

    format_version: Literal[1]
    rope_dtype: RopeDtype
    decoder_upscale: int | None = Field(None, ge=1)  # None: the patch size


OFFICIAL_ORIGIN = PipelineOrigin(format_version=1, rope_dtype="bfloat16", decoder_upscale=OFFICIAL_UPSCALE)


def sections_of(flat: Mapping[str, Any], path: object) -> dict[str, Any]:
    """The values of a `TokenizerConfig` in the flat ones of `path`, which may be official or ours.

    Raises ArtefactError or ConfigError for what the official code could not run, and for keys that it does not know.
    """
    if flat.get("model_type") != "vtp":
        raise ArtefactError(
            f"{path}: model_type is {flat.get('model_type')!r}, expected 'vtp'; is this the right folder?"
        )
    origin, values = OFFICIAL_ORIGIN, {**OFFICIAL_DEFAULTS, **flat}
    if "vtp_pipeline" in flat:
        origin, values = PipelineOrigin.parse(flat["vtp_pipeline"], where=f"{path}:vtp_pipeline"), dict(flat)
    sections: dict[str, Any] = {key: values[key] for key in _TOP if key in values}
    sections |= {part: _section(values, part, switch, path) for part, switch in _PARTS.items()}
    if "vtp_pipeline" not in flat and sections["vision"].get("feature_bottleneck", 1) is None:
        sections["vision"]["feature_bottleneck"] = sections["vision"].get("embed_dim")  # its last norm is learned
    sections |= origin.model_dump(exclude={"format_version"})
    if sections["decoder"] is None or sections["decoder_upscale"] == values.get("vision_patch_size"):
        sections["decoder_upscale"] = None
    return sections


def _section(values: Mapping[str, Any], part: str, switch: str | None, path: object) -> dict[str, Any] | None:
    """The values of a part under our names, as the official code takes them; None where there is no such part."""
    if switch is not None:
        if not isinstance(values.get(switch), bool):
            raise ArtefactError(f"{path}: {switch} is {values.get(switch)!r}, expected true or false")
        if not values[switch]:
            return None
    section = {key.removeprefix(f"{part}_"): value for key, value in values.items() if key.startswith(f"{part}_")}
    if section.get("init_values") == 0:
        section["init_values"] = None  # it builds no LayerScale that would begin at 0
    if part == "text":
        if section.pop("embed_cls", False) is not False:
            raise ArtefactError(
                f"{path}: text_embed_cls is {values['text_embed_cls']!r}, known is false: with a class token the official "
                "code has more positions than tokens and cannot run; fetch the file again"
            )
        section["proj_type"] = "none" if section.get("proj_type") == "none" else "linear"
    return section


def flatten(sections: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a `TokenizerConfig`, given as nested values; those of parts that there are not are left out."""
    flat: dict[str, Any] = {"architectures": ["VTPModel"], "model_type": "vtp", "dtype": "float32"}
    flat |= {key: sections[key] for key in _TOP}
    for part, switch in _PARTS.items():
        if switch is not None:
            flat[switch] = sections[part] is not None
        flat |= {f"{part}_{key}": value for key, value in (sections[part] or {}).items()}
    if flat["train_clip"]:
        flat["text_embed_cls"] = False
    names = PipelineOrigin.model_fields.keys() & sections.keys()
    origin = PipelineOrigin(format_version=FORMAT_VERSION, **{name: sections[name] for name in names})
    return dict(sorted({**flat, "vtp_pipeline": origin.model_dump()}.items()))


def official_name(keys: tuple[str | int, ...]) -> str:
    """What a key of a `TokenizerConfig` is called in the flat file."""
    return "_".join(map(str, keys))


def official_key(key: str) -> str:
    """Our state-dict key in the official layout, which flattens the text tower."""
    if not key.startswith("text."):
        return key
    rest = key.removeprefix("text.")
    return f"text_{rest}" if rest.startswith("transformer.") else rest


_TEXT_KEYS = ("token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def our_key(key: str) -> str:
    """The inverse of `official_key`."""
    if key.startswith("text_transformer."):
        return "text." + key.removeprefix("text_")
    return f"text.{key}" if key.startswith(_TEXT_KEYS) else key
