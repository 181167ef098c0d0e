"""The explorers that pages calculate: their controls, and the numbers of the lesson that they start from.

static/routing.js and static/sizes.js have an entry for each. `cells_of` runs the lesson's own cells.
"""

import base64
import json
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch

from nanomoe.viz import expert_color

NBS = Path(__file__).resolve().parents[2] / 'nbs'
PALETTE = [expert_color(e) for e in range(8)]


@cache
def cells_of(notebook: str, *ids: str) -> dict:
    "What the lesson's module, its imports and the cells with these ids define."
    cells = json.loads((NBS / f'{notebook}.ipynb').read_text())['cells']
    code = {cell['id']: ''.join(cell['source']) for cell in cells}
    module = f'nanomoe.{notebook[3:]}'
    namespace = dict(vars(import_module(module))) if find_spec(module) else {}
    with redirect_stdout(StringIO()):
        for cell in (*(cell for cell in code if cell.endswith('imports')), *ids):
            exec(code[cell], namespace)
    return namespace


def slider(name: str, values: list, value, label: str = '', form: str = '') -> dict:
    "A slider over values that are written in a format."
    labels = [format(v, form) for v in values]
    return control('range', name, values, value, label) | {'labels': labels}


def choice(name: str, values: list, value, label: str = '') -> dict:
    return control('select', name, values, value, label)


def control(kind: str, name: str, values: list, value, label: str = '') -> dict:
    label, labels = label or name.replace('_', ' '), [str(v) for v in values]
    return dict(kind=kind, name=name, label=label, values=values, labels=labels, at=values.index(value))


def steps(low: float, high: float, step: float) -> list[float]:
    "low, low + step, ... high."
    return [round(low + i * step, 9) for i in range(round((high - low) / step) + 1)]


def router() -> dict:
    "Probabilities and gates of one token."
    lesson = cells_of('01_router', 'draw-token')
    controls = [
        slider('top_k', list(range(1, 9)), 2),
        slider('temperature', steps(0.25, 4, 0.05), 1, form='.2f'),
    ]
    return dict(controls=controls, data=dict(logits=lesson['one_token'][0].tolist()))


def plane() -> dict:
    "The arrows of four experts, and a token."
    arrows = cells_of('01_router', 'draw-plane', 'result-picture')['arrows']
    controls = [
        slider('top_k', [1, 2, 3, 4], 2),
        slider('temperature', steps(0.25, 4, 0.05), 1, form='.2f'),
        control('checkbox', 'norm_topk_prob', [False, True], False),
    ]
    return dict(controls=controls, data=dict(arrows=arrows.tolist(), token=[1.2, -0.5]))


def layer_cost() -> dict:
    controls = [slider('E', list(range(8, 65)), 16), slider('K', list(range(1, 9)), 4)]
    return dict(controls=[*controls, slider('F', list(range(64, 1025, 64)), 512)], data=dict(C=256))


def dropping() -> dict:
    "The noise of 2048 tokens' logits, which the popularity of the experts is added to."
    lesson = cells_of('04_capacity', 'demand')
    noise = lesson['routing'](0, 2048).logits
    controls = [
        slider('capacity_factor', steps(0.5, 2.5, 0.05), 1.25, form='.2f'),
        slider('skew', steps(0, 2, 0.05), 1, form='.2f'),
        choice('priority', ['choice', 'token', 'gate'], 'choice'),
    ]
    return dict(controls=controls, data=dict(noise=base64.b64encode(noise.numpy().tobytes()).decode()))


def leak() -> dict:
    "The logits of 32 tokens, and those of the token that replaces each."
    lesson = cells_of('04_capacity', 'layer')
    x, router = lesson['x'], lesson['router']
    others = [torch.randn(16, generator=torch.Generator().manual_seed(n)) @ router for n in range(32)]
    controls = [
        slider('token', list(range(32)), 16),
        choice('priority', ['choice', 'token', 'gate'], 'choice'),
        slider('factor', steps(0.5, 2, 0.05), 0.75, form='.2f'),
        choice('rows', [1, 2, 4], 1),
    ]
    return dict(
        controls=controls, data=dict(logits=(x @ router).tolist(), others=torch.stack(others).tolist())
    )


def sizes() -> dict:
    nano = cells_of('07_model', 'architecture')['nano']
    controls = [slider('n_experts', list(range(2, 33)), 8), slider('top_k', list(range(1, 9)), 2)]
    controls.append(slider('moe_every', list(range(1, 7)), 2))
    data = {key: getattr(nano, key) for key in ('n_layer', 'vocab_size', 'block_size')} | {'C': nano.n_embd}
    return dict(controls=controls, data=data)


def schedule() -> dict:
    controls = [
        slider('warmup_iters', list(range(0, 501, 10)), 100),
        slider('peak', steps(0.5, 10, 0.1), 3, form='.1f'),
        slider('floor', steps(0, 1, 0.05), 0.1, form='.2f'),
        slider('max_iters', list(range(200, 1001, 50)), 1000),
    ]
    return dict(controls=controls, data={})


def waiting() -> dict:
    "The assignments of each expert at each skew."
    rows_of_experts = cells_of('12_expert_parallel', 'waiting')['rows_of_experts']
    skews = steps(0, 2, 0.05)
    controls = [
        slider('skew', skews, 0.6, form='.2f'),
        slider('capacity', steps(1, 4, 0.05), 4, 'capacity factor; 4 is none', '.2f'),
        choice('P', [1, 2, 4, 8, 16], 4),
    ]
    counts = {format(skew, 'g'): rows_of_experts(skew, None)[0].tolist() for skew in skews}
    return dict(controls=controls, data=dict(counts=counts))


def planner() -> dict:
    amounts = [10, 20, 50, 100, 200, 300, 500, 1000, 2000, 3000, 5000, 10_000, 20_000, 50_000, 100_000]
    controls = [
        slider('dollars', amounts, 300, form=','),
        slider('experts', list(range(2, 65)), 16),
        slider('top_k', [1, 2, 4, 8], 2),
        slider('price', steps(0.5, 10, 0.25), 2.5, form='.2f'),
        slider('mfu', steps(0.05, 0.6, 0.01), 0.3, form='.2f'),
    ]
    return dict(controls=controls, data=dict(peak=cells_of('26_sizing', *BILL)['PEAK']['H100']))


BILL = ('parameters-check', 'active', 'bill', 'family', 'planner')
EXPLORERS = {
    ('01_router', 'explorer'): router,
    ('01_router', 'walk-picture'): plane,  # below a picture that does not move
    ('02_experts', 'explorer'): layer_cost,
    ('04_capacity', 'explorer'): dropping,
    ('04_capacity', 'leak-explore'): leak,
    ('07_model', 'explorer'): sizes,
    ('08_optim', 'schedule-explore'): schedule,
    ('12_expert_parallel', 'waiting-explorer'): waiting,
    ('26_sizing', 'explorer'): planner,
}
