"""Commands that need the model's function: cost and export; and bench, which needs its files."""

import argparse
import ast
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import cost
from jaxcompress.export.checkpoint.packed_file import Checkpoint, load

_MODEL = "MODULE:NAME of apply_fn(params, *inputs), or MODULE:NAME(ARGUMENTS) of what returns it"


def add_commands(commands: Any) -> None:
    """`cost`, `export` and `bench`."""
    estimate = _with_model(commands, "cost", "cost of a packed file on a device, layer by layer")
    estimate.add_argument("--device", required=True, help="see `jaxcompress devices`")
    estimate.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    estimate.set_defaults(run=_cost)
    export = _with_model(commands, "export", "write .onnx, .tflite or .stablehlo of a packed file")
    export.add_argument("target", help="*.onnx, *.tflite or *.stablehlo")
    export.add_argument(
        "--dynamic", action="store_true", help="int8 activations on grids found at run time"
    )
    export.add_argument(
        "--integers",
        metavar="NPY",
        help="float inputs [N, ...] to calibrate on: the whole network in int8",
    )
    export.add_argument(
        "--runtime", choices=["litert", "micro"], help="of a .tflite file: phones, or "
        "microcontrollers (TFLite-Micro, with --integers); default litert",
    )  # fmt: skip
    export.set_defaults(run=_export)
    bench = commands.add_parser("bench", help="size and latency of files in their runtimes")
    bench.add_argument("files", nargs="+", help="*.onnx, *.tflite, *.stablehlo")
    bench.add_argument("--threads", type=int, default=1)
    bench.add_argument("--repeats", type=int, default=50)
    bench.add_argument("--batch", type=int, default=1, help="rows, where a file leaves them free")
    bench.add_argument(
        "--inputs", metavar="NPY", help="inputs [N, ...]: the other files are compared on them "
        "with the first one",
    )  # fmt: skip
    bench.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    bench.set_defaults(run=_bench)


def _with_model(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    parser.add_argument("file", help="packed parameters, as jaxcompress.export.save writes them")
    parser.add_argument("--model", required=True, help=_MODEL)
    parser.add_argument(
        "--input", required=True, action="append", metavar="DTYPE[SIZES]",
        help="float32[1,32,32,3]; once for every input",
    )  # fmt: skip
    return parser


def function(text: str) -> Callable[..., Any]:
    """The function that MODULE:NAME or MODULE:NAME(ARGUMENTS) names; arguments are literals.

    Raises:
      ValueError: no such module or name, another syntax, or what is there cannot be called.
    """
    match = re.fullmatch(r"([\w.]+):([\w.]+)(?:\((.*)\))?", text)
    if match is None:
        raise ValueError(f"--model must be {_MODEL}, got {text!r}")
    module, name, arguments = match.groups()
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {text}: {error}") from error
    finally:
        sys.path.remove("")
    if arguments is not None:
        try:
            found = found(*ast.literal_eval(f"({arguments},)" if arguments.strip() else "()"))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"--model {text}: arguments must be literals: {error}") from error
    if not callable(found):
        raise ValueError(f"--model {text}: {type(found).__name__} cannot be called")
    return found


def shaped(text: str) -> jax.ShapeDtypeStruct:
    """`float32[1,32,32,3]` as shape and dtype.

    Raises:
      ValueError: another syntax, or no such dtype.

    >>> shaped("int32[1,128]")
    ShapeDtypeStruct(shape=(1, 128), dtype=int32)
    """
    match = re.fullmatch(r"(\w+)\[([\d, ]*)\]", text.strip())
    try:
        if match is None:
            raise ValueError("no such syntax")
        dtype, sizes = jnp.dtype(match[1]), [int(n) for n in match[2].split(",") if n.strip()]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--input must be DTYPE[SIZES], float32[1,32,32,3] say, got {text!r}"
        ) from error
    return jax.ShapeDtypeStruct(tuple(sizes), dtype)


def _opened(args: argparse.Namespace) -> tuple[Callable[..., Any], Checkpoint, list[Any]]:
    # What is quick to see comes first: a wrong flag is said before anything is read or run.
    inputs = [shaped(text) for text in args.input]
    _check_files(args.file)
    return function(args.model), load(args.file), inputs


def _check_files(*files: str) -> None:
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such file")


def _cost(args: argparse.Namespace) -> None:
    device = cost.device(args.device)
    fn, packed, inputs = _opened(args)
    forms = {grid.format for grid in packed.activations.values()}
    if len(forms) > 1:
        raise ValueError(f"{args.file}: activations of several formats: {sorted(map(str, forms))}")
    form = next(iter(forms), None)
    found = cost.estimate(fn, packed.params, *inputs, device=device, activations=form)
    if not args.json:
        print(found)
        return
    names = ("weight_bytes", "peak_bytes", "latency_s", "energy_j", "macs")
    print(json.dumps({name: getattr(found, name) for name in names}))


def _export(args: argparse.Namespace) -> None:
    from jaxcompress import export

    suffix = Path(args.target).suffix
    if suffix not in (".onnx", ".tflite", ".stablehlo"):
        raise ValueError(f"target must be *.onnx, *.tflite or *.stablehlo, got {args.target!r}")
    if args.dynamic and (args.integers or suffix == ".stablehlo"):
        raise ValueError("--dynamic is for *.onnx and *.tflite, without --integers")
    if args.runtime and suffix != ".tflite":
        raise ValueError(f"--runtime is for *.tflite, got {args.target!r}")
    if args.dynamic and args.runtime == "micro":
        raise ValueError("--dynamic is not for --runtime micro, which has no dynamic grids")
    if Path(args.target).is_dir() or Path(args.target).resolve() == Path(args.file).resolve():
        raise ValueError(f"target {args.target!r} is a folder, or the file that is read")
    _check_files(*filter(None, [args.integers]))
    fn, packed, inputs = _opened(args)
    if args.integers:
        program = _program(fn, packed, args.integers)
        write = {".onnx": export.onnx, ".tflite": export.litert, ".stablehlo": export.stablehlo}
        how: Any = {"runtime": args.runtime} if args.runtime else {}
        report: Any = write[suffix](program, path=args.target, **how)
    elif suffix == ".onnx":
        how = {"products": "dynamic"} if args.dynamic else {}
        marked = export.mark_activations(fn, packed.activations) if packed.activations else fn
        report = export.onnx(marked, packed.params, *inputs, path=args.target, shapes=None, **how)
    elif suffix == ".tflite":
        grids = "dynamic" if args.dynamic else packed.activations or None
        report = export.litert(
            fn, packed.params, *inputs, path=args.target, activations=grids,
            runtime=args.runtime or "litert",
        )  # fmt: skip
    else:
        report = export.stablehlo(_with_grids(fn, packed), packed.params, *inputs, path=args.target)
    print(f"{report.path}: {report.file_bytes:,} bytes")


def _with_grids(fn: Callable[..., Any], packed: Checkpoint) -> Callable[..., Any]:
    from jaxcompress.quantize import with_activations

    if not packed.activations:
        return fn
    walked = with_activations(fn)
    return lambda params, *inputs: walked(packed.activations, params, *inputs)


def _program(fn: Callable[..., Any], packed: Checkpoint, file: str) -> Any:
    from jaxcompress.quantize import integer_only

    x = np.load(file, allow_pickle=False)
    size = min(64, len(x))
    return integer_only(fn, packed.params, [jnp.asarray(x[:size])] + [
        jnp.asarray(x[k : k + size]) for k in range(size, len(x) - size + 1, size)
    ])  # fmt: skip


def describe(path: Path) -> dict[str, Any]:
    """What lies in a `.onnx`, `.tflite` or `.stablehlo` file, for `inspect`.

    Raises:
      ValueError: another kind of file.
    """
    from jaxcompress.export.sessions import session

    found: dict[str, Any] = {"file_bytes": path.stat().st_size}
    if path.suffix == ".onnx":
        from jaxcompress.export.onnx_format.onnx_graph import require_onnx

        model = require_onnx().load(path)
        found["operators"] = Counter(node.op_type for node in model.graph.node)
        found["opset"] = model.opset_import[0].version
    elif path.suffix == ".tflite":
        from jaxcompress.export.litert_format.flatbuffer import contents

        inside = contents(path.read_bytes())
        found["integer"] = inside.integer
        found["operators"] = {
            f"{o.name} {o.inputs[0] if o.inputs else ''}": o.count for o in inside.operators
        }
    elif path.suffix != ".stablehlo":
        raise ValueError(f"{path}: inspect reads *.safetensors, *.onnx, *.tflite, *.stablehlo")
    loaded = session(path)
    ports = zip(loaded.dtypes, loaded.shapes, strict=True)
    found["inputs"] = [f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in ports]
    return found


def _bench(args: argparse.Namespace) -> None:
    from jaxcompress.export.benchmarks import benchmark, outputs
    from jaxcompress.export.sessions import session

    for name in ("threads", "repeats", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for file in args.files:
        if Path(file).suffix not in (".onnx", ".tflite", ".stablehlo"):
            raise ValueError(f"{file}: bench reads *.onnx, *.tflite and *.stablehlo")
    _check_files(*args.files, *filter(None, [args.inputs]))
    inputs, reference = [], None
    if args.inputs:
        inputs = [np.load(args.inputs, allow_pickle=False)]
        reference = outputs(session(args.files[0], threads=args.threads), *inputs)
    found = benchmark(
        {name: name for name in args.files},
        *inputs,
        reference=reference,
        threads=args.threads,
        repeats=args.repeats,
        batch=args.batch,
    )
    if args.json:
        print(json.dumps({name: row._asdict() for name, row in found.items()}))
        return
    first = next(iter(found.values()))
    print(f"{'file':40} {'bytes':>12} {'ratio':>6} {'ms':>9} {'speed':>6} {'argmax':>8}")
    for name, row in found.items():
        ratio, speed = row.file_bytes / first.file_bytes, first.latency_s / row.latency_s
        agree = "" if row.argmax_agreement is None else f"{100 * row.argmax_agreement:.2f} %"
        print(
            f"{name[-40:]:40} {row.file_bytes:12,} {ratio:6.3f} {1e3 * row.latency_s:9.3f} "
            f"{speed:5.2f}x {agree:>8}"
        )
