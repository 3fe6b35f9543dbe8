"""A pruned model behind vLLM's OpenAI server, and a client that asks about an image.

    pip install "dartfx[vllm]" openai
    python examples/serve_vllm.py checkpoint /tmp/tiny_vlm_for_vllm
    python -m vllm.entrypoints.openai.api_server --model /tmp/tiny_vlm_for_vllm \\
        --additional-config '{"dartfx": {"retain_tokens": 64}}' \\
        --max-model-len 1024 --dtype float32 --enforce-eager
    python examples/serve_vllm.py ask examples/tiny_vlm/heldout/000.png "read row four ?"

With your own checkpoint, skip the first command. docs/vllm.md lists which models work.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).parent / "tiny_vlm" / "model"


def write_checkpoint(folder: Path, source: Path = MODEL) -> Path:
    """Convert the small model of examples/tiny_vlm to an equivalent one that vLLM can load.

    vLLM's Qwen2 supports windows on all layers or none, its Llama on some, so the decoder becomes a
    Llama with attention biases, zero for the output projection.  vLLM also expects the vision
    tower's weights under the names of earlier transformers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.startswith(("config", "training")):
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    text = config["text_config"]
    for name in ("use_sliding_window", "max_window_layers"):
        text.pop(name)
    text |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": False,
        "head_dim": text["hidden_size"] // text["num_attention_heads"],
    }
    old = "vision_tower.vision_model."
    moved = {name: name.replace("vision_tower.", old) for name in weights if old not in name}
    weights = {moved.get(name, name): weight for name, weight in weights.items()}
    for name in list(weights):
        if name.endswith("self_attn.q_proj.bias") and "language_model" in name:
            zeros = torch.zeros(text["hidden_size"], dtype=weights[name].dtype)
            weights[name.replace("q_proj", "o_proj")] = zeros
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ask(url: str, image: Path, question: str) -> None:
    """Send one question about an image, and stream the answer to stdout."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    data = base64.b64encode(image.read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    message = {"role": "user", "content": [picture, {"type": "text", "text": question}]}
    stream = client.chat.completions.create(
        model=model, messages=[message], max_tokens=16, temperature=0, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint = commands.add_parser("checkpoint", help="write the small model as vLLM reads it")
    checkpoint.add_argument("folder", type=Path)
    asking = commands.add_parser("ask", help="ask a running server")
    asking.add_argument("image", type=Path)
    asking.add_argument("question")
    asking.add_argument("--url", default="http://localhost:8000/v1", help="(%(default)s)")
    given = parser.parse_args()
    if given.command == "checkpoint":
        print(write_checkpoint(given.folder))
    else:
        ask(given.url, given.image, given.question)


if __name__ == "__main__":
    main()
