"""The trained model as a folder that ``from_pretrained`` loads, and the held-out questions.

    python examples/tiny_vlm/export.py FOLDER       # where train_decoder.py left its checkpoint

writes examples/tiny_vlm/model (weights in float16, tokenizer, processor, logs of the training) and
examples/tiny_vlm/heldout (pictures of test digits on the test photograph, and questions.jsonl); of
another --variant the folders that variants.py names.

    python examples/tiny_vlm/export.py --variant fine --pictures 160 --to FOLDER

writes FOLDER/heldout_fine alone, the same pictures and more.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from data import Scenes, questions
from model import MEAN, STD, build
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from variants import VARIANTS, WINDOW, WINDOWED, Variant
from world import PATCH

HERE = Path(__file__).parent
SEED = 20_000  # of the held-out images
# Reported type of each held-out question. The one-word cells ("c2") are only for training.
HELD_OUT = {
    "cell": "location",
    "corner": "location",
    "colour": "colour",
    "colour_of": "colour of digit",
    "digit_of": "digit of colour",
    "count": "count",
    "largest": "largest",
    "read": "read",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def build_processor(variant: Variant = VARIANTS["coarse"]) -> LlavaProcessor:
    """One token per word after ``<bos>``; pixels as in training.  Unknown words are errors."""
    vocabulary = variant.world.vocabulary
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    side = {"height": variant.world.side, "width": variant.world.side}
    pictures = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default" if variant.class_tokens else "full",
        num_additional_image_tokens=variant.class_tokens,  # which "default" removes again
        chat_template=CHAT_TEMPLATE,
    )


def export_model(variant: Variant, trained: Path, folder: Path) -> None:
    """Write weights, tokenizer, processor and training logs."""
    model = build(variant)
    model.load_state_dict(torch.load(trained / "decoder.pt", map_location="cpu")["module"])
    model = as_lfm3(model) if variant.decoder == "lfm2" else model
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.half().save_pretrained(folder)
    build_processor(variant).save_pretrained(folder)
    for log in trained.glob("*.json"):
        shutil.copy(log, folder / f"training_{log.name}")


def as_lfm3(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Convert the decoder to LFM3, whose layer 1 has the window that it was trained with.

    LFM2 has no sliding-window layers, and not every transformers suitable for training has LFM3.
    """
    from transformers import Lfm3Config

    config, text = model.config, model.config.text_config
    layers = [
        "sliding_attention" if kind != "conv" and number < WINDOWED else kind
        for number, kind in enumerate(text.layer_types)
    ]
    rope = dict.fromkeys(("sliding_attention", "full_attention"), text.rope_parameters)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "norm_eps")
    shared += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    shared += ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    config.text_config = Lfm3Config(
        **{name: getattr(text, name) for name in (*shared, "conv_L_cache", "conv_bias")},
        head_dim=text.hidden_size // text.num_attention_heads,
        layer_types=layers,
        rope_parameters=rope,
        sliding_window=WINDOW,
        use_sandwich_norm=False,
        use_attention_gate=False,
    )
    other = LlavaForConditionalGeneration(config)
    names = {
        "q_layernorm": "q_norm",
        "k_layernorm": "k_norm",
        "self_attn.out_proj": "self_attn.o_proj",
    }
    weights = {}
    for name, weight in model.state_dict().items():
        if "language_model" in name:
            for old, new in names.items():
                name = name.replace(old, new)
        weights[name] = weight
    other.load_state_dict(weights)
    return other


def export_questions(
    folder: Path, variant: Variant = VARIANTS["coarse"], pictures: int | None = None
) -> None:
    """Write images and, if the scene has one, a question of each type on each."""
    folder.mkdir(parents=True, exist_ok=True)
    supply = Scenes("test", SEED, world=variant.world)
    lines = []
    for number in range(pictures or variant.pictures):
        scene = supply.scene()
        picture = f"{number:03}.png"
        Image.fromarray(scene.image).save(folder / picture, optimize=True)
        for kind, asked in questions(scene).items():
            if kind in HELD_OUT and asked:
                text, answer = asked[supply.rng.integers(len(asked))]
                question = {"type": HELD_OUT[kind], "question": text, "answer": answer}
                lines.append(json.dumps({"image": picture} | question))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Export both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="with the checkpoints and logs of the training")
    add("--pictures", type=int, help="held-out ones (default: as many as are here)")
    add("--variant", choices=VARIANTS, default="coarse")
    add("--to", type=Path, default=HERE)
    args = parser.parse_args()
    variant = VARIANTS[args.variant]
    if args.folder is not None:
        export_model(variant, args.folder, args.to / variant.folder)
    export_questions(args.to / variant.questions, variant, args.pictures)


if __name__ == "__main__":
    main()
