"""Runs the lab without Jupyter: python -m lab.run executes dirl.ipynb and stores its outputs in it."""
import base64
import contextlib
import io
import json
import sys
import time
from pathlib import Path

import matplotlib

from common.files import atomic_write

NOTEBOOK = Path(__file__).parent / "dirl.ipynb"


def read(path=NOTEBOOK):
    """The notebook as it is in its file, a dict."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    """Its code cells, in order, each as (cell, source)."""
    return [(cell, "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(source, namespace, title):
    """Executes a cell in the namespace; gives what it printed and its figures as PNG bytes."""
    import matplotlib.pyplot as plt
    printed, pictures = io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        exec(compile(source, title, "exec"), namespace)
    for number in plt.get_fignums():
        buffer = io.BytesIO()
        plt.figure(number).savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
        pictures.append(buffer.getvalue())
    plt.close("all")
    return printed.getvalue(), pictures


def outputs_of(printed, pictures):
    """The same as a notebook's outputs."""
    out = []
    if printed:
        out.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    for png in pictures:
        data = {"image/png": base64.b64encode(png).decode(), "text/plain": ["a figure"]}
        out.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return out


def main():
    matplotlib.use("agg")
    notebook, namespace, start = read(), {"__name__": "__main__"}, time.time()
    for number, (cell, source) in enumerate(code_cells(notebook), 1):
        begun = time.time()
        cell["outputs"] = outputs_of(*run_cell(source, namespace, f"cell {number}"))
        cell["execution_count"] = number
        print(f"cell {number}: {time.time() - begun:.1f} s  {source.splitlines()[0][:70]}")
    with atomic_write(NOTEBOOK) as temp:
        temp.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{time.time() - start:.0f} s, {NOTEBOOK.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
