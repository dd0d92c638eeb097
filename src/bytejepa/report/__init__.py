"""Reports: runs and studies as one page that a person can read, with every plot as PNG and its numbers as CSV.

`report` is the way in. `measure` is the one module that needs torch; it prices text and looks at weights and gradients.
`inputs` reads run folders, `tables` holds what a plot shows, the `*_plots` modules draw, `page` puts it together.
"""

from bytejepa.report.report import ReportResult, report

__all__ = ["ReportResult", "report"]
