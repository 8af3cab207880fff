"""Hartree-Fock of HeH+ in a minimal basis with DIIS, its force and its polarisability.

    python experiments/examples/science/hartree_fock.py

Each atom has one 1s function of three Gaussians (STO-3G). With h the integrals of kinetic energy
and nuclear attraction, S the overlaps and (ij|kl) the repulsion of electrons, the Fock matrix of
two paired electrons is a fixed point (in atomic units):

    F_ij = h_ij + Σ_kl P_kl ((ij|kl) - (ik|jl) / 2),   P = 2 c cᵀ,   F c = ε S c   (lowest ε)

Anderson acceleration of F is what chemists call DIIS. The polarisability, which is the derivative
of the dipole moment by an electric field, needs the derivative of the fixed point.

Source: Szabo and Ostlund, "Modern Quantum Chemistry", 1989, section 3.5 and appendix B.
"""

import jax
import jax.numpy as jnp

from deq_jax import Anderson, deq_fixed_point

jax.config.update("jax_enable_x64", True)

EXPONENTS, WEIGHTS = jnp.array([[0.109818, 0.405771, 2.22766], [0.444635, 0.535328, 0.154329]])


def boys(t):
    """∫₀¹ exp(-t s²) ds."""
    root = jnp.sqrt(jnp.maximum(t, 1e-12))
    return jnp.sqrt(jnp.pi) / 2 * jax.lax.erf(root) / root


def integrals(places, charges, zetas):
    """S, h, the dipole, each `[2, 2]`, and (ij|kl), of two atoms on a line."""
    a, at = jnp.outer(zetas**2, EXPONENTS).ravel(), jnp.repeat(places, 3)
    basis = jnp.repeat(jnp.eye(2), 3, axis=0)  # which function a Gaussian belongs to
    basis = basis * (jnp.tile(WEIGHTS, 2) * (2 * a / jnp.pi) ** 0.75)[:, None]
    p, product, gap = a[:, None] + a, a[:, None] * a, (at[:, None] - at) ** 2
    middle, bell = (a[:, None] * at[:, None] + a * at) / p, jnp.exp(-product / p * gap)
    overlap, h = (jnp.pi / p) ** 1.5 * bell, product / p * (3 - 2 * product / p * gap)
    attraction = boys(p * (middle - places[:, None, None]) ** 2) * charges[:, None, None]
    h = h * overlap - 2 * jnp.pi / p * bell * attraction.sum(0)
    q, other, bells = p[..., None, None], middle[..., None, None], bell[..., None, None] * bell
    bells = bells * boys(q * p / (q + p) * (other - middle) ** 2)
    repulsion = 2 * jnp.pi**2.5 / (q * p * jnp.sqrt(q + p)) * bells
    two = [basis.T @ m @ basis for m in (overlap, h, overlap * middle)]
    return *two, jnp.einsum("abcd,ai,bj,ck,dl->ijkl", repulsion, *[basis] * 4)


def molecule(distance, field, charges, zetas):
    """Energy and dipole moment in a field along the axis, twice, the second for `has_aux`."""
    places = jnp.stack([0 * distance, distance])
    overlap, h, dipole, repulsion = integrals(places, charges, zetas)
    repulsion, h = repulsion - repulsion.swapaxes(1, 2) / 2, h + field * dipole
    root = jnp.linalg.inv(jnp.linalg.cholesky(overlap))  # root S rootᵀ = 1

    def density(fock):
        return 2 * jnp.outer(*[root.T @ jnp.linalg.eigh(root @ fock @ root.T)[1][:, 0]] * 2)

    def f(params, fock, x):  # the arrays that it closes over get their gradients all the same
        return h + jnp.einsum("kl,ijkl->ij", density(fock), repulsion)

    fock = deq_fixed_point(f, None, None, h, solver=Anderson(tol=1e-12), batched=False)
    p, nuclei = density(fock), charges @ places
    energy = (p * (h + fock)).sum() / 2 + charges[0] * charges[1] / distance - field * nuclei
    found = jnp.stack([energy, nuclei - (p * dipole).sum()])
    return found, found


properties = jax.jit(jax.jacrev(molecule, argnums=(0, 1), has_aux=True))


def main(distance=1.4632):
    slopes, values = properties(distance, 0.0, jnp.array([2.0, 1.0]), jnp.array([2.0925, 1.24]))
    print(f"energy {values[0]:.6f}, force {-slopes[0][0]:.6f}, polarisability {slopes[1][1]:.6f}")
    return values, slopes


if __name__ == "__main__":
    main()
