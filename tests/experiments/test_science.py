"""Every file of `experiments/examples/science` has right values, found another way in NumPy."""

import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "examples" / "science"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def double_precision():
    """The files enable float64 for all, as a script does; here it ends with the test."""
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_enable_x64", False)


@functools.cache
def load(name):
    """The file as a module; made once, so that what it jits is compiled once."""
    spec = importlib.util.spec_from_file_location(f"science_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(function, point, step=1e-5):
    """The derivative of a NumPy function by each entry of `point`, to the fourth order."""
    point = np.asarray(point, float)

    def at(index, steps):
        moved = point.copy()
        moved[index] += steps * step
        return np.asarray(function(moved))

    slopes = [
        (8 * (at(i, 1) - at(i, -1)) - (at(i, 2) - at(i, -2))) / (12 * step)
        for i in np.ndindex(point.shape)
    ]
    return np.stack(slopes, -1).reshape(*slopes[0].shape, *point.shape)


def numpy_root(residual, start):
    """A root of a NumPy function by SciPy, polished with dense Newton steps."""
    z = scipy.optimize.root(residual, start, tol=1e-12).x
    for _ in range(2):
        z = z - np.linalg.solve(differences(residual, z, 1e-3), residual(z))
    return z


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_short_stands_alone_and_is_listed(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    imported = re.findall(r"^\s*(?:from|import) (\w+)", text, flags=re.MULTILINE)
    assert set(imported) <= {"deq_jax", "functools", "jax", "numpy", "scipy"}
    assert f"python experiments/examples/science/{file.name}" in text
    assert "\nSource: " in text
    page = (ROOT / "docs" / "science.md").read_text(encoding="utf-8")
    assert f"](../experiments/examples/science/{file.name})" in page


def test_kepler(capsys):
    module = load("kepler")
    anomaly, found, errors = module.main()
    assert max(errors) < 1e-13
    e, mean = np.array(list(module.ECCENTRICITIES.values())), 0.3
    expected = mean + e
    for _ in range(50):  # Newton's method
        expected -= (expected - e * np.sin(expected) - mean) / (1 - e * np.cos(expected))
    np.testing.assert_allclose(anomaly, expected, rtol=1e-14)
    slope = 1 / (1 - e * np.cos(expected))
    np.testing.assert_allclose(found[0], slope, rtol=1e-13)
    np.testing.assert_allclose(found[1], np.sin(expected) * slope, rtol=1e-13)
    assert "Halley" in capsys.readouterr().out


def value_iteration(costs, classes=40, discount=0.95, moves=(0.35, 0.6, 0.05)):
    """The value of an engine, by so many iterations that none is left to do."""
    chances = np.zeros((classes, classes))
    for state in range(classes):
        for step, chance in enumerate(moves):
            chances[state, min(state + step, classes - 1)] += chance
    value = np.zeros(classes)
    for _ in range(900):
        following = discount * chances @ value
        value = np.logaddexp(-costs[0] * np.arange(classes) + following, following[0] - costs[1])
    return value


def test_bellman():
    value, found, error = load("bellman").main()
    assert error < 1e-11
    costs = np.array([0.15, 5.0])
    np.testing.assert_allclose(value, value_iteration(costs), rtol=1e-12)
    np.testing.assert_allclose(found, differences(value_iteration, costs, 1e-3), rtol=1e-8)


def test_sinkhorn():
    module = load("sinkhorn")
    marginals, error, gradient = module.main()
    assert marginals < 1e-13
    assert error < 1e-12
    x, y, a, b = map(np.asarray, module.problem())

    def cost(x):
        """Sinkhorn's own iteration, on scalings instead of potentials."""
        distances = ((x[:, None] - y[None]) ** 2).sum(-1)
        kernel = np.exp(-distances / 0.1)
        v = np.ones(len(b))
        for _ in range(500):
            u = a / (kernel @ v)
            v = b / (kernel.T @ u)
        return (u[:, None] * kernel * v * distances).sum()

    np.testing.assert_allclose(module.transport_cost(x, y, a, b), cost(x), rtol=1e-12)
    np.testing.assert_allclose(gradient, differences(cost, x, 1e-4), atol=1e-9)


def numpy_heat(conductivity, steps=10, dt=0.02, points=20):
    """The same discretisation, each step solved by SciPy."""
    a, b = conductivity
    h, u = 1 / (points + 1), np.zeros(points)
    for _ in range(steps):

        def residual(new, old=u):
            padded = np.concatenate([[1.0], new, [0.0]])
            flow = (a + b * (padded[1:] + padded[:-1]) / 2) * np.diff(padded) / h
            return new - old - dt * np.diff(flow) / h

        u = scipy.optimize.fsolve(residual, u, xtol=1e-13)
    return u


def test_heat():
    u, gradient, error = load("heat").main()
    assert error < 1e-11
    conductivity = np.array([0.3, 1.2])
    np.testing.assert_allclose(u, numpy_heat(conductivity), atol=1e-11)
    expected = differences(lambda c: numpy_heat(c)[10], conductivity, 1e-3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7)


def test_hartree_fock():
    module = load("hartree_fock")
    values, slopes = module.main()
    # Szabo and Ostlund: -4.227529 of the electrons and 1.366867 of the nuclei, with an error
    # function of theirs that is good to six digits.
    assert float(values[0]) == pytest.approx(-2.860662, abs=5e-6)
    helium_hydride = (jnp.array([2.0, 1.0]), jnp.array([2.0925, 1.24]))
    hydrogen = module.properties(1.4, 0.0, jnp.array([1.0, 1.0]), jnp.array([1.24, 1.24]))[1]
    assert float(hydrogen[0]) == pytest.approx(-1.1167, abs=5e-5)

    def energy(inputs):
        return module.properties(inputs[0], inputs[1], *helium_hydride)[1][0]

    by_distance, by_field = differences(energy, [1.4632, 0.0], 1e-3)
    np.testing.assert_allclose(slopes[0][0], by_distance, rtol=1e-8)
    np.testing.assert_allclose(values[1], -by_field, rtol=1e-8)  # the dipole moment
    np.testing.assert_allclose(slopes[1][0], by_field, rtol=1e-8)
    # The polarisability is minus the second derivative of the energy.
    near, far = ([energy([1.4632, s * k]) for s in (-1, 0, 1)] for k in (2e-3, 4e-3))
    second = [(a - 2 * b + c) / k**2 for (a, b, c), k in ((near, 2e-3), (far, 4e-3))]
    np.testing.assert_allclose(slopes[1][1], -(4 * second[0] - second[1]) / 3, rtol=1e-6)


def numpy_voltages(loads):
    """V of the two load buses, by Newton's method on real and imaginary parts."""
    rows = [20 - 50j, -10 + 20j, -10 + 30j], [-10 + 20j, 26 - 52j, -16 + 32j]
    y = np.array([*rows, [-10 + 30j, -16 + 32j, 26 - 62j]])

    def mismatch(parts):
        v = np.array([1.05, parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]])
        drawn = loads[:, 0] + 1j * loads[:, 1]
        wrong = (v * np.conj(y @ v))[1:] + drawn
        return np.array([wrong.real, wrong.imag]).ravel()

    parts = numpy_root(mismatch, np.array([1.0, 0.0, 1.0, 0.0]))
    v = np.array([1.05, parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]])
    return v, v[0] * np.conj(y[0] @ v)


def test_power_flow():
    module = load("power_flow")
    v, power, gradient = module.main()
    np.testing.assert_allclose(v[1:], [0.98 - 0.06j, 1.00 - 0.05j], atol=1e-12)  # Saadat
    np.testing.assert_allclose(power, 4.095 + 1.89j, atol=1e-12)
    loads = np.asarray(module.LOADS)
    np.testing.assert_allclose(v, numpy_voltages(loads)[0], atol=1e-12)
    expected = differences(lambda s: numpy_voltages(s)[1].real - s[:, 0].sum(), loads, 1e-3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-8)


def numpy_column(params, layers=12):
    """Temperatures of the column, by SciPy; the fluxes are sums over all pairs of layers."""
    sunlight, emissivity, mixing = params
    passed = 1 - emissivity

    def heating(t):
        shine, gained = 5.670374e-8 * t**4, np.zeros(layers + 1)
        emits = np.array([1.0] + [emissivity] * layers)
        for i in range(layers + 1):  # what i sends to j, over the layers between them
            for j in range(layers + 1):
                if i != j:
                    share = passed ** (abs(i - j) - 1) * emits[i] * emits[j]
                    gained[j] += share * shine[i]
                    gained[i] -= share * shine[i]
            above = layers - i
            gained[i] -= emits[i] * passed**above * shine[i]  # to space
        carried = mixing * 0.5 * np.logaddexp(0, (t[:-1] - t[1:] - 6.0) / 0.5)
        gained[:-1] -= carried
        gained[1:] += carried
        gained[0] += sunlight
        return gained

    return numpy_root(heating, np.linspace(290.0, 220.0, layers + 1))


def test_radiative_convective():
    temperature, sensitivity, error = load("radiative_convective").main()
    assert abs(error) < 1e-9
    params = np.array([240.0, 0.2, 20.0])
    np.testing.assert_allclose(temperature, numpy_column(params), rtol=1e-11)
    expected = differences(lambda p: numpy_column(p)[0], params, 1e-3)
    np.testing.assert_allclose(sensitivity, expected, rtol=1e-7)


def numpy_peaks(theta, bins):
    """Of both peaks, each times its share, `[..., 2, bins]`."""
    mean, share, variance = theta[..., :2, None], theta[..., 2, None], theta[..., 3:, None]
    bell = np.exp(-((bins - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    return np.stack([share, 1 - share], -2) * bell


def numpy_em(counts, bins):
    """Fits by plain EM, `[..., 5]`: mean₁, mean₂, share, variance₁, variance₂."""
    theta = np.broadcast_to([-1.0, 2.0, 0.5, 1.0, 1.0], (*counts.shape[:-1], 5))
    for _ in range(200):
        peaks = numpy_peaks(theta, bins)
        weights = counts[..., None, :] * peaks / peaks.sum(-2, keepdims=True)
        total = weights.sum(-1)
        mean = weights @ bins / total
        variance = (weights * (bins - mean[..., None]) ** 2).sum(-1) / total
        share = total[..., :1] / total.sum(-1, keepdims=True)
        theta = np.concatenate([mean, share, variance], -1)
    return theta


def test_covariance_of_a_fit():
    module = load("fit_covariance")
    values, matrix = module.main()
    bins, counts = np.asarray(module.BINS), np.asarray(module.expected_counts())
    np.testing.assert_allclose(values, numpy_em(counts, bins), atol=1e-10)
    # At the expected counts it is the inverse of the Fisher information.
    chances = numpy_peaks(np.asarray(values), bins).sum(-2)
    slopes = differences(lambda theta: numpy_peaks(theta, bins).sum(-2), values, 1e-3)
    information = (slopes.T / chances) @ slopes * counts.sum() / chances.sum()
    np.testing.assert_allclose(matrix, np.linalg.inv(information), rtol=1e-4, atol=1e-9)
    # And it is the scatter of fits to counts that were drawn.
    drawn = np.random.default_rng(0).poisson(counts, size=(400, len(counts)))
    scatter = numpy_em(drawn, bins).std(axis=0)
    np.testing.assert_allclose(np.sqrt(np.diag(matrix)), scatter, rtol=0.12)


def test_scipy_root():
    module = load("scipy_root")
    (p, liquid, vapour), slope, error = module.main()
    assert abs(error) < 1e-10
    assert float(p) == pytest.approx(0.646998, abs=1e-6)
    assert abs(module.imbalance(0.9, (liquid, vapour), None)).max() < 1e-12

    def vapour_pressure(temperature):
        v = module.by_scipy(temperature[0])[1]
        return np.array(8 * temperature[0] / (3 * v - 1) - 3 / v**2)

    np.testing.assert_allclose(slope, differences(vapour_pressure, [0.9], 1e-3)[0], rtol=1e-8)
