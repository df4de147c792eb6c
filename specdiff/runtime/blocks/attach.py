"""Attach: token selection for a model whose blocks are compiled one by one.

Two hooks on the root, nothing patched. The one before a call runs the evaluation, by the same
runtime that answers a whole graph, its programs being forwards of the root under which the blocks
compute all tokens or the active ones. The call itself then passes through idle blocks, and the hook
behind it hands out the result.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specdiff.errors import Unsupported
from specdiff.options import Options
from specdiff.program import (
    CacheSlot,
    Denoised,
    InputRole,
    InputSpec,
    Segment,
    Signature,
    time_names,
)
from specdiff.runtime.blocks.block import Diverged, RootCall, Visit, enter, identities, leave
from specdiff.runtime.blocks.patchify import Patches, possible
from specdiff.runtime.blocks.root_programs import RootPrograms, forward
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.step.shapes import remember

logger = logging.getLogger(__name__)

MAX_SHAPES = 8
"""Call shapes that are remembered, each with caches of its own."""
MAX_LOOKS = 4
"""Looks at calls of one shape, before calls that go through other blocks each time run dense."""
FORGIVEN = 8
"""Calls answered for one look more."""
_RESULT: ContextVar[tuple[object, Any] | None] = ContextVar("specdiff_result", default=None)
"""The attachment whose root is being called, and what that call is to return."""


@dataclass(frozen=True)
class Found:
    """What answers calls of one shape."""

    runtime: Runtime
    programs: RootPrograms
    structure: pytree.TreeSpec
    """Of the model's output."""


class Attachment:
    """The hooks of one root; `detach` removes them. Made by `specdiff.attach`."""

    def __init__(self, root: nn.Module, options: Options) -> None:
        self._root = root
        self._options = options
        self._found: dict[Hashable, Found | str] = {}
        forward = getattr(root, "_orig_mod", root).forward
        self._argument_names = tuple(inspect.signature(forward).parameters)
        self._lost: defaultdict[Hashable, float] = defaultdict(float)
        """How often of late calls of a shape went through other blocks than before."""
        self._hooks = (
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

    def detach(self) -> None:
        """Remove the hooks; blocks answer alone again, which means dense."""
        _RESULT.set(None)
        leave()
        for hook in self._hooks:
            hook.remove()

    def reasons(self) -> tuple[str, ...]:
        """Why calls run dense, each reason once."""
        reasons = [found for found in self._found.values() if isinstance(found, str)]
        return tuple(dict.fromkeys(reasons))

    def _before(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Run the evaluation; the call that follows passes through idle blocks."""
        _RESULT.set(None)
        leave()
        leaves, arguments = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *root.parameters())):
            return
        key = self._key(leaves, arguments)
        inputs = (*leaves, *root.parameters())
        for _ in range(2):  # blocks may not be those of the last look
            if key not in self._found:
                remember(self._found, key, self._look(leaves, arguments), MAX_SHAPES)
            found = self._found[key]
            if isinstance(found, str):
                return
            try:
                outputs = found.runtime(*inputs)
            except Diverged as error:
                self._forget(key, str(error))
                continue
            self._lost[key] = max(0.0, self._lost[key] - 1 / FORGIVEN)
            enter(found.programs.idle(inputs))
            _RESULT.set((self, pytree.tree_unflatten(outputs, found.structure)))
            return

    def _after(self, root: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The result that the hook before has."""
        result = _RESULT.get()
        if result is None or result[0] is not self:
            return output
        _RESULT.set(None)
        leave()
        return result[1]

    def _key(self, leaves: Sequence[Any], arguments: pytree.TreeSpec) -> Hashable:
        """What of a call decides how it runs: of a time only that there is one."""
        names = self._names(leaves, arguments)
        time = _time(names, leaves, self._options.timestep_arg)
        kinds = [_kind_of(leaf) for leaf in leaves]
        if time is not None and not isinstance(leaves[time], Tensor):
            kinds[time] = str(type(leaves[time]))
        return (arguments, tuple(kinds))

    def _forget(self, key: Hashable, reason: str) -> None:
        """Look again, as adapters may have been loaded or switched; but not for ever."""
        self._lost[key] += 1
        if self._lost[key] < MAX_LOOKS:
            self._found.pop(key, None)  # another thread may have been here
        else:
            self._found[key] = self._dense(reason)

    def _look(self, leaves: Sequence[Any], arguments: pytree.TreeSpec) -> Found | str:
        """One forward with the blocks as they were traced; then what it allows."""
        call = RootCall("plain", identities(self._root.parameters()))
        outputs, structure = forward(self._root, leaves, arguments, call)
        try:
            patches = _patches_of(outputs, call.visits)
            signature = self._signature(leaves, arguments, patches, outputs[0], call.visits)
        except Unsupported as error:
            return self._dense(str(error))
        programs = RootPrograms(self._root, arguments, patches, call.visits, signature)
        return Found(Runtime(programs, self._options, programs.plain), programs, structure)

    def _dense(self, reason: str) -> str:
        logger.warning("attached model runs dense: %s", reason)
        return reason

    def _signature(
        self,
        leaves: Sequence[Any],
        arguments: pytree.TreeSpec,
        patches: Patches,
        output: Tensor,
        visits: Sequence[Visit],
    ) -> Signature:
        names = self._names(leaves, arguments)
        tokens = patches.split(output)
        slots = _slots(visits, patches.tokens)
        if any(slot.shape[0] != len(output) for slot in slots):
            raise Unsupported("the samples of a block are not those of the output")
        denoised = _denoised(leaves, output)
        time = _time(names, leaves, self._options.timestep_arg)
        roles: dict[int, InputRole] = {
            i: "scalar" for i, leaf in enumerate(leaves) if _is_scalar(leaf, len(output))
        }
        roles[denoised.latent] = "latent"
        if time is not None:
            roles[time] = "time"
        inputs = [InputSpec(i, n, roles.get(i, "condition")) for i, n in enumerate(names)]
        for i, (name, _) in enumerate(self._root.named_parameters(), start=len(leaves)):
            inputs.append(InputSpec(i, name, "parameter"))
        return Signature(
            inputs=tuple(inputs),
            segments=(Segment("tokens", patches.tokens, True),),
            caches=slots,
            tokens=CacheSlot("tokens", tuple(tokens.shape), tokens.dtype, tokens.device),
            lengths=(patches.tokens,),
            denoised=(denoised,),
            time=time,
            additive=denoised.is_all_of(output),
        )

    def _names(self, leaves: Sequence[Any], arguments: pytree.TreeSpec) -> list[str]:
        """The argument of the root's forward that each leaf belongs to."""
        args, kwargs = pytree.tree_unflatten(list(leaves), arguments)
        named = [*zip(self._argument_names, args, strict=False), *kwargs.items()]
        found = [name for name, value in named for _ in pytree.tree_leaves(value)]
        return found + [""] * (len(leaves) - len(found))


def _patches_of(outputs: Sequence[Any], visits: Sequence[Visit]) -> Patches:
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        raise Unsupported(f"the model returns {len(outputs)} values, not one tensor")
    lengths = frozenset(length for visit in visits for length in visit.block.lengths)
    found = list(possible(outputs[0].shape, lengths))
    if len(found) != 1:
        raise Unsupported(
            f"an output of shape {list(outputs[0].shape)} can be seen in {len(found)} ways as"
            f" tokens of its blocks, which have {sorted(lengths)}"
        )
    return found[0]


def _slots(visits: Sequence[Visit], tokens: int) -> tuple[CacheSlot, ...]:
    planned = [v.block.planned(tokens) for v in visits if tokens in v.block.lengths]
    return tuple(slot for programs in planned for slot in programs.slots)


def _denoised(leaves: Sequence[Any], output: Tensor) -> Denoised:
    floats = [
        (i, leaf)
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    found = [Denoised.match(i, leaf.shape, 0, output.shape) for i, leaf in floats]
    matches = [match for match in found if match is not None]
    if not matches:
        raise Unsupported("no input has the shape of the output, so none is known to be denoised")
    return min(matches, key=lambda match: match.shared is not None)


def _time(names: Sequence[str], leaves: Sequence[Any], wanted: str | None) -> int | None:
    accepted = time_names(wanted)
    return next((i for i, n in enumerate(names) if n in accepted and leaves[i] is not None), None)


def _is_scalar(leaf: object, batch: int) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.is_floating_point() and leaf.numel() <= batch
    return isinstance(leaf, float)


def _kind_of(leaf: object) -> Hashable:
    """What of a leaf decides how a call runs."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    return leaf if isinstance(leaf, bool | int | str) else str(type(leaf))
