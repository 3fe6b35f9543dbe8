"""A family: a tiny model and the format of its prompts.

The models are unmodified Hugging Face classes with small configurations: fp32, eval, seeded.
Weights have a standard deviation of 1 / sqrt(fan in) instead of the usual 0.02, so that dropping or
misplacing one token changes the logits by far more than rounding does.
Sizes are free, so a test can make the sequence length equal the hidden size, the vocabulary, ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

Inputs = dict[str, Any]
Segment = list[int]
Pixels = Callable[[int, torch.Generator], Inputs]

VARIANTS = ("one", "two", "pad2", "pad4", "ragged", "text")
PAD_ID, BOS_ID, FIRST_TEXT_ID = 0, 1, 2
SPECIAL_IDS = 12  # at the end of the vocabulary, so that any vocabulary size works
_GAP = 3  # text tokens between two images


@dataclass(frozen=True)
class Structure:
    """A model's configuration and the format of its prompts.

    model_class: name in transformers.  config: of the whole model.
    image_token_id: the placeholder replaced by vision features, ``tokens_per_image`` times.
    pixels: number of images -> the model's vision arguments, each with the images in dim 0;
    per_row: they have the prompt's row in dim 0 and the image in dim 1 instead.
    image_prefix, image_suffix: markers around each image.
    layer: the K of the survey, 2 unless layer 1 has no attention that provides keys.
    types: name of the argument that is 1 at vision tokens, or "".
    extra: (input_ids, attention_mask) -> more arguments.
    decoder: path of the text decoder where ``get_decoder()`` is not it.
    attention: the only implementation that the model supports, or "" for any.
    eager_parts: paths of modules excluded from dynamo because it miscompiles them by itself.
    makes_cache: whether a plain forward creates its own KV cache.
    latent_cache: whether the cache holds latents that keys are computed from, not the keys.
    """

    model_class: str
    config: Any
    image_token_id: int
    tokens_per_image: int
    pixels: Pixels
    image_prefix: tuple[int, ...] = ()
    image_suffix: tuple[int, ...] = ()
    layer: int = 2
    per_row: bool = False
    types: str = ""
    extra: Callable[[Tensor, Tensor], Inputs] = field(default=lambda ids, mask: {})
    decoder: str = ""
    attention: str = ""
    eager_parts: tuple[str, ...] = ()
    makes_cache: bool = True
    latent_cache: bool = False


Builder = Callable[..., Structure]
"""(sizes of the text model by name) -> Structure; see :func:`text_sizes`."""


@dataclass(frozen=True)
class Family:
    """A built model and its prompts."""

    name: str
    structure: Structure
    model: Any

    @property
    def image_token_id(self) -> int:
        """The placeholder replaced by vision features."""
        return self.structure.image_token_id

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens of one image."""
        return self.structure.tokens_per_image

    @property
    def decoder(self) -> Any:
        """The text decoder: the module that holds the decoder layers."""
        path = self.structure.decoder
        return self.model.get_submodule(path) if path else self.model.get_decoder()

    @property
    def text_ids(self) -> range:
        """Token ids that are plain text in this model's vocabulary."""
        return range(FIRST_TEXT_ID, vocabulary(self.structure.config) - SPECIAL_IDS)

    def make_inputs(
        self,
        variant: str = "one",
        *,
        before: int = 5,
        after: int = 8,
        length: int | None = None,
        seed: int = 1,
    ) -> Inputs:
        """Keyword arguments of ``model(...)`` and ``model.generate(...)``; see ``VARIANTS``.

        ``before`` and ``after`` count the text tokens around the image of the longest row;
        ``length`` sets the length of that row instead of ``after``.
        ``pad2`` and ``pad4`` are left-padded batches, one image in each row, shorter row by row.
        ``ragged`` has two images in row 0 and one in row 1.
        ``text`` holds no image and has exactly the shapes of ``one``.
        Raises ValueError on an unknown variant or a length the images do not fit in.
        """
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; choose one of {VARIANTS}")
        generator = torch.Generator().manual_seed(seed)
        if length is not None:
            after += length - len(self._rows(variant, before, after, generator)[0])
            if after < 1:
                raise ValueError(f"length={length} leaves no text after the images of {variant!r}")
            generator.manual_seed(seed)
        return self._pack(self._rows(variant, before, after, generator), generator)

    def row(self, inputs: Inputs, index: int) -> Inputs:
        """Row ``index`` of a batch as a single prompt, without its padding."""
        image = inputs["input_ids"] == self.image_token_id
        counts = (image.sum(1) // self.tokens_per_image).tolist()
        first, last = sum(counts[:index]), sum(counts[: index + 1])
        valid = inputs["attention_mask"][index].bool()
        alone: Inputs = {}
        for name, value in inputs.items():
            if name in ("input_ids", "attention_mask", self.structure.types):
                alone[name] = value[index, valid][None]
            elif last > first:
                per_image = value.shape[0] // sum(counts)
                alone[name] = value[first * per_image : last * per_image]
        return alone

    def _rows(
        self, variant: str, before: int, after: int, generator: torch.Generator
    ) -> list[Segment]:
        def text(n: int) -> Segment:
            low, high = self.text_ids.start, self.text_ids.stop
            return torch.randint(low, high, (max(1, n),), generator=generator).tolist()

        image = [*self.structure.image_prefix]
        image += [self.image_token_id] * self.tokens_per_image + [*self.structure.image_suffix]
        if variant == "text":
            return [text(max(1, before) + len(image) + max(1, after))]
        two = text(before) + image + text(_GAP) + image + text(after)
        if variant == "two":
            return [two]
        if variant == "ragged":
            return [two, text(before) + image + text(after)]
        count = {"one": 1, "pad2": 2, "pad4": 4}[variant]
        return [text(before - i) + image + text(after - i) for i in range(count)]

    def _pack(self, rows: list[Segment], generator: torch.Generator) -> Inputs:
        width = max(map(len, rows))
        ids = torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs: Inputs = {"input_ids": ids, "attention_mask": mask}
        image = ids == self.image_token_id
        if self.structure.types:
            inputs[self.structure.types] = image.int()
        if images := int(image.sum()) // self.tokens_per_image:
            vision = self.structure.pixels(images, generator)
            if self.structure.per_row:
                vision = {k: v.unflatten(0, (len(rows), -1)) for k, v in vision.items()}
            inputs |= vision
        return inputs | self.structure.extra(ids, mask)


def vocabulary(config: Any) -> int:
    """Size of the text model's vocabulary."""
    return int(config.get_text_config(decoder=True).vocab_size)


def special(vocab_size: int, number: int) -> int:
    """The ``number``-th special token id, 1 .. SPECIAL_IDS, counted from the vocabulary's end.

    1 is the image, 2 the video, 3 and 4 are the markers around them; the rest are free.
    """
    return vocab_size - number


def text_sizes(
    layers: int = 4,
    hidden_size: int = 64,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 200,
    **more: Any,
) -> dict[str, Any]:
    """Sizes of a text model, under the names used by nearly all text configurations."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 5 // 2,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": None,
        "pad_token_id": PAD_ID,
        **more,
    }


def tower_sizes(layers: int = 3, **more: Any) -> dict[str, Any]:
    """Sizes of a vision tower, under the names used by most vision configurations."""
    return {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        **more,
    }


def images(*shape: int, name: str = "pixel_values", **more: list[int]) -> Pixels:
    """Vision arguments: a random tensor [images, *shape], and one row of ``more`` per image."""

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        drawn = {name: torch.randn((count, *shape), generator=generator)}
        return drawn | {k: torch.tensor([row] * count) for k, row in more.items()}

    return pixels


def patches(count: int, width: int, **more: list[int]) -> Pixels:
    """Flattened patches [images * count, width], and one row of ``more`` per image."""

    def pixels(number: int, generator: torch.Generator) -> Inputs:
        drawn = {"pixel_values": torch.randn((number * count, width), generator=generator)}
        return drawn | {k: torch.tensor([row] * number) for k, row in more.items()}

    return pixels


def build(
    name: str,
    builder: Builder,
    *,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    **sizes: Any,
) -> Family:
    """Build a family's model with random weights.

    Raises AttributeError if this transformers has no such model, ImportError if the model needs a
    package that is not installed.
    """
    structure = builder(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, structure.model_class)(structure.config).eval()
        _redraw(model)
    model.set_attn_implementation(structure.attention or attn_implementation)
    for path in structure.eager_parts:
        part = model.get_submodule(path)
        part.forward = torch.compiler.disable(part.forward)  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings() or model.language_model.get_output_embeddings()
    with torch.no_grad():
        # Their logits are then zero, so greedy decoding never emits a placeholder token.
        head.weight[vocabulary(structure.config) - SPECIAL_IDS :] = 0.0
    model.generation_config.eos_token_id = None
    return Family(name, structure, model.requires_grad_(False))


def _redraw(model: Any) -> None:
    """Redraw weights large enough to matter, and norms and biases other than one or zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif parameter.dim() > 1:
                fan_in = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5)
