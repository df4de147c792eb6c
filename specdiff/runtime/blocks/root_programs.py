"""Root: the programs of a whole model whose blocks are compiled, as the runtime takes them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specdiff.program import Evaluation, Signature
from specdiff.runtime.blocks.block import (
    Kind,
    Prunable,
    RootCall,
    Visit,
    identities,
    numbered,
    under,
)
from specdiff.runtime.blocks.patchify import Patches

Own = Callable[..., Any]
"""The module's own call."""


class RootPrograms:
    """The programs of a whole model whose blocks are compiled: forwards of the root.

    Implements `specdiff.program.Programs`. Flat inputs are the leaves of the call's arguments.

    Args:
        root: the model.
        own: its call.
        arguments: structure of the call's arguments.
        patches: how its output is tokens.
        holder: the argument of the blocks that holds them, where their number does not tell.
        visits: the block calls of one forward.
        signature: what flat inputs mean.
    """

    def __init__(
        self,
        root: nn.Module,
        own: Own,
        arguments: pytree.TreeSpec,
        patches: Patches,
        holder: str | None,
        visits: Sequence[Visit],
        signature: Signature,
    ) -> None:
        self.signature = signature
        self._root = root
        self._own = own
        self._arguments = arguments
        self._patches = patches
        self._prunable = Prunable(patches.tokens, holder)
        self._visits = numbered(visits, self._prunable)

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Of every block's programs, those that blocks share counted once."""
        seconds: Counter[str] = Counter()
        for block in {visit.block for visit in self._visits}:
            if block.has(self._prunable):
                seconds.update(block.planned(self._prunable).compile_seconds)
        return seconds

    def probe(self, inputs: Sequence[object]) -> Tensor:
        """Every token computed by every block, no cache read or written."""
        return self._tokens(inputs, self._call("probe", inputs))

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """Every token computed; the caches are overwritten in place."""
        return self._evaluation(inputs, self._call("dense", inputs, caches))

    def tabulate(
        self, inputs: Sequence[object], caches: Sequence[Tensor], later: Sequence[Tensor] = ()
    ) -> None:
        """Nothing to fill: a block is given what time makes, not time."""

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        text: bool = True,
        importance: bool = True,
        row: int | None = None,
    ) -> Evaluation:
        """Only `active` computed by the blocks; what lies around them computes every token.

        Text always is: a block hands it on to the next.
        """
        call = self._call("selective", inputs, caches, active, importance)
        evaluation = self._evaluation(inputs, call)
        rows = active.unsqueeze(-1).expand(-1, -1, evaluation.tokens.shape[2])
        return Evaluation(evaluation.tokens.gather(1, rows), evaluation.importance)

    def tail(self, inputs: Sequence[object], tokens: Tensor) -> list[Tensor]:
        """The model's output of its tokens."""
        return [self._patches.join(tokens)]

    def plain(self, *inputs: object) -> list[Any]:
        """The leaves of the model's output, its blocks as they were traced, compiled."""
        return forward(self._own, inputs, self._arguments, self._call("plain", inputs))[0]

    def _call(
        self,
        kind: Kind,
        inputs: Sequence[object],
        caches: Sequence[Tensor] = (),
        active: Tensor | None = None,
        importance: bool = True,
    ) -> RootCall:
        parameters, visits = identities(self._root.parameters()), self._visits
        return RootCall(kind, parameters, self._prunable, visits, caches, active, importance)

    def _evaluation(self, inputs: Sequence[object], call: RootCall) -> Evaluation:
        return Evaluation(self._tokens(inputs, call), call.importance)

    def _tokens(self, inputs: Sequence[object], call: RootCall) -> Tensor:
        (output,), _ = forward(self._own, inputs, self._arguments, call)
        call.finish()
        return self._patches.split(output)


def forward(
    own: Own, inputs: Sequence[object], arguments: pytree.TreeSpec, call: RootCall
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of a module's output, its blocks answering to `call`; and what restores it."""
    args, kwargs = pytree.tree_unflatten(list(inputs[: arguments.num_leaves]), arguments)
    with under(call):
        return flattened(own(*args, **kwargs))


def flattened(output: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of an output, in a dataclass, too, and what makes an output of leaves.

    None is no leaf: models of xDiT return a tensor and None.
    """
    if dataclasses.is_dataclass(output) and not pytree.is_namedtuple_instance(output):
        names = [field.name for field in dataclasses.fields(output) if field.init]
        parts = {name: getattr(output, name) for name in names}
        leaves, parts_of = flattened(parts)
        kind: Callable[..., Any] = type(output)
        return leaves, lambda values: kind(**parts_of(values))
    leaves, structure = pytree.tree_flatten(output)
    is_value = [leaf is not None for leaf in leaves]

    def restored(values: Sequence[Any]) -> Any:
        rest = iter(values)
        return pytree.tree_unflatten([next(rest) if v else None for v in is_value], structure)

    return [leaf for leaf in leaves if leaf is not None], restored
