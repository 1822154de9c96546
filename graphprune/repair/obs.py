"""Optimal brain surgeon on one linear map: what to do with the kept weights of a row when others go.

With H the second moment of the inputs, a row w and its removed set P, the loss of the best repair and the repair itself are

    loss(P) = 1/2 w_P ([H^-1]_PP)^-1 w_P^T          change = - w_P ([H^-1]_PP)^-1 [H^-1]_P,:

(Hassibi and Stork 1993; all weights of P at once: "joint"). SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) removes the weights of
P one after the other from left to right, moving only columns further right: "sequential", never better than joint on the same set.
`sweep` goes through the columns in steps; after a step its columns are final, and the Cholesky factor of H^-1 holds what the rest needs.

Everything is batched over groups: weights are (groups, outputs, columns), H is (groups, columns, columns), masks are True where kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

SMALL = 6  # columns of a step up to which the inverses of all its subsets are made, rather than a system solved for every row
ROWS = 1 << 24  # entries of the row systems that are solved at once

Choose = Callable[[int, Tensor, Tensor], Tensor]  # (first column, weights of the step, inverse over the step) -> mask of the step


def inverse(hessian: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, more damping added where rounding needs it."""
    return torch.cholesky_inverse(_factor(hessian))


def _factor(matrix: Tensor) -> Tensor:
    damping = 0.0
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(8):
        factor, info = torch.linalg.cholesky_ex(matrix + damping * mean * eye)
        if not info.any():
            return factor
        damping = 10 * damping or 1e-6
    raise torch.linalg.LinAlgError(f"the second moments of {matrix.shape[-1]} inputs stay singular with damping {damping / 10:g}")


def loss(change: Tensor, hessian: Tensor) -> Tensor:
    """(groups,): mean squared error that a change of the weights makes in the layer's result, halved."""
    return 0.5 * ((change @ hessian) * change).sum((-2, -1))


def sweep(weight: Tensor, hessian: Tensor, choose: Choose, step: int, joint: bool) -> tuple[Tensor, Tensor]:
    """New weights, removed ones exactly zero, and the mask.

    Args:
        choose: what stays of the next `step` columns, from their weights as earlier steps left them and the inverse Hessian over them and
            all later columns, restricted to them.
        joint: compensate the removed weights of a step together; else one column after the other.
    """
    upper = torch.linalg.cholesky(inverse(hessian)).mT
    weight, keep = weight.to(hessian.dtype).clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[-1], step):
        here = slice(start, min(start + step, weight.shape[-1]))
        corner = upper[..., here, here]
        rows = corner.mT @ upper[..., here, start:]  # the inverse over what is left, rows of this step
        now = weight[..., here]
        keep[..., here] = choose(start, now, rows[..., : now.shape[-1]])
        gone = ~keep[..., here]
        if joint:
            weight[..., start:] -= _joint(now, gone, rows[..., : now.shape[-1]]) @ rows
        else:
            weight[..., start:] -= _sequential(now, gone, corner) @ upper[..., here, start:]
        weight[..., here].masked_fill_(gone, 0.0)
    return weight, keep


def _joint(weight: Tensor, gone: Tensor, inner: Tensor) -> Tensor:
    """(groups, outputs, step): w_P ([H^-1]_PP)^-1 of every row, zero outside P."""
    out = torch.empty_like(weight)
    size = weight.shape[-1]
    if size <= SMALL:
        subsets = _subsets(size, weight.device).to(weight)
        systems = inner[:, None] * subsets[:, :, None] * subsets[:, None] + torch.diag_embed(1 - subsets)
        inverses = torch.linalg.inv_ex(systems)[0]  # (groups, subsets, size, size)
        which = (gone * 2 ** torch.arange(size, device=gone.device)).sum(-1)  # (groups, outputs)
        each = torch.arange(len(inverses), device=which.device)[:, None]
        return ((weight * gone)[..., None, :] @ inverses[each, which])[..., 0, :]
    for g in range(weight.shape[0]):
        for part in torch.arange(weight.shape[1], device=weight.device).split(max(1, ROWS // size**2)):
            mask = gone[g, part].to(weight)
            system = inner[g] * mask[:, :, None] * mask[:, None, :] + torch.diag_embed(1 - mask)
            out[g, part] = torch.linalg.solve(system, (weight[g, part] * mask)[..., None])[..., 0]
    return out


@cache
def _subsets(size: int, device: torch.device) -> Tensor:
    """(2**size, size) bool, row i the binary digits of i, least first."""
    return (torch.arange(2**size, device=device)[:, None] >> torch.arange(size, device=device)) % 2 == 1


def _sequential(weight: Tensor, gone: Tensor, corner: Tensor) -> Tensor:
    """(groups, outputs, step): the scaled error of each column, those of earlier columns made up for first."""
    left = weight.mT.clone()  # columns as rows: two calls for each of them, since there are many and each is small
    errors, share = torch.empty_like(left), gone.mT / corner.diagonal(dim1=-2, dim2=-1)[..., None]
    for j in range(left.shape[1]):
        torch.mul(left[:, j], share[:, j], out=errors[:, j])
        left[:, j + 1 :].baddbmm_(corner[:, j, j + 1 :, None], errors[:, j : j + 1], alpha=-1)
    return errors.mT


def refit(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """The least-squares answer for a given mask, row by row: `w_K <- (w H)_K (H_KK)^-1`. Cubic in the columns for every row.

    It equals the joint repair of all removed weights at once, and is the oracle of `sweep`.
    """
    out = torch.zeros_like(weight, dtype=hessian.dtype)
    target = weight.to(hessian.dtype) @ hessian
    for g, o in ((g, o) for g in range(weight.shape[0]) for o in range(weight.shape[1])):
        stays = keep[g, o].nonzero()[:, 0]
        if len(stays):
            out[g, o, stays] = torch.linalg.solve(hessian[g][stays][:, stays], target[g, o, stays])
    return out
