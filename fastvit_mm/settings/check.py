"""Whether a config can work: its sections, types, names of settings and values."""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import Registry
from mmengine.runner import (
    EpochBasedTrainLoop,
    FlexibleRunner,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from fastvit_mm.errors import FastViTError

from .names import READERS, Registered, known_scope, mentioned, nearest, spoken, suggestion
from .options import Change, places, unread, wrong_kind
from .signatures import Takes, accepted, definer
from .values import out_of_range, together, unlike_annotation

STAGES = dict(
    train=('train_dataloader', 'train_cfg', 'optim_wrapper'),
    val=('val_dataloader', 'val_cfg', 'val_evaluator'),
    test=('test_dataloader', 'test_cfg', 'test_evaluator'),
)
#: Top-level keys that mmengine, the other packages and the tools read.
READ = {
    *inspect.signature(Runner.__init__).parameters,
    *inspect.signature(FlexibleRunner.__init__).parameters,
    *('activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval'),
    *('find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn'),
    *('test_pipeline', 'tta_model', 'tta_pipeline', 'init_weights_for_test_or_val', 'demo'),
} - {'self', 'cfg'}

#: What is read of it to train, to test, and to predict.
TRAIN = READ
TEST = READ - {*STAGES['train'], *STAGES['val'], 'param_scheduler', 'auto_scale_lr'}
PREDICT = {'model', 'data_preprocessor', 'default_scope', 'test_dataloader', 'test_pipeline'}

# What mmengine builds at a place, its list indices left out.
DATA = r'(?:train|val|test)_dataloader'
BUILT = {
    r'model': roots.MODELS,
    rf'{DATA}(\.datasets?)+': roots.DATASETS,
    rf'{DATA}(\.datasets?)+\.pipeline': roots.TRANSFORMS,
    rf'{DATA}\.(batch_)?sampler': roots.DATA_SAMPLERS,
    rf'{DATA}\.(collate_fn|worker_init_fn)': roots.FUNCTIONS,
    r'(train|val|test)_cfg': roots.LOOPS,
    r'(val|test)_evaluator(\.metrics)?': roots.METRICS,
    r'optim_wrapper': roots.OPTIM_WRAPPERS,
    r'optim_wrapper\.optimizer': roots.OPTIMIZERS,
    r'param_scheduler': roots.PARAM_SCHEDULERS,
    r'custom_hooks|default_hooks\.\w+': roots.HOOKS,
    r'visualizer': roots.VISUALIZERS,
    r'visualizer\.vis_backends': roots.VISBACKENDS,
    r'log_processor': roots.LOG_PROCESSORS,
    r'model\.(.+\.)?(norm_cfg|act_cfg|conv_cfg|backbone|neck)': roots.MODELS,
    r'model\.(.+\.)?init_cfg': roots.WEIGHT_INITIALIZERS,
}
COMPILED = [(re.compile(pattern), root) for pattern, root in BUILT.items()]
# What builds the rest, and how near an unknown name must be to one of theirs to be a typo.
LIKELY = dict(model=((roots.MODELS, roots.TASK_UTILS), 0.6))
ELSEWHERE = ((roots.TRANSFORMS,), 0.85)

# Read before the rest is handed to the type.
BESIDES = {
    roots.HOOKS: {'priority'},
    roots.PARAM_SCHEDULERS: {'convert_to_iter_based', 'epoch_length'},
    roots.OPTIM_WRAPPERS: {'constructor', 'paramwise_cfg', 'optimizer'},
    roots.LOOPS: {'by_epoch'},
    roots.EVALUATOR: {'metrics'},
    roots.WEIGHT_INITIALIZERS: {'override'},
    roots.MODELS: {'requires_grad'},
}
STACK = READERS | {'torch'}
ALWAYS = {'type', '_scope_', '_delete_'}
LOADER = {
    *inspect.signature(DataLoader.__init__).parameters,
    *('num_batch_per_epoch', 'disable_subprocess_warning'),
}
# Parts without a type: what their keys are.
PLAIN = {
    DATA: LOADER,
    'randomness': {*inspect.signature(Runner.set_randomness).parameters},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'compile': {*inspect.signature(torch.compile).parameters, 'target'},
    r'optim_wrapper\.clip_grad': {
        *inspect.signature(clip_grad_norm_).parameters,
        *inspect.signature(clip_grad_value_).parameters,
        'type',
    },
}
# There, a key that nobody reads does no harm: only what is nearly one of these is a mistake.
LENIENT = {'env_cfg', 'auto_scale_lr', 'compile'}
# How code reads a top-level key; how it reads and removes one of a part; how it defines a name.
READ_FROM_CFG = r"""\bcfg(?:\.|\[['"]|\.(?:get|pop)\(\s*['"]){}\b"""
READ_FROM_PART = r"""['"]{}['"]|\.{}\b"""
DEFINED = r"""(?:class|def)\s+{}\b|['"]{}['"]"""

# Their keys are data (names of parameters, classes, hooks), or go to code outside this stack.
FREE = {'custom_keys', 'metainfo', 'default_hooks'} | {
    *('compile', 'define_metric_cfg', 'dist_cfg', 'init_kwargs', 'mp_cfg', 'model_wrapper_cfg')
}


def check(cfg: Config, changes: Iterable[Change] = (), reads: set[str] = TRAIN) -> None:
    """Refuse a config that cannot work.

    Args:
        changes: what :func:`.merge` has changed; these settings must be read by something.
        reads: sections to check: :data:`TRAIN`, :data:`TEST` or :data:`PREDICT`. Those that
            ``changes`` concern come on top.

    Raises:
        FastViTError: says what is wrong first, where, and what it might mean.
    """
    changes = list(changes)
    Check(cfg, reads | {c.path[0] for c in changes} & READ).run(changes)


class Check:
    def __init__(self, cfg: Config, reads: set[str]):
        self.tree, self.text, self.reads = cfg._cfg_dict, cfg.text, reads
        self.sections = [k for k in self.tree if k in reads]
        self.targets: dict[str, Callable] = {}  # what the type at a path names

    def run(self, changes: list[Change]) -> None:
        self.check_sections()
        for change in changes:
            if isinstance(change.old, list) or 'type' in dict_of(change.old):
                self.check_kind(change)
        self.registered = Registered(known_scope(self.tree.get('default_scope') or 'mmengine'))
        for section in self.sections:
            self.visit(self.tree[section], section)
        for problem in together(self.tree, self.sections):
            raise FastViTError(problem)
        for change in changes:
            self.check_kind(change)
        self.check_top_level(changes)
        self.check_changes(changes)

    def check_sections(self) -> None:
        if not isinstance(self.tree.get('model'), dict):
            raise FastViTError(
                'the config has no model: it is a part that whole configs inherit, as from _base_'
            )
        for stage, names in STAGES.items():
            if not self.reads >= set(names):
                continue
            given = [n for n in names if self.tree.get(n) is not None]
            if 0 < len(given) < 3 or (stage == 'train' and not given):
                missing = [n for n in names if n not in given]
                typos = [t for n in missing if (t := nearest(n, set(self.tree) - READ, 0.85))]
                raise FastViTError(
                    f'{", ".join(names)} belong together: without {", ".join(missing)}'
                    + (f' (instead, there is {", ".join(typos)})' if typos else '')
                )

    def check_top_level(self, changes: list[Change]) -> None:
        """Keys that nothing reads: those given as options, and obvious typos in the file."""
        given = {c.path[0]: c for c in changes}
        suspects = {k for k in self.tree if k not in READ and (k in given or close(k, READ))}
        read = {k: v for k, v in self.tree.items() if k in READ}
        for key in sorted(suspects):
            used = self.is_used(key) or any(places(read, self.tree[key]))
            if (key in given or not used) and not mentioned(key, READ_FROM_CFG, self.packages()):
                raise FastViTError(unread(key, self.tree, given.get(key), READ))

    def is_used(self, key: str) -> bool:
        """Whether the config's files name a variable more than once. Of the bases that a file
        imports (``read_base``) the text is not known."""
        times = len(re.findall(rf'\b{re.escape(key)}\b', self.text))
        return times > 1 or (times == 0 and 'read_base' in self.text)

    def check_kind(self, change: Change) -> None:
        *above, key = change.path
        if self.is_own('.'.join(change.path)):
            return
        target = self.targets.get('.'.join(above))
        parameter = accepted(target).names.get(key) if target else None
        if parameter and isinstance(change.new, str) and 'str' in str(parameter.annotation):
            return  # such as loss_scale='dynamic', and the name of an arch in place of its settings
        if problem := wrong_kind(change):
            raise FastViTError(problem)

    def visit(self, node: Any, path: str) -> None:
        """Check a part of the tree."""
        if self.is_own(path):
            return
        if what := out_of_range(path, node):
            raise FastViTError(f'{path}={node!r}: give {what}')
        if isinstance(node, list | tuple):
            for index, child in enumerate(node):
                self.visit(child, f'{path}.{index}')
            return
        if not isinstance(node, dict):
            self.expect_dict(node, path)
            return
        self.check_dict(node, path)
        scope = node.get('_scope_')
        outer = self.registered
        if isinstance(scope, str):
            self.registered = Registered(known_scope(scope))
        for key, child in node.items():
            self.visit(child, f'{path}.{key}')
        self.registered = outer

    def expect_dict(self, node: Any, path: str) -> None:
        root = root_of(path)
        if root is not None and (isinstance(node, str) or is_number(node)):
            raise FastViTError(f'{path}={node!r}: give a dict with a type')

    def check_dict(self, node: dict, path: str) -> None:
        root = root_of(path)
        for pattern, names in PLAIN.items():
            if re.fullmatch(pattern, path):
                given = {k: v for k, v in node.items() if path not in LENIENT or close(k, names)}
                self.check_names(given, path, Takes(dict.fromkeys(names), False))
        if 'type' not in node:
            target = default_type(node, path)
            if target is None and root is not None and must_have_type(node, path):
                raise FastViTError(f'{path} has no type')
        else:
            target = self.find(node['type'], path, root)
        if target is None:
            return
        self.targets[path] = target
        takes, besides = accepted(target), BESIDES.get(root, set()) | ALWAYS
        if 'constructor' in node:  # it reads settings of its own
            self.find(node['constructor'], path, roots.OPTIM_WRAPPER_CONSTRUCTORS, 'constructor')
            return
        self.check_names(node, path, takes, besides, name_of(target), nested=root is None)
        for key, value in node.items():
            what = unlike_annotation(takes.names.get(key), value)
            if what and not self.is_own(f'{path}.{key}'):
                raise FastViTError(f'{path}.{key}={value!r}: give {what}')
        if path == 'optim_wrapper':
            self.check_paramwise(node)

    def check_names(
        self,
        node: dict,
        path: str,
        takes: Takes,
        besides: set[str] = ALWAYS,
        owner: str = '',
        nested: bool = False,
    ) -> None:
        """Every key of ``node`` must be one that its type takes."""
        known = takes.names.keys() | besides
        for key in node:
            if key in known or not isinstance(key, str):
                continue
            if takes.anything and (not close(key, known) or self.is_mentioned(key)):
                continue
            if nested and self.may_be_removed(key, path, close(key, known)):
                continue
            what = f'{owner} takes no {key}' if owner else 'there is no such setting'
            raise FastViTError(f'{path}.{key}: {what}; {suggestion(key, known - ALWAYS)}')

    def check_paramwise(self, node: dict) -> None:
        source = inspect.getsource(DefaultOptimWrapperConstructor)
        known = set(re.findall(r"""paramwise_cfg(?:\.get\(|\[)\s*'(\w+)'""", source))
        given = node.get('paramwise_cfg')
        if isinstance(given, dict):
            takes = Takes(dict.fromkeys(known), False)
            self.check_names(given, 'optim_wrapper.paramwise_cfg', takes)

    def find(
        self, kind: Any, path: str, root: Registry | None, key: str = 'type'
    ) -> Callable | None:
        """What the ``type`` at ``path`` names; None if it may be something else than a type."""
        if not isinstance(kind, str):
            if callable(kind):
                return kind
            raise FastViTError(f'{path}.{key}={kind!r}: give a name')
        if root is not None:
            likely, cutoff = (root,), 0.0
            target = self.registered.get(root, kind)
            if root is roots.METRICS and target is None:
                target = self.registered.get(roots.EVALUATOR, kind)
        else:
            likely, cutoff = LIKELY.get(path.partition('.')[0], ELSEWHERE)
            target = self.registered.get_anywhere(kind, likely)
        if target is not None:
            return target
        known = self.registered.names(*likely)
        # Elsewhere than where mmengine builds, a type may also name an operator, a mode ...
        if root is None and (not nearest(kind, known, cutoff) or self.is_defined(kind)):
            return None
        where = self.registered.scope
        if not self.tree.get('default_scope'):
            where += ', and the config sets no default_scope'
        raise FastViTError(
            f'{path}.{key}={kind!r} is not known in {where}: {suggestion(kind, known)}'
        )

    def check_changes(self, changes: list[Change]) -> None:
        """Settings that options have added, where no type says what it takes."""
        for change in changes:
            *above, key = change.path
            if not change.added or not above or FREE & set(above) or not key.isidentifier():
                continue
            place, path = '.'.join(above), '.'.join(change.path)
            target = self.targets.get(place)
            known = set(accepted(target).names) if target else set()
            known |= {n for p, names in PLAIN.items() if re.fullmatch(p, place) for n in names}
            if key not in known and not self.is_own(path) and not self.is_mentioned(key):
                parent = self.tree
                for name in above:
                    parent = parent[int(name) if isinstance(parent, list) else name]
                known |= set(parent) if isinstance(parent, dict) else set()
                known -= ALWAYS | {key}
                text = f': {suggestion(key, known)}' if known else ''
                raise FastViTError(f'nothing reads {path}{text}')

    def is_own(self, path: str) -> bool:
        """Whether what is at ``path`` is given to a parameter that a class from outside this stack
        defines: one of a project's own, which may do with it what it likes."""
        names = path.split('.')
        around = (
            (self.targets.get('.'.join(names[:depth])), names[depth])
            for depth in range(1, len(names))
        )
        return any(t is not None and definer(t, key) not in STACK for t, key in around)

    def may_be_removed(self, key: str, path: str, is_close: bool) -> bool:
        """Whether what is around a dict may read and remove a key of it before building it."""
        around = [t for at, t in self.targets.items() if f'{path}.'.startswith(f'{at}.')]
        modules = {
            k.__module__ for t in around for k in ((inspect.isclass(t) and t.__mro__) or [t])
        }
        if spoken(key, READ_FROM_PART, modules):
            return True
        return not is_close and self.is_mentioned(key)

    def is_defined(self, name: str) -> bool:
        """Whether any imported code of this stack defines or quotes such a name."""
        return mentioned(name, DEFINED, self.packages())

    def is_mentioned(self, key: str) -> bool:
        """Whether any imported code of this stack has such a word."""
        return mentioned(key, r'\b{}\b', self.packages())

    def packages(self) -> set[str]:
        """Packages whose code may read the config: this stack, its imports, its types."""
        imports = (self.tree.get('custom_imports') or {}).get('imports') or []
        imports = [imports] if isinstance(imports, str) else imports
        names = [*imports, *(t.__module__ for t in self.targets.values())]
        return READERS | {str(n).partition('.')[0] for n in names} - {'torch', 'torchvision'}


def dict_of(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def root_of(path: str) -> Registry | None:
    """The registry that builds what is at ``path``."""
    plain = re.sub(r'\.\d+(?=\.|$)', '', path)
    return next((root for pattern, root in COMPILED if pattern.fullmatch(plain)), None)


def default_type(node: dict, path: str) -> Callable | None:
    """What mmengine takes where no type is given."""
    if path == 'train_cfg':
        return EpochBasedTrainLoop if node.get('by_epoch') else IterBasedTrainLoop
    return dict(val_cfg=ValLoop, test_cfg=TestLoop, log_processor=LogProcessor).get(path)


def must_have_type(node: dict, path: str) -> bool:
    if path in ('optim_wrapper', 'visualizer'):
        return False
    if path == 'param_scheduler':  # those of several optimizers, each under its name
        return not any(isinstance(value, dict | list) for value in node.values())
    return 'metrics' not in node and not path.startswith('model.')


def name_of(target: Callable) -> str:
    return getattr(target, '__name__', str(target))


def close(name: str, known: Iterable[str]) -> bool:
    """Whether a name is nearly, but not quite, one that is known."""
    near = nearest(name, known, 0.85)
    return near is not None and near != name
