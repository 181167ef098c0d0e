"Explorers as pages hold them: data for static/explorers.js, and a picture for readers without scripts."

import base64
import json
import shutil
from html import escape
from pathlib import Path

import computed
from record import explorers_of, recordings


def explorers(notebooks: dict[str, dict], named: list[str], folder: Path) -> dict[tuple[str, str], str]:
    """(notebook, cell id) -> HTML of each explorer that works on the site.

    Those in computed.py, and the others of the notebooks in `named`, recorded. Pictures are written below
    explorers/ in `folder`.
    """
    html = {place: computed_explorer(notebooks, *place, folder) for place in computed.EXPLORERS}
    cells = {}
    for name in named:
        found = {cell: box for cell, box in explorers_of(notebooks[name]).items() if (name, cell) not in html}
        if found:
            cells[name] = found
    for name, recording in recordings(notebooks, cells).items():
        shutil.copytree(recording, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns('*.json'))
        html |= {(name, cell): recorded_explorer(recording, name, cell) for cell in cells[name]}
    return html


def recorded_explorer(recording: Path, name: str, cell: str) -> str:
    spec = json.loads((recording / f'{cell}.json').read_text()) | {'folder': f'explorers/{name}/{cell}/'}
    return explorer(cell, spec, first_view(cell, spec))


def computed_explorer(notebooks: dict[str, dict], name: str, cell: str, folder: Path) -> str:
    spec = computed.EXPLORERS[name, cell]() | {'computed': f'{name}/{cell}', 'palette': computed.PALETTE}
    if cell not in explorers_of(notebooks[name]):  # it stands below the cell's own picture
        return explorer(cell, spec, '')
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f'{cell}.png').write_bytes(still(notebooks[name], cell))
    return explorer(cell, spec, f'<img alt="{title(cell)}" src="explorers/{name}/{cell}.png">')


def title(cell: str) -> str:
    return cell.replace('-', ' ')


def still(notebook: dict, cell: str) -> bytes:
    "The picture that a cell's output holds."
    (outputs,) = [c['outputs'] for c in notebook['cells'] if c['id'] == cell]
    return base64.b64decode(next(o['data']['image/png'] for o in outputs if 'data' in o))


def first_view(cell: str, spec: dict) -> str:
    "The frame at the controls' first positions."
    place = 0
    for control in spec['controls']:
        place = place * len(control['labels']) + control['at']
    frame = spec['frames'][place]
    if 'html' in spec:
        return spec['html'][frame]
    width, height = spec['size']
    src = spec['folder'] + spec['pictures'][frame]
    return f'<img alt="{title(cell)}" src="{src}" width="{width}" height="{height}">'


def explorer(cell: str, spec: dict, view: str) -> str:
    data = json.dumps(spec | {'title': title(cell)}, separators=(',', ':')).replace('<', '\\u003c')
    return (
        f'<div class="explorer" id="{cell}-live" role="group" aria-label="{escape(title(cell))}">'
        f'<div class="view">{view}</div>{note(spec)}<script type="application/json">{data}</script></div>'
    )


def note(spec: dict) -> str:
    "What the page's explorer lacks."
    words = []
    if any(control.get('of', 0) > len(control['labels']) for control in spec['controls']):
        words.append('In JupyterLab the sliders have more positions.')
    if any(control['kind'] == 'text' for control in spec['controls']):
        words.append('Type your own text in JupyterLab.')
    return f'<p class="note">{" ".join(words)}</p>' if words else ''
