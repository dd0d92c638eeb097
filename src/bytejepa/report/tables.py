"""What a plot shows, as a table: the CSV beside the plot and the picture are made from the same rows."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence

Cell = str | int | float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Named columns, units in the names, and rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
        """Return the table of `rows`, each as long as `columns`."""
        assert all(len(row) == len(columns) for row in rows)
        return cls(tuple(columns), tuple(tuple(row) for row in rows))

    def to_csv(self) -> str:
        """Return the table as CSV, floats with all their digits, an empty field for None."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return out.getvalue()
