"""What happens to a run when something outside it goes wrong: real processes, real stops."""
import json
import math
import os
import subprocess
import sys
import time

from nanomoe import checkpoint

TINY = ['tiny', '--log_interval=1', '--device=cpu']
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def torchrun(program, *words, **kwargs) -> subprocess.CompletedProcess:
    "The program on two processes."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(program)]
    return subprocess.run([*command, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, **kwargs)


def test_a_process_that_stands_still_is_named(tmp_path):
    program = tmp_path/'program.py'
    program.write_text('import os, sys, time\nfrom nanomoe import train\n'
                       'real = train.training_batch\n'
                       'def stuck(data, first, *rest):\n'
                       '    if os.environ["RANK"] == "1" and first >= 5 * 16: time.sleep(600)\n'
                       '    return real(data, first, *rest)\n'
                       'train.training_batch = stuck\n'
                       'train.main(sys.argv[1:])')
    begun = time.monotonic()
    done = torchrun(program, *TINY, '--hang_timeout=5', '--checkpoint_interval=2', f'--out_dir={tmp_path}/run')
    assert done.returncode == 1 and time.monotonic() - begun < 120
    assert done.stderr.count('has not come on for 5 seconds') == 1 and 'process 1 (pid ' in done.stderr
    assert checkpoint.load_latest(tmp_path/'run').step == 4


def test_a_gradient_that_is_nan_on_one_process_is_skipped_by_both(tmp_path):
    program = tmp_path/'program.py'
    program.write_text('import math, os, sys\nfrom nanomoe import train\n'
                       'real, bad = train.micro_batch, [int(s) for s in sys.argv[1].split(",")]\n'
                       'def poisoned(run, number, last):\n'
                       '    hook = None\n'
                       '    if os.environ["RANK"] == "1" and run.step in bad:\n'
                       '        hook = run.model.wpe.weight.register_hook(lambda g: g * math.nan)\n'
                       '    try: return real(run, number, last)\n'
                       '    finally: hook and hook.remove()\n'
                       'train.micro_batch = poisoned\n'
                       'train.main(sys.argv[2:])')
    words = [*TINY, '--max_iters=12', '--checkpoint_interval=5']
    done = torchrun(program, '3,7', *words, f'--out_dir={tmp_path}/two')
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path/'two'/'log.jsonl').read_text().splitlines()]
    assert [row['skipped'] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert all(math.isfinite(row['ce']) for row in rows)
    weights = checkpoint.load_latest(tmp_path/'two').tensors['model']
    assert all(w.isfinite().all() for w in weights.values())
    done = torchrun(program, '7,8,9', *words, f'--out_dir={tmp_path}/three')
    assert done.returncode == 1 and 'was not finite in 3 updates in a row, up to step 10' in done.stderr
    assert checkpoint.load_latest(tmp_path/'three').step == 5
