"""y = U C (Vt x) + bias and its gradients: a factored weight of low or full rank, U and Vt frozen, C trained.

Each direction launches twice the kernel that decodes tiles of its matrix in registers; the second launch applies C to
its operand as it loads it. One form serves any number of tokens.

Letters: M tokens, N out features, K in features, R rank. Matrices and the core as in :mod:`adapted_linear` and
:mod:`core`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adapted_linear_few import few_backward, few_forward
from .config import Override
from .core import core_gradient
from .matrix import check_operands, unit_rows
from .operands import Core, Matrix


def forward(
    x: Tensor, u: Matrix, core: Core | None, vt: Matrix, bias: Tensor | None, out_features: int, rank: int,
    config: Override = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = U C h + bias, h = Vt x, row by row of x.

    Args:
        x: [M, K], float32, bfloat16 or float16, any row stride; M >= 1.
        u, vt: U [N, R] and Vt [R, K], dense or NF4.
        core: C [R, R]; None for the identity.
        bias: [N] or None.
        out_features, rank: N and R.
        config: as in :func:`adapted_linear.forward`.

    Returns:
        y [M, N] and h [M, R], both in the dtype of x.

    Raises:
        TypeError: bfloat16 in the interpreter.

    Numerics: products accumulate in float32. h is rounded to the dtype of x, and so is C h as an operand of the second
    product (not for one or two tokens); C h is float32 except with a dense core, see :func:`core.core_tile`. Factors
    are rounded as the weight is in :func:`adapted_linear.forward`. y is rounded once. Within a configuration a token's
    row does not depend on other rows.
    """
    check_operands(x, u, vt, core, bias)
    x = unit_rows(x)
    h = few_forward(x, vt, rank, config=config)
    return few_forward(h, u, out_features, core=core, core_on_x=True, bias=bias, config=config), h


def backward(
    g: Tensor, h: Tensor | None, u: Matrix, core: Core | None, vt: Matrix, in_features: int, rank: int, need_x: bool,
    need_core: bool, config: Override = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx = Vtᵀ (Cᵀ b), dC[i, j] = Σ_m b[m, i] · h[m, j] on the pattern of C, with b = Uᵀ g, row by row.

    Args:
        g: gradient of y, [M, N], float32, bfloat16 or float16, any row stride; M >= 1.
        h: as returned by :func:`forward`; may be None unless ``need_core``.
        in_features: K.
        need_x, need_core: which gradients to compute.
        The other arguments are as in :func:`forward`.

    Returns:
        dx [M, K] in the dtype of g, dC in the layout and dtype of the values of C; None where not needed.

    Raises:
        TypeError: bfloat16 in the interpreter.

    Numerics: as in :func:`forward`; b is kept in float32, and Cᵀ b is rounded to the dtype of g as an operand. For dC see
    :func:`core.core_gradient`.
    """
    check_operands(g, u, vt, core, h)
    dx = dcore = None
    if need_x or need_core:
        b = few_backward(unit_rows(g), u, rank, torch.float32, config=config)
        if need_x:
            dx = few_backward(b, vt, in_features, g.dtype, core=core, core_on_g=True, config=config)
        if need_core and core is not None and h is not None:
            dcore = core_gradient(b, h, core, config=config)
    return dx, dcore
