"""Other engines: the `DetectorModel` protocol, and PyTorch and ONNX Runtime behind it.

A detector made of such a model still needs its tokenizer and a codebook compiled for it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .errors import ModelLoadError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["DetectorModel", "OnnxModel", "Readouts", "TorchModel"]

# What is read beside a text: how many of its tokens each sees, and a token or what was learned.
Readouts = Sequence[tuple[int, "int | npt.NDArray[np.float32]"]]


@runtime_checkable
class DetectorModel(Protocol):
    """A causal language model that hands out its residual stream.

    Attributes
    ----------
    sites : list of str
        Where activations are read, such as ``"6.resid_post"``, in the codebook's order.
    hidden_size : int
        Width of one activation row.
    max_position_embeddings : int
        Most tokens of one sequence.
    bos_token_id : int or None
        Token put in front of every text.
    """

    sites: list[str]
    hidden_size: int
    max_position_embeddings: int
    bos_token_id: int | None

    def activations(self, input_ids: list[int], readouts: Readouts = ()) -> npt.NDArray[np.float32]:
        """Float32 activations ``(seq_len + n_readouts, n_sites, hidden_size)``.

        Called from any thread. A readout ``(n, token)`` stands at position ``n``, sees the first
        ``n`` tokens and not itself, and nothing sees it. Their rows follow those of ``input_ids``.
        Codebooks with readouts need them; others never ask for any. In place of the token a model
        with an attribute ``reads_learned`` that is true gets what a codebook has learned, float32
        ``(n_blocks, hidden_size)``: the readout's residual stream begins with the first vector, and
        each other one is added before its block.
        """
        ...


def _beside(
    input_ids: list[int], readouts: Readouts
) -> tuple[list[int], list[int], list[list[int]]]:
    """Tokens and readouts, their positions, and a column: how many of the first rows each sees."""
    n = len(input_ids)
    positions = [*range(n), *(after for after, _ in readouts)]
    seen = [*range(1, n + 1), *(after for after, _ in readouts)]
    # The embedding of what was learned gives way to it.
    ids = [*input_ids, *(probe if isinstance(probe, int) else 0 for _, probe in readouts)]
    return ids, positions, [[own] for own in seen]


def _layers(sites: Sequence[str]) -> list[int]:
    """Zero-based layers of ``resid_post`` sites."""
    layers = []
    for site in sites:
        layer, _, kind = site.partition(".")
        if kind != "resid_post" or not layer.isdigit():
            raise ModelLoadError(f"site {site!r}: this engine reads LAYER.resid_post only")
        layers.append(int(layer))
    return layers


class TorchModel:
    """A Transformers causal model (``AutoModel``-like) on PyTorch.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(input_ids=..., output_hidden_states=True)``; put in evaluation mode.
        Its last hidden state is final-normed, so the last layer cannot be a site. With blocks in
        ``model.base_model.layers``, as Llama has them, it reads what codebooks have learned.
    sites : sequence of str
        ``LAYER.resid_post``.

    Raises
    ------
    ImportError
        If PyTorch is not installed.
    """

    def __init__(self, model: Any, sites: Sequence[str]) -> None:
        try:
            import torch
        except ImportError:
            raise ImportError(
                "TorchModel needs PyTorch: pip install 'alknet-firewall[torch]'"
            ) from None
        self._torch = torch
        self._model = model.eval()
        self._layers = _layers(sites)
        config = model.config
        if max(self._layers) >= config.num_hidden_layers - 1:
            raise ModelLoadError(
                "the last layer's hidden state is final-normed: use an earlier one"
            )
        self.sites = list(sites)
        self.hidden_size: int = config.hidden_size
        self.max_position_embeddings: int = config.max_position_embeddings
        self.bos_token_id: int | None = config.bos_token_id
        blocks = getattr(getattr(model, "base_model", model), "layers", None)
        self.reads_learned = blocks is not None
        # Of this thread's call: what each row has learned.
        self._call = threading.local()
        for layer, block in enumerate(blocks or ()):
            block.register_forward_pre_hook(partial(self._steer, layer))

    def _steer(self, layer: int, _block: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What a block reads, with what was learned."""
        learned = getattr(self._call, "learned", {})
        if not learned:
            return None
        states = args[0].clone()
        for row, vectors in learned.items():
            if layer < len(vectors):
                vector = self._torch.from_numpy(vectors[layer]).to(states)
                states[0, row] = vector + (states[0, row] if layer else 0)
        return (states, *args[1:])

    def activations(self, input_ids: list[int], readouts: Readouts = ()) -> npt.NDArray[np.float32]:
        """See `DetectorModel.activations`."""
        torch, device = self._torch, self._model.device
        beside: dict[str, Any] = {}
        probes = enumerate((probe for _, probe in readouts), len(input_ids))
        learned = {row: probe for row, probe in probes if not isinstance(probe, int)}
        if readouts:
            input_ids, positions, seen = _beside(input_ids, readouts)
            # What is added to the scores: nothing, or the least number there is.
            hidden = torch.finfo(self._model.dtype).min
            columns = torch.arange(len(input_ids), device=device)
            mask = (columns >= torch.tensor(seen, device=device)) * hidden
            beside["attention_mask"] = mask.to(self._model.dtype)[None, None]
            beside["position_ids"] = torch.tensor([positions], device=device)
        with torch.inference_mode():
            ids = torch.tensor([input_ids], device=device)
            self._call.learned = learned
            try:
                output = self._model(input_ids=ids, output_hidden_states=True, **beside)
            finally:
                # Whoever else calls the model gets what it is.
                self._call.learned = {}
            # hidden_states[0] is the embedding, so layer n's output is number n + 1.
            states = output.hidden_states
            rows = torch.stack([states[layer + 1][0] for layer in self._layers], dim=1)
            array: npt.NDArray[np.float32] = rows.float().cpu().numpy()
        return array


class OnnxModel:
    """An ONNX graph with one input of token ids and one output per site.

    It reads tokens only: codebooks with learned readouts, as the shipped one, are refused.

    Parameters
    ----------
    path : str
        The graph. Input ``input_ids``, int64 ``(1, seq_len)``; for each site an output of that
        name, float32 ``(1, seq_len, hidden_size)``. For readouts, inputs ``position_ids``, int64
        ``(1, seq_len)``, and ``attention_mask``, float32 ``(1, 1, seq_len, seq_len)``, which is
        added to the scores: 0 where a row sees a column, else the least number there is.
    sites : sequence of str
        Names of the outputs to read.
    max_position_embeddings : int
        Most tokens of one sequence.
    bos_token_id : int or None
        Token put in front of every text.

    Raises
    ------
    ImportError
        If ONNX Runtime is not installed.
    ModelLoadError
        If the graph has no such outputs.
    """

    def __init__(
        self,
        path: str,
        sites: Sequence[str],
        *,
        max_position_embeddings: int,
        bos_token_id: int | None,
    ) -> None:
        try:
            import numpy
            import onnxruntime
        except ImportError:
            raise ImportError(
                "OnnxModel needs ONNX Runtime: pip install 'alknet-firewall[onnx]'"
            ) from None
        self._numpy = numpy
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        self._inputs = {graph_input.name for graph_input in self._session.get_inputs()}
        missing = [site for site in sites if site not in outputs]
        if missing:
            raise ModelLoadError(f"{path} has no output {missing[0]!r}, only {sorted(outputs)}")
        self.sites = list(sites)
        self.hidden_size = int(outputs[self.sites[0]][-1])
        self.max_position_embeddings = max_position_embeddings
        self.bos_token_id = bos_token_id

    def activations(self, input_ids: list[int], readouts: Readouts = ()) -> npt.NDArray[np.float32]:
        """See `DetectorModel.activations`."""
        numpy = self._numpy
        places = {"position_ids", "attention_mask"}
        if readouts and not places <= self._inputs:
            raise ModelLoadError(
                "this graph has no position_ids and attention_mask: it reads nothing beside a text"
            )
        ids, positions, seen = _beside(input_ids, readouts)
        feed = {"input_ids": numpy.asarray([ids], dtype=numpy.int64)}
        if places <= self._inputs:
            feed["position_ids"] = numpy.asarray([positions], dtype=numpy.int64)
            mask = (numpy.arange(len(ids)) >= seen) * numpy.finfo(numpy.float32).min
            feed["attention_mask"] = mask[None, None]
        outputs = self._session.run(self.sites, feed)
        array: npt.NDArray[np.float32] = numpy.stack([out[0] for out in outputs], axis=1)
        return array.astype(numpy.float32, copy=False)
