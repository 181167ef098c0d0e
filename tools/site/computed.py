"""The explorers that pages calculate: their controls, and the numbers of the lesson that they start from.

static/computed.js has an entry for each. The lesson's own code makes what it needs: `cells_of` runs cells.
"""

import json
from functools import cache
from pathlib import Path

from nanomoe.viz import expert_color

NBS = Path(__file__).resolve().parents[2] / 'nbs'
PALETTE = [expert_color(e) for e in range(8)]


@cache
def cells_of(notebook: str, *ids: str) -> dict:
    "What the cells of a lesson define."
    cells = json.loads((NBS / f'{notebook}.ipynb').read_text())['cells']
    code = {cell['id']: ''.join(cell['source']) for cell in cells}
    namespace = {}
    for cell in ids:
        exec(code[cell], namespace)
    return namespace


def slider(name: str, values: list, value, label: str = '', form: str = '') -> dict:
    "A slider over values that are written in a format."
    labels = [format(v, form) for v in values]
    return control('range', name, values, value, label) | {'labels': labels}


def choice(name: str, values: list, value, label: str = '') -> dict:
    return control('select', name, values, value, label)


def control(kind: str, name: str, values: list, value, label: str) -> dict:
    label, labels = label or name.replace('_', ' '), [str(v) for v in values]
    return dict(kind=kind, name=name, label=label, values=values, labels=labels, at=values.index(value))


def steps(low: float, high: float, step: float) -> list[float]:
    "low, low + step, ... high."
    return [round(low + i * step, 9) for i in range(round((high - low) / step) + 1)]


def router() -> dict:
    "Probabilities and gates of one token."
    lesson = cells_of('01_router', 'imports', 'lesson-imports', 'draw-token')
    controls = [
        slider('top_k', list(range(1, 9)), 2),
        slider('temperature', steps(0.25, 4, 0.05), 1, form='.2f'),
    ]
    return dict(controls=controls, data=dict(logits=lesson['one_token'][0].tolist()))


EXPLORERS = {('01_router', 'explorer'): router}
