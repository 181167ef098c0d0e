"""The exercises of a lesson: the cell with the reader's place, the folded answer, and wrong answers that its
check refuses.
"""

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

PLACE = re.compile(r'# your (code|number|choice)')
WRONG = Path(__file__).parent / 'wrong_answers'


class Exercise(NamedTuple):
    cell: str  # id of the cell: a stub, and its check
    stub: str  # the cell as it stands
    answer: str  # the cell with the folded answer in place of the stub
    wrong: dict[str, str]  # the cell with each plausible mistake in that place, by what is wrong


def with_answer(cell: str, code: str) -> str:
    "A cell in which `code` stands in place of the statement that holds the reader's place."
    lines = cell.splitlines()
    (place,) = [i for i, line in enumerate(lines, 1) if PLACE.search(line)]
    (stub,) = [node for node in ast.parse(cell).body if node.lineno <= place <= node.end_lineno]
    return '\n'.join(lines[: stub.lineno - 1] + code.strip().splitlines() + lines[stub.end_lineno :])


def wrong_answers(lesson: str) -> dict[str, dict[str, str]]:
    "By cell id: what is wrong -> code. They stand below `# %% CELL: what is wrong` in a file per lesson."
    path, found = WRONG / f'{lesson}.py', {}
    for part in re.split(r'^# %% ', path.read_text(), flags=re.M)[1:] if path.exists() else []:
        title, code = part.split('\n', 1)
        cell, what = title.split(': ', 1)
        found.setdefault(cell, {})[what] = code
    return found


def exercises(path: Path) -> list[Exercise]:
    "The exercises of a lesson in order. Raises `AssertionError` where one lacks an answer."
    cells, wrong = json.loads(path.read_text())['cells'], wrong_answers(path.stem)
    found = []
    for cell, below in zip(cells, cells[1:]):
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or not PLACE.search(source):
            continue
        answer = re.search(
            r'<summary>Answer</summary>.*?```python\n(.*?)```.*?</details>', ''.join(below['source']), re.S
        )
        assert answer, f'{path.name}: {cell["id"]} has no folded answer in the cell below'
        put = {what: with_answer(source, code) for what, code in wrong.pop(cell['id'], {}).items()}
        found.append(Exercise(cell['id'], source, with_answer(source, answer[1]), put))
    assert not wrong, f'{path.name} has no exercise {", ".join(wrong)}'
    return found


def check_exercise(exercise: Exercise, namespace: dict):
    """The stub says "not yet", the folded answer passes, and every wrong one fails an assertion."""

    def output(code: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, dict(namespace))
        return out.getvalue()

    assert 'not yet' in output(exercise.stub), f'{exercise.cell}: the stub does not print "not yet"'
    assert 'not yet' not in output(exercise.answer), f'{exercise.cell}: the answer is taken for a stub'
    for what, code in exercise.wrong.items():
        try:
            output(code)
        except AssertionError:
            continue
        raise AssertionError(f'{exercise.cell} accepts a wrong answer: {what}')


def other_values(control) -> list:
    "A few values that a control does not have now."
    if hasattr(control, 'options'):
        values = [option[1] if isinstance(option, tuple) else option for option in control.options]
    elif isinstance(control.value, bool):
        values = [not control.value]
    elif isinstance(control.value, str):
        values = [control.value + ' 12', 'x']
    else:
        low, high = control.min, control.max
        if hasattr(control, 'base'):
            low, high = control.base**low, control.base**high
        values = [low, high, type(control.value)((low + high) / 2)]
    return [value for value in values if value != control.value][:4]


def check_explorer(box):
    "Each control redraws; put back where it was, it gives the same picture again."
    controls, view = box.children[0].children, box.children[1]
    for control in controls:
        value, before, changed = control.value, view.value, False
        for other in other_values(control):
            control.value = other
            if changed := view.value != before:
                break
        assert changed, f'{control.description} changes nothing'
        control.value = value
        assert view.value == before, f'{control.description}: another picture at the same value'


EXPLORER = re.compile(r'^(\w+) = explore\(', re.M)


def with_checks(path: Path) -> dict:
    "A notebook with a cell behind each exercise and each explorer that checks it."
    notebook = json.loads(path.read_text())
    found = {e.cell: e for e in exercises(path)} if path.stem[0].isdigit() else {}
    cells = []
    for cell in notebook['cells']:
        cells.append(cell)
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code':
            continue
        checks = [f'check_explorer({name})' for name in EXPLORER.findall(source)]
        if cell['id'] in found:
            checks.append(f'check_exercise(Exercise(**{found[cell["id"]]._asdict()!r}), globals())')
        if checks:
            code = f'import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n' + (
                'from exercises import Exercise, check_exercise, check_explorer\n' + '\n'.join(checks)
            )
            cells.append(
                dict(
                    cell_type='code',
                    id=f'check-{cell["id"]}',
                    metadata={},
                    source=code,
                    outputs=[],
                    execution_count=None,
                )
            )
    return notebook | {'cells': cells}
