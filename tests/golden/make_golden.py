"""Write the golden files beside this script with PyTorch and Transformers.

The Rust tests compare our engines with these numbers, so nothing of ours is imported here. Run it
in an environment of its own (``pip install torch transformers gguf safetensors``)::

    python tests/golden/make_golden.py --gguf model.Q4_1.gguf --tokenizer tokenizer.json

``--gguf`` is the file that the shipped detector is packed from, ``--tokenizer`` the
``tokenizer.json`` that is published with the model. Without them only the tiny models and the
rotary tables are written.

Written files
-------------
tiny-tokenizer.json
    Byte-level BPE in the manner of SmolLM2: 264 tokens, none for the byte 0x04.
tiny/, tiny-biased/
    Random Llamas with their activations at every site. The second one has biases, bf16 weights,
    heads wider than ``hidden_size / num_attention_heads``, and Llama 3 rotary scaling.
rope.json
    Rotary frequencies of every scaling kind.
smollm2.json, smollm2.safetensors
    For every text of ``texts.json``: ``input_ids`` by the published tokenizer, and activations of
    the real model after ``<|endoftext|>``: norms of all rows, three whole rows, at five layers.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).parent
Output = torch.Tensor | tuple[torch.Tensor, ...]

SMOLLM2_LAYERS = (0, 3, 6, 10, 14)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ã", "©")]
SKIPPED_BYTE = 4


def byte_alphabet() -> list[str]:
    """Character that stands for each byte in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def write_tokenizer() -> int:
    """Write ``tiny-tokenizer.json`` and return its number of tokens."""
    alphabet = [char for byte, char in enumerate(byte_alphabet()) if byte != SKIPPED_BYTE]
    tokens = SPECIAL + alphabet + [left + right for left, right in MERGES]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": token, **flags, "special": True}
            for id, token in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": MERGES,
        },
    }
    (HERE / "tiny-tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")
    return len(tokens)


def tiny_configs(vocab_size: int) -> dict[str, LlamaConfig]:
    """Configurations of the tiny models by folder."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return {
        "tiny": LlamaConfig(**shape),
        "tiny-biased": LlamaConfig(
            **shape, head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=llama3
        ),
    }


def captured(model: LlamaForCausalLM, input_ids: list[int]) -> dict[str, np.ndarray]:
    """Activations of every site by name, each ``(seq_len, hidden_size)``."""
    rows: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: Output) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            rows[name] = tensor.detach().float().reshape(len(input_ids), -1).numpy().copy()

        return hook

    hooks = []
    for layer, block in enumerate(model.model.layers):
        hooks += [
            block.self_attn.register_forward_hook(keep(f"{layer}.attn_out")),
            block.mlp.register_forward_hook(keep(f"{layer}.mlp_out")),
            block.register_forward_hook(keep(f"{layer}.resid_post")),
        ]
    with torch.no_grad():
        model(torch.tensor([input_ids]))
    for hook in hooks:
        hook.remove()
    return rows


def write_tiny_models(vocab_size: int) -> None:
    """Write the random models and their activations."""
    for folder, config in tiny_configs(vocab_size).items():
        torch.manual_seed(len(folder))
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            # Wide enough that attention is sharp and every layer matters.
            centre = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=0.3)
        dtype = torch.bfloat16 if config.attention_bias else torch.float32
        weights = {
            name: tensor.to(dtype).contiguous()
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"
        }
        model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        model.tie_weights()
        input_ids = [0, *torch.randint(0, vocab_size, (40,)).tolist()]
        path = HERE / folder
        path.mkdir(exist_ok=True)
        save_torch_file(weights, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
        ids = {"input_ids": np.array(input_ids, dtype=np.int64)}
        save_file(ids | captured(model, input_ids), path / "activations.safetensors")


def write_rope_tables() -> None:
    """Write the frequencies of every scaling kind for two head widths."""
    kinds = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "attention_factor": 0.9,
        },
    ]
    tables = []
    for kind in kinds:
        for head_dim, theta in ((64, 100000.0), (16, 10000.0)):
            config = LlamaConfig(
                vocab_size=264,
                hidden_size=4 * head_dim,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=8192,
                rope_parameters=kind | {"rope_theta": theta},
            )
            inv_freq, factor = rope(config, kind["rope_type"])
            tables.append(
                {"config": config.to_dict(), "inv_freq": inv_freq, "attention_factor": factor}
            )
    (HERE / "rope.json").write_text(json.dumps(tables) + "\n")


def rope(config: LlamaConfig, kind: str) -> tuple[list[float], float]:
    """Frequencies as Transformers computes them for sequences within the model's length."""
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
    return inv_freq.tolist(), float(factor)


def write_smollm2(gguf: Path, tokenizer: Path) -> None:
    """Write ids and activations of the real model."""
    published = Tokenizer.from_file(str(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    prompt = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(
        "The capital of France is", return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1].item()
    print("The capital of France is" + published.decode([answer]))

    texts = json.loads((HERE / "texts.json").read_text())
    ids: dict[str, list[int]] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, text in texts.items():
        ids[name] = published.encode(text, add_special_tokens=False).ids
        rows = captured(model, [0, *ids[name]])
        for layer in SMOLLM2_LAYERS:
            site = rows[f"{layer}.resid_post"]
            chosen = sorted({1, len(site) // 2, len(site) - 1})
            tensors[f"{name}/{layer}.resid_post/norms"] = np.linalg.norm(site, axis=1)
            tensors[f"{name}/{layer}.resid_post/rows"] = site[chosen]
        tensors[f"{name}/rows"] = np.array(chosen, dtype=np.int64)
    (HERE / "smollm2.json").write_text(json.dumps(ids) + "\n")
    save_file(tensors, HERE / "smollm2.safetensors")


def main() -> None:
    """Write everything that the arguments allow."""
    parser = argparse.ArgumentParser(description="Write the golden files.")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    write_tiny_models(write_tokenizer())
    write_rope_tables()
    if arguments.gguf and arguments.tokenizer:
        write_smollm2(arguments.gguf, arguments.tokenizer)


if __name__ == "__main__":
    main()
