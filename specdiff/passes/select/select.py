"""Select: find the tokens that a step may leave out, and what it must still compute."""

from __future__ import annotations

from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.base import Pass, PassError
from specdiff.passes.select.axes import AxisFacts
from specdiff.passes.select.output import find_output
from specdiff.passes.select.selection import Selection


class SelectPass(Pass[AxisFacts, Selection]):
    """Finds the prunable segments, and from the token-level output backwards what a step needs."""

    name = "select"

    def apply(self, value: AxisFacts) -> Selection:
        """Select. Raises Unsupported if no segment reaches the output token by token."""
        output = find_output(value)
        selection = Selection(
            axes=value, prunable=output.segments, slots=output.slots, tail=output.tail
        )
        _require_self_contained_tail(selection)
        selection = selection.with_needs()
        if not selection.cached:
            raise Unsupported("no attention reads the prunable tokens, so nothing can be cached")
        return selection

    def verify(self, value: AxisFacts, result: Selection) -> None:
        """Check that what rows are computed from is itself available as rows."""
        for node in result.rows:
            if not result.is_token_wise(node):
                if node not in result.whole and node.op != "placeholder":
                    raise PassError(
                        f"{node.name} is needed as rows, but neither computed nor gathered"
                    )
                continue
            for operand in result.token_operands(node):
                if operand not in result.rows:
                    raise PassError(f"{node.name}: operand {operand.name} is not available as rows")

    def summary(self, result: Selection) -> str:
        """How many values are needed in each form."""
        names = ", ".join(slot.name for slot in result.slots)
        rows, whole = (sum(n.op == "call_function" for n in s) for s in (result.rows, result.whole))
        return (
            f"{result.tokens} prunable tokens, output by token: {names};"
            f" {rows} values as rows, {whole} whole, {len(result.cached)} cached"
        )

    def notes(self, result: Selection) -> dict[fx.Node, str]:
        """The forms in which each value is needed, and why one with tokens must stay whole."""
        forms = (("rows", result.rows), ("whole", result.whole), ("cached", set(result.cached)))
        notes = {}
        for node in result.axes.graph.nodes:
            texts = [name for name, members in forms if node in members]
            if texts and result.carries(node) and "rows" not in texts:
                texts += [reason] if (reason := result.why_whole(node)) else []
            notes[node] = ", ".join(texts) or "not needed"
        return notes


def _require_self_contained_tail(selection: Selection) -> None:
    if not selection.attention_dependent.intersection(selection.slots):
        raise Unsupported("the output does not depend on an attention")
    for slot in selection.slots:
        if not selection.is_token_wise(slot):
            raise Unsupported(f"the token-level output {slot.name} is not computed token by token")
    for node in selection.tail:
        for operand in node.all_input_nodes:
            if operand in selection.attention_dependent and operand not in (
                *selection.tail,
                *selection.slots,
            ):
                raise Unsupported(f"{node.name} after the token-level output needs {operand.name}")
