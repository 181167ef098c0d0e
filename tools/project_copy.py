"A copy of the project in which notebooks can be changed and run."

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_of_the_project(folder: Path) -> Path:
    """This project in another folder, by links, with no more data than `make lab` prepares.

    Its folder of notebooks.
    """
    for path in ROOT.iterdir():
        if path.name not in ('.git', 'nbs', 'data', 'out'):
            (folder / path.name).symlink_to(path)
    (folder / 'data').mkdir()
    for name in ('onboard', 'numbers'):
        (folder / 'data' / name).symlink_to(ROOT / 'data' / name)
    (folder / 'nbs').mkdir()
    for path in (ROOT / 'nbs').iterdir():
        (folder / 'nbs' / path.name).symlink_to(path)
    return folder / 'nbs'
