"""The benchmark: renderings of the cells, the referee, the page, and one tiny run of it all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import solve_fixed_point
from experiments.benchmark import __main__ as script
from experiments.benchmark import jax_calls, page, problems, referee, reference, workloads
from experiments.benchmark.run_deq_jax import AbsoluteRidgeAnderson, Calls
from experiments.benchmark.worker import WorkerFailedError, WorkerProcess
from experiments.benchmark.workloads import WORKLOADS
from tests.reference import relative_error

PROBLEMS = {
    "residual": problems.residual(batch=2, size=5, channels=8, inner=16),
    "dense": problems.dense(batch=3, width=6),
    "gains": problems.gains(np.array([0.1, 0.5, 0.9]), width=6),
    "transformer": problems.transformer(batch=2, tokens=3, width=8),
    "low_rank": problems.low_rank(batch=2, width=12),
}


def double(arrays):
    return {name: array.astype(np.float64) for name, array in arrays.items()}


@pytest.mark.parametrize("cell", referee.CELLS)
def test_jax_and_numpy_cells_agree(cell, x64):
    problem = PROBLEMS[cell]
    params, x = double(problem.params), double(problem.x)
    params = {name: array + 0.1 for name, array in params.items()}  # no scale 1, no bias 0
    z = problem.cotangent.astype(np.float64)
    expected = referee.CELLS[cell](params, z, x)
    assert relative_error(jax_calls.CELLS[cell](params, z, x), expected) < 1e-12
    assert referee.CELLS.keys() == jax_calls.CELLS.keys() == PROBLEMS.keys()
    if cell == "residual":
        first = problems.to_channels_first
        arrays = [{k: first(k, a) for k, a in d.items()} for d in (params, {"z": z}, x)]
        got = jax_calls.residual_channels_first(arrays[0], arrays[1]["z"], arrays[2])
        assert relative_error(problems.to_channels_last("z", np.asarray(got)), expected) < 1e-12


def test_jax_and_numpy_injections_agree(x64):
    problem = problems.network(batch=3, size=8, channels=8, inner=16, pool=4)
    params, images = double(problem.params), problem.x["images"].astype(np.float64)
    expected = referee.injection(params, images)
    assert relative_error(jax_calls.injection(params, images), expected) < 1e-12


def test_layouts_can_be_undone():
    for name in ("kernel1", "stem.kernel", "x"):
        array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
        there = problems.to_channels_first(name, array)
        assert there.shape == ((5, 4, 2, 3) if "kernel" in name else (2, 5, 3, 4))
        np.testing.assert_array_equal(problems.to_channels_last(name, there), array)


def test_problems_survive_saving(tmp_path):
    problem = problems.network(batch=2, size=8, channels=8, inner=8)
    problem.save(tmp_path / "problem.npz")
    loaded = problems.Problem.load(tmp_path / "problem.npz")
    assert loaded.digest() == problem.digest()
    assert loaded.digest(b"other code") != problem.digest()
    assert PROBLEMS["dense"].digest() != PROBLEMS["low_rank"].digest()


@pytest.mark.slow
def test_reference_of_an_equation_is_that_of_a_dense_solve():
    problem = PROBLEMS["dense"]
    params, x = double(problem.params), double(problem.x)
    got = reference.reference_of(problem)
    assert referee.residuals(problem, got["z"]).max() < 1e-12
    z, y = got["z"], problem.cotangent.astype(np.float64)
    slope = 1 - np.tanh(z @ params["w"].T + x["x"] @ params["u"].T + params["b"]) ** 2
    v = np.stack(
        [
            np.linalg.solve(np.eye(6) - (s[:, None] * params["w"]).T, c) * s
            for s, c in zip(slope, y, strict=True)
        ]
    )
    expected = {
        "params/w": v.T @ z,
        "params/u": v.T @ x["x"],
        "params/b": v.sum(0),
        "x/x": v @ params["u"],
    }
    gradient = problems.under("gradient", got)
    assert referee.gradient_error(gradient, expected) < 1e-11
    off = {**expected, "x/x": np.zeros_like(expected["x/x"])}
    size = np.sqrt(sum((g**2).sum() for g in expected.values()))
    missing = np.linalg.norm(expected["x/x"]) / size
    assert referee.gradient_error(off, expected) == pytest.approx(missing)


def loss_in_numpy(params, x):
    inside = problems.cell_params(params)
    z = injected = referee.injection(params, x["images"])
    for _ in range(100):
        z = referee.residual(inside, z, {"x": injected})
    y = referee.standardise(z, (0, 1, 2))
    y = y * params["norm_out.scale"] + params["norm_out.bias"]
    pooled = y.reshape(len(z), 2, 2, 2, 2, 8).mean((2, 4)).reshape(len(z), -1)
    logits = pooled @ params["head.weight"] + params["head.bias"]
    chosen = logits[np.arange(len(z)), x["labels"]]
    return (np.log(np.exp(logits).sum(1)) - chosen).mean()


@pytest.mark.slow
def test_reference_of_the_network_agrees_with_a_difference_quotient():
    problem = problems.network(batch=2, size=4, channels=8, inner=8, pool=2)
    params = double(problem.params)
    x = {"images": problem.x["images"].astype(np.float64), "labels": problem.x["labels"]}
    got = reference.reference_of(problem)
    assert referee.residuals(problem, got["z"]).max() < 1e-12
    gradient = problems.under("gradient/params", got)
    assert gradient.keys() == params.keys()
    rng = np.random.default_rng(0)
    for names in (["cell.kernel1", "cell.kernel2"], ["stem.kernel", "norm_in.scale"], params):
        way = {name: rng.normal(size=params[name].shape) for name in names}
        ends = [
            loss_in_numpy(params | {name: params[name] + h * way[name] for name in way}, x)
            for h in (-1e-6, 1e-6)
        ]
        along = sum((gradient[name] * way[name]).sum() for name in way)
        assert (ends[1] - ends[0]) / 2e-6 == pytest.approx(along, rel=1e-5)


def test_absolute_ridge_takes_the_steps_of_its_formula(x64):
    rng = np.random.default_rng(0)
    matrix = 0.4 * rng.normal(size=(5, 5)) / np.sqrt(5)
    x = rng.normal(size=(1, 5))
    f = lambda z: np.tanh(z @ matrix + x)  # noqa: E731
    ridge, history = 0.05, 3
    points, values = [], []
    z = np.zeros((1, 5))
    for _ in range(6):
        points, values = [*points, z][-history:], [*values, f(z)][-history:]
        g = np.concatenate(values) - np.concatenate(points)
        n = len(g)
        system = np.block([[0, np.ones(n)], [np.ones((n, 1)), g @ g.T + ridge * np.eye(n)]])
        alpha = np.linalg.solve(system, np.eye(n + 1)[0])[1:]
        z = alpha[None] @ np.concatenate(values)
    solver = AbsoluteRidgeAnderson(history, ridge=ridge, tol=0.0, max_iter=7)
    got = solve_fixed_point(lambda w, z, x: jnp.tanh(z @ w + x), matrix, x, solver=solver)
    assert relative_error(got.value, z) < 1e-12


def test_whole_batch_tolerance_is_halved_until_every_sample_is_within():
    problem = PROBLEMS["dense"]
    z = referee_solution(problem)
    asked = []

    def solve(tol):
        asked.append(tol)
        wrong = z.copy()
        wrong[0, 0] += 5 * tol * np.linalg.norm(z[0])
        return wrong

    tol = referee.whole_batch_tolerance(problem, solve)
    assert tol == asked[-1] < problem.tol / 2
    assert referee.residuals(problem, solve(tol)).max() <= problem.tol
    assert referee.residuals(problem, solve(2 * tol)).max() > problem.tol
    assert referee.whole_batch_tolerance(problem, lambda tol: z + 1) == problem.tol


def referee_solution(problem):
    z = np.zeros(problem.cotangent.shape)
    for _ in range(300):
        z = referee.CELLS[problem.cell](problem.params, z, problem.x)
    return z


def row(milliseconds, residual=1e-6, **more):
    return {
        "first": 2.0,
        "forward": 10,
        "backward": 8,
        "memory": 2**20,
        "notes": "a note",
        "residual_largest": residual,
        "residual_median": residual / 2,
        "gradient_error": 1e-4,
        "seconds": {"call": [milliseconds / 1e3 + d for d in (0, -1e-4, 1e-4)]},
        **more,
    }


def result(mode, rows, size=None):
    record = {"mode": mode, "size": size, "tol": 1e-5, "max_iter": 50, "rows": rows}
    return record | {"reference_residual": 1e-13}


def results():
    forward = {
        "deq_jax": row(11.0, forward=10, backward=None),
        "deq_jax, Picard": row(2.0, residual=1e-3, backward=None),  # fast, but it is not there
        "optimistix": row(10.0, backward=None),
        "tutorial": {"failed": "no answer to `first` within 600 s"},
    }
    forward["deq_jax"]["seconds"] |= {"cell": [1e-3] * 3, "prepared cell": [5e-4] * 3}
    gradient = {
        "deq_jax": row(5.0),
        "deq_jax, shrinking": row(2.0, gradient_error=1.1e-4),  # less accurate than jaxopt
        "jaxopt": row(20.0),
        "jaxopt, ridge 1e-4": row(30.0),
    }
    products = row(5.0)
    products["seconds"] |= {"product": [8e-3, 9e-3, 7e-3], "prepared product": [2e-3] * 3}
    series = {
        f"batch {size}": result("gradient", {"deq_jax": row(size), "jaxopt": other}, size)
        for size, other in ((1, row(2.0, residual=0.5)), (4, {"failed": "no"}))
    }
    context = {
        "date": "2026-01-01",
        "machine": "2 cores",
        "versions": "Python 3",
        "revision": "abc",
        "rounds": 3,
        "command": "python -m experiments.benchmark",
    }
    cases = {
        "dense": {
            "forward": result("forward", forward),
            "forward + gradient": result("gradient", gradient),
        },
        "batch": series,
        "solve": {"forward": result("forward", {"deq_jax": forward["deq_jax"]})},
        "preparation": {"forward + gradient": result("gradient", {"deq_jax": products})},
    }
    return {name: {"context": context, "cases": records} for name, records in cases.items()}


def cells_of(page, start):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_page_computes_ratios_and_says_what_was_missed():
    parts = page.render(results())
    missed = "dense, forward: deq_jax / optimistix"
    # The faster row is above the tolerance, so it is not the one compared.
    assert cells_of(parts["targets"], missed) == [
        "1.00",
        "1.10",
        "**missed**; deq_jax / optimistix",
    ]
    met = cells_of(parts["targets"], "dense, forward + gradient: deq_jax / jaxopt")
    assert met == ["0.60", "0.25", "met; deq_jax / jaxopt"]
    overhead = "solve: overhead over the cell as"
    assert cells_of(parts["targets"], f"{overhead} the library runs it")[1] == "2.20"
    assert cells_of(parts["targets"], f"{overhead} written")[1] == "1.10"
    assert cells_of(parts["targets"], "step: deq_jax / jaxopt") == ["0.10", "-", "not measured"]
    assert cells_of(parts["targets"], "products, prepared / not") == ["-", "0.25", "deq_jax"]
    dense = parts["dense"]
    assert cells_of(dense, "deq_jax, Picard")[3] == "**1.0e-03**"
    assert cells_of(dense, "tutorial")[0] == "failed: no answer to `first` within 600 s"
    assert "jaxopt, ridge 1e-4" not in dense.replace("- jaxopt, ridge 1e-4: a note", "")
    equal = parts["equal ridge"]
    assert cells_of(equal, "jaxopt, ridge 1e-4")[:3] == ["30.0", "29.9 - 30.1", "10 / 8"]
    assert cells_of(parts["batch"], "1") == ["1.00 (10/8)", "2.00 (10/8) *"]
    assert cells_of(parts["batch"], "4") == ["4.00 (10/8)", "failed"]
    assert cells_of(parts["preparation"], "deq_jax")[6] == "8.00 / 2.00"


def test_every_target_names_a_case_and_implementations_that_are_run():
    for target in page.TARGETS:
        assert target.case in WORKLOADS[target.workload](True)
        names = WORKLOADS[target.workload](False)[target.case].implementations
        rows = {name: row(10.0 if name.startswith("deq_jax") else 20.0) for name in names}
        for values in rows.values():
            for what in ("cell", "prepared cell", "product", "prepared product"):
                values["seconds"][what] = [1e-3]
        assert not isinstance(target.measure(result("forward", rows)), str), target.name
    cases = [case for make in WORKLOADS.values() for case in make(False).values()]
    used = {name for case in cases for name in case.implementations}
    assert used == set(workloads.IMPLEMENTATIONS)


def test_the_pictures_draw_the_medians_of_the_json():
    (lines,) = [figure.axes[0].lines for figure in page.draw(results()).values()]
    assert [line.get_label() for line in lines] == ["deq_jax", "jaxopt"]
    points = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines]
    assert points[0] == [(1, pytest.approx(1.0)), (4, pytest.approx(4.0))]
    assert points[1] == [(1, pytest.approx(2.0))]  # what failed is a gap


@pytest.mark.slow
def test_prepared_products_are_those_of_the_cell(x64):
    problem = PROBLEMS["residual"]
    case = {"mode": "gradient", "time_cell": False, "time_products": True}
    calls = Calls(problem, case, {}, {})
    params, x = calls.given.params, calls.given.x
    plain, prepared = (calls._products(params, x, prepared=p) for p in (False, True))
    flat_f = lambda z: jax_calls.residual(params, z.reshape(2, 5, 5, 8), x).ravel()  # noqa: E731
    jacobian = np.asarray(jax.jacrev(flat_f)(jnp.zeros(2 * 5 * 5 * 8, jnp.float32)), np.float64)
    y = problem.cotangent.ravel().astype(np.float64)
    expected = y
    for _ in range(jax_calls.LOOP):
        expected = 0.5 * jacobian.T @ expected + y
    for got in (plain, prepared):
        assert relative_error(got.ravel(), expected) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fast"], ["'fast'", "solve", "precision"]),
        (["dense", "--implementations", "numpy"], ["'numpy'", "deq_jax, 2 devices", "optimistix"]),
        (["dense", "--quick", "--write"], ["--quick"]),
        (["dense", "--rounds", "0"], ["--rounds"]),
    ],
)
def test_bad_arguments_end_with_code_2(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in named), message


def test_a_missing_peer_is_named_and_skipped(monkeypatch, capsys):
    monkeypatch.setattr(workloads.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["benchmark", "dense", "--implementations", "torchdeq"])
    script.main()
    message = capsys.readouterr().err
    assert "torchdeq is not installed (pip install --no-deps torchdeq" in message
    assert "none of the chosen implementations takes part" in message


def test_a_worker_that_fails_or_is_too_slow_is_ended():
    with WorkerProcess({}, limit=60) as worker:
        arguments = {"problem": "", "reference": "", "case": {}, "options": {}}
        with pytest.raises(WorkerFailedError, match="run_nothing") as failed:
            worker.ask("load", module="run_nothing", calls="Calls", **arguments)
        assert "Traceback" in failed.value.trouble
    slow = pytest.raises(WorkerFailedError, match=r"no answer to `first` within 0.001 s")
    with WorkerProcess({}, limit=0.001) as worker, slow:
        worker.ask("first")


@pytest.mark.slow
def test_a_tiny_run_from_the_command_line():
    arguments = "dense --quick --implementations deq_jax --limit 100"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *arguments.split()],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dense, forward: round 1 of 1, deq_jax" in done.stderr
    forward, gradient = re.findall(r"^\| deq_jax \|(.*)\|$", done.stdout, re.MULTILINE)
    for line, largest_error in ((forward, None), (gradient, 1e-4)):
        milliseconds, _, evaluations, largest, median, *rest = line.split("|")
        assert 0 < float(milliseconds) < 1e5
        assert all(3 < int(count) < 40 for count in evaluations.split("/"))
        assert 0 < float(median) <= float(largest) <= 1e-5
        if largest_error:
            assert 0 < float(rest[0]) < largest_error
