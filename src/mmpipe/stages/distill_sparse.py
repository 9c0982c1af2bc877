"""Dense-to-sparse mimic distillation: the up-cycled student's experts specialise under the teacher."""

from __future__ import annotations

from typing import Literal

from mmpipe.stages.distill_dense import DistillDense


class DistillSparse(DistillDense):
    """Defaults are LLaVA-MoD's ``dense2sparse_distillation.sh`` (and paper): KL and cross entropy, router losses on;
    experts, routers, the other feed-forward networks and the projector train."""

    loss_type: Literal["only_kd", "kd_lm"] = "kd_lm"
    trainable: tuple[str, ...] = ("language_model.layers.*.mlp.*", "multi_modal_projector.*")


STAGE = DistillSparse
