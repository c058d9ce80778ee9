"""Reader of the files that W&B keeps in a run's folder, RUN/wandb/*/run-*.wandb."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto.wandb_internal_pb2 import Record, RunRecord

FILE_HEADER, BLOCK, CHUNK_HEADER = 7, 32768, struct.Struct("<IHB")
"""Bytes of the file's header; bytes of a block; header of a chunk: checksum, length, kind (LevelDB's log format)."""
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
"""Kinds of chunks of a record."""


class WandbFile(NamedTuple):
    """Content of a .wandb file. Its fields are empty as long as W&B has written nothing to it."""

    run_id: str
    project: str
    name: str
    config: dict[str, Any]
    """Settings, without W&B's own."""
    rows: list[dict[str, Any]]
    """History: the values of each call of `log`, without W&B's own."""
    step_metrics: dict[str, str]
    """X axis by name of the metric, as defined."""
    exit_code: int | None
    """None where the run did not finish."""


def read_wandb(run: Path) -> list[WandbFile]:
    """Return the content of the files of a run's folder, oldest first: one per start of the run."""
    files = (run / "wandb").glob("*run-*/*.wandb")
    # Folders are named [offline-]run-DATE_TIME-ID.
    dated = sorted(
        (file for file in files if not file.parent.is_symlink()), key=lambda x: x.parent.name.split("run-")[1]
    )
    return [_read(file) for file in dated]


def _read(file: Path) -> WandbFile:
    info, config, rows, axes, exit_code = RunRecord(), {}, [], {}, None
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            info = record.run
            config = {x.key: json.loads(x.value_json) for x in info.config.update if not x.key.startswith("_")}
        elif kind == "history":
            items = {(x.key or "/".join(x.nested_key)): json.loads(x.value_json) for x in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
        elif kind == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return WandbFile(info.run_id, info.project, info.display_name, config, rows, axes, exit_code)


def _records(content: bytes) -> Iterator[Record]:
    """Yield the records; a last one that a kill cut short is left out."""
    position, parts = FILE_HEADER, b""
    while position + CHUNK_HEADER.size <= len(content):
        if BLOCK - position % BLOCK < CHUNK_HEADER.size:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(content, position)
        position += CHUNK_HEADER.size
        chunk = content[position : position + length]
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or len(chunk) < length:
            return
        position += length
        parts = chunk if kind in (WHOLE, FIRST) else parts + chunk
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)
