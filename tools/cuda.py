"""GPU tests and benchmarks.

    make cuda                                  # all sections; about 25 minutes on an H100 (estimated)
    python tools/cuda.py --only layer,step     # some of them; the others' earlier results are kept
    python tools/cuda.py --dry                 # smoke test: tiny sizes on a CPU

Each section runs in a process of its own with a time limit, so that a failure costs one section. The results
go to assets/bench/cuda/DATE-CARD.json (out/cuda with --dry), with the card, driver, versions, commit and
command; what a section had measured before it failed is kept, and its log beside. `step`, `target`,
`pretrain` and `ladder` need what `data` prepares.
"""

import argparse
import datetime
import gc
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
HERE = ROOT / 'out' / 'cuda'  # texts and runs; another folder for --dry
PYTHON = [sys.executable]


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument('--only', default=','.join(SECTIONS), help='comma-separated sections')
    arguments.add_argument('--dry', action='store_true', help='tiny sizes on a CPU')
    arguments.add_argument('--out', type=Path, help='folder for the results')
    arguments.add_argument('--wheels', type=Path, help='folder with wheels of missing packages')
    arguments.add_argument('--against', help='nanoMoE clone whose layer is timed too')
    arguments.add_argument('--commit', help='what to record where there is no git')
    arguments.add_argument('--section', help=argparse.SUPPRESS)  # what a section's own process is told
    given = arguments.parse_args()
    if given.section:
        return run_section(given)
    if given.wheels and not [*given.wheels.glob('*.whl')]:
        arguments.error(f'{given.wheels} holds no wheels')
    names = given.only.split(',')
    if unknown := [name for name in names if name not in SECTIONS]:
        arguments.error(f'there is no section {unknown[0]} (sections: {", ".join(SECTIONS)})')
    brought = (
        {path.name.split('-')[0].lower() for path in given.wheels.glob('*.whl')} if given.wheels else set()
    )
    if missing := [name for name in NEEDED if name not in brought and not importlib.util.find_spec(name)]:
        arguments.error(
            f'{", ".join(missing)} cannot be imported; give a folder with their wheels: --wheels FOLDER'
        )
    facts, folder = (
        machine(given),
        (given.out or (HERE if given.dry else ROOT / 'assets' / 'bench' / 'cuda')).resolve(),
    )
    if not given.dry and not facts['card']:
        arguments.error('this machine has no CUDA GPU; try --dry')
    folder.mkdir(parents=True, exist_ok=True)
    card = re.sub('[^a-z0-9]+', '-', facts['card'].lower()).strip('-') or 'cpu'
    path = folder / f'{"dry" if given.dry else facts["date"]}-{card}.json'
    found = json.loads(path.read_text())['sections'] if path.exists() else {}
    print(', '.join(f'{key} {value}' for key, value in facts.items()), flush=True)
    with tempfile.TemporaryDirectory() as extra:
        if given.wheels:
            subprocess.run(
                [
                    *PYTHON,
                    '-m',
                    'pip',
                    'install',
                    '-q',
                    '--no-index',
                    '--no-deps',
                    '--target',
                    extra,
                    *given.wheels.glob('*.whl'),
                ],
                check=True,
            )
        for name in names:
            found[name] = in_a_process(name, given, folder, extra)
            path.write_text(json.dumps(without_nan(dict(machine=facts, sections=found)), indent=1) + '\n')
            show(name, found[name])
    print(
        '\n'
        + table(
            [
                dict(
                    section=name,
                    result=found[name]['result'],
                    seconds=found[name]['seconds'],
                    headline=found[name]['headline'],
                )
                for name in names
            ]
        ),
        path,
        sep='\n',
    )
    sys.exit(any(found[name]['result'] != 'passed' for name in names))


def in_a_process(name: str, given, folder: Path, extra: str) -> dict:
    "Run a section in a subprocess; return its results or its error."
    start, out, log = time.monotonic(), folder / f'.{name}.json', folder / f'{name}.log'
    words = [*PYTHON, __file__, '--section', name, '--out', folder, *['--dry'] * given.dry]
    if given.against:
        words += ['--against', Path(given.against).resolve()]
    paths = [extra, str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    print(f'== {name}', flush=True)
    out.unlink(missing_ok=True)
    with open(log, 'w') as f:
        process = subprocess.Popen(
            words,
            stdout=f,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | {'PYTHONPATH': os.pathsep.join(paths), 'PYTHONUNBUFFERED': '1'},
        )
        try:
            result = 'passed' if process.wait(60 * SECTIONS[name][0]) == 0 else 'failed'
        except subprocess.TimeoutExpired:
            result = 'timed out'
        finally:
            for pid in [*descendants(process.pid), process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()
    said, found = (
        log.read_text(errors='replace').strip().splitlines(),
        json.loads(out.read_text()) if out.exists() else {},
    )
    if result == 'passed':
        log.unlink()
    else:
        found |= dict(headline=(said or ['no output'])[-1][:160], log=said[-40:])
    out.unlink(missing_ok=True)
    return (
        dict(
            result=result,
            seconds=round(time.monotonic() - start, 1),
            command=f'python tools/cuda.py --only {name}',
        )
        | found
    )


def descendants(pid: int) -> list[int]:
    "All processes below one, the deepest first; torchrun gives its workers sessions of their own."
    parents = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            parents.setdefault(int(path.read_text().rpartition(')')[2].split()[1]), []).append(
                int(path.parent.name)
            )
        except OSError:
            pass  # it has just ended

    def below(pid):
        return [found for child in parents.get(pid, []) for found in [*below(child), child]]

    return below(pid)


def run_section(given):
    global HERE
    if given.dry:
        HERE = given.out / 'dry'
    HERE.mkdir(parents=True, exist_ok=True)
    note(given, **SECTIONS[given.section][1](given))


def note(given, **found):
    "Keep what has been found so far."
    made = given.out / f'.{given.section}.tmp'
    made.write_text(json.dumps(found))
    made.replace(given.out / f'.{given.section}.json')


def without_nan(value):
    "`value` with NaN replaced by None, as JSON has no NaN."
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if value != value else value


def machine(given) -> dict:
    "Hardware, versions, commit and command recorded with the results."
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() and not given.dry else ''

    def said(*words):
        try:
            return (
                subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.strip().splitlines()[0]
            )
        except (OSError, IndexError):
            return 'unknown'

    return dict(
        date=datetime.date.today().isoformat(),
        card=card,
        driver=said('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader') if card else '',
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        cores=os.cpu_count(),
        commit=given.commit or said('git', 'describe', '--always', '--dirty'),
        command=' '.join(['python', 'tools/cuda.py', *sys.argv[1:]]),
    )


def table(rows: list[dict]) -> str:
    "Rows as aligned text; missing values as –."
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value):
        return '–' if value is None else f'{value:,.4g}' if isinstance(value, float) else str(value)

    cells = [columns] + [[text(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells
    )


def show(name: str, found: dict):
    print(f'{found["result"]} in {found["seconds"]} s: {found["headline"]}')
    if found.get('rows'):
        print(table(found['rows']))
    if found.get('log'):
        print('\n'.join(found['log']))
    print(flush=True)


# What the sections share


def device(dry: bool):
    import torch

    return torch.device('cpu') if dry else torch.device('cuda', 0)


def low(dry: bool):
    "bfloat16 by autocast."
    import torch

    return torch.autocast(device(dry).type, torch.bfloat16)


def wait(dry: bool):
    if not dry:
        import torch

        torch.cuda.synchronize()


def milliseconds(cases: dict[str, Callable], repeats: int) -> dict[str, float]:
    "Median time per case in ms, interleaved, after warm-up."
    from nanomoe.bench import interleaved

    interleaved(cases, 1)
    return {name: 1e3 * statistics.median(times) for name, times in interleaved(cases, repeats).items()}


def shrunk(cfg, dry: bool, **changes):
    "`cfg` with a vocabulary size; tiny if `dry`."
    cfg = replace(cfg, vocab_size=cfg.vocab_size or 50304, **changes)
    if not dry:
        return cfg
    narrow = dict(expert_width=24, n_kv_head=1) if cfg.n_kv_head else {}
    return replace(
        cfg,
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=32,
        vocab_size=512,
        n_experts=min(cfg.n_experts, 8),
        top_k=min(cfg.top_k, 2),
        **narrow,
    )


def training(dry: bool, name: str, **changes):
    "`TrainConfig` for the text prepared by `data`."
    from nanomoe.config import TrainConfig

    usual = dict(
        out_dir=str(HERE / name),
        dataset=str(HERE / 'data'),
        device=device(dry).type,
        dtype='bfloat16',
        min_lr=0.0,
        eval_iters=4 if dry else 50,
        checkpoint_interval=10**9,
        log_interval=10,
    )
    shutil.rmtree(HERE / name, ignore_errors=True)
    return TrainConfig(**usual | changes)


def command(*words) -> str:
    "Output of a Python command, shown as it comes; raises `RuntimeError` where it fails."
    lines = []
    with subprocess.Popen(
        [*PYTHON, *map(str, words)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
            lines.append(line)
    if process.returncode:
        raise RuntimeError(f'{" ".join(map(str, words[:2]))} failed: {(lines or ["no output"])[-1].strip()}')
    return ''.join(lines)


# The sections: each returns its headline and its rows, and raises where something is wrong


def tests(given) -> dict:
    "Run tests/test_cuda.py."
    chosen = 'kernel_of_a_gpu or orthogonalized or plain_loop' if given.dry else 'not cpu'
    said = command(
        '-m',
        'pytest',
        '-q',
        '-p',
        'no:cacheprovider',
        '--tb=short',
        '--durations=5',
        '-k',
        chosen,
        'tests/test_cuda.py',
    )
    return dict(
        headline=said.strip().splitlines()[-1].strip('= '),
        rows=[],
        slowest=re.findall(r'^[\d.]+s .*', said, re.M),
    )


def text_of(kind: str, endings: tuple[str, ...], roots: list[Path], limit: int) -> Path:
    """One file of all texts with these endings below the folders, up to so many bytes, in a fixed order of
    their names.
    """
    from nanomoe.corpora import in_fixed_order
    from nanomoe.tokenizer import EOT

    files = [
        (str(path.relative_to(root)), path)
        for root in roots
        if root.is_dir()
        for path in root.rglob('*')
        if path.suffix in endings and path.is_file()
    ]
    made, size = HERE / 'text' / f'{kind}.txt', 0
    made.parent.mkdir(exist_ok=True)
    with open(made, 'w') as f:
        for _, path in in_fixed_order(files):
            text = path.read_text(errors='replace')
            if size >= limit:
                break
            if 200 < len(text) < 500_000 and EOT not in text:
                size += f.write(text + EOT)
    return made


def data(given) -> dict:
    "Tokenize source code and docs found on this machine; time it and batch loading."
    from nanomoe.bench import Bench
    from nanomoe.bench import data as read

    site, most = Path(sysconfig.get_paths()['purelib']), 300_000 if given.dry else 60_000_000
    stdlib = Path(sysconfig.get_paths()['stdlib'])
    headers = [Path('/usr/include'), Path('/usr/local/cuda/include'), site]
    texts = [
        text_of('python', ('.py',), [stdlib, site] if not site.is_relative_to(stdlib) else [stdlib], most),
        text_of('headers', ('.h', '.hpp', '.cuh'), headers, most),
        text_of('prose', ('.md', '.rst', '.txt'), [site], most),
    ]
    start = time.monotonic()
    command(
        '-m',
        'nanomoe.data',
        *texts,
        '--out',
        HERE / 'data',
        '--vocab_size',
        512 if given.dry else 8192,
        '--val_fraction',
        0.02,
    )
    seconds, manifest = time.monotonic() - start, json.loads((HERE / 'data' / 'manifest.json').read_text())
    tokens = sum(split['tokens'] for split in manifest['splits'].values())
    rows = [
        {
            'what': f'batches, {row["case"]}',
            'million tokens/s': row['million_tok_per_s'],
            'speedup': row['speedup'],
        }
        for row in read(Bench(device=device(given.dry).type, repeats=1 if given.dry else 7))
    ]
    return dict(
        headline=f'{tokens / 1e6:,.1f} M tokens prepared in {seconds:.0f} s',
        tokens=tokens,
        rows=[{'what': 'preparation', 'million tokens/s': tokens / seconds / 1e6}] + rows,
    )


def layer(given) -> dict:
    """One layer beside its matched dense MLP, Hugging Face's and the original's, forward and backward in
    bfloat16.
    """
    from nanomoe import bench
    from nanomoe.bench import Bench, make_pass, report
    from nanomoe.bench import layer as all_cases

    if given.dry:
        bench.peak_memory = lambda *args: float('nan')  # on a CPU each case would take a process of its own
    base = Bench(
        dtype='bfloat16', device=device(given.dry).type, against=given.against, repeats=2 if given.dry else 15
    )
    shapes = {
        'C 384, 8/2': {},
        'C 384, 64/8': dict(n_experts=64, top_k=8, expert_width=192),
        'C 1536, 8/2': dict(n_embd=1536, expert_width=6144),
    }
    rows = []
    for name, shape in shapes.items():
        b = replace(base, **shape, against=given.against if name == 'C 384, 8/2' else None)
        if given.dry:
            b = replace(
                b,
                n_tokens=64,
                n_embd=32,
                expert_width=64 if 'expert_width' in shape else 128,
                n_experts=min(b.n_experts, 8),
            )
        both = {'dense': ('dense', 'moe'), 'moe': ('dense', 'moe')}
        made = [dict(compiled=False) | row for row in all_cases(b)]
        if not given.dry or name == 'C 384, 8/2':
            made += [dict(compiled=True) | row for row in report(both, make_pass, replace(b, compile=True))]
        for row in made:
            matrices = 3 if re.search('swiglu|Mixtral', row['case']) else 2
            work = 6 * matrices * b.n_tokens * b.top_k * b.n_embd * b.expert_width
            rows.append(dict(shape=name) | row | dict(tflop_s=work / row['ms'] / 1e9))
        note(given, headline='', rows=rows)
    found = {(row['shape'], row['case'], row['compiled']): row for row in rows}
    said = [
        f'{name}: {found[name, "moe", False]["ms"]:.2f} ms, '
        f'{found[name, "moe", False]["times_dense"]:.2f}× matched dense'
        for name in shapes
    ]
    return dict(headline='; '.join(said), rows=rows)


def parts_of(model, B: int, dry: bool) -> dict[str, tuple[Callable, int]]:
    "Per layer type: a forward-backward function and the layer count."
    import torch
    from nanomoe.experts import MoE
    from nanomoe.model import chunked_cross_entropy
    from nanomoe.losses import Losses
    from nanomoe.metrics import step_stats

    cfg, where = model.cfg, model.wte.weight.device
    x = torch.randn(B, cfg.block_size, cfg.n_embd, device=where, requires_grad=True)
    ids = torch.randint(cfg.vocab_size, (B, cfg.block_size), device=where)
    sparse = [block.mlp for block in model.h if isinstance(block.mlp, MoE)]
    dense = [block.mlp for block in model.h if not isinstance(block.mlp, MoE)]
    _, routing = sparse[0](x.detach(), ids)

    def both(f):
        def run():
            with low(dry):
                y = f(x)
            y.sum().backward() if y.dim() else y.backward()
            wait(dry)

        return run

    def routed(x):
        experts, kept = sparse[0].experts, sparse[0].experts.forward
        experts.forward = lambda rows, offsets=None: rows
        try:
            return sparse[0](x, ids)[0]
        finally:
            experts.forward = kept

    def statistics_of():
        step_stats(Losses(*x.new_zeros(4)), (routing,) * len(sparse))
        wait(dry)

    cases = {
        'attention': (both(model.h[0].attn), len(model.h)),
        'experts and routing': (both(lambda x: sparse[0](x, ids)[0]), len(sparse)),
        'routing': (both(routed), len(sparse)),
        'head': (both(lambda x: chunked_cross_entropy(x.flatten(0, 1), model.wte.weight, ids.flatten())), 1),
        'statistics': (statistics_of, 1),
    }
    return cases | ({'dense MLPs': (both(dense[0]), len(dense))} if dense else {})


def step(given) -> dict:
    "Training throughput by micro-batch size, cost per layer type, cost of data loading."
    import torch
    from nanomoe.presets import PRESETS
    from nanomoe.parallel import DistContext
    from nanomoe.train import Trainer, peak_flops

    dry, where, rows, parts = given.dry, device(given.dry), [], {}
    peak = peak_flops(where, torch.bfloat16)
    run = Trainer(
        shrunk(PRESETS['nano_moe'][0], dry),
        training(dry, 'waiting', compile=not dry, batch_size=2 if dry else 12, gradient_accumulation_steps=8),
        DistContext(device=where),
    )
    real, fixed = run.feed, run.feed[0]

    class Same:
        def __getitem__(self, number):
            return fixed

    def with_feed(feed):
        def one():
            run.feed = feed
            run.train_step()
            wait(dry)

        return one

    waits = milliseconds({'read': with_feed(real), 'fixed': with_feed(Same())}, 2 if dry else 10)
    said = f'step time with data loading: {waits["read"] / waits["fixed"]:.3f}× a fixed batch'
    note(given, headline=said, waits=waits)
    run = None  # its model makes room
    cases = [('nano_moe', 12, True), ('nano_moe', 64, True), ('modern', 64, True)]
    cases += [(preset, B, False) for preset in ('nano_moe', 'modern') for B in (12, 32, 64)]
    for preset, B, compiled in [('nano_moe', 2, False), ('modern', 2, False)] if dry else cases:
        row, shares = throughput(shrunk(PRESETS[preset][0], dry), B, compiled, dry, peak)
        rows.append(dict(preset=preset) | row)
        if shares:
            parts[preset] = shares
        best = max(rows, key=lambda row: row['mfu'])
        found = dict(
            headline=f'{best["preset"]}, B {best["B"]}: {best["tok_per_s"] / 1e3:,.0f} thousand tokens/s, '
            f'MFU {best["mfu"]:.1%}; {said}',
            rows=rows,
            parts=parts,
            waits=waits,
        )
        note(given, **found)
    return found


def throughput(cfg, B: int, compiled: bool, dry: bool, peak: float) -> tuple[dict, dict]:
    "One row of `step`, and for the smallest eager batch the share of each layer type in a micro-batch."
    import torch
    from nanomoe.config import TrainConfig
    from nanomoe.model import GPT, flops_per_token
    from nanomoe.optim import make_optimizer

    torch._dynamo.reset()
    gc.collect()  # compiled models sit in reference cycles
    before = 0 if dry else torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model = GPT(cfg).to(device(dry)).train()
    optimizer = make_optimizer(model, TrainConfig())
    if compiled:
        model.compile()
    x, y = torch.randint(cfg.vocab_size, (2, B, cfg.block_size), device=device(dry))

    def micro_batch():
        with low(dry):
            loss = model(x, y, keep_logits=False).losses.total
        loss.backward()
        wait(dry)

    def finish():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wait(dry)

    micro_batch()
    finish()
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    ms = milliseconds({'micro-batch': micro_batch, 'finish': finish}, 2 if dry else 12)
    gib = None if dry else (torch.cuda.max_memory_allocated() - before) / 2**30
    # of a step of 40 micro-batches
    rate = 40 * B * cfg.block_size / (40 * ms['micro-batch'] + ms['finish']) * 1e3
    row = dict(
        B=B,
        compiled=compiled,
        ms=ms['micro-batch'],
        finish_ms=ms['finish'],
        tok_per_s=round(rate),
        mfu=rate * flops_per_token(cfg) / peak,
        peak_gib=gib,
    )
    if compiled or B > 12:
        return row, {}
    cases = parts_of(model, B, dry)
    each = milliseconds({name: run for name, (run, _) in cases.items()}, 2 if dry else 12)
    return row, {name: each[name] * count / ms['micro-batch'] for name, (_, count) in cases.items()}


def timed_run(given, name: str, cfg, seconds: float, **changes) -> dict:
    "Train for about `seconds`, schedule fitted to that; return final metrics and the validation curve."
    from nanomoe.parallel import DistContext
    from nanomoe.train import Trainer, train

    settings = training(
        given.dry,
        name,
        batch_size=4 if given.dry else 32,
        gradient_accumulation_steps=1,
        compile=not given.dry,
        **changes,
    )
    trial = Trainer(cfg, settings, DistContext(device=device(given.dry)))
    for _ in range(1 if given.dry else 5):
        trial.train_step()
    start = time.perf_counter()
    for _ in range(2 if given.dry else 20):
        trial.train_step()
    pace = (time.perf_counter() - start) / (2 if given.dry else 20)
    del trial
    gc.collect()
    steps = 6 if given.dry else int(seconds / pace)
    settings = replace(
        settings, max_iters=steps, warmup_iters=min(200, steps // 5), eval_interval=max(steps // 8, 1)
    )
    curve = [
        dict(step=r.step, tokens=r.tokens, seconds=r.step * pace, bpb=r.val['val_bpb'])
        for r in train(cfg, settings)
        if r.val
    ]
    return dict(
        case=name,
        seconds=steps * pace,
        steps=steps,
        tokens=curve[-1]['tokens'],
        ms_per_step=1e3 * pace,
        bpb=curve[-1]['bpb'],
        curve=curve,
    )


def target(given) -> dict:
    "Train three dense models and an MoE for equal time; compare bits per byte."
    from nanomoe.presets import PRESETS

    seconds = 1 if given.dry else 28
    base = dict(
        vocab_size=512 if given.dry else 8192,
        block_size=512,
        n_layer=6,
        n_head=6,
        positions='rotary',
        norm='rmsnorm',
        qk_norm=True,
    )
    make = lambda C, **experts: shrunk(replace(PRESETS['gpt2'][0], **base, n_embd=C, **experts), given.dry)
    cases = {f'dense C {C}': make(C) for C in (256, 384, 512)}
    cases['mixture 8/2 C 384'] = make(
        384, n_experts=8, top_k=2, expert_width=64 if given.dry else 768, moe_every=1, norm_topk_prob=True
    )
    rows = []
    for name, cfg in cases.items():
        rows.append(timed_run(given, name, cfg, seconds, optimizer='muon', learning_rate=5e-3))
        note(given, headline='', rows=rows)
    best, mixture = min(rows[:-1], key=lambda row: row['bpb']), rows[-1]
    there = next((at['seconds'] for at in mixture['curve'] if at['bpb'] <= best['bpb']), None)
    said = f'MoE matches it in {there / best["seconds"]:.2f}× the time' if there else 'MoE does not match it'
    return dict(
        headline=f'best dense ({best["case"]}) {best["bpb"]:.4f} bits per byte, MoE {mixture["bpb"]:.4f}; '
        f'{said}',
        rows=[{key: value for key, value in row.items() if key != 'curve'} for row in rows],
        curves={row['case']: row['curve'] for row in rows},
    )


def pretrain(given) -> dict:
    "Pretrain `modern` under torchrun for about 2 minutes; write a report and a sample."
    dry, log = given.dry, HERE / 'pretrain' / 'log.jsonl'
    shape = (
        [
            '--n_layer=2',
            '--n_embd=32',
            '--n_head=2',
            '--n_kv_head=1',
            '--block_size=32',
            '--n_experts=8',
            '--top_k=2',
            '--expert_width=24',
        ]
        if dry
        else []
    )
    words = [
        'modern',
        f'--dataset={HERE / "data"}',
        '--vocab_size=None',
        *shape,
        f'--batch_size={4 if dry else 32}',
        '--gradient_accumulation_steps=2',
        '--optimizer=muon',
        '--learning_rate=0.005',
        '--min_lr=0',
        '--warmup_iters=100',
        f'--device={device(dry).type}',
        '--log_interval=10',
        f'--eval_iters={2 if dry else 10}',
    ]

    def run(folder, steps):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        return command(
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=1',
            '-m',
            'nanomoe.train',
            *words,
            f'--out_dir={HERE / folder}',
            f'--max_iters={steps}',
            f'--eval_interval={max(steps // 5, 1)}',
            f'--checkpoint_interval={steps}',
        )

    run('trial', 10 if dry else 40)
    pace = [
        json.loads(line)['tok_per_s']
        for line in (HERE / 'trial' / 'log.jsonl').read_text().splitlines()
        if 'tok_per_s' in line
    ][-1]
    steps = 20 if dry else int(110 * pace / (2 * 32 * 1024))
    said = run('pretrain', steps)
    command('-m', 'nanomoe.viz', 'report', HERE / 'pretrain')
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    wrote = command(
        '-m', 'nanomoe.sample', HERE / 'pretrain', '--max_new_tokens=100', f'--device={device(dry).type}'
    )
    shutil.copy(HERE / 'pretrain' / 'report.html', given.out / 'report.html')
    last = rows[-1]
    return dict(
        headline=f'{last["tokens"] / 1e6:,.1f} M tokens at {last["tok_per_s"] / 1e3:,.0f} thousand/s, MFU '
        f'{last["mfu"]:.1%}: '
        f'{last["val_bpb"]:.4f} bits per byte',
        rows=[],
        summary=said.strip().splitlines()[-6:],
        sample=wrote,
        log=[],
        curve=[
            {key: row[key] for key in ('step', 'ce', 'val_bpb', 'mfu', 'tok_per_s') if key in row}
            for row in rows
        ],
    )


def muon(given) -> dict:
    "Update time of Muon and AdamW, and Muon's share of a step of 491,520 tokens."
    import torch
    from nanomoe.config import TrainConfig
    from nanomoe.presets import PRESETS
    from nanomoe.model import GPT
    from nanomoe.optim import make_optimizer

    rows = []
    for preset in ('nano_moe', 'modern'):
        cfg, B = shrunk(PRESETS[preset][0], given.dry), 2 if given.dry else 12
        model = GPT(cfg).to(device(given.dry))
        x, y = torch.randint(cfg.vocab_size, (2, B, cfg.block_size), device=device(given.dry))

        def micro_batch():
            with low(given.dry):
                loss = model(x, y, keep_logits=False).losses.total
            loss.backward()
            wait(given.dry)

        def updating(kind):
            optimizer = make_optimizer(model, TrainConfig(optimizer=kind, learning_rate=1e-6))

            def run():
                grads = [(p, p.grad) for p in model.parameters()]
                optimizer.step()
                for p, grad in grads:
                    p.grad = grad  # Muon takes them away
                wait(given.dry)

            return run

        micro_batch()
        ms = milliseconds(
            {'micro-batch': micro_batch, 'adamw': updating('adamw'), 'muon': updating('muon')},
            2 if given.dry else 10,
        )
        rows.append(
            dict(
                preset=preset,
                adamw_ms=ms['adamw'],
                muon_ms=ms['muon'],
                share_of_step=ms['muon'] / (40 * ms['micro-batch'] + ms['muon']),
            )
        )
    return dict(
        headline=', '.join(
            f'{row["preset"]}: {row["muon_ms"]:.1f} ms, {row["share_of_step"]:.1%} of a step' for row in rows
        ),
        rows=rows,
    )


def memory(given) -> dict:
    "Lesson 26's memory estimate against the measured peak."
    import torch
    from nanomoe.bench import resident
    from nanomoe.config import TrainConfig
    from nanomoe.presets import PRESETS
    from nanomoe.model import GPT
    from nanomoe.sizing import step_bytes
    from nanomoe.optim import make_optimizer

    rows = []
    nano = PRESETS['nano_moe'][0]
    cases = {
        'nano_moe': (nano, True),
        'nano_moe in float32': (nano, False),
        '32 experts': (replace(nano, n_experts=32), True),
        'modern': (PRESETS['modern'][0], True),
    }
    for name, (cfg, is_low) in cases.items():
        cfg, B = shrunk(cfg, given.dry), 2 if given.dry else 12
        before = resident('VmRSS') if given.dry else torch.cuda.memory_allocated()
        if given.dry:
            Path('/proc/self/clear_refs').write_text('5')
        else:
            torch.cuda.reset_peak_memory_stats()
        model = GPT(cfg).to(device(given.dry))
        optimizer = make_optimizer(model, TrainConfig())
        x, y = torch.randint(cfg.vocab_size, (2, B, cfg.block_size), device=device(given.dry))
        for _ in range(2):
            for _ in range(2):
                with torch.autocast(device(given.dry).type, torch.bfloat16, enabled=is_low):
                    loss = model(x, y, keep_logits=False).losses.total
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        measured = (resident('VmHWM') if given.dry else torch.cuda.max_memory_allocated()) - before
        planned = sum(step_bytes(cfg, B, is_low, 'cpu' if given.dry else 'cuda').values())
        rows.append(
            dict(
                case=name,
                planned_gib=planned / 2**30,
                measured_gib=measured / 2**30,
                ratio=planned / max(measured, 1),
            )
        )
        del model, optimizer, x, y, loss
    return dict(
        headline='planned/measured: ' + ', '.join(f'{row["case"]} {row["ratio"]:.2f}' for row in rows),
        rows=rows,
    )


def ladder(given) -> dict:
    "`nano_moe` at 10× the learning rate, with none and all of lesson 23's stabilisers."
    from nanomoe.presets import PRESETS
    from nanomoe.train import train

    cfg = shrunk(PRESETS['nano_moe'][0], given.dry)
    if not given.dry:
        cfg = replace(cfg, vocab_size=8192)
    rungs = {
        'none': replace(cfg, balance='none', router_z_loss_weight=0.0, router_float32=False, init='gpt2'),
        'all tricks': cfg,
    }
    rows, curves = [], {}
    for name, rung in rungs.items():
        run = training(
            given.dry,
            'ladder',
            max_iters=10 if given.dry else 1000,
            batch_size=2 if given.dry else 12,
            gradient_accumulation_steps=1,
            learning_rate=6e-3,
            warmup_iters=2 if given.dry else 100,
            decay_lr=False,
            grad_clip=0.0,
            weight_decay=0.0,
            compile=False,
            eval_interval=10**9,
            log_interval=2 if given.dry else 10,
        )
        curve, ended = curves.setdefault(name, []), 'at its last step'
        try:
            for r in train(rung, run):
                curve.append((r.step, r.ce))
        except RuntimeError as e:
            ended = str(e)
        last = [ce for _, ce in curve[-5:]]
        rows.append(
            dict(
                rung=name,
                best=min(ce for _, ce in curve),
                end=sum(last) / len(last),
                steps=curve[-1][0],
                ended=ended,
            )
        )
        note(given, headline='', rows=rows, curves=curves)
    return dict(
        headline=', '.join(f'{row["rung"]}: {row["end"]:.2f} nats at the end' for row in rows),
        rows=rows,
        curves=curves,
    )


def write(given) -> dict:
    "Decoding throughput with and without KV cache, batch sizes 1 and 64, eager and compiled."
    from nanomoe.bench import Bench
    from nanomoe.bench import write as timed

    rows, most = [], 4 if given.dry else 64
    cases = [
        (1, 'float32', False),
        (1, 'bfloat16', False),
        (most, 'float32', False),
        (most, 'bfloat16', False),
        (1, 'bfloat16', True),
    ]
    for B, dtype, compiled in cases if given.dry else [*cases, (most, 'bfloat16', True)]:
        b = Bench(
            preset='tiny' if given.dry else 'nano_moe',
            batch_size=B,
            dtype=dtype,
            device=device(given.dry).type,
            compile=compiled,
            repeats=1 if given.dry else 9,
        )
        rows += [dict(rows=B, dtype=dtype, compiled=compiled) | row for row in timed(b)]
    best = {
        B: max(row['tok_per_s'] for row in rows if row['rows'] == B)
        for B in dict.fromkeys(row['rows'] for row in rows)
    }
    return dict(
        headline=', '.join(f'{B} text{"s" * (B > 1)}: {rate:,.0f} tokens/s' for B, rate in best.items()),
        rows=rows,
    )


NEEDED = 'tyro typeguard docstring_parser tiktoken tokenizers safetensors matplotlib pytest'.split()
SECTIONS: dict[str, tuple[float, Callable]] = {  # minutes at most, and what runs; in order of value
    'tests': (4, tests),
    'data': (1.5, data),
    'layer': (2.5, layer),
    'step': (4, step),
    'target': (4.5, target),
    'pretrain': (4, pretrain),
    'muon': (0.75, muon),
    'memory': (0.75, memory),
    'ladder': (1.5, ladder),
    'write': (1.5, write),
}

if __name__ == '__main__':
    main()
