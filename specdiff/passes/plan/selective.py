"""Selective: find the tokens that a step may leave out, and what it then needs."""

from __future__ import annotations

from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.base import Pass, PassError
from specdiff.passes.plan.axes import AxisFacts
from specdiff.passes.plan.output import find_output
from specdiff.passes.plan.selective_plan import SelectivePlan


class SelectivePass(Pass[AxisFacts, SelectivePlan]):
    """Finds the prunable segment and propagates needs backwards from the token-level output."""

    name = "selective"

    def apply(self, value: AxisFacts) -> SelectivePlan:
        """Raises Unsupported where no segment reaches the output token by token."""
        output = find_output(value)
        plan = SelectivePlan(
            axes=value, prunable=output.segments, slots=output.slots, tail=output.tail
        )
        _require_self_contained_tail(plan)
        plan = plan.replan()
        if not plan.cached:
            raise Unsupported("no attention reads the prunable tokens, so nothing can be cached")
        return plan

    def verify(self, value: AxisFacts, result: SelectivePlan) -> None:
        """Operands of rows are there in the form that is needed."""
        for node in result.rows:
            if not result.is_token_wise(node):
                if node not in result.whole and node.op != "placeholder":
                    raise PassError(f"{node.name} is needed as rows and can be had in no form")
                continue
            for operand in result.token_operands(node):
                if operand not in result.rows:
                    raise PassError(f"{node.name}: operand {operand.name} is not there as rows")

    def summary(self, result: SelectivePlan) -> str:
        """How many values are needed in which form."""
        names = ", ".join(slot.name for slot in result.slots)
        rows, whole = (sum(n.op == "call_function" for n in s) for s in (result.rows, result.whole))
        return (
            f"{result.tokens} prunable tokens, output by token: {names};"
            f" {rows} values as rows, {whole} whole, {len(result.cached)} cached"
        )

    def notes(self, result: SelectivePlan) -> dict[fx.Node, str]:
        """The forms a value is needed in, and why it stays whole although it holds tokens."""
        forms = (("rows", result.rows), ("whole", result.whole), ("cached", set(result.cached)))
        notes = {}
        for node in result.axes.graph.nodes:
            texts = [name for name, members in forms if node in members]
            if texts and result.carries(node) and "rows" not in texts:
                texts += [reason] if (reason := result.why_whole(node)) else []
            notes[node] = ", ".join(texts) or "not needed"
        return notes


def _require_self_contained_tail(plan: SelectivePlan) -> None:
    if not plan.attention_dependent.intersection(plan.slots):
        raise Unsupported("the output does not depend on an attention")
    for slot in plan.slots:
        if not plan.is_token_wise(slot):
            raise Unsupported(f"the token-level output {slot.name} is not computed token by token")
    for node in plan.tail:
        for operand in node.all_input_nodes:
            if operand in plan.attention_dependent and operand not in (*plan.tail, *plan.slots):
                raise Unsupported(f"{node.name} after the token-level output needs {operand.name}")
