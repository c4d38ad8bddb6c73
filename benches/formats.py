"""The detector's model in the formats that the peers read: the same weights and blocks.

``python formats.py FOLDER``, with a `Request` in ``FOLDER/request.json``, writes what can be
written and says in ``FOLDER/formats.json`` what could not be, and why. It runs in a process of its
own, so that the bench itself never loads PyTorch.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Request", "load_truncated", "num_layers"]

MODEL, ONNX, ONNX_INT8 = "llama", "model.onnx", "model-int8.onnx"
OPENVINO, OPENVINO_WEIGHTS, OPENVINO_INT8 = "model.xml", "model-weights.xml", "model-int8.xml"
GGUF = "model.gguf"


@dataclass(frozen=True)
class Request:
    """What to convert.

    Attributes
    ----------
    gguf : str
        The file that the detector was packed from.
    sites : sequence of str
        Where activations are read, such as ``14.resid_post``.
    samples : sequence of list of int
        Token ids of a few texts, for the converters that want to see activations.
    """

    gguf: str
    sites: Sequence[str]
    samples: Sequence[list[int]]


def num_layers(sites: Sequence[str]) -> int:
    """Blocks up to the deepest site."""
    return 1 + max(int(site.split(".")[0]) for site in sites)


def load_truncated(folder: Path, sites: Sequence[str], dtype: str) -> Any:
    """The truncated model as a PyTorch module: ``(1, n)`` ids to ``(n_sites, n, hidden_size)``.

    The blocks are called one by one because the model itself would go on to its final norm, and
    because without a mask tensor attention takes PyTorch's fused causal kernel.
    """
    import torch
    from transformers import LlamaModel

    model = LlamaModel.from_pretrained(folder / MODEL, dtype=getattr(torch, dtype))
    kept = _keep_sites(model, sites)

    class Truncated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            hidden = model.embed_tokens(input_ids)
            positions = torch.arange(input_ids.shape[1])[None]
            rotary = model.rotary_emb(hidden, position_ids=positions)
            for block in model.layers:
                hidden = block(hidden, position_embeddings=rotary)
            return torch.cat([kept[site] for site in sites])

    module = Truncated()
    module.train(False)
    return module


def _keep_sites(model: Any, sites: Sequence[str]) -> dict[str, Any]:
    """A dictionary that every pass of `model` fills with the activations of the sites."""
    kept: dict[str, Any] = {}

    def keep(site: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            kept[site] = output[0] if isinstance(output, tuple) else output

        return hook

    parts = {"attn_out": "self_attn", "mlp_out": "mlp"}
    for site in sites:
        layer, kind = site.split(".")
        block = model.layers[int(layer)]
        part = getattr(block, parts[kind]) if kind in parts else block
        part.register_forward_hook(keep(site))
    return kept


def _write_torch(request: Request, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    gguf = Path(request.gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).model
    model.config.num_hidden_layers = num_layers(request.sites)
    model.layers = model.layers[: model.config.num_hidden_layers]
    model.save_pretrained(folder / MODEL)


def _write_openvino(request: Request, folder: Path) -> None:
    import openvino as ov
    import torch

    module = load_truncated(folder, request.sites, "float32")
    example = torch.tensor([request.samples[0]])
    with torch.no_grad():
        model = ov.convert_model(module, example_input=example, input=[[1, -1]])
    ov.save_model(model, folder / OPENVINO, compress_to_fp16=False)


def _write_openvino_weights(request: Request, folder: Path) -> None:
    import nncf
    import openvino as ov

    model = nncf.compress_weights(ov.Core().read_model(folder / OPENVINO))
    ov.save_model(model, folder / OPENVINO_WEIGHTS, compress_to_fp16=False)


def _write_openvino_int8(request: Request, folder: Path) -> None:
    import nncf
    import numpy as np
    import openvino as ov

    samples = nncf.Dataset([np.array([ids]) for ids in request.samples])
    model = nncf.quantize(
        ov.Core().read_model(folder / OPENVINO),
        samples,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(request.samples),
    )
    ov.save_model(model, folder / OPENVINO_INT8, compress_to_fp16=False)


def _write_onnx(request: Request, folder: Path) -> None:
    import torch

    module = load_truncated(folder, request.sites, "float32")
    torch.onnx.export(
        module,
        (torch.tensor([request.samples[0]]),),
        folder / ONNX,
        input_names=["input_ids"],
        dynamic_shapes=({1: torch.export.Dim("seq_len", min=2, max=8192)},),
        dynamo=True,
    )


def _write_onnx_int8(request: Request, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        folder / ONNX, folder / ONNX_INT8, weight_type=QuantType.QInt8, per_channel=True
    )


def _write_gguf(request: Request, folder: Path) -> None:
    """Copies the first blocks as they are stored: llama.cpp reads its own quantisation."""
    import gguf

    blocks = num_layers(request.sites)
    reader = gguf.GGUFReader(request.gguf)
    writer = gguf.GGUFWriter(folder / GGUF, "llama")
    for name, field in reader.fields.items():
        if name == "general.architecture" or name.startswith("GGUF."):
            continue  # The writer puts these itself.
        value = blocks if name == "llama.block_count" else field.contents()
        nested = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=nested)
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or int(parts[1]) < blocks:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_WRITERS: dict[str, Callable[[Request, Path], None]] = {
    MODEL: _write_torch,
    OPENVINO: _write_openvino,
    OPENVINO_WEIGHTS: _write_openvino_weights,
    OPENVINO_INT8: _write_openvino_int8,
    ONNX: _write_onnx,
    ONNX_INT8: _write_onnx_int8,
    GGUF: _write_gguf,
}

# What a format is made from, where it is not the GGUF file.
_NEEDS = {
    OPENVINO: MODEL,
    OPENVINO_WEIGHTS: OPENVINO,
    OPENVINO_INT8: OPENVINO,
    ONNX: MODEL,
    ONNX_INT8: ONNX,
}


def main(folder: Path) -> None:
    request = Request(**json.loads((folder / "request.json").read_text()))
    missing: dict[str, str] = {}
    for name, write in _WRITERS.items():
        if (needed := _NEEDS.get(name)) in missing:
            missing[name] = f"made from {needed}, which failed: {missing[needed]}"
            continue
        try:
            write(request, folder)
        except Exception as error:  # noqa: BLE001 - a peer that fails is reported as missing.
            missing[name] = f"{type(error).__name__}: {error}"
    result = {"request": asdict(request), "missing": missing}
    (folder / "formats.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
