"""Documents out of parquet files: the rows of the column `text`, read a few hundred at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bytejepa.data.blocks import Block, Segment
from bytejepa.errors import DataError, file_errors_as

TEXT_COLUMN = "text"
_BATCH_ROWS = 256
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_NO_TEXT = np.empty(0, dtype=np.uint8)
_NO_STARTS = np.empty(0, dtype=np.int64)


def open_parquet(path: str) -> Any:
    """Return the opened parquet file (a `pyarrow.parquet.ParquetFile`) after checking that it has a text column.

    Raises:
        DataError: pyarrow is not installed, the file is no parquet, or it has no column `text` of strings.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as problem:
        raise DataError("reading parquet needs pyarrow", hint="pip install 'bytejepa[parquet]'") from problem
    with file_errors_as(DataError, "read", path):
        try:
            # Unbuffered beforehand: a row group may be larger than the memory.
            file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        except pyarrow.ArrowException as problem:
            raise DataError(f"{path} is no whole parquet file: {problem}", hint="fetch it again") from problem
    names = file.schema_arrow.names
    if TEXT_COLUMN not in names:
        found = ", ".join(names[:8])
        raise DataError(f"{path} has no column {TEXT_COLUMN!r}: its columns are {found}", hint="rename the text column")
    if names.count(TEXT_COLUMN) > 1:
        raise DataError(
            f"{path} has {names.count(TEXT_COLUMN)} columns {TEXT_COLUMN!r}: expected one", hint="rename the others"
        )
    column_type = file.schema_arrow.field(TEXT_COLUMN).type
    value_type = column_type.value_type if pyarrow.types.is_dictionary(column_type) else column_type
    if str(value_type) not in _TEXT_TYPES:
        raise DataError(f"{path} has a column {TEXT_COLUMN!r} of {column_type}: expected strings")
    return file


def parquet_blocks(segment: Segment) -> Iterator[Block]:
    """Yield the rows of a segment's row groups, one document each.

    Raises:
        DataError: see `open_parquet`; also a damaged row group or a row without text.
    """
    file = open_parquet(segment.path)
    import pyarrow

    with file_errors_as(DataError, "read", segment.path), file:
        end = file.num_row_groups if segment.end is None else segment.end
        for group in range(segment.begin, end):
            batches = file.iter_batches(_BATCH_ROWS, [group], [TEXT_COLUMN], use_threads=False)
            num_rows = 0
            try:
                for batch in batches:
                    yield _column_block(batch.column(0), f"{segment.path}, row group {group}", num_rows)
                    num_rows += len(batch)
            except pyarrow.ArrowException as problem:
                raise DataError(
                    f"{segment.path} is damaged in row group {group}: {problem}", hint="fetch it again"
                ) from problem
            yield Block(data=_NO_TEXT, starts=_NO_STARTS, source_bytes=parquet_text_bytes(file, group)[0])


def parquet_text_bytes(file: Any, group: int) -> tuple[int, int]:
    """Return the bytes of the text column in a row group, on the disk and unpacked."""
    metadata = file.metadata.row_group(group)
    for index in range(metadata.num_columns):
        column = metadata.column(index)
        if column.path_in_schema == TEXT_COLUMN:
            return column.total_compressed_size, column.total_uncompressed_size
    return 0, 0


def _column_block(column: Any, where: str, first_row: int) -> Block:
    """Return the values of a column of strings, without a loop over its rows."""
    import pyarrow

    if column.null_count:
        row = first_row + column.is_null().index(True).as_py()
        raise DataError(f"{where}, row {row}: expected a text, got null", hint="remove the rows without text")
    values = column.cast(pyarrow.large_binary())
    _, offsets_buffer, data_buffer = values.buffers()
    if len(values) == 0 or data_buffer is None:
        return Block(data=_NO_TEXT, starts=np.zeros(len(values), dtype=np.int64), source_bytes=0)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(data_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]]
    return Block(data=data, starts=offsets[:-1] - offsets[0], source_bytes=0)
