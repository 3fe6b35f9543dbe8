"""The trained model as a folder that ``from_pretrained`` loads, and the held-out questions.

    python examples/tiny_vlm/export.py FOLDER       # where train_decoder.py left its checkpoint

writes examples/tiny_vlm/model (weights in float16, tokenizer, processor, logs of the training) and
examples/tiny_vlm/heldout (pictures of test digits on the test photograph, and questions.jsonl).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from data import PATCH, SIDE, VOCABULARY, Scenes, questions
from model import MEAN, STD, build
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
SCENES, SEED = 128, 20_000  # of the held-out pictures
# What a held-out question is counted as. The one-word cells ("c2") only help to learn.
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


def build_processor() -> LlavaProcessor:
    """One token a word, ``<bos>`` in front; pixels as in training.  An unknown word is an error."""
    words = Tokenizer(models.WordLevel(VOCABULARY))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    side = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes off again
        chat_template=CHAT_TEMPLATE,
    )


def export_model(trained: Path, folder: Path) -> None:
    """Writes weights, tokenizer, processor and the logs of the training."""
    model = build()
    model.load_state_dict(torch.load(trained / "decoder.pt")["module"])
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.half().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    for name in ("vision", "decoder"):
        shutil.copy(trained / f"{name}.json", folder / f"training_{name}.json")


def export_questions(folder: Path) -> None:
    """Writes pictures and one question of each type on each, where a scene has one."""
    folder.mkdir(parents=True, exist_ok=True)
    supply = Scenes("test", SEED)
    lines = []
    for number in range(SCENES):
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
    parser.add_argument("folder", type=Path, help="with the checkpoints and logs of the training")
    parser.add_argument("--to", type=Path, default=HERE)
    args = parser.parse_args()
    export_model(args.folder, args.to / "model")
    export_questions(args.to / "heldout")


if __name__ == "__main__":
    main()
