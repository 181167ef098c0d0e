"""What `make test` runs: every notebook through nbdev_test, then tests/; last comes `N passed, N failed`.

    python tools/test.py [NOTEBOOK...]

With names, such as 01_router, only those notebooks. Behind each exercise and each explorer, a notebook gets a
cell that checks it, in a copy of the project.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / 'tests'))

from exercises import with_checks  # noqa: E402
from project_copy import copy_of_the_project  # noqa: E402


def check_notebook(path: Path) -> bool:
    "Run one notebook's cells as nbdev_test does, ten minutes at most; its output is shown only if it fails."
    start = time.perf_counter()
    try:
        checked = json.dumps(with_checks(path))
        path.unlink()
        path.write_text(checked)
        run = subprocess.run(
            [BIN / 'nbdev_test', '--path', path],
            cwd=path.parents[1],
            timeout=600,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        passed, said = run.returncode == 0 and 'Success' in run.stdout, run.stdout
    except (subprocess.TimeoutExpired, AssertionError) as e:
        passed, said = False, f'{e}\n'
    print(
        f'{"passed" if passed else "FAILED"}  {path.name}  {time.perf_counter() - start:.0f} s'
        + ('' if passed else f'\n{said}'),
        flush=True,
    )
    return passed


def check_tests() -> tuple[int, int]:
    "Run tests/ with pytest, two files at a time; returns how many passed and failed."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        options = ['-q', '-rs', '-n2', '--dist=loadfile', '--durations=10', f'--junitxml={report}']
        code = subprocess.run([BIN / 'pytest', *options, 'tests'], cwd=ROOT).returncode
        if not report.exists():
            return 0, 1
        suite = ElementTree.parse(report).getroot().find('testsuite')
    total, skipped = int(suite.get('tests')), int(suite.get('skipped'))
    bad = int(suite.get('failures')) + int(suite.get('errors'))
    return total - bad - skipped, max(bad, int(code != 0))


def main():
    if not shutil.which('chromium') and not sys.argv[1:]:
        print('without chromium on the PATH, the browser test is left out')
    named = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:
        paths = sorted(copy_of_the_project(Path(folder)).glob('*.ipynb'))
        notebooks = list(two.map(check_notebook, [path for path in paths if path.stem in named or not named]))
    passed, failed = (0, 0) if named else check_tests()
    passed, failed = passed + sum(notebooks), failed + len(notebooks) - sum(notebooks)
    print(f'{passed} passed, {failed} failed')
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
