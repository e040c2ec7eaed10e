"""A checkpoint that a merge would make and that is never written.

A merge of merges can be made in one pass: each slice of an inner result is computed, rounded to its
stored dtype as if it had been written, and merged at once. The bytes are those of one merge after
the other; what is saved is writing and reading everything in between.
"""

from __future__ import annotations

from pathlib import Path

from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.dtypes import DTYPES
from ..files.placing import LINEAGE_KEY
from ..files.writer import OutputTensor, layout_parts
from .plan import MergePlan, Step


class Unmade(Checkpoint):
    """What a merge would write, as an input of another merge; its tensors cannot be read.

    Args:
        plan: the merge, one that `can_be_unmade`.
        name: what the checkpoint would be called.
        node: what errors call it.
        key: what stands for it in lineages, in place of a digest.
        plan_name: what lineages call it.

    Attributes:
        plan, node: as given.
        steps: tensor name → how it is made.
    """

    key: str
    is_stored = True

    def __init__(
        self, plan: MergePlan, *, name: str, node: str, key: str, plan_name: str | None = None
    ) -> None:
        path, start = Path(name), 0
        tensors = {}
        outputs = [OutputTensor(step.name, step.dtype, step.shape) for step in plan.steps]
        first = plan.models[0]
        for file in layout_parts(outputs, first.parts, shard_size=None):
            for tensor in file.tensors:  # in the order in which they would lie in the file
                info = TensorInfo(*tensor, path, start, tensor.nbytes)
                tensors[tensor.name] = info
                start += tensor.nbytes
        metadata = {name: text for name, text in first.metadata.items() if name != LINEAGE_KEY}
        super().__init__(path, (), tensors, metadata, is_folder=first.is_folder, parts=first.parts)
        self.plan = plan
        self.node = node
        self.key = key
        self.plan_name = plan_name
        self.steps = {step.name: step for step in plan.steps}

    def bytes_to_read(self, info: TensorInfo) -> int:
        """How many bytes are read to make a tensor."""
        return self.plan.bytes_to_read(self.steps[info.name])

    @property
    def dtype(self) -> str | None:
        """The dtype that its config would name, where a merge on the way changed it."""
        first = self.plan.models[0]
        return self.plan.recipe.dtype or (first.dtype if isinstance(first, Unmade) else None)

    @property
    def companions(self) -> Path | None:
        """The folder whose config and other files would have come along."""
        return self.plan.files_from.companions


def can_be_unmade(plan: MergePlan) -> bool:
    """Whether every tensor is made element by element, from the same elements of the inputs.

    And whether the first model's folder would have come along as it is but for a dtype: what else
    changes in one, such as a config's number of layers, is known only once it is written.
    """
    recipe = plan.recipe
    if recipe.slices or plan.dropped or recipe.files_from or recipe.tokenizer_from:
        return False
    return recipe.chat_template is None and takes_unmade(plan) and all(
        (step.outline is None or step.outline.is_elementwise)
        and not any(step.scales) and step.quantized is None
        for step in plan.steps
    )  # fmt: skip


def takes_unmade(plan: MergePlan) -> bool:
    """Whether a merge takes its inputs element by element, and none of them before it begins."""
    return not plan.layout.gathered and not any(is_undecided(step) for step in plan.steps)


def is_undecided(step: Step) -> bool:
    """Whether only the values can tell if a tensor can be made at all."""
    opaque = DTYPES[step.dtype].kind == "opaque"
    return step.kind == "integer" and (step.policy == "error" or (step.policy == "max" and opaque))
