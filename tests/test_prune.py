"""A pruned model is a run like any other: every program takes it, and training continues from it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nanomoe import data, evaluate, prune, report, sample, train
from nanomoe.command_line import parse
from nanomoe.config import BadInput, ModelConfig
from nanomoe.data import prepare_missing
from nanomoe.model import GPT
from nanomoe.pretrained import export_hf, load_model

MODERN = '--qk_norm=True --norm=rmsnorm --activation=swiglu --positions=rotary --expert_width=24'


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    "A run of a few steps that transformers can load, 4 experts in each of 2 layers."
    prepare_missing('numbers')
    out = tmp_path_factory.mktemp('prune') / 'run'
    quick = f'--max_iters=4 --warmup_iters=1 --eval_iters=2 --device=cpu --out_dir={out}'
    list(train.train(*parse(['tiny', *MODERN.split(), *quick.split()])))
    return out


@pytest.fixture(scope='module', params=['reap', 'frequency', 'merge'])
def pruned(request, trained) -> Path:
    out = trained.parent / request.param
    prune.main([str(trained), '--keep', '3', '--n', '4', '--method', request.param, '--out_dir', str(out)])
    return out


def test_every_program_takes_a_pruned_run(pruned, capsys, tmp_path):
    model = load_model(pruned)
    assert model.cfg.n_experts == 3 and model.h[0].mlp.experts.c_fc.shape[0] == 3
    sample.main([str(pruned), '--start', '7 +', '--max_new_tokens', '4', '--device', 'cpu'])
    sample.main([str(pruned), '--domains', 'True', '--max_new_tokens', '4', '--device', 'cpu'])
    evaluate.main([str(pruned), '--n', '2', '--device', 'cpu'])
    assert 'parity' in capsys.readouterr().out
    assert 'n_experts' in report.report(pruned)
    assert export_hf(pruned, tmp_path / 'hf') < 1e-4


def test_training_continues_from_a_pruned_run(pruned, capsys):
    before = load_model(pruned).state_dict()
    record = list(train.train(*parse([str(pruned / 'config.json')])))[-1]
    assert record.step == 4 and math.isfinite(record.val['val_ce'])
    after = load_model(pruned).state_dict()
    assert before.keys() == after.keys() and not torch.equal(before['wte.weight'], after['wte.weight'])


def test_a_run_can_start_from_a_pruned_run(trained, tmp_path):
    prune.main([str(trained), '--keep=2', '--n=4', f'--out_dir={tmp_path}/two'])
    words = f'tiny {MODERN} --init_from={tmp_path}/two --n_experts=2 --max_iters=1 --warmup_iters=0'
    list(train.train(*parse([*words.split(), '--device=cpu', f'--out_dir={tmp_path}/on'])))
    assert load_model(tmp_path / 'on').cfg.n_experts == 2


BAD = {
    'too few': ('{run} --keep=1 --out_dir={new}', 'keep must be from 2 to n_experts=4, got 1'),
    'too many': ('{run} --keep=5 --out_dir={new}', 'keep must be from 2 to n_experts=4, got 5'),
    'folder in use': ('{run} --keep=3 --out_dir={run}', 'out_dir must be a new folder, got {run}'),
    'no folder': ('{run} --keep=3', 'give a run and a new folder, such as out/onboard --out_dir out/pruned'),
    'no run': ('--out_dir={new}', 'give a run and a new folder, such as out/onboard --out_dir out/pruned'),
    'not a run': ('gpt2 --out_dir={new}', 'give the folder of a run, such as out/onboard, got gpt2'),
    'missing': ('{new} --out_dir={new}', 'give the folder of a run, such as out/onboard, got {new}'),
    'no text': ('{run} --n=0 --out_dir={new}', 'n must be at least 1, got 0'),
    'method': ('{run} --method=luck --out_dir={new}', "invalid choice 'luck' for argument '--method'"),
    'option': ('{run} --kep=3 --out_dir={new}', 'there is no option --kep; did you mean keep?'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_gets_one_sentence(case, trained, tmp_path, capsys):
    words, sentence = (text.format(run=trained, new=tmp_path / 'new') for text in BAD[case])
    with pytest.raises(SystemExit) as stopped:
        prune.main(words.split())
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and sentence in said and '\n' not in said
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('content', [b'[]', b'null', b'["gates"]', b'{"a": 1}', b'\xff', b'[' * 100_000])
def test_settings_of_another_get_one_sentence(content, tmp_path, capsys):
    (tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        prune.main([str(tmp_path), f'--out_dir={tmp_path}/new'])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and 'config.json holds no settings: ' in said and '\n' not in said


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(n_experts=1), 'the model must have experts, and this one is dense'),
        (dict(router='hash'), 'each token must choose among all experts by their scores, got router=hash'),
        (dict(n_groups=2, top_groups=1), 'got router=softmax, top_groups=1'),
    ],
)
def test_models_that_cannot_be_pruned_are_named(options, sentence):
    model = GPT(ModelConfig(vocab_size=20, n_layer=1, n_embd=16, n_head=2, moe_every=1, **options))
    with pytest.raises(BadInput, match=sentence):
        prune.prune_experts(model, torch.rand(1, 8), 2)


def test_experts_without_a_token_are_removed_first_and_merge_into_nothing():
    cfg = ModelConfig(vocab_size=20, n_layer=1, n_embd=16, n_head=2, moe_every=1, n_experts=6)
    model = GPT(cfg).eval()
    used = torch.tensor([[0.6, 0.4, 0, 0, 0, 0]])
    importance = prune.Importance(used, 3 * used, torch.rand(1, 6, 6))
    for keep in (2, 4):
        for small in (
            prune.prune_experts(model, importance.reap, keep),
            prune.merge_experts(model, importance, keep),
        ):
            assert all(p.isfinite().all() for p in small.parameters())
    merged = prune.merge_experts(model, importance, 2).h[0].mlp.experts.c_fc
    torch.testing.assert_close(merged, model.h[0].mlp.experts.c_fc[:2], atol=1e-6, rtol=0)


def test_a_run_on_another_vocabulary_is_named(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / 'copy')
    settings = json.loads((copy / 'config.json').read_text())
    (copy / 'config.json').write_text(json.dumps(settings | {'dataset': str(tmp_path / 'other')}))
    (tmp_path / 'text.txt').write_text('Experts read what routers send.\n' * 300)
    data.main([str(tmp_path / 'text.txt'), '--tokenizer=chars', '--out', str(tmp_path / 'other')])
    with pytest.raises(SystemExit) as stopped:
        prune.main([str(copy), '--keep=3', f'--out_dir={tmp_path}/new'])
    assert stopped.value.code == 2
    assert 'was tokenized with a different vocabulary' in capsys.readouterr().err


def test_llama_cpp_knows_every_tensor_of_an_export(trained, tmp_path):
    """Its converter stacks the experts' matrices and renames; `gguf` holds its table of names.

    What it makes of the tokenizer is not tested: it accepts only tokenizers whose hash it has in a list.
    """
    gguf = pytest.importorskip('gguf')
    export_hf(trained, tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config['num_hidden_layers'])
    shapes, experts = {}, {}
    for path in (tmp_path / 'hf').glob('*.safetensors'):
        with safe_open(path, 'pt') as f:
            for name in f.keys():
                parts, shape = name.split('.'), f.get_slice(name).get_shape()
                if 'experts' in parts:
                    number = parts.pop(parts.index('experts') + 1)
                    experts.setdefault('.'.join(parts), set()).add(int(number))
                    shape = [config['num_experts'], *shape]
                gguf_name = table.get_name('.'.join(parts), try_suffixes=('.weight',))
                assert gguf_name, name
                assert shapes.setdefault(gguf_name, shape) == shape
    assert all(numbers == set(range(config['num_experts'])) for numbers in experts.values())
    E, F, C = config['num_experts'], config['moe_intermediate_size'], config['hidden_size']
    D, H, G = config['head_dim'], config['num_attention_heads'], config['num_key_value_heads']
    wanted = {
        'ffn_gate_inp': [E, C],
        'ffn_gate_exps': [E, F, C],
        'ffn_up_exps': [E, F, C],
        'ffn_down_exps': [E, C, F],
        'attn_q': [H * D, C],
        'attn_k': [G * D, C],
        'attn_v': [G * D, C],
        'attn_output': [C, H * D],
        'attn_q_norm': [D],
        'attn_k_norm': [D],
        'attn_norm': [C],
        'ffn_norm': [C],
    }
    layers = range(config['num_hidden_layers'])
    needed = {f'blk.{i}.{name}.weight': shape for i in layers for name, shape in wanted.items()}
    needed |= {name: [config['vocab_size'], C] for name in ('token_embd.weight', 'output.weight')}
    needed['output_norm.weight'] = [C]
    if 'output.weight' not in shapes:  # a tied head: llama.cpp takes the embedding
        assert config['tie_word_embeddings'] and needed.pop('output.weight')
    assert shapes == needed
