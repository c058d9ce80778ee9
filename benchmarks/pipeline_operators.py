"""Kernel launches and copies of a batch of the two-view pipeline on a GPU, counted from its graph for each backend.

python benchmarks/pipeline_operators.py [--recipe R] [--scenario S] [--colour torchvision] [--json FILE]

It needs no GPU: graphs are constructed and not built. Kernels of JPEG decoding are not counted, because their number
depends on the images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import tyro
from environment import BenchmarkError, check_writable
from options import chosen_views
from rich.console import Console

from dali_pipelines.augmentations import JitterImpl, ViewBackend
from dali_pipelines.photometric_kernels import kernel_launches, missing_ops
from dali_pipelines.views import Views
from iwm.evaluation.result_table import ResultTable
from iwm.ranges import Range, check_ranges
from shards.command_line import run_command


@dataclass(frozen=True)
class OperatorOptions:
    """Kernel launches and copies of a batch, for each backend."""

    recipe: str | None = None
    """Recipe whose views are used (iwm/recipes.py). None: the paper's views, A.1."""
    scenario: str | None = None
    """Row of table S2 that replaces the recipe's photometric augmentations."""
    size: Annotated[int | None, Range(min=1)] = None
    """Side of the views (pixels). None: the recipe's."""
    colour: JitterImpl | None = None
    """Implementation of the colour jitter. None: the recipe's."""
    batch_size: Annotated[int, Range(min=1)] = 256
    """Batch size (images)."""
    json: Path | None = None
    """File for all counts (JSON)."""


class GpuOperator(NamedTuple):
    """One operator of a DALI graph whose outputs are in GPU memory."""

    name: str
    """Name of its schema, e.g. Resize."""
    arguments: dict[str, Any]
    """Constant arguments."""


class PipelineGraph(NamedTuple):
    """GPU part of a DALI graph."""

    operators: list[GpuOperator]
    to_gpu: int
    """Number of nodes that are copied from CPU to GPU memory, without the encoded images."""
    to_cpu: int
    """Number of nodes that are copied from GPU to CPU memory, for which a thread of DALI waits."""


def read_graph(pipeline: Any) -> PipelineGraph:
    """Return the GPU part of a pipeline's graph. The pipeline need not be built."""
    pipeline._build_graph()  # DALI has no public function for it
    operators, moved = [], set()
    for op in pipeline._ops:
        if any(op.spec.OutputDevice(i) == "gpu" for i in range(op.spec.NumOutput())):
            operators.append(GpuOperator(op._op.schema_name, op._op._init_args))
    for node in (*(node for op in pipeline._ops for node in op.inputs), *pipeline._graph_outputs):
        if (made_on := str(node.source.spec.OutputDevice(node.index))) != node.device:
            moved.add((node.name, made_on))
    devices = [made_on for _, made_on in moved]
    return PipelineGraph(operators, devices.count("cpu"), devices.count("gpu"))


def _once(operator: GpuOperator, images: int, pixels: int) -> int:
    return 1


def _never(operator: GpuOperator, images: int, pixels: int) -> int:
    return 0


def _resize(operator: GpuOperator, images: int, pixels: int) -> int:
    return 2 * -(-images // operator.arguments.get("minibatch_size", 32))


LAUNCHES: dict[str, Callable[[GpuOperator, int, int], int]] = {
    "_ArithmeticGenericOp": _once,
    "BrightnessContrast": _once,
    "Cast": _once,
    # At most: in a branch it runs only on the images that the op was drawn for.
    "ColorSpaceConversion": lambda operator, images, pixels: images,
    "CoordTransform": _once,
    # Of a batch that was merged from branches, which is not contiguous.
    "Copy": lambda operator, images, pixels: images,
    "CropMirrorNormalize": _once,
    "GaussianBlur": lambda operator, images, pixels: 2,
    "LookupTable": _once,
    "Resize": _resize,
    # One stage for each 15 powers of two of the numbers that are summed.
    "reductions__Mean": lambda operator, images, pixels: -(-(pixels.bit_length() - 1) // 15),
    "Slice": _once,
    "Stack": _once,
    "_TensorSubscript": _once,
    "Transpose": _once,
    "experimental__WarpPerspective": _once,
    # These only rearrange pointers.
    "Reinterpret": _never,
    "_conditional__Merge": _never,
    "_conditional__Split": _never,
    # Not counted.
    "decoders__Image": _never,
}
"""Kernel launches for a batch by operator, from the number of images and of the view's pixels.

They are read from DALI's source; one launch is assumed for CropMirrorNormalize, Stack, _TensorSubscript and Transpose,
which jitter `torchvision` uses, and for WarpPerspective of rotation. Those of ColorSpaceConversion and Copy were seen
in traces (benchmarks/results).
"""


def launches(operator: GpuOperator, images: int, pixels: int) -> int:
    """Return the kernel launches of an operator for a batch. Raises BenchmarkError where they are not known."""
    if operator.name not in LAUNCHES:
        raise BenchmarkError(f"operator {operator.name}: its kernel launches are not known; add them to LAUNCHES")
    return LAUNCHES[operator.name](operator, images, pixels)


def count(views: Views, backend: ViewBackend, batch_size: int) -> dict[str, Any]:
    """Return the launches by operator and in all, and the copies, of a batch of a backend on a machine with a GPU."""
    graph = read_graph(two_views_graph(views, backend, batch_size))
    by_operator: dict[str, int] = {}
    for operator in graph.operators:
        by_operator.setdefault(operator.name, 0)
        by_operator[operator.name] += launches(operator, batch_size, views.size**2)
    return {
        "operators": by_operator,
        "dali": sum(by_operator.values()),
        "triton": kernel_launches(views) if backend == "triton" else 0,
        "copies_to_gpu": graph.to_gpu,
        "copies_to_cpu": graph.to_cpu,
    }


def two_views_graph(views: Views, backend: ViewBackend, batch_size: int) -> Any:
    """Return the pipeline beside a GPU, not built, with a source that is never read."""
    # Not at the top: run_command reports a missing DALI.
    from dali_pipelines.decoder import DECODER
    from dali_pipelines.pipelines import two_views
    from dali_pipelines.reader import DataSource
    from shards.format import Manifest, Shard

    shard = Shard("train-000000.tar", 1, 0, "", "train-000000.idx", 0, "")
    manifest = Manifest("train", 0, 1, 0, 1, 0, columns=[], masks=False, settings={}, shards=[shard])
    source = DataSource(Path("unused"), manifest, None, masks=False, rank=0, world_size=1)
    return two_views(
        source, views, backend=backend, shuffle_buffer=1, shuffle_seed=0, reader_prefetch=1, decoder=DECODER,
        batch_size=batch_size, num_threads=1, device_id=0, seed=0,
    )  # fmt: skip


def show(counts: dict[str, dict[str, Any]], views: Views, batch_size: int, console: Console) -> None:
    rows = []
    for name in sorted({name for counted in counts.values() for name in counted["operators"]}):
        cells = [counted["operators"].get(name) for counted in counts.values()]
        uncounted = LAUNCHES[name] is _never
        if not uncounted or name.startswith("decoders"):
            rows.append([name, *("" if cell is None else "not counted" if uncounted else str(cell) for cell in cells)])
    for name, key in (
        ("DALI, on its stream", "dali"),
        ("Triton, on training's stream", "triton"),
        ("copies to the GPU", "copies_to_gpu"),
        ("copies from the GPU", "copies_to_cpu"),
    ):
        rows.append([name, *(str(counted[key]) for counted in counts.values())])
    title = f"a batch of {batch_size} images, two views of {views.size} px, jitter {views.jitter_impl}"
    console.print(ResultTable(title, ["kernel launches", *counts], rows))


def main() -> None:
    options, console = (
        tyro.cli(OperatorOptions, description=__doc__, prog="benchmarks/pipeline_operators.py"),
        Console(),
    )
    check_ranges(options)
    if options.json is not None:
        check_writable("--json", options.json)
    views = chosen_views(options.recipe, options.scenario, options.size, options.colour)
    backends = [name for name in get_args(ViewBackend) if name != "triton" or not missing_ops(views)]
    counts = {backend: count(views, backend, options.batch_size) for backend in backends}
    show(counts, views, options.batch_size, console)
    if options.json is not None:
        options.json.write_text(json.dumps(counts, indent=1) + "\n")
        console.print(f"written to {options.json}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/pipeline_operators.py"))
