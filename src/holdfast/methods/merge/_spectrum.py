"""Directions of a matrix and what is shared by methods that work on them."""

import torch


def left_vectors(w: torch.Tensor, k: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(U (m, r), s (r,)) of a matrix (m, n) in fp64, largest first, all or the top k; none of no length if m > n."""
    w = w.double()
    wide = w.shape[0] <= w.shape[1]
    values, vectors = _eigen(w @ w.T if wide else w.T @ w, k)
    s = values.clamp(min=0).sqrt()
    if not wide:
        real = s > 1e-7 * s[0]  # eigenvalues carry 1e-16 of the largest: a smaller s is rounding
        s, vectors = s[real], w @ vectors[:, real] / s[real]
    return vectors, s


def _eigen(gram: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and vectors (columns), largest first; the top k alone are four times as fast."""
    n = len(gram)
    if k is None or k >= n:
        values, vectors = torch.linalg.eigh(gram)
    else:
        from scipy.linalg import eigh

        found = eigh(gram.cpu().numpy(), subset_by_index=[n - k, n - 1])
        values, vectors = (torch.from_numpy(x).to(gram.device) for x in found)
    return values.flip(0), vectors.flip(1)


def shrunk(base: torch.Tensor, tuned: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """The control of a repair: base plus the whole change, shrunk to a Frobenius norm where it is larger."""
    change = tuned - base
    return base + change * (norm / torch.linalg.vector_norm(change).clamp(min=1e-30)).clamp(max=1).to(change.dtype)
