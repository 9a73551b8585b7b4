"""One self-contained page from a run folder, and the table the command line prints.

A report is a view, never a source: everything it shows is read from the folder's tables and
`summary.json`, so a figure can be drawn anew, elsewhere or otherwise, without running a model.

- `tables`: which tables a page is drawn from, and the columns each must have.
- `palette`: one colour a role, the same in every figure, apart for colour-blind readers too.
- `plots`, `marks`: what the figures share: bands, whiskers, labels at the ends of lines, floors.
- `stages`, `curves`, `bars`, `classes`, `maps`: the figures.
- `pictures`: scenes with their tokens coloured by verdict, as inline SVG.
- `text`: intervals and verdicts in words; `findings_table` for a terminal.
- `opening`: the numbers that a page opens with.
- `figures`: what a page consists of, as data; `study_page` and `probe_page` are these data, one for
  each kind of run: sections, figures, captions and the control each figure must beat.
- `page`: all of it in one HTML file that opens offline.
"""

from __future__ import annotations

from interp.report.page import write_report
from interp.report.text import findings_table

__all__ = ["findings_table", "write_report"]
