"""`make_teacher`: the constructors of `teachers` and `progress` by their enum."""

from collections.abc import Callable, Mapping
from typing import Any

from aidx.distill import progress, teachers
from aidx.distill.options import TeacherModelType

T = TeacherModelType
CONSTRUCTORS: Mapping[TeacherModelType, Callable[..., Any]] = {
    T.NEURAL_NETWORK: teachers.network_teacher,
    T.ENSEMBLE: teachers.ensemble_teacher,
    T.PRETRAINED: teachers.pretrained_teacher,
    T.TRANSFORMER: teachers.transformer_teacher,
    T.MULTI_MODAL: teachers.multi_modal_teacher,
    T.ADAPTIVE: progress.adaptive_teacher,
    T.ONLINE: progress.online_teacher,
    T.CURRICULUM: progress.curriculum_teacher,
    T.SELF: teachers.self_teacher,
    T.QUANTIZED: teachers.quantized_teacher,
    T.DISTRIBUTED: teachers.distributed_teacher,
}


def make_teacher(kind: TeacherModelType | str, *args: Any, **options: Any) -> Any:
    """The teacher of that kind; arguments are those of its constructor.

    Raises:
        ValueError: an unknown kind (the message lists the known), or what the constructor refuses.
        TypeError: an argument that the constructor does not have.

    Example:
        >>> float(make_teacher("neural_network", lambda w, x: x * w, 2.0)(1.0).logits)
        2.0
        >>> make_teacher("oracle")
        Traceback (most recent call last):
        ValueError: unknown TeacherModelType 'oracle'; known: neural_network, ensemble, ...
    """
    return CONSTRUCTORS[TeacherModelType(kind)](*args, **options)
