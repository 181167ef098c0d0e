"""Running a notebook again changes nothing: committed outputs differ only where something really changed."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('name', ['01_router', '05_viz'])
def test_running_again_gives_the_same_bytes(name, tmp_path):
    "Two runs, each in a kernel of its own, on this machine: text, pictures and explorers."

    def run(folder: str) -> bytes:
        place = tmp_path / folder
        (place / 'nbs').mkdir(parents=True)
        for other in ('settings.ini', 'nanomoe', 'data', 'assets'):
            (place / other).symlink_to(ROOT / other)
        shutil.copytree(ROOT / 'tools', place / 'tools')
        copy = Path(shutil.copy(ROOT / 'nbs' / f'{name}.ipynb', place / 'nbs'))
        subprocess.run(
            [sys.executable, place / 'tools' / 'run_notebooks.py', copy], check=True, capture_output=True
        )
        return copy.read_bytes()

    with ThreadPoolExecutor(2) as two:
        once, again = two.map(run, ('once', 'again'))
    assert once == again and once.count(b'image/png') >= 4


def test_text_flushed_in_pieces_is_one_output():
    sys.path.insert(0, str(ROOT / 'tools'))
    from run_notebooks import joined

    pieces = [('stdout', 'a'), ('stdout', '\n'), ('stderr', 'b'), ('stdout', 'c')]
    made = joined(
        [dict(output_type='stream', name=name, text=text) for name, text in pieces]
        + [dict(output_type='display_data', data={})] * 2
    )
    assert [o.get('text') for o in made] == ['a\n', 'b', 'c', None, None]
