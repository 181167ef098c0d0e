"""What the trainer's command prints, and runs that fail among several."""

import dataclasses
import io
import time
from contextlib import redirect_stdout

import pytest

from nanomoe.metrics import Record
from nanomoe.presets import PRESETS
from nanomoe.terminal import live_line, print_progress, validation_lines
from nanomoe.train import train_all


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_rewrites_its_last_line():
    with redirect_stdout(Terminal()) as terminal:
        print_progress('step 1', keep=False)
        print_progress('step 2', keep=True)
    with redirect_stdout(io.StringIO()) as file:
        print_progress('step 1', keep=False)
    assert file.getvalue() == 'step 1\n' and terminal.getvalue() == '\r\033[Kstep 1\r\033[Kstep 2\n'


def test_a_line_of_progress():
    cfg = dataclasses.replace(PRESETS['tiny'][1], max_iters=30)
    last = Record(
        step=30,
        ce=2.5,
        bpb=1.5,
        load=[[3, 1]],
        drop_rate=0.0,
        tok_per_s=1234.5,
        val=dict(val_ce=2.0, val_bpb=2.9),
    )
    line = live_line(last, cfg, time.perf_counter(), 0)
    assert (
        line.startswith('step 30/30  ce 2.500')
        and '1,234 tok/s  max load 1.50' in line
        and '0:00 left' in line
    )
    assert line.endswith('| validation: ce 2.000, 2.900 bits/byte')
    assert 'left' not in live_line(last, cfg, time.perf_counter(), 30)  # nothing to extrapolate from yet


def test_a_validation_on_a_part_is_named_so():
    row = dict(val_ce=2.0, val_bpb=2.9, val_tokens=100, val_bytes=300, step=5)
    assert 'on a part of the validation text' in validation_lines(row, dict(tokens=999, domains=[]))[0]
    assert 'on the whole validation text' in validation_lines(row, dict(tokens=101, domains=[]))[0]


def test_a_run_among_several_that_cannot_start(tmp_path):
    with pytest.raises(
        RuntimeError, match=r'impossible failed: top_k must be between 1 and n_experts=4, got 9'
    ):
        train_all({'impossible': 'tiny --max_iters 4 --device cpu --top_k 9'}, str(tmp_path))
