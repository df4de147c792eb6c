"""Row batches: rows of one call that belong to trajectories of their own.

    with specdiff.rows(model, [a, a, b, c]):
        model(latents [4, ...], times [4], prompts [4, ...])

    the rows of a session    one evaluation of one trajectory, decided as if it were alone
    those to be computed     one call of the model for all of them, padded to a few sizes
    the others               forecast
    all of them              in their rows again

That rows may be left out is checked once for each form of call: a session's rows alone must give
what they give among others. Where they do not, all rows are computed when one is due.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from specdiff.errors import OptionError, Unsupported
from specdiff.runtime.blocks.block import RootCall, under
from specdiff.runtime.blocks.root_programs import Own, flattened
from specdiff.runtime.blocks.row_parts import joined, taken
from specdiff.runtime.records.recording import StepRecord, begun, ended
from specdiff.runtime.step.dispatch import Due, Runtime
from specdiff.runtime.step.shapes import remember
from specdiff.runtime.streams.budget import keep_within
from specdiff.runtime.streams.registry import ModelState, Session, effective

logger = logging.getLogger(__name__)

MAX_FORMS = 8
"""Forms of a session's rows that are remembered."""
ROUNDINGS = 256
"""Relative difference, in roundings, that rows alone may have from rows among others."""
TOGETHER = (
    "rows of the batch depend on each other, or are not along the first axis of every input that"
    " has as many entries: all rows are computed when one is due"
)

Call = tuple[Any, Any]
"""Positional and named arguments."""
Outputs = Sequence[Any]
"""Flat outputs of the model."""
Make = Callable[[Own, Sequence[Any], pytree.TreeSpec, Outputs, "Supply"], Runtime]
"""(the module's own call, leaves and structure of a call, its outputs, where to find later ones) ->
what answers such calls. Raises Unsupported."""


class Supply:
    """Outputs that were computed for evaluations among those of others."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[int, ...], Outputs] = {}

    def put(self, leaves: Sequence[Any], outputs: Outputs) -> None:
        """Keep the outputs of a call with these leaves."""
        self._outputs[_name(leaves)] = outputs

    def take(self, leaves: Sequence[Any]) -> Outputs | None:
        """The outputs of a call with these leaves, if they were computed."""
        return self._outputs.pop(_name(leaves), None)

    def has(self, leaves: Sequence[Any]) -> bool:
        """Whether the outputs of a call with these leaves were computed."""
        return _name(leaves) in self._outputs

    def clear(self) -> None:
        """Forget all."""
        self._outputs.clear()


def _name(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Of a call, while its leaves live: some of them all calls share, the latent none does."""
    return tuple(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))


@dataclass
class Form:
    """What answers the rows of a session."""

    runtime: Runtime
    restored: Callable[[Sequence[Any]], Any]
    """The model's output, of its leaves."""
    apart: bool | None = None
    """Whether rows may be left out; None until it was checked."""


class Group:
    """The rows of one session in one call.

    Args:
        session: whose.
        rows: their numbers.
        whole: the call.
        batch: rows of the whole call.
    """

    def __init__(self, session: Session, rows: Sequence[int], whole: Call, batch: int) -> None:
        self.session = session
        self.rows = rows
        self.call: Call = taken(whole, rows, batch)
        self.leaves, self.arguments = pytree.tree_flatten(self.call)


class RowBatches:
    """Answers the calls of an attached module whose rows are named.

    Args:
        state: of the model.
        key: what of a call, by its leaves and their structure, decides how it runs.
        make: makes what answers the rows of a session.
    """

    def __init__(
        self,
        state: ModelState,
        key: Callable[[Sequence[Any], pytree.TreeSpec], Hashable],
        make: Make,
    ) -> None:
        self._state, self._key, self._make = state, key, make
        self._supply = Supply()
        self._forms: dict[Hashable, Form] = {}
        self._refusals: dict[Hashable, str] = {}
        """Why steps of such calls cannot be left out."""
        self._named: weakref.WeakSet[Session] = weakref.WeakSet()
        """Whoever had rows."""
        self._turn = threading.Lock()

    @torch.no_grad()
    def answer(self, own: Own, call: Call, sessions: Sequence[Session]) -> Any:
        """The output of one call.

        Raises:
            OptionError: not as many sessions as rows.
            Unsupported: no steps can be left out.
        """
        batch = len(sessions)
        _check(call, batch)
        if self._refusals and (refusal := self._refusals.get(self._key_of(call))):
            raise Unsupported(refusal)
        named = list(dict.fromkeys(sessions))
        places = [[i for i, each in enumerate(sessions) if each is session] for session in named]
        groups = [Group(*each, call, batch) for each in zip(named, places, strict=True)]
        with self._turn:
            self._supply.clear()  # of a call that failed
            try:
                forms = self._formed(own, call, groups, batch)
            except Unsupported as error:
                remember(self._refusals, self._key_of(call), str(error), MAX_FORMS)
                raise
            outputs = self._evaluated(own, call, groups, forms, batch)
            self._supply.clear()
            self._make_room(forms[0], named)
        return joined(outputs, places, batch)

    def _make_room(self, form: Form, named: Sequence[Session]) -> None:
        self._named.update(named)
        settings = effective(form.runtime.options, self._state, None)
        keep_within(settings.max_cache_bytes, self._named)

    def _key_of(self, call: Call) -> Hashable:
        return self._key(*pytree.tree_flatten(call))

    def _formed(self, own: Own, call: Call, groups: Sequence[Group], batch: int) -> list[Form]:
        """What answers each group; found by one call of all rows where it is new or unchecked."""
        keys = [self._key(group.leaves, group.arguments) for group in groups]
        others = len(groups) > 1
        known = [self._forms.get(key) for key in keys]
        if all(form is not None and (form.apart is not None or not others) for form in known):
            return [form for form in known if form is not None]
        whole, forms = _run(own, call), []
        for key, group in zip(keys, groups, strict=True):
            part, restored = flattened(taken(whole, group.rows, batch))
            if key not in self._forms:
                runtime = self._make(own, group.leaves, group.arguments, part, self._supply)
                remember(self._forms, key, Form(runtime, restored), MAX_FORMS)
            form = self._forms[key]
            if form.apart is None and others:
                form.apart = self._is_apart(own, group, part)
            self._supply.put(group.leaves, part)
            forms.append(form)
        return forms

    def _is_apart(self, own: Own, group: Group, among_others: Outputs) -> bool:
        """Whether a group's rows alone give what they give among others."""
        try:
            alone = flattened(_run(own, group.call))[0]
            pairs = list(zip(alone, among_others, strict=True))
        except Exception:  # what was taken for rows is not: such a call is the model's own error
            pairs = None
        apart = pairs is not None and all(_alike(*p) for p in pairs if isinstance(p[0], Tensor))
        if not apart:
            self._state.say(logger, TOGETHER)
        return apart

    def _evaluated(
        self, own: Own, call: Call, groups: Sequence[Group], forms: Sequence[Form], batch: int
    ) -> list[Any]:
        """The output of each group."""
        evaluations = [self._due(*each) for each in zip(groups, forms, strict=True)]
        computed = [
            group
            for group, (due, _) in zip(groups, evaluations, strict=True)
            if due.computes and not self._supply.has(group.leaves)
        ]
        together = any(form.apart is False for form in forms)
        self._compute(own, call, groups if computed and together else computed, batch)
        try:
            return [
                form.restored(self._made(due, record))
                for form, (due, record) in zip(forms, evaluations, strict=True)
            ]
        except BaseException:
            for group in groups:  # some have come further than others
                group.session.abort()
            raise

    def _due(self, group: Group, form: Form) -> tuple[Due, StepRecord | None]:
        device = form.runtime.programs.signature.tokens.device
        record = begun(self._state.recordings, device)
        return form.runtime.due(group.leaves, self._state, group.session, record), record

    def _made(self, due: Due, record: StepRecord | None) -> Outputs:
        outputs = due.make()
        ended(self._state.recordings, record)
        return outputs

    def _compute(self, own: Own, call: Call, groups: Sequence[Group], batch: int) -> None:
        """Run the model for the rows of these groups, and of few others."""
        rows = [row for group in groups for row in group.rows]
        if not rows:
            return
        rows += rows[-1:] * (bucket(len(rows), batch) - len(rows))
        if len(rows) < batch:
            outputs = _run(own, taken(call, rows, batch))
        else:
            rows, outputs = list(range(batch)), _run(own, call)
        for group in groups:
            part = taken(outputs, [rows.index(row) for row in group.rows], len(rows))
            self._supply.put(group.leaves, flattened(part)[0])


def bucket(rows: int, batch: int) -> int:
    """With how many rows the model is run for this many: 1, 2, 3, 4, 6, 8, 12 ..., or the batch."""
    power = 1 << (rows - 1).bit_length()
    between = power * 3 // 4
    return min(between if rows <= between else power, batch)


def _run(own: Own, call: Call) -> Any:
    args, kwargs = call
    with under(RootCall("whole")):
        return own(*args, **kwargs)


def _check(call: Call, batch: int) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    sizes = sorted({len(tensor) for tensor in tensors if tensor.dim() > 1})
    listed = any(isinstance(part, list) and len(part) == batch for part in _arguments(call))
    if batch not in sizes and not listed:
        raise OptionError(
            f"rows: {batch} sessions, but no input has as many rows (first axes: {sizes});"
            " give one session for each row of the batch"
        )


def _arguments(call: Call) -> list[Any]:
    args, kwargs = call
    return [*args, *kwargs.values()]


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape and bool((one == other).all())
    allowed = ROUNDINGS * torch.finfo(one.dtype).eps
    distance, length = (one.double() - other.double()).norm(), other.double().norm()
    return bool(distance <= allowed * length)
