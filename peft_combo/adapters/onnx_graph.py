"""ONNX export of an encoder, 8-bit quantization of its graph, and ONNX Runtime sessions.

Owns the way from token ids to unit vectors as a graph, the 8-bit schemes, and sessions. Knows nothing of adapters,
texts, folders, or of how good a graph has to be.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.encoder.architectures import count_bytes
from peft_combo.errors import BackboneError, PeftComboError

OPSET = 18
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "vector"

Pool: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Run: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""(B, L) ids and (B, L) mask to (B, D) vectors of unit length."""
Graph: TypeAlias = Any  # onnx.ModelProto; onnx is an extra, and its types are generated while it is imported

_PROTOBUF_LIMIT = 2**31  # bytes of a file that protobuf can read
# Tables of fewer rows (token types) are not worth three more operators.
_TABLE_ROWS = 100


@dataclass(frozen=True)
class Scheme:
    """How the weights of matrix products are kept in 8 bits.

    Attributes:
        block: so many weights of one output share a scale; fewer are more exact and take more room.
        whole: multiply in whole numbers, activations rounded block by block and row by row. Faster, and less exact
            than weights turned back into float32 for every product.
    """

    block: int
    whole: bool

    @property
    def name(self) -> str:
        return f"blocks of {self.block}, {'8-bit' if self.whole else 'float32'} products"


SCHEMES = (Scheme(32, True), Scheme(16, True), Scheme(32, False))
"""From the quickest to the most exact."""


class OnnxMissing(PeftComboError):
    """The extra is not installed."""


def require_onnx() -> None:
    """Refuse early where the extra is missing.

    Raises:
        OnnxMissing: with the command that installs it.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as cause:
            raise OnnxMissing(
                f"Export to ONNX needs the package {package}, which is not installed. Install it with: pip install "
                '"peft-combo[onnx]"'
            ) from cause


class _Vectors(nn.Module):
    def __init__(self, encoder: nn.Module, pool: Pool) -> None:
        super().__init__()
        self.encoder = encoder
        self._pool = pool

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self._pool(hidden, attention_mask)


@torch.no_grad()
def build_graph(encoder: nn.Module, pool: Pool, ids: Tensor, mask: Tensor) -> Graph:
    """Write an encoder with its pooling as one graph, batch and length left open.

    Args:
        encoder: in evaluation mode; called with ids and mask, returns ``last_hidden_state``.
        pool: (B, L, D) states and (B, L) mask to (B, D).
        ids, mask: (B, L) int64 that the encoder takes, B and L at least 2; only their shapes and types matter.
    Returns:
        a graph of opset 18 with the inputs ``input_ids`` and ``attention_mask``, (batch, tokens) int64, and the output
        ``vector``, (batch, D) float32.
    Raises:
        BackboneError: the encoder is too large for one file, or does something ONNX has no words for.
    """
    if count_bytes(encoder) >= _PROTOBUF_LIMIT:
        raise BackboneError(
            f"One ONNX file holds less than 2 GiB, this encoder has {count_bytes(encoder) / 2**30:.1f}. The format "
            "merged has no such limit."
        )
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with _silence_exporter():
        try:
            # The exporter that follows TorchDynamo: where a shape or a value would be baked in it refuses, the older
            # one (dynamo=False) bakes in what the example happened to hold.
            program = torch.onnx.export(
                _Vectors(encoder, pool).eval(), (ids, mask), input_names=list(INPUTS), output_names=[OUTPUT],
                opset_version=OPSET, dynamic_shapes=(axes, axes), dynamo=True, verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise BackboneError(f"This encoder cannot be written as an ONNX graph: {reason}") from error
    assert program is not None
    graph: Any = program.model_proto
    # Each node carries the Python stack that made it: half a megabyte, and paths of this machine.
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    return graph


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Silence the exporter's notes on operators we do not use and on names of axes it merges."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registry.setLevel(level)


# Warning filters belong to the whole process, and two threads would put them back in the wrong order.
_QUIET = threading.Lock()


def quantize_blocks(graph: Graph, scheme: Scheme) -> Graph:
    """Return a copy with 8-bit weights: matrix products in blocks, embedding tables row by row.

    Every scale belongs to few weights and, in `Scheme.whole` products, to few activations of one token; so an outlier
    spoils its own block, and what stands beside a text in a batch changes nothing. ONNX's own dynamic products have one
    scale for all activations of a batch, which a few large features of BERT-like encoders leave hardly any digits.

    The graph asks for ONNX Runtime: ``MatMulNBits`` is its operator.
    """
    small = _copy(graph)
    with _silence_root_logger():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            small, bits=8, block_size=scheme.block, is_symmetric=True, accuracy_level=4 if scheme.whole else 1
        )
        quantizer.process()
    small = quantizer.model.model
    _round_tables(small)
    return small


def _round_tables(graph: Graph) -> None:
    """Round the embedding tables of a graph to 8 bits, row by row; ONNX Runtime's quantizer does so in 4 bits only."""
    from onnx import TensorProto, helper, numpy_helper

    matrices = {
        tensor.name: tensor
        for tensor in graph.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }
    made: dict[str, Any] = {}  # tensors by name; lookups that share a table share what becomes of it
    nodes = []
    for node in graph.graph.node:
        if node.op_type != "Gather" or (name := node.input[0]) not in matrices or not _is_lookup(node, matrices[name]):
            nodes.append(node)
            continue
        rows, out = node.input[1], node.output[0]
        table, scales = _round_rows(numpy_helper.to_array(matrices[name]))
        made |= {f"{name}.q": table, f"{name}.scale": scales}
        nodes += [
            helper.make_node("Gather", [f"{name}.q", rows], [f"{out}.q"], f"{node.name}.q"),
            helper.make_node("Cast", [f"{out}.q"], [f"{out}.whole"], f"{node.name}.whole", to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}.scale", rows], [f"{out}.scale"], f"{node.name}.scale"),
            helper.make_node("Mul", [f"{out}.whole", f"{out}.scale"], [out], f"{node.name}.float"),
        ]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    added = [numpy_helper.from_array(array, name) for name, array in made.items()]
    for field, values in ((graph.graph.node, nodes), (graph.graph.initializer, kept + added)):
        copies = [_copy(value) for value in values]
        del field[:]
        field.extend(copies)


def _is_lookup(gather: Any, table: Any) -> bool:
    """Whether it takes rows of a table that is worth the trouble."""
    return table.dims[0] >= _TABLE_ROWS and all(a.i == 0 for a in gather.attribute if a.name == "axis")


def _copy(message: Any) -> Any:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin


def _round_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each row of (R, C) to int8, -127 to 127, with a scale of its own, (R, 1)."""
    scales = np.abs(table).max(1, keepdims=True) / 127
    scales[scales == 0] = 1.0
    return np.rint(table / scales).astype(np.int8), scales.astype(np.float32)


def quantize_naively(graph: Graph) -> Graph:
    """Return what ``onnxruntime.quantization.quantize_dynamic`` makes of a graph by itself: the usual advice."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # It takes and gives files, and logs on the root logger, which it would configure where nobody has yet.
    with tempfile.TemporaryDirectory() as folder, _silence_root_logger():
        whole, prepared, small = (str(Path(folder) / name) for name in ("whole.onnx", "prepared.onnx", "small.onnx"))
        onnx.save(graph, whole)
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, small)
        return onnx.load(small)


@contextmanager
def _silence_root_logger() -> Iterator[None]:
    root, handler = logging.getLogger(), logging.NullHandler()
    disabled = logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)


def open_session(graph: Graph | Path, threads: int) -> Run:
    """Open a graph (or its file) on the CPU.

    Args:
        threads: of each operator.
    Raises:
        BackboneError: ONNX Runtime does not take it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    source = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    try:
        opened = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions derive from Exception alone
        raise BackboneError(f"ONNX Runtime {onnxruntime.__version__} does not take the graph: {error}") from error

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = opened.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))[0]
        return vectors

    return run


def list_opsets(graph: Graph) -> dict[str, int]:
    """Return the operator sets a graph asks for; ``ai.onnx`` is ONNX's own."""
    return {entry.domain or "ai.onnx": entry.version for entry in graph.opset_import}
