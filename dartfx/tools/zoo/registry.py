"""Every family by name, in the order of the table."""

from __future__ import annotations

import contextlib

from dartfx import compat
from dartfx.tools.zoo.families import (
    documents,
    gemma,
    grids,
    hybrids,
    indexed,
    llava,
    others,
    projected,
    qwen,
    recent,
    tokenised,
)
from dartfx.tools.zoo.family import Builder, Family, build

BUILDERS: tuple[Builder, ...] = (
    llava.llava,
    llava.llava_next,
    llava.llava_onevision,
    llava.llava_next_video,
    llava.video_llava,
    llava.vipllava,
    llava.llava_pixtral,
    llava.mistral3,
    llava.internvl,
    llava.idefics3,
    llava.smolvlm,
    llava.aya_vision,
    llava.ovis2,
    llava.lfm2_vl,
    qwen.qwen2_vl,
    qwen.qwen2_5_vl,
    qwen.qwen3_vl,
    qwen.qwen3_vl_moe,
    qwen.qwen3_5,
    qwen.qwen3_5_moe,
    hybrids.nemotron_h_omni,
    hybrids.lfm3_vl,
    qwen.glm4v,
    qwen.glm46v,
    qwen.glm4v_moe,
    gemma.paligemma,
    gemma.paligemma2,
    gemma.gemma3,
    gemma.gemma4,
    others.minicpmv4_6,
    others.kimi_k25,
    others.phi4_multimodal,
    others.llama4,
    others.perception_lm,
    others.mllama,
    others.florence2,
    others.fuyu,
    projected.cohere2_vision,
    projected.aria,
    projected.deepseek_vl,
    projected.janus,
    projected.idefics2,
    projected.got_ocr2,
    projected.lighton_ocr,
    projected.qianfan_ocr,
    projected.fast_vlm,
    projected.granite4_vision,
    projected.granite_docling,
    projected.step3p7,
    projected.deepseek_vl_hybrid,
    projected.molmo2,
    gemma.gemma4_unified,
    grids.hunyuan_vl,
    grids.qwen2_5_omni,
    grids.qwen3_omni_moe,
    grids.video_llama_3,
    grids.paddleocr_vl,
    grids.ernie4_5_vl_moe,
    grids.glm_ocr,
    grids.exaone4_5,
    grids.hyperclovax_vision_v2,
    grids.cohere_compass,
    tokenised.emu3,
    tokenised.chameleon,
    tokenised.blip_2,
    tokenised.instructblip,
    tokenised.instructblipvideo,
    documents.minicpm_ocr,
    documents.minicpmv4_7,
    documents.deepseek_ocr2,
    documents.unlimited_ocr,
    recent.cosmos3_edge,
    recent.cosmos3_omni,
    indexed.mistral_large4,
    indexed.dots3_note,
    indexed.qwen4_exp,
    indexed.glm5_next,
    indexed.minimax_m3_vl,
    recent.muse_glimmer,
    recent.muse_spark,
    recent.inkling,
    recent.inkling2,
    tokenised.kosmos_2,
    tokenised.kosmos_2_5,
)

FAMILIES: dict[str, Builder] = {builder.__name__: builder for builder in BUILDERS}

# Model types of ``AutoModelForImageTextToText`` that the zoo does not contain, and why.
_ENCODER_DECODER = "vision tokens enter the encoder of an encoder-decoder model, as florence2's"
_CROSS_ATTENTION = "the text looks at the image by cross-attention, as mllama's"
EXCLUDED: dict[str, str] = {
    "blip": _CROSS_ATTENTION,
    "diffusion_gemma": "denoises blocks of text in place of decoding",
    "evolla": "reads proteins",
    "git": "the image stands before the token ids, without placeholders among them",
    "idefics": _CROSS_ATTENTION,
    "mistral4": "a text model, of which mistral3 takes the images",
    "pi0": "writes actions of robots by flow matching",
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
}


def missing_classes() -> dict[str, str]:
    """Vision-language classes of the installed transformers without a family in the zoo.

    By model type, from ``AutoModelForImageTextToText``'s mapping without ``EXCLUDED``.  Raises
    Unavailable if that mapping cannot be found.
    """
    known, held = compat.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, set()
    for builder in BUILDERS:
        # This transformers lacks the family, or its configuration needs a missing package.
        with contextlib.suppress(AttributeError, ImportError):
            held.add(builder().model_class)
    left = {kind: name for kind, name in known.items() if name not in held}
    return {kind: name for kind, name in left.items() if kind not in EXCLUDED}


def load(name: str, *, seed: int = 0, attn_implementation: str = "sdpa", **sizes: object) -> Family:
    """Build one family, as :func:`build` does.  Raises KeyError on unknown names."""
    return build(name, FAMILIES[name], seed=seed, attn_implementation=attn_implementation, **sizes)
