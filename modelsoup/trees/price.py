"""What a merge of a tree costs: the bytes that it reads, and the memory that it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from ..merging.folding import Adapted
from ..merging.forms import Whole
from ..merging.jobs import STATE
from ..merging.plan import Made, MergePlan, Unmade
from ..merging.sources import Stored
from ..merging.threads import default_workers

_BUFFERS = 110 << 20  # what a merge takes, however large the models are
_PER_TENSOR = 600  # for each tensor that is read or written


def bytes_read_by(plan: MergePlan) -> int:
    """Tensor bytes that a merge reads; see `NodePlan.bytes_read`."""
    taken = {step.name for step in plan.steps}
    return plan.bytes_streamed - plan.bytes_written + _read_for_digests(plan, taken)


def _read_for_digests(plan: MergePlan, taken: Collection[str]) -> int:
    """Bytes of what no step needs, if only some tensors of the result are taken.

    They are counted place by place: equal merges on the way may be one plan, of other files each.
    """
    used: dict[int, set[str]] = defaultdict(set)
    for step in plan.steps:
        for source in step.sources if step.name in taken else ():
            if isinstance(source, Stored | Made):
                used[id(source.model)].add(source.info.name)
    found = 0
    for model in plan.inputs:
        if isinstance(model, Unmade):
            found += _read_for_digests(model.plan, used[id(model)])
        elif not isinstance(model, Adapted):  # whose factors are all used
            found += sum(i.nbytes for n, i in model.tensors.items() if n not in used[id(model)])
    return found


def memory_of(plan: MergePlan) -> int:
    """Buffers, what is known of each tensor, and what methods hold of the largest ones.

    Those that see whole tensors hold one for each thread.
    """
    whole = [
        int((len(step.sources) + 1 + step.outline.form.memory) * step.elements)
        * step.compute_dtype.itemsize
        for step in plan.steps
        if step.outline is not None and isinstance(step.outline.form, Whole)
    ]
    tensors = sum(1 + len(step.sources) for step in plan.steps)
    gathered = max([STATE, *(step.state_bytes for step in plan.steps)]) - STATE
    return _BUFFERS + _PER_TENSOR * tensors + gathered + sum(sorted(whole)[-default_workers() :])
