"""Parts of a model as files that run without softvq: `torch.export` programs (.pt2) and ONNX (.onnx).

    from softvq.export.files import write_part
    from softvq.export.parts import decoder_part

    write_part(decoder_part(tokenizer), "decoder.onnx", "onnx")

Every file takes batches of any size, and is run against the model itself before it is kept.
"""

import contextlib
import copy
import dataclasses
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import softvq
from softvq.errors import InputError, RunError
from softvq.export.parts import Part
from softvq.files import replacing, write_json

__all__ = ["TOLERANCE", "Check", "run_part", "write_part"]

TOLERANCE = 1e-3
"""Largest difference from the model, in units of its largest output, that a float32 file may have."""
BATCHES = (1, 3)  # that files are checked with; programs are traced with 2
ONNX_BYTES = 2 << 30  # what one file can hold
LEAST = 1e-12  # stands for the largest output of a model that gives only zeros

Run = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How far a file's outputs are from those of the model in float32."""

    largest: float
    """Largest difference, in units of the largest output."""
    root_mean_square: float
    """Of the differences, in units of the outputs' own."""


def write_part(
    part: Part,
    out: Path | str,
    file_format: Literal["torch", "onnx"],
    precision: Literal["float32", "bf16", "int8"] = "float32",
) -> Check:
    """Write a part, read it back, compare it with the model, and write what a user has to know beside it.

    Args:
        part: What to write.
        out: The file to make or replace; its facts go to `out` with `.json` after its name.
        file_format: `torch` is a program of `torch.export`, `onnx` is for onnxruntime and others.
        precision: `bf16` rounds the weights of a `torch` file and computes with them; `int8` those of an `onnx` file,
            and activations as they come. Inputs and outputs are float32.

    Returns:
        How far its outputs are from the model's.

    Raises:
        InputError: If format and precision do not go together, the weights do not fit into a file, or packages are
            missing.
        RunError: If the file's outputs are not those of the model; nothing is kept then.
    """
    if precision == {"torch": "int8", "onnx": "bf16"}[file_format]:
        raise InputError(f"precision {precision} is not of format {file_format}; bf16 is for torch, int8 for onnx")
    out = Path(out)
    with replacing(out) as temporary, replacing(out.with_name(f"{out.name}.json")) as beside, _quietly():
        if file_format == "torch":
            torch.export.save(_program(part, precision), temporary)
        else:
            _write_onnx(part, temporary, precision)
        check = _compare(part, run_part(temporary, file_format), precision)
        facts = {
            "format": file_format,
            "part": part.kind,
            "precision": precision,
            "inputs": [port.facts() for port in part.inputs],
            "output": part.output.facts(),
            **part.facts,
            "max_relative_error": check.largest,
            "rms_relative_error": check.root_mean_square,
            "softvq": softvq.__version__,
            "torch": torch.__version__,
        }
        write_json(beside, facts)
    return check


def run_part(path: Path | str, file_format: Literal["torch", "onnx"]) -> Run:
    """Return a function that runs a file: as many tensors in as the part has inputs, one out, all on the CPU.

    Args:
        path: What `write_part` wrote.
        file_format: Its format.

    Returns:
        The function.

    Raises:
        InputError: If onnxruntime is missing.
    """
    if file_format == "torch":
        module = torch.export.load(path).module()
        return torch.no_grad()(module)
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # which slows whatever runs after it
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])

    return run


def _program(part: Part, precision: str = "float32") -> torch.export.ExportedProgram:
    module = copy.deepcopy(part.module).requires_grad_(False).eval()
    if precision == "bf16":
        _round(module)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    examples = tuple(port.examples(2) for port in part.inputs)
    with torch.no_grad():
        return torch.export.export(module, examples, dynamic_shapes=tuple({0: batch} for _ in examples), strict=False)


def _round(module: nn.Module) -> None:
    """Round weights to bfloat16, but for what normalises latents, and sees more of them than of anything else."""
    kept = {
        name: value.clone() for name, value in module.named_buffers() if "latent_mean" in name or "latent_std" in name
    }
    module.to(torch.bfloat16)
    for name, value in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value)


def _write_onnx(part: Part, path: Path, precision: str) -> None:
    size = sum(value.numel() * value.element_size() for value in part.module.state_dict().values())
    if size >= ONNX_BYTES:
        raise InputError(f"the weights take {size / 2**30:.1f} GiB, an ONNX file holds 2; take format torch")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name)
    program = torch.onnx.export(
        _program(part),
        dynamo=True,
        verbose=False,
        input_names=[port.name for port in part.inputs],
        output_names=[part.output.name],
        optimize=True,
    )
    assert program is not None
    if precision == "float32":
        program.save(path, external_data=False)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        plain, ready = Path(folder) / "plain.onnx", Path(folder) / "ready.onnx"
        program.save(plain, external_data=False)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_dynamic(
            ready,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_codebook_products(ready),
        )


def _codebook_products(path: Path) -> list[str]:
    """Return the names of products with fixed tensors that are no matrices: codebooks, whose rounding would show."""
    graph = _package("onnx").load(path).graph
    tensors = {each.name for each in graph.initializer if len(each.dims) != 2}
    return [node.name for node in graph.node if node.op_type == "MatMul" and tensors.intersection(node.input)]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"ONNX needs {name}; run: pip install 'softvq[export]'") from error


def _compare(part: Part, run: Run, precision: str) -> Check:
    largest, squares, own = 0.0, 0.0, 0.0
    for batch in BATCHES:
        inputs = [port.examples(batch) for port in part.inputs]
        with torch.no_grad():
            wanted = part.module(*inputs).double()
        found = run(*inputs).double()
        if found.shape != wanted.shape or not bool(found.isfinite().all()):
            raise RunError(
                f"the {part.kind} that was written gives {list(found.shape)}, not all finite; it is not kept"
            )
        if not bool(wanted.isfinite().all()):  # which no comparison would find to be too far
            raise RunError(f"the {part.kind} itself gives values that are not finite; try another model")
        difference = found - wanted
        largest = max(largest, float(difference.abs().max() / wanted.abs().max().clamp(min=LEAST)))
        squares, own = squares + float(difference.square().sum()), own + float(wanted.square().sum())
    if precision == "float32" and largest > TOLERANCE:
        raise RunError(
            f"the {part.kind} that was written differs from the model by {largest:.2e} of its largest output, above "
            f"{TOLERANCE:g}; it is not kept"
        )
    return Check(largest=largest, root_mean_square=(squares / max(own, LEAST**2)) ** 0.5)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what exporters remark about their own insides from people who can do nothing about it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
