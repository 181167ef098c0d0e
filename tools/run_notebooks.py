"""Run notebooks in a real kernel and store their outputs.

    python tools/run_notebooks.py [--flags timing,slow] nbs/01_router.ipynb …

Cells that settings.ini's tst_flags mark are left as they are unless their flag is named. Widget state is
dropped and metadata cleaned, so that running twice on one machine gives the same bytes.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
WIDGET = 'application/vnd.jupyter.widget-view+json'


def flagged(source: str, skipped: set[str]) -> bool:
    "Whether a cell's directives keep it from running here."
    directives = re.findall(r'^#\s*\|\s*(.+)$', source, re.M)
    return 'eval: false' in directives or any(d.split()[0] in skipped for d in directives)


class Client(NotebookClient):
    skipped: set[str] = set()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == 'code' and flagged(cell.source, self.skipped):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def still(output: dict) -> dict | None:
    "An output without its live widget; None if nothing else was in it."
    data = output.get('data', {})
    if WIDGET not in data:
        return output
    del data[WIDGET]
    return output if {'image/png', 'text/html'} & data.keys() else None


def joined(outputs: list[dict]) -> list[dict]:
    "The outputs, text that was flushed in pieces put together again."
    whole = []
    for output in outputs:
        if whole and output.get('name') and output['name'] == whole[-1].get('name'):
            whole[-1]['text'] += output['text']
        else:
            whole.append(output)
    return whole


def run(path: Path, skipped: set[str]) -> float:
    "Execute one notebook in its folder, write it back, and return the seconds it took."
    notebook, start = nbformat.read(path, 4), time.perf_counter()
    client = Client(
        notebook,
        timeout=None,
        kernel_name='python3',
        resources={'metadata': {'path': str(path.parent)}},
        record_timing=False,
    )
    client.skipped = skipped
    client.execute()
    seconds = time.perf_counter() - start
    notebook.metadata.pop('widgets', None)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cell.outputs = joined([o for o in map(still, cell.outputs) if o])
    nbformat.write(notebook, path)
    subprocess.run([Path(sys.executable).parent / 'nbdev_clean', '--fname', path], check=True)
    return seconds


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument('--flags', default='', help='flagged cells to run too, such as timing,slow')
    arguments.add_argument('notebooks', nargs='+', type=Path)
    given = arguments.parse_args()
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini')
    skipped = set(settings['DEFAULT']['tst_flags'].split()) - set(given.flags.split(','))
    if 'slow' not in skipped:
        os.environ['REMAKE'] = '1'  # without it, Run All passes over those cells
    for path in given.notebooks:
        print(f'{path.name}: {run(path.resolve(), skipped):.1f} s', flush=True)


if __name__ == '__main__':
    main()
