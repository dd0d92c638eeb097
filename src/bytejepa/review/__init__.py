"""Review: is it allowed, is it true. Reads submissions, runs and artifacts; foreign code runs only if asked to, outside.

    from bytejepa.review import review
    outcome = review(Path("records/somebody"))
    print(outcome.verdict.word, outcome.verdict.reason)

`findings` holds the shapes, `source_scan` the static part (`interpreter` walks a script without running it, `rules` and
`surroundings` judge what it met), `budget` and `scores` the files and logs, `behaviour` the model itself, `smoke` the
test of a foreign script in a subprocess, `report_forms` terminal, JSON and Markdown. Importing this loads no torch.
"""

from bytejepa.review.findings import Evidence, Finding, Review, Status, Verdict, Weight, Word
from bytejepa.review.reviewer import review

__all__ = ["Evidence", "Finding", "Review", "Status", "Verdict", "Weight", "Word", "review"]
