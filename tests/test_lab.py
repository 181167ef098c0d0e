"The figures that the text of the router lab quotes are those of the run it shows."

import json
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[1] / 'nbs' / '22_router_lab.ipynb'


def test_the_router_lab_shows_the_run_that_its_text_describes():
    "Running the notebook where `out/onboard` is missing stores the outputs of the small substitute."
    cells = {cell['id']: cell for cell in json.loads(NOTEBOOK.read_text())['cells']}
    shown = ''.join(cells['load-model']['outputs'][0]['text'])
    assert shown.startswith('out/onboard, step-00001200'), 'run make train, then run the notebook again'
    assert not cells['which-run-code']['outputs']
