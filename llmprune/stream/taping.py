"""Record a block's forward as a tape.

Where the shapes of results depend on values (a mixture's routing), the innermost module around it becomes one operation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from llmprune.models.sites import Block, Site
from llmprune.stream.capture import Call, forwards_replaced
from llmprune.stream.tape import HIDDEN, Made, Operation, Ref, Tape, Use, filled, given, results


def record(block: Block, call: Call, hidden: Tensor) -> Tape | None:
    """Run the block once; None where its operations depend on values and no module within it bounds them."""
    whole: set[str] = set()
    while True:
        recorder = _Recorder(block.module, call, hidden, whole)
        try:
            with recorder.watching(block.sites), recorder:
                out = call.run(block.module, hidden)
        except _Depends as problem:
            if not problem.path or problem.path in whole:
                return None
            whole.add(problem.path)
        else:
            output = recorder.name(out)  # None: what the block returns is no result of a recorded operation
            return Tape(recorder.operations, recorder.uses, recorder.made, output) if output is not None else None


class _Depends(Exception):
    """An operation whose results' shapes depend on values, in the module at `path`."""

    def __init__(self, path: str) -> None:
        self.path = path


class _Recorder(TorchDispatchMode):
    """Writes down what is dispatched. Modules at the paths `whole` are one operation each."""

    def __init__(self, module: nn.Module, call: Call, hidden: Tensor, whole: set[str]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.uses: list[Use] = []
        self.made: dict[str, Made] = {}
        self._module, self._whole = module, whole
        self._names = WeakIdKeyDictionary()
        self._own = {id(tensor): path for path, tensor in _own_tensors(module)}
        self._stack = [""]
        self._inside = False
        for name, tensor in given(call).items():
            self._names[tensor] = name
        self._names[hidden] = HIDDEN

    def name(self, tensor: Tensor) -> str | None:
        return self._names.get(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        if _depends_on_values(func, args):
            raise _Depends(self._stack[-1])
        heavy = func._overloadpacket in flop_registry or "attention" in func.name()
        return self._write(func, func, args, kwargs, heavy)

    def _write(self, run: Any, func: Callable[..., Any], args: Any, kwargs: Any, heavy: bool) -> Any:
        versions: list[tuple[Tensor, int]] = []

        def refer(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                versions.append((leaf, leaf._version))
                return self._refer(leaf)
            return leaf

        taken = filled(tuple(args), refer), filled(kwargs, refer)
        out = func(*args, **kwargs)
        written = [self._names.get(leaf, "") for leaf, before in versions if leaf._version != before]
        if not all(name in self.made for name in written):
            raise _Depends("")  # it changes what it was given, or the block's own tensors
        outputs = tuple(map(self._named, results(out)))
        self.operations.append(Operation(run, taken[0], taken[1], outputs, tuple(written), heavy))
        return out

    def _refer(self, leaf: Tensor) -> Ref | Tensor:
        """A tensor that is neither computed nor given nor the block's own is a constant, and stays."""
        if leaf in self._names:
            return Ref(self._names[leaf])
        path = self._own.get(id(leaf))
        return Ref(path, own=True) if path is not None else leaf

    def _named(self, out: Any) -> str | None:
        if not isinstance(out, Tensor):
            return None
        if out not in self._names:
            name = self._names[out] = f"{len(self.operations)}.{len(self.made)}"
            whole = out.untyped_storage()
            self.made[name] = Made(out.nbytes, out.is_contiguous() and whole.nbytes() == out.nbytes, whole.data_ptr())
        return self._names[out]

    @contextmanager
    def watching(self, sites: Sequence[Site]) -> Iterator[None]:
        """Follow which module is running, and the uses of sites."""
        paths = sorted(self._whole)
        modules = [self._module.get_submodule(path) for path in paths]
        runs = [functools.partial(self._run_whole, module.forward) for module in modules]

        def write(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._write(paths[index], runs[index], args, kwargs, True)

        with ExitStack() as stack:
            stack.enter_context(forwards_replaced(modules, write))
            for path, module in self._module.named_modules():
                if path and path not in self._whole:
                    stack.callback(module.register_forward_pre_hook(functools.partial(self._enter, path)).remove)
                    stack.callback(module.register_forward_hook(self._leave).remove)
            for site in sites:
                stack.callback(site.watch(functools.partial(self._use, site.name)).remove)
            yield

    def _enter(self, path: str, *_: Any) -> None:
        self._stack.append(path)

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _use(self, site: str, x: Tensor, tokens: Tensor | None) -> None:
        value = None if self._inside else self._names.get(x)
        if value is None and not self._inside:
            raise _Depends("")
        self.uses.append(Use(site, len(self.operations), value))

    def _run_whole(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inside = True
        try:
            return forward(*args, **kwargs)
        finally:
            self._inside = False


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _depends_on_values(func: Any, args: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:  # by numbers its shape is known, by truth values not
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
