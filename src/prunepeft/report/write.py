"""Write everything a report consists of into the run folder."""

from pathlib import Path

from prunepeft.report.card import make_card
from prunepeft.report.loading_code import loading_code
from prunepeft.report.page import make_page
from prunepeft.report.plots import make_pictures
from prunepeft.report.record import read_evidence
from prunepeft.report.render import to_csv
from prunepeft.report.tables import make_tables
from prunepeft.state import write_bytes, write_text


def write_report(run: str | Path) -> Path:
    """Write the report and the model card of a finished run.

    Reads the JSON files of the run folder only. The same files give the same bytes.

    Args:
        run: The run folder.
    Returns:
        The HTML page. Beside it are `figures/` (PNG, SVG) and `tables/` (CSV); the card is
        `README.md` in the run folder.
    Raises:
        StateError: if the run has no result yet.
        CheckpointError: if one of its files is damaged.
        DiskError: if a file cannot be written.
    """
    run = Path(run)
    evidence = read_evidence(run)
    tables, pictures = make_tables(evidence), make_pictures(evidence)
    page = make_page(evidence, tables, pictures, loading_code(evidence))
    card = make_card(evidence)
    report = run / "report"
    for picture in pictures:
        write_bytes(report / "figures" / f"{picture.name}.svg", picture.svg)
        write_bytes(report / "figures" / f"{picture.name}.png", picture.png)
    for table in tables:
        write_text(report / "tables" / f"{table.name}.csv", to_csv(table))
    write_text(run / "README.md", card)
    write_text(report / "report.html", page)
    return report / "report.html"
