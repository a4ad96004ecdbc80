"""The notebook: committed without outputs, and every cell of it runs, to a latent that is named."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "jobs" / "tour.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def said(cell: nbformat.NotebookNode) -> str:
    """Return all that a cell has shown, as text."""
    return "".join(
        one.text if one.output_type == "stream" else "".join(one.data.values())
        for one in cell.outputs
    )


def test_what_is_committed_holds_no_outputs():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert cells
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_goes_from_a_sentence_to_what_the_adapter_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = read()
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))

    def shown(words: str) -> str:
        """Return what the cell has shown whose source holds these words."""
        (cell,) = (one for one in cells if words in one.source)
        return said(cell)

    assert "ordering numbers" in shown("profile.latents")
    assert shown('row["reasons"]').count("<tr>") == 6
    assert "ordering numbers" in shown("trace.texts")
    assert "gain +" in shown("maker.make()")
    assert shown('"held_out_loss"').count("<polyline") == 2
    summary = shown("explaining.run()")
    assert "verified to be behind it" in summary
    assert "No single latent" not in summary
    latents = shown('one["verified"]')
    assert latents.count("<tr>") == 11
    assert ">yes<" in latents
    assert shown("by_order").count("<polyline") == 4
    assert "rise and fall as before" in shown("share_true")
    assert shown('one["before"]').count("<tr>") == 4
    assert (tmp_path / "out/tour/why/report.html").exists()
