"""Mixture-of-experts language models. The names that most programs need, imported when they are first used.

>>> model, run = nanomoe.PRESETS['nano_moe']
>>> model.n_experts, model.top_k
(8, 2)
"""
import importlib

__version__ = "0.1.0"

_MODULE = {
    'ModelConfig': 'config', 'TrainConfig': 'config', 'PRESETS': 'presets', 'GPT': 'model', 'MoE': 'experts',
    'Routing': 'router', 'train': 'train', 'generate': 'sample', 'load': 'sample', 'prepare': 'data',
}
__all__ = list(_MODULE)


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f'nanomoe has no {name}; it offers {", ".join(__all__)}')
    module = importlib.import_module(f'nanomoe.{_MODULE[name]}')
    return module if name == 'train' else getattr(module, name)  # the module can be called like its function


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
