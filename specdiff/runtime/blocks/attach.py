"""Attach: watch the calls of a module, whatever runs inside it.

Compiled or not, in one graph or many, by blocks, quantised, offloaded, sharded: of the module only
the boundary counts (`specdiff.boundary`), by which whole steps are forecast. Where its blocks are
compiled by specdiff, each on its own, they compute the active tokens alone, as a whole graph would.

    call of the module -> look once at each form of call -> programs of the root, or whole steps
                       -> the runtime that answers a graph, too
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specdiff.boundary import Leaf, is_scalar, step_signature
from specdiff.errors import Unsupported
from specdiff.options import Options
from specdiff.program import (
    NAME_TOKENS,
    CacheSlot,
    Denoised,
    InputRole,
    InputSpec,
    Programs,
    Segment,
    Signature,
    time_rank,
)
from specdiff.runtime.blocks.block import Diverged, Prunable, RootCall, Visit, identities, under
from specdiff.runtime.blocks.patchify import Patches, possible
from specdiff.runtime.blocks.root_programs import Own, RootPrograms, forward
from specdiff.runtime.blocks.row_batch import RowBatches, Supply
from specdiff.runtime.blocks.watched import answer_of, unwatch, watch
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.step.shapes import remember
from specdiff.runtime.step.step_programs import StepPrograms
from specdiff.runtime.streams.registry import ModelState, named_rows

logger = logging.getLogger(__name__)

TRAINED = "gradients are recorded (torch.no_grad() around a picture's steps)"
OTHER_BLOCKS = "the model calls other blocks each time"
NO_BLOCKS = "no block of the model is compiled by specdiff"
ROWS = "rows that were named are computed or forecast whole"
MAX_SHAPES = 8
"""Call shapes that are remembered, each with caches of its own."""
MAX_LOOKS = 4
"""Looks at calls of one shape, before calls that go through other blocks each time run dense."""
FORGIVEN = 8
"""Calls answered for one look more."""


@dataclass(frozen=True)
class Form:
    """What answers calls of one shape."""

    runtime: Runtime
    restored: Callable[[Sequence[Any]], Any]
    """The model's output, of its leaves."""


class Attachment:
    """Answers the calls of one module, until `detach`. Made by `specdiff.attach`."""

    def __init__(
        self, root: nn.Module, options: Options, state: ModelState, holder: str | None = None
    ) -> None:
        self._root = root
        self._holder = holder
        self._options = options
        self._state = state
        self._forms: dict[Hashable, Form | str] = {}
        forward = getattr(root, "_orig_mod", root).forward
        self._argument_names = tuple(inspect.signature(forward).parameters)
        self._known_places: dict[Hashable, list[tuple[str, bool]]] = {}
        self._lost: defaultdict[Hashable, float] = defaultdict(float)
        """How often of late calls of a shape went through other blocks than before."""
        self._rows = RowBatches(state, self._key, self._of_rows)
        watch(root, self._answer)

    def __deepcopy__(self, memo: object) -> Attachment:
        return self  # a copy of the module is not attached

    def detach(self) -> None:
        """Leave the module to itself again: calls are dense, or what its compiled graph makes."""
        if answer_of(self._root) == self._answer:
            unwatch(self._root)

    def reasons(self) -> tuple[str, ...]:
        """Why calls run dense or select no tokens, each reason once."""
        forms = self._forms.values()
        reasons = [f if isinstance(f, str) else f.runtime.unselectable for f in forms]
        return tuple(dict.fromkeys(reason for reason in reasons if reason))

    def _answer(self, own: Own, args: Any, kwargs: Any) -> Any:
        """The output of one call."""
        leaves, arguments = pytree.tree_flatten((args, kwargs))
        if torch.is_grad_enabled() and self._is_trained(leaves):
            self._state.count_dense(TRAINED)
            self._state.say(logger, f"running dense: {TRAINED}")
            return own(*args, **kwargs)
        if named := named_rows(self._state):
            try:
                return self._rows.answer(own, (args, kwargs), named)
            except Unsupported as error:
                self._state.refusals.add(str(error))
                self._state.say(logger, f"attached model runs dense: {error}")
                return self._whole(own, args, kwargs, str(error))
        key = self._key(leaves, arguments)
        for _ in range(2):  # blocks may not be those of the last look
            form = self._forms.get(key)
            if form is None:
                form = self._look(own, leaves, arguments)
                remember(self._forms, key, form, MAX_SHAPES)
            if isinstance(form, str):
                break
            try:
                outputs = form.runtime(*leaves)
            except Diverged as error:
                self._forget(key, str(error))
                continue
            if self._lost:
                self._lost[key] = max(0.0, self._lost[key] - 1 / FORGIVEN)
            return form.restored(outputs)
        reason = self._forms.get(key)
        return self._whole(own, args, kwargs, reason if isinstance(reason, str) else OTHER_BLOCKS)

    def _whole(self, own: Own, args: Any, kwargs: Any, reason: str) -> Any:
        """The output of one call that runs dense."""
        self._state.count_dense(reason)
        with under(RootCall("whole")):
            return own(*args, **kwargs)

    def _is_trained(self, leaves: Sequence[Any]) -> bool:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return any(t.requires_grad for t in (*tensors, *self._root.parameters()))

    def _key(self, leaves: Sequence[Any], arguments: pytree.TreeSpec) -> Hashable:
        """What of a call decides how it runs: of a time only that there is one."""
        names = self._names(arguments)
        time = _time(names, leaves, self._options.timestep_arg)
        kinds = [_kind_of(leaf) for leaf in leaves]
        if time is not None and not isinstance(leaves[time], Tensor):
            kinds[time] = str(type(leaves[time]))
        return (arguments, tuple(kinds))

    def _forget(self, key: Hashable, reason: str) -> None:
        """Look again, as adapters may have been loaded or switched; but not for ever."""
        self._lost[key] += 1
        if self._lost[key] < MAX_LOOKS:
            self._forms.pop(key, None)  # another thread may have been here
        else:
            self._forms[key] = self._dense(reason)

    def _look(self, own: Own, leaves: Sequence[Any], arguments: pytree.TreeSpec) -> Form | str:
        """One forward with the blocks as they were traced; then what it allows."""
        call = RootCall("plain", identities(self._root.parameters()))
        outputs, restored = forward(own, leaves, arguments, call)
        programs: Programs
        try:
            if not call.visits:
                raise Unsupported(NO_BLOCKS)
            patches = _patches_of(outputs, call.visits, self._holder)
            signature = self._signature(leaves, arguments, patches, outputs[0], call.visits)
            programs = RootPrograms(
                self._root, own, arguments, patches, self._holder, call.visits, signature
            )
            return Form(self._runtime(programs, programs.plain), restored)
        except Unsupported as error:
            reason = str(error)
        try:
            return Form(self._whole_steps(own, leaves, arguments, outputs, reason), restored)
        except Unsupported as error:
            return self._dense(str(error))

    def _whole_steps(
        self,
        own: Own,
        leaves: Sequence[Any],
        arguments: pytree.TreeSpec,
        outputs: Sequence[Any],
        reason: str,
    ) -> Runtime:
        """What forecasts whole steps of a model of which one call is known."""
        signature = self._step_signature(leaves, arguments, outputs, reason)

        def model(inputs: Sequence[object]) -> Sequence[Any]:
            return forward(own, inputs, arguments, RootCall("whole"))[0]

        programs = StepPrograms(model, signature)
        return self._runtime(programs, lambda *inputs: model(inputs))

    def _of_rows(
        self,
        own: Own,
        leaves: Sequence[Any],
        arguments: pytree.TreeSpec,
        outputs: Sequence[Any],
        supply: Supply,
    ) -> Runtime:
        """What forecasts whole steps of rows that their session tells from others."""
        signature = self._step_signature(leaves, arguments, outputs, ROWS)

        def model(inputs: Sequence[object]) -> Sequence[Any]:
            computed = supply.take(inputs)
            return computed or forward(own, inputs, arguments, RootCall("whole"))[0]

        # rows are copies, made anew for each call: as conditions they would tell nothing
        named = [
            replace(each, role="scalar") if each.role == "condition" else each
            for each in signature.inputs
        ]
        programs = StepPrograms(model, replace(signature, inputs=tuple(named)))
        return self._runtime(programs, lambda *inputs: model(inputs))

    def _step_signature(
        self, leaves: Sequence[Any], arguments: pytree.TreeSpec, outputs: Sequence[Any], reason: str
    ) -> Signature:
        known = [
            Leaf(name, value, in_list=item)
            for (name, item), value in zip(self._places(arguments), leaves, strict=True)
        ]
        return step_signature(known, outputs, self._options.timestep_arg, reason)

    def _runtime(self, programs: Programs, plain: Callable[..., Any]) -> Runtime:
        return Runtime(programs, self._options, plain, self._state)

    def _dense(self, reason: str) -> str:
        logger.warning("attached model runs dense: %s", reason)
        self._state.refusals.add(reason)
        return reason

    def _signature(
        self,
        leaves: Sequence[Any],
        arguments: pytree.TreeSpec,
        patches: Patches,
        output: Tensor,
        visits: Sequence[Visit],
    ) -> Signature:
        names = self._names(arguments)
        tokens = patches.split(output)
        slots = _slots(visits, Prunable(patches.tokens, self._holder))
        if any(slot.shape[0] != len(output) for slot in slots):
            raise Unsupported("the samples of a block are not those of the output")
        denoised = _denoised(leaves, output)
        time = _time(names, leaves, self._options.timestep_arg)
        roles: dict[int, InputRole] = {
            i: "scalar" for i, leaf in enumerate(leaves) if is_scalar(leaf, len(output))
        }
        roles[denoised.latent] = "latent"
        if time is not None:
            roles[time] = "time"
        inputs = [InputSpec(i, n, roles.get(i, "condition")) for i, n in enumerate(names)]
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

    def _names(self, arguments: pytree.TreeSpec) -> list[str]:
        """What each leaf is called."""
        return [name for name, _ in self._places(arguments)]

    def _places(self, arguments: pytree.TreeSpec) -> list[tuple[str, bool]]:
        """What each leaf is called, and whether it is an item of a list."""
        places = self._known_places.get(arguments)
        if places is None:
            flat = pytree.tree_unflatten([0] * arguments.num_leaves, arguments)
            paths, _ = pytree.tree_flatten_with_path(flat)
            places = [self._place(path) for path, _ in paths]
            remember(self._known_places, arguments, places, MAX_SHAPES)
        return places

    def _place(self, path: tuple[Any, ...]) -> tuple[str, bool]:
        """By the last key in dicts, or else by the argument; `path` begins in (args, kwargs)."""
        keys = [step.key for step in path if isinstance(step, pytree.MappingKey)]
        names = [key for key in keys if isinstance(key, str)]
        first, names_known = path[1], self._argument_names
        if not names and isinstance(first, pytree.SequenceKey) and first.idx < len(names_known):
            names = [names_known[first.idx]]
        in_list = len(path) > 2 and isinstance(path[-1], pytree.SequenceKey)
        return (names[-1] if names else "", in_list)


def _patches_of(outputs: Sequence[Any], visits: Sequence[Visit], holder: str | None) -> Patches:
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        raise Unsupported(f"the model returns {len(outputs)} values, not one tensor")
    lengths = frozenset(length for v in visits for length in v.block.lengths_of(holder))
    if not lengths and holder is not None:
        held = sorted({name for v in visits for name, some in v.block.held.items() if some})
        raise Unsupported(f"tokens: {holder!r} holds none in any block, but {held} do")
    ways = list(possible(outputs[0].shape, lengths))
    if len(ways) > 1:  # the prompt may be as long as the picture in larger patches: it ends inside
        returned = visits[-1].block.returned
        ways = [way for way in ways if way.tokens in returned] or ways
    if len(ways) != 1:
        raise Unsupported(
            f"an output of shape {list(outputs[0].shape)} can be seen in {len(ways)} ways as tokens"
            f" of its blocks, which have {sorted(lengths)}; {NAME_TOKENS}"
        )
    return ways[0]


def _slots(visits: Sequence[Visit], prunable: Prunable) -> tuple[CacheSlot, ...]:
    planned = [v.block.planned(prunable) for v in visits if v.block.has(prunable)]
    return tuple(slot for programs in planned for slot in programs.slots)


def _denoised(leaves: Sequence[Any], output: Tensor) -> Denoised:
    floats = [
        (i, leaf)
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    fitting = [Denoised.match(i, leaf.shape, 0, output.shape) for i, leaf in floats]
    matches = [match for match in fitting if match is not None]
    if not matches:
        raise Unsupported("no input has the shape of the output, so none is known to be denoised")
    return min(matches, key=lambda match: match.shared is not None)


def _time(names: Sequence[str], leaves: Sequence[Any], wanted: str | None) -> int | None:
    ranks = [
        (rank, i)
        for i, name in enumerate(names)
        if leaves[i] is not None and (rank := time_rank(name, wanted)) is not None
    ]
    return min(ranks)[1] if ranks else None


def _kind_of(leaf: object) -> Hashable:
    """What of a leaf decides how a call runs."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    return leaf if isinstance(leaf, bool | int | str) else str(type(leaf))
