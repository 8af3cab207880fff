"""AC power flow of a grid with three buses, and the adjoint that prices every load.

    python experiments/examples/science/power_flow.py

With the admittance matrix Y, the voltage V_i of a load bus that draws the complex power S_i solves

    V_i = (-conj(S_i) / conj(V_i) - Σ_{j≠i} Y_ij V_j) / Y_ii,

while bus 0, the slack, has a given voltage and makes up for what is missing. All quantities are per
unit. Iterated bus by bus this is the method of Gauss and Seidel; here all buses move at once, with
Anderson acceleration. One adjoint solve gives the derivative of the losses by all loads.

Source: Saadat, "Power System Analysis", 1999, example 6.7, whose solution is V = 0.98 - 0.06i and
1.00 - 0.05i, with a slack power of 4.095 + 1.890i.
"""

import jax
import jax.numpy as jnp

from deq_jax import GMRES, Anderson, Implicit, deq_fixed_point

jax.config.update("jax_enable_x64", True)

SLACK = 1.05 + 0.0j
LINES = {(0, 1): 10 - 20j, (0, 2): 10 - 30j, (1, 2): 16 - 32j}  # admittances
LOADS = jnp.array([[2.566, 1.102], [1.386, 0.452]])  # active and reactive power of buses 1, 2
SOLVER = Anderson(tol=1e-13, max_iter=100)


def admittances():
    """Y `[3, 3]`: minus the line between two buses, and the sum of a bus's lines."""
    matrix = jnp.zeros((3, 3), complex)
    for (i, j), line in LINES.items():
        matrix = matrix.at[(i, j), (j, i)].add(-line).at[(i, j), (i, j)].add(line)
    return matrix


def voltages(loads):
    """V `[3]`, complex."""
    y = admittances()
    power = loads[:, 0] + 1j * loads[:, 1]

    def f(power, v, _):
        # The loads inject -S, so the current into a load bus is -conj(S / V).
        current = -jnp.conj(power / v)
        inner = y[1:, 1:] - jnp.diag(jnp.diag(y)[1:])
        return (current - y[1:, 0] * SLACK - inner @ v) / jnp.diag(y)[1:]

    start = jnp.ones(2, complex)
    gradient = Implicit(GMRES(tol=1e-13))
    v = deq_fixed_point(f, power, None, start, solver=SOLVER, gradient=gradient, batched=False)
    return jnp.concatenate([jnp.array([SLACK]), v])


def slack_power(loads):
    """The complex power that bus 0 feeds into the grid."""
    v = voltages(loads)
    return v[0] * jnp.conj(admittances()[0] @ v)


def losses(loads):
    """The active power that the lines turn into heat."""
    return slack_power(loads).real - loads[:, 0].sum()


def main():
    v, power = voltages(LOADS), slack_power(LOADS)
    print("voltages", " ".join(f"{value:.6f}" for value in v[1:]), f"slack power {power:.4f}")
    gradient = jax.grad(losses)(LOADS)
    print(f"losses {losses(LOADS):.4f}, and more for each unit drawn, active and reactive:")
    print(gradient)
    return v, power, gradient


if __name__ == "__main__":
    main()
