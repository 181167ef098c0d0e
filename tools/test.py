"""What `make test` runs: every notebook through nbdev_test, then tests/; last comes `N passed, N failed`."""

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


def check_notebook(path: Path) -> bool:
    "Run one notebook's cells as nbdev_test does, ten minutes at most; its output is shown only if it fails."
    start = time.perf_counter()
    try:
        run = subprocess.run(
            [BIN / 'nbdev_test', '--path', path],
            cwd=ROOT,
            timeout=600,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        passed, said = run.returncode == 0 and 'Success' in run.stdout, run.stdout
    except subprocess.TimeoutExpired as e:
        passed, said = False, f'{e}\n'
    print(
        f'{"passed" if passed else "FAILED"}  {path.name}  {time.perf_counter() - start:.0f} s'
        + ('' if passed else f'\n{said}'),
        flush=True,
    )
    return passed


def check_tests() -> tuple[int, int]:
    "Run tests/ with pytest; returns how many passed and failed."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        code = subprocess.run(
            [BIN / 'pytest', '-q', '-rs', '--durations=10', f'--junitxml={report}', 'tests'], cwd=ROOT
        ).returncode
        if not report.exists():
            return 0, 1
        suite = ElementTree.parse(report).getroot().find('testsuite')
    total, skipped = int(suite.get('tests')), int(suite.get('skipped'))
    bad = int(suite.get('failures')) + int(suite.get('errors'))
    return total - bad - skipped, max(bad, int(code != 0))


def main():
    if not shutil.which('chromium'):
        print('without chromium on the PATH, the browser test is left out')
    with ThreadPoolExecutor(2) as two:
        notebooks = list(two.map(check_notebook, sorted((ROOT / 'nbs').glob('*.ipynb'))))
    passed, failed = check_tests()
    passed, failed = passed + sum(notebooks), failed + len(notebooks) - sum(notebooks)
    print(f'{passed} passed, {failed} failed')
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
