"""The names that JAX gives instructions, as paths of scopes."""

import re

type Path = tuple[str, ...]

UNATTRIBUTED = "(unattributed)"

# What JAX itself puts into a name.
WRAPPERS = re.compile(
    r"checkpoint|rematted_computation|while|body|cond|closed_call|eval_jaxpr|custom_vjp_call"
    r"|custom_jvp_call|branch_\d+_fun|mpmd_map"
)


def scope_path(op_name: str) -> Path:
    """The scopes of an instruction's op_name, without programs, transformations and the primitive.

    What a transposition made is under `backward`.

    >>> scope_path("jit(step)/layer_0/attention/dot_general")
    ('layer_0', 'attention')
    >>> scope_path("jit(step)/transpose(jvp(layer_0))/mul")
    ('backward', 'layer_0')
    >>> scope_path("jit(f)/add"), scope_path("")
    (('(no scope)',), ('(unattributed)',))
    """
    if not op_name:
        return (UNATTRIBUTED,)
    parts, depth, part = [], 0, ""
    for letter in op_name:
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    path: list[str] = ["backward"] if "transpose(" in op_name else []
    for name in parts:  # the primitive, behind the last stroke, is no scope
        if re.match(r"p?jit\(", name):
            continue
        while match := re.fullmatch(r"(?:transpose|jvp|vmap|rematted_computation)\((.*)\)", name):
            name = match.group(1)
        path += [n for n in name.split("/") if n and not WRAPPERS.fullmatch(n)]
    return tuple(path) or ("(no scope)",)
