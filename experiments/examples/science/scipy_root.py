"""A root that SciPy finds, made differentiable: the boiling of a van der Waals fluid.

    python experiments/examples/science/scipy_root.py

In units of the critical point a van der Waals fluid of the temperature T and the volume v has

    pressure p = 8 T / (3 v - 1) - 3 / v²,
    free energy a = -(8 / 3) T log(3 v - 1) - 3 / v,   a + p v = Gibbs energy g

Liquid and vapour are in equilibrium where both have the same p and the same g. SciPy solves these
two equations for the two volumes. `implicit` gives its answer the derivative of the equations, so
that the vapour pressure p(T) has one. The equation of Clausius and Clapeyron says what it must be:

    dp/dT = (s_vapour - s_liquid) / (v_vapour - v_liquid),   entropy s = (8 / 3) log(3 v - 1)

`jax.pure_callback` lets the host function run under `jit`. It needs no derivative of its own.

Source: Callen, "Thermodynamics and an Introduction to Thermostatistics", 1985, sections 9.3-9.4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from deq_jax import implicit

jax.config.update("jax_enable_x64", True)


def pressure(temperature, volume):
    return 8 * temperature / (3 * volume - 1) - 3 / volume**2


def gibbs(temperature, volume, log=jnp.log):
    free = -8 / 3 * temperature * log(3 * volume - 1) - 3 / volume
    return free + pressure(temperature, volume) * volume


def imbalance(temperature, volumes, _, stack=jnp.stack, log=jnp.log):
    """Differences of pressure and of Gibbs energy between liquid and vapour, `[2]`."""
    liquid, vapour = volumes
    p = pressure(temperature, liquid) - pressure(temperature, vapour)
    return stack([p, gibbs(temperature, liquid, log) - gibbs(temperature, vapour, log)])


def by_scipy(temperature):
    """The volumes `[2]` of liquid and vapour, computed on the host without JAX."""
    temperature = float(temperature)
    start = 1 - 1.1 * np.sqrt(1 - temperature), 1 + 3 * np.sqrt(1 - temperature)
    return scipy.optimize.root(
        lambda v: imbalance(temperature, v, None, np.stack, np.log), start, tol=1e-13
    ).x


@implicit(imbalance, form="root")
def volumes(temperature, _=None):
    shape = jax.ShapeDtypeStruct((2,), jnp.result_type(temperature))
    return jax.pure_callback(by_scipy, shape, temperature, vmap_method="sequential")


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def vapour_pressure(temperature):
    both = volumes(temperature, None)
    return pressure(temperature, both[1]), both


def main(temperature=0.9):
    (p, (liquid, vapour)), slope = vapour_pressure(temperature)
    exact = 8 / 3 * jnp.log((3 * vapour - 1) / (3 * liquid - 1)) / (vapour - liquid)
    print(f"T = {temperature}: volumes {liquid:.6f} and {vapour:.6f}, pressure {p:.6f}")
    print(f"dp/dT = {slope:.10f}, by Clausius and Clapeyron {exact:.10f}")
    return (p, liquid, vapour), slope, float(slope / exact - 1)


if __name__ == "__main__":
    main()
