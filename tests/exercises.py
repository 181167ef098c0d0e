"""The exercises of a lesson: the place for the reader's function, an empty stub, and the printed answer."""

import json
import re
from pathlib import Path
from typing import NamedTuple

PLACE = re.compile(r'^(\w+) = .*# put your .*here.*$', re.M)


class Exercise(NamedTuple):
    cell: str  # id of the cell that checks
    name: str  # what the reader is to write
    stub: str  # the check with an empty function in its place
    answer: str  # the check with the printed answer
    code: str  # the printed answer alone


def exercises(path: Path) -> list[Exercise]:
    "The checks of a lesson in order, each with the answer that is folded beside it."
    cells = json.loads(path.read_text())['cells']
    prose = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    folded = re.findall(r'<details>.*?</details>', prose, re.S)
    answers = [code for text in folded for code in re.findall(r'```python\n(.*?)```', text, re.S)[:1]]
    checks = [c for c in cells if c['cell_type'] == 'code' and PLACE.search(''.join(c['source']))]
    assert len(answers) == len(checks) == len(folded), (
        f'{path.name}: a check without an answer in code, or the reverse'
    )
    out = []
    for cell, answer in zip(checks, answers):
        source = ''.join(cell['source'])
        (name,) = PLACE.findall(source)
        put = lambda code: PLACE.sub(lambda _: code, source)
        out.append(
            Exercise(
                cell['id'],
                name,
                put(f'def {name}(*args, **kwargs): return None'),
                put(answer.strip()),
                answer,
            )
        )
    return out
