"""The efforts that solve x = alpha + coupling G x, see world/bcz.py, and the cap that games state."""

import math

import numpy as np

from games import GameError, complete_graph


def effort_fixed_point(
    alpha_N, coupling: float, links_NN: np.ndarray, cap: float | None = None
) -> np.ndarray:
    """The solution x of x = alpha + coupling G x, or with a cap of x = min(cap, alpha + coupling G x); (N,).

    Without a cap a solution x >= 0 exists iff I - coupling G is positive definite. This is tested first:
    `solve` with an indefinite matrix would return negative efforts and absurd welfare without an error. With
    a cap there is exactly one solution for any coupling >= 0. Raises GameError where there is none."""
    alpha_N = np.asarray(alpha_N, float)
    system_NN = np.eye(len(alpha_N)) - coupling * links_NN
    try:
        # The margin refuses a matrix that is singular up to rounding.
        np.linalg.cholesky(system_NN - 1e-12 * np.eye(len(alpha_N)))
        x = np.linalg.solve(system_NN, alpha_N)
        if cap is None or x.max() <= cap:
            return x
    except np.linalg.LinAlgError:
        if cap is None:
            raise GameError(
                f"efforts have no finite solution: coupling * rho(G) = "
                f"{coupling * np.linalg.eigvalsh(links_NN).max():.3f} must be below 1; lower delta"
            ) from None
    # From below, the iteration rises monotonically to the solution, so that an agent at the cap stays there.
    x = np.minimum(cap, alpha_N)
    while True:
        previous, x = x, np.minimum(cap, alpha_N + coupling * links_NN @ x)
        if (x - previous).max() <= 1e-10 * x.min():
            break
    # Now it is known which agents are at the cap; the efforts of the others follow from a linear system.
    free = alpha_N + coupling * links_NN @ x < cap
    pressure = alpha_N[free] + coupling * links_NN[np.ix_(free, ~free)].sum(1) * cap
    x = np.full(len(alpha_N), float(cap))
    x[free] = np.minimum(cap, np.linalg.solve(system_NN[np.ix_(free, free)], pressure))
    return x


def effort_cap(alpha_N, delta: float) -> float:
    """[choice] The smallest integer at least 1.5 times the largest planner effort (on the complete graph,
    where efforts are largest), so that the cap binds at no solution of any graph."""
    alpha_N = np.asarray(alpha_N, float)
    largest = effort_fixed_point(alpha_N, 2 * delta, complete_graph(len(alpha_N))).max()
    return float(math.ceil(1.5 * largest - 1e-9))  # 1.5 * 2.0000000000000004 is meant to be 3
