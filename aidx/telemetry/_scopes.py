"""The names that JAX gives instructions, as paths of scopes."""

import re

type Path = tuple[str, ...]

UNATTRIBUTED = "(unattributed)"

# What JAX itself, and aidx's choice of a kernel, put into a name.
WRAPPERS = re.compile(
    r"checkpoint|rematted_computation|while|body|cond|closed_call|eval_jaxpr|custom_vjp_call"
    r"|custom_jvp_call|aidx_dispatch|branch_\d+_fun|mpmd_map|.*->.*"
)


def scope_path(op_name: str) -> Path:
    """The scopes of an instruction's op_name, without programs, transformations and the primitive.

    What a transposition made is under `backward`.

    >>> scope_path("jit(step)/layer_0/attention/dot_general")
    ('layer_0', 'attention')
    >>> scope_path("jit(step)/transpose(jvp(layer_0))/mul")
    ('backward', 'layer_0')
    >>> scope_path("jit(f)/loss/transpose(loss)/jvp(layer)/mul")
    ('backward', 'loss', 'layer')
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
    path: list[str] = []
    for name in parts:  # the primitive, behind the last stroke, is no scope
        if re.match(r"p?jit\(", name):
            continue
        while match := re.fullmatch(r"(?:transpose|jvp|vmap|rematted_computation)\((.*)\)", name):
            name = match.group(1)
        path += [n for n in name.split("/") if n and not WRAPPERS.fullmatch(n)]
    # A rule of a custom gradient is traced within the scopes that it was called in, once more.
    for n in range(len(path) // 2, 0, -1):
        if path[:n] == path[n : 2 * n]:
            path = path[n:]
            break
    backward = ("backward",) if "transpose(" in op_name else ()
    return (*backward, *path) or ("(no scope)",)
