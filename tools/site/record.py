"""Record what the explorers of the notebooks show, so that pages can show it without a kernel.

A notebook runs in a copy of the project, with a cell behind each explorer that moves its controls through
their positions. Its recording is a folder below out/explorers with a `CELL.json` for each explorer and the
pictures in a folder CELL; it is kept until the notebook's code or the package changes.
"""

import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = ROOT / 'out' / 'explorers'
MAX_FRAMES = 64  # of one explorer
EXPLORER = re.compile(r'^(\w+) = explore\(', re.M)
KINDS = {
    'Dropdown': 'select',
    'ToggleButtons': 'radio',
    'Checkbox': 'checkbox',
    'Text': 'text',
    'Textarea': 'text',
}


# What runs in the notebook


def positions_of(control) -> dict:
    "All values of a control, how each is written, and the number `at` of the one that it has now."
    kind = KINDS.get(type(control).__name__, 'range')
    values, labels = [control.value], None
    if hasattr(control, 'options'):
        pairs = [o if isinstance(o, tuple) else (str(o), o) for o in control.options]
        labels, values = map(list, zip(*pairs))
    elif kind == 'checkbox':
        values = [False, True]
    elif kind == 'range':
        n = math.floor((control.max - control.min) / control.step + 1e-9) + 1
        values = [round(control.min + i * control.step, 9) for i in range(n)]
        if hasattr(control, 'base'):
            values = [control.base**exponent for exponent in values]
        at = min(range(n), key=lambda i: abs(values[i] - control.value))
        values[at] = control.value  # it may lie between the steps
        labels = [format(value, control.readout_format) for value in values]
    return {
        'kind': kind,
        'label': control.description,
        'values': values,
        'labels': labels or [str(value) for value in values],
        'at': values.index(control.value),
    }


def spread(n: int, count: int, at: int) -> list[int]:
    """`count` of the positions 0 to n - 1, evenly spaced, with both ends and `at`.

    Of two, `at` and the end that is farther from it.
    """
    if count == 2:
        return sorted({at, 0 if 2 * at >= n else n - 1})
    chosen = [round(i * (n - 1) / (count - 1)) for i in range(count)]
    if at not in chosen:
        chosen[min(range(1, count - 1), key=lambda i: abs(chosen[i] - at))] = at
    return chosen


def thinned(controls: list[dict]) -> list[dict]:
    "The controls with fewer positions on the longest sliders, so that all combinations are few."
    counts = [len(control['values']) for control in controls]
    sliders = [i for i, control in enumerate(controls) if control['kind'] == 'range']
    while math.prod(counts) > MAX_FRAMES and max((counts[i] for i in sliders), default=2) > 2:
        counts[max(sliders, key=lambda i: (counts[i], len(controls[i]['values'])))] -= 1
    made = []
    for control, count in zip(controls, counts):
        n, at = len(control['values']), control['at']
        chosen = spread(n, count, at) if count < n else range(n)
        kept = {key: [control[key][i] for i in chosen] for key in ('values', 'labels')}
        made.append(control | kept | {'at': list(chosen).index(at), 'of': n})
    return made


def frames_at(controls: list[dict], widgets: list, view) -> list:
    "What the view shows at each combination of positions, those of the last control first."
    before, frames = [widget.value for widget in widgets], []
    for values in product(*(control.pop('values') for control in controls)):
        for widget, value in zip(widgets, values):
            widget.value = value
        frames.append(view.value)
    for widget, value in zip(widgets, before):
        widget.value = value
    return frames


def record(box, path: str):
    "Write `path`.json, which a page reads, and the pictures into the folder `path`; equal frames only once."
    path, (row, view) = Path(path), box.children
    controls = thinned([positions_of(widget) for widget in row.children])
    frames = frames_at(controls, row.children, view)
    views = list(dict.fromkeys(frames))
    spec = {'controls': controls, 'frames': [views.index(frame) for frame in frames]}
    path.mkdir(parents=True)
    if isinstance(views[0], str):
        spec['html'] = views
    else:
        spec['pictures'] = [f'{i:02}.png' for i in range(len(views))]
        spec['size'] = struct.unpack('>2I', views[0][16:24])  # in a PNG's header
        for name, picture in zip(spec['pictures'], views):
            (path / name).write_bytes(picture)
    path.with_suffix('.json').write_text(json.dumps(spec))


# What runs the notebooks


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def explorers_of(notebook: dict) -> dict[str, str]:
    "Cell id -> the name of the explorer that the cell shows."
    code = {cell['id']: source(cell) for cell in notebook['cells'] if cell['cell_type'] == 'code'}
    return {cell: EXPLORER.findall(text)[-1] for cell, text in code.items() if EXPLORER.search(text)}


def with_recorders(notebook: dict, cells: dict[str, str], folder: Path) -> dict:
    "The notebook up to its last explorer, with a cell behind each of `cells` that records it."
    made, last = [], 0
    for cell in notebook['cells']:
        made.append(cell)
        if cell['id'] in cells:
            code = f'import sys\nsys.path.append({str(ROOT / "tools" / "site")!r})\n'
            code += 'from record import record as _record_explorer\n'
            code += f'_record_explorer({cells[cell["id"]]}, {str(folder / cell["id"])!r})'
            of_cell = dict(id=f'record-{cell["id"]}', source=code, outputs=[], execution_count=None)
            made.append(dict(cell_type='code', metadata={}, **of_cell))
            last = len(made)
    return notebook | {'cells': made[:last]}


def key_of(notebook: dict, cells: dict[str, str]) -> str:
    "Changes with the notebook's code, the explorers to record, the package, the recorded runs and this file."
    parts = [source(cell).encode() for cell in notebook['cells'] if cell['cell_type'] == 'code']
    read = [*(ROOT / 'nanomoe').glob('*.py'), *(ROOT / 'assets' / 'runs').glob('*'), Path(__file__)]
    read += (ROOT / 'out' / 'onboard').glob('log.jsonl')
    parts += [' '.join(cells).encode(), *(path.read_bytes() for path in sorted(read))]
    return hashlib.sha256(b'\0'.join(parts)).hexdigest()[:16]


def record_notebook(project: Path, name: str, notebook: dict, cells: dict[str, str]) -> Path:
    "The folder of the notebook's recording, made if it is not there; exits if a cell fails."
    folder = RECORDINGS / f'{name}-{key_of(notebook, cells)}'
    if folder.exists():
        return folder
    start, part = time.perf_counter(), folder.with_suffix('.part')
    shutil.rmtree(part, ignore_errors=True)
    path = project / 'nbs' / f'{name}.ipynb'
    path.unlink()
    path.write_text(json.dumps(with_recorders(notebook, cells, part)))
    done = subprocess.run(
        [Path(sys.executable).parent / 'nbdev_test', '--path', path],
        cwd=project,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode or 'Success' not in done.stdout:
        sys.exit(f'{name} cannot be recorded:\n{done.stdout}')
    for old in RECORDINGS.glob(f'{name}-*'):
        if old != part:
            shutil.rmtree(old)
    part.rename(folder)
    frames = sum(len(json.loads(spec.read_text())['frames']) for spec in folder.glob('*.json'))
    seconds = time.perf_counter() - start
    print(f'{name}: explorers recorded at {frames} positions in {seconds:.0f} s', flush=True)
    return folder


def recordings(notebooks: dict[str, dict], cells: dict[str, dict[str, str]]) -> dict[str, Path]:
    "Notebook -> the folder with the recording of its `cells`; two notebooks run at a time."
    sys.path.append(str(ROOT / 'tools'))
    from project_copy import copy_of_the_project

    RECORDINGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:
        copy_of_the_project(Path(folder))
        if (run := ROOT / 'out' / 'onboard').exists():  # the run that the lessons' texts describe
            (Path(folder) / 'out').mkdir()
            (Path(folder) / 'out' / 'onboard').symlink_to(run)
        made = two.map(lambda name: record_notebook(Path(folder), name, notebooks[name], cells[name]), cells)
        return dict(zip(cells, made))
