"""Puts faults into a copy of deq_jax, one at a time, and says which of them the tests notice.

    python -m tests.mutations            # all of them: about 15 minutes on 2 idle cores
    python -m tests.mutations ridge gmres  # those with one of these words in their name

Not a test, and not collected by pytest. Each fault names the test files that are meant to notice
it, and only these run, up to the first failure. A fault is caught when a test fails. It is stale
when the text that it replaces is not in the file exactly once.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Fault(NamedTuple):
    """One wrong line.

    Attributes:
        name: what is wrong with it.
        file: under `deq_jax/`.
        old: the text that is replaced, which occurs once.
        new: what stands there instead.
        tests: the files under `tests/` that should notice, separated by blanks.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    # Solvers.
    Fault(
        "Anderson's ridge is left out",
        "solvers/anderson.py",
        "return (1 + ridge) * (1 +",
        "return (1 + 0 * ridge) * (1 +",
        "solvers/test_anderson.py",
    ),
    Fault(
        "a proposal of Anderson's that hardly moves is taken",
        "solvers/anderson.py",
        "moved < _STAGNATION * size",
        "moved < 0 * size",
        "solvers/test_anderson.py",
    ),
    Fault(
        "Anderson's window survives a residual that blows up",
        "solvers/anderson.py",
        "blown_up = size > _BLOW_UP * state.lowest",
        "blown_up = size < 0 * state.lowest",
        "solvers/test_anderson.py",
    ),
    Fault(
        "Broyden drops its terms one by one when the memory is full",
        "solvers/broyden.py",
        "emptied = ~resting & ((state.slot == 0) | (size > _BLOW_UP * state.lowest))",
        "emptied = ~resting & (size > _BLOW_UP * state.lowest)",
        "solvers/test_broyden.py",
    ),
    Fault(
        "Broyden's line search takes a third of the step and not half",
        "solvers/broyden.py",
        "state.length / 2, self._full_length",
        "state.length / 3, self._full_length",
        "solvers/test_broyden.py",
    ),
    Fault(
        "Picard's damping is 1 - τ",
        "solvers/picard.py",
        "tree.scale(self.damping, tree.subtract",
        "tree.scale(1 - self.damping, tree.subtract",
        "solvers/test_anderson.py",
    ),
    Fault(
        "Newton's forcing term falls linearly",
        "solvers/newton_krylov.py",
        "0.9 * shrunk**2",
        "0.9 * shrunk",
        "solvers/test_newton_krylov.py",
    ),
    Fault(
        "Newton stands still where no correction was found",
        "solvers/newton_krylov.py",
        "(found > 0), correction, g)",
        "(found > 0), correction, 0 * g)",
        "solvers/test_newton_krylov.py",
    ),
    # Columns.
    Fault(
        "inner products of complex columns subtract the imaginary part",
        "columns.py",
        "real_products(columns.real, leaf.real) + real_products(",
        "real_products(columns.real, leaf.real) - real_products(",
        "solvers/test_anderson.py",
    ),
    Fault(
        "a Krylov space never counts as exhausted",
        "columns.py",
        "new = length > 10 * jnp.finfo(length.dtype).eps * before",
        "new = length >= 0 * before",
        "stability/test_spectrum.py solvers/test_krylov.py",
    ),
    # The solve loop.
    Fault(
        "the last iterate is returned and not the best",
        "solve.py",
        "better = met | (residual < carry.best_residual)",
        "better = met | (residual < jnp.inf)",
        "solvers/test_loop.py",
    ),
    Fault(
        "a sample that is not finite reports MAX_ITER",
        "solve.py",
        "status = jnp.where(finite, status, int(Status.DIVERGED))",
        "status = jnp.where(finite, status, int(Status.MAX_ITER))",
        "solvers/test_loop.py",
    ),
    Fault(
        "a stopped sample is not frozen",
        "solve.py",
        "z=tree.where(still_active, proposal, best)",
        "z=proposal",
        "solvers/test_loop.py edges/test_mixing_samples.py",
    ),
    Fault(
        "a stopped sample never wakes up",
        "solve.py",
        "status = jnp.where(active | resting, status, carry.status)",
        "status = jnp.where(active, status, carry.status)",
        "edges/test_mixing_samples.py",
    ),
    Fault(
        "the evaluation that wakes a sample is not traced",
        "solve.py",
        "row = jnp.where(active | woken, residual, _unused())",
        "row = jnp.where(active, residual, _unused())",
        "edges/test_mixing_samples.py",
    ),
    Fault(
        "of samples that mix, iterates of different evaluations are returned",
        "solve.py",
        "better |= number == self.limit",
        "better |= number == 0",
        "edges/test_mixing_samples.py",
    ),
    # The adjoint.
    Fault(
        "the backward system is not transposed",
        "adjoint.py",
        "y, inverse.transposed(), transposed=True, report=probed)",
        "y, inverse.transposed(), transposed=False, report=probed)",
        "gradients/test_probe.py",
    ),
    Fault(
        "a singular backward system is called converged",
        "adjoint.py",
        "(length > most * scale)",
        "(length > jnp.inf * scale)",
        "edges/test_singular.py",
    ),
    Fault(
        "a small cotangent is not brought to unit size",
        "adjoint.py",
        "return tree.power_of_two(-exponent, size.dtype)",
        "return tree.power_of_two(0 * exponent, size.dtype)",
        "edges/test_scale.py",
    ),
    Fault(
        "the reused estimate has the wrong sign",
        "adjoint.py",
        "tree.unpack(-self.estimate.apply(",
        "tree.unpack(self.estimate.apply(",
        "gradients/test_policies.py",
    ),
    # Linear solvers.
    Fault(
        "a cycle of GMRES runs on when the tolerance is met",
        "linear/gmres.py",
        "reached = broken | (size <= target * jnp.sqrt((null**2).sum(1)))",
        "reached = broken",
        "solvers/test_krylov.py",
    ),
    Fault(
        "a direction of BiCGStab has the wrong sign",
        "linear/bicgstab.py",
        "carry.p - tree.scale(omega, v))",
        "carry.p + tree.scale(omega, v))",
        "solvers/test_krylov.py",
    ),
    Fault(
        "a cotangent that is not finite becomes a gradient of zero",
        "linear/krylov.py",
        "value = tree.where(jnp.isfinite(size), end.best, b)",
        "value = end.best",
        "gradients/test_probe.py",
    ),
    # Gradient policies.
    Fault(
        "the damping of a Neumann series is wrong",
        "gradients/neumann.py",
        "kept = tree.scale(1 - self.damping, term)",
        "kept = tree.scale(self.damping, term)",
        "gradients/test_policies.py",
    ),
    Fault(
        "Phantom pulls back at the next step's point",
        "gradients/phantom.py",
        "before = policy.steps - 1 - done",
        "before = policy.steps - done",
        "gradients/test_policies.py",
    ),
    # Closures.
    Fault(
        "two solvers of a user's own class are taken for the same",
        "closure.py",
        "return same and self.contents is not None",
        "return isinstance(other, _Object)",
        "edges/test_freshness.py",
    ),
    # Mixing, shrinking and sharding.
    Fault(
        "a sum over the batch is not seen to mix",
        "mixing.py",
        "if batch in over and first[batch] > 1",
        "if batch in () and first[batch] > 1",
        "test_shrinking.py",
    ),
    Fault(
        "the finished samples stay and the active ones leave",
        "shrinking.py",
        "jnp.argsort(~carry.active, stable=True)",
        "jnp.argsort(carry.active, stable=True)",
        "test_shrinking.py",
    ),
    Fault(
        "evaluations of the shards are added up in the backward report",
        "sharding.py",
        "(counts.max(),)",
        "(counts.sum(),)",
        "test_shard_axis.py",
    ),
    # Stability.
    Fault(
        "the error of a spectral radius ignores how sensitive the eigenvalue is",
        "stability/spectrum.py",
        "error = residuals[:, 0] * conditions[:, 0]",
        "error = residuals[:, 0]",
        "stability/test_spectrum.py",
    ),
    Fault(
        "the Jacobian term is not divided by the number of entries",
        "stability/jacobian.py",
        "size.mean().astype(jnp.float32) / entries",
        "size.mean().astype(jnp.float32)",
        "stability/test_jacobian.py",
    ),
    Fault(
        "the weights of fixed-point correction run backwards",
        "stability/correction.py",
        "tuple(gamma ** (states - 1 - i) for i",
        "tuple(gamma**i for i",
        "stability/test_correction.py",
    ),
    # Cells and adapters.
    Fault(
        "attention sees one position more than its window",
        "cells/attention.py",
        "mask &= distance < window",
        "mask &= distance <= window",
        "cells/test_transformer.py",
    ),
    Fault(
        "the trellis cell takes the memory of the wrong step",
        "cells/trellis.py",
        "jnp.concatenate([injection.c, z.c], 1)[:, : z.c.shape[1]]",
        "jnp.concatenate([injection.c, z.c], 1)[:, -z.c.shape[1] :]",
        "cells/test_trellis.py",
    ),
    Fault(
        "an NNX layer takes its batch statistics at the wrong point",
        "nnx.py",
        "cell(*jax.lax.stop_gradient((z, injection)), *step)",
        "cell(*jax.lax.stop_gradient((injection, injection)), *step)",
        "test_adapters_state.py",
    ),
    Fault(
        "a Linen layer keeps its first statistics of a normalisation for ever",
        "linen.py",
        "if changes and jax.tree.leaves(statistics):",
        "if changes and not jax.tree.leaves(statistics):",
        "stability/test_normalized_layers.py",
    ),
    # Solutions from elsewhere, and roots.
    Fault(
        "what solve closes over keeps its tangents",
        "attach.py",
        "_compat.evaluate(jaxpr, lax.stop_gradient(captured))",
        "_compat.evaluate(jaxpr, captured)",
        "test_attach.py",
    ),
    Fault(
        "a solve in NumPy is given tracers",
        "attach.py",
        "lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf",
        "lambda leaf: leaf",
        "test_attach.py",
    ),
    Fault(
        "attach_gradient forgets the absolute bound",
        "attach.py",
        "solver=_Evaluation(tol, atol)",
        "solver=_Evaluation(tol, 0.0)",
        "test_attach.py",
    ),
    Fault(
        "a root in a small unit counts as solved",
        "root_form.py",
        "sign * magnitude, 1)",
        "sign * magnitude / magnitude, 1)",
        "test_root.py",
    ),
    Fault(
        "the sign of F matters",
        "root_form.py",
        "sign * magnitude, 1)",
        "magnitude, 1)",
        "test_root.py",
    ),
    # Loop control.
    Fault(
        "the last iterate is the point that was evaluated, not the next",
        "solve.py",
        "tree.where(improved, proposal, carry.best), step + 1",
        "tree.where(improved, z, carry.best), step + 1",
        "test_control.py",
    ),
    Fault(
        "min_iter is one evaluation late",
        "solve.py",
        "met &= number >= control.min_iter",
        "met &= number > control.min_iter",
        "test_control.py",
    ),
    Fault(
        "the derivative takes f at the evaluation after the one returned",
        "solve.py",
        "best, best_step = tree.where(improved, z, carry.best), step\n",
        "best, best_step = tree.where(improved, z, carry.best), step + 1\n",
        "test_control.py",
    ),
    Fault(
        "a tolerance of zero asks in every trip",
        "solve.py",
        "self.asks = watch.stop is not None or not no_tolerance",
        "self.asks = True",
        "test_control.py",
    ),
    Fault(
        "scales are multiplied and not divided by",
        "control.py",
        "leaf.astype(scale.dtype) / scale",
        "leaf.astype(scale.dtype) * scale",
        "test_control.py",
    ),
    Fault(
        "truncated backpropagation takes one step more",
        "gradients/truncated.py",
        "leave=self.steps, **options)",
        "leave=self.steps + 1, **options)",
        "gradients/test_truncated.py",
    ),
    # Reversible, the smaller solvers, the penalties, several starts.
    Fault(
        "a step of Reversible back divides by the wrong factor",
        "solvers/reversible.py",
        "expansions.quotient(terms, kept,",
        "expansions.quotient(terms, beta,",
        "gradients/test_reversed.py",
    ),
    Fault(
        "a stopped sample of Reversible goes on",
        "solvers/reversible.py",
        "moving &= jnp.isfinite(tree.largest(fz))",
        "moving |= jnp.isfinite(tree.largest(fz))",
        "gradients/test_reversed.py",
    ),
    Fault(
        "rounding errors of a sum of floats are lost",
        "expansions.py",
        "errors.append(error)",
        "errors.append(0 * error)",
        "test_expansions.py",
    ),
    Fault(
        "Reversed's cotangent of the point before last is not scaled",
        "gradients/reversed.py",
        "scaled(1, carry.cotangent)",
        "carry.cotangent",
        "gradients/test_reversed.py",
    ),
    Fault(
        "Reversed takes the last iterate for the best one",
        "gradients/reversed.py",
        "jnp.where(stats.converged, stats.iterations, best)",
        "stats.iterations",
        "gradients/test_reversed.py",
    ),
    Fault(
        "SQUAREM never takes an extrapolation back",
        "solvers/squarem.py",
        "size > _GROWTH * state.size",
        "size < 0 * size",
        "solvers/test_squarem_wegstein.py",
    ),
    Fault(
        "Wegstein's factor has no bounds",
        "solvers/wegstein.py",
        "q = jnp.clip(q, lower, upper)",
        "q = jnp.clip(q, 100 * lower, 1)",
        "solvers/test_squarem_wegstein.py",
    ),
    Fault(
        "Chandrupatla's method only bisects",
        "solvers/chandrupatla.py",
        "(phi**2 < xi)",
        "(phi**2 < 0)",
        "solvers/test_chandrupatla.py",
    ),
    Fault(
        "a bracket without a change of sign is not searched",
        "solvers/chandrupatla.py",
        "fraction * (state.upper - state.lower)",
        "0 * fraction",
        "solvers/test_chandrupatla.py",
    ),
    Fault(
        "Broyden's steps have no bound",
        "solvers/broyden.py",
        "most = checks.in_dtype(self.bound, size.dtype) * size",
        "most = 1e9 * size",
        "solvers/test_broyden.py",
    ),
    Fault(
        "the spectral norm takes the transpose for the adjoint",
        "stability/jacobian.py",
        "return jax.tree.map(jnp.conj, product)\n\n    push",
        "return product\n\n    push",
        "stability/test_jacobian.py",
    ),
    Fault(
        "a start that did not converge has votes",
        "multi_start.py",
        "return jnp.where(converged, lax.map(",
        "return jnp.where(sizes > 0, lax.map(",
        "test_multi_start.py",
    ),
    # Several devices.
    Fault(
        "the state varies over an axis that f sums away",
        "closure.py",
        "    if communicates:\n",
        "    if communicates and not own:\n        pass\n    elif False:\n",
        "test_layouts.py",
    ),
    Fault(
        "each shard takes the first rows of a draw",
        "draws.py",
        "lax.axis_index(axes) * length",
        "0 * lax.axis_index(axes) * length",
        "test_shard_axis.py",
    ),
    Fault(
        "inner products of split samples are those of a part",
        "tree.py",
        "return vary_over(lax.psum(values, axes), frozenset(axes)) if axes else values",
        "return values",
        "test_layouts.py",
    ),
    Fault(
        "under a mesh a state is reshaped",
        "_compat.py",
        "return any(mesh.shape[axis] > 1 for axis in mesh.auto_axes)",
        "return False",
        "test_layouts.py",
    ),
    Fault(
        "parameters are not gathered",
        "sharding.py",
        "    given = iter(whole)\n    leaves = [next(given)",
        "    given = iter(arrays)\n    leaves = [next(given)",
        "test_layouts.py",
    ),
    Fault(
        "nobody is told that the batch is sharded over another axis",
        "sharding.py",
        "    if not others:",
        "    if True:",
        "test_shard_axis.py",
    ),
]


def run(tree: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """The named test files in a copy of the tree, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--tb=no", "-rf"]
    command += [f"tests/{name}" for name in tests.split()]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def check(tree: Path, fault: Fault) -> str:
    """What became of one fault: `caught`, `MISSED` or `STALE`, and what more there is to say."""
    path = tree / "deq_jax" / fault.file
    right = path.read_text(encoding="utf-8")
    if right.count(fault.old) != 1:
        return f"STALE   {fault.name}: {right.count(fault.old)} times {fault.old!r} in {fault.file}"
    path.write_text(right.replace(fault.old, fault.new), encoding="utf-8")
    try:
        done = run(tree, fault.tests)
    finally:
        path.write_text(right, encoding="utf-8")
    if done.returncode == 0:
        return f"MISSED  {fault.name} ({fault.tests})"
    failed = re.findall(r"^FAILED (?:tests/)?(\S+)", done.stdout, flags=re.MULTILINE)
    if done.returncode == 1 and failed:
        return f"caught  {fault.name}: {failed[0]}"
    return f"STALE   {fault.name}: the tests could not run\n{done.stdout}{done.stderr}"


def main(words: list[str]) -> int:
    """Tries all faults, or those whose names contain one of the words; 1 if any is not caught."""
    chosen = [f for f in FAULTS if not words or any(w.lower() in f.name.lower() for w in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", "runs")
        shutil.copytree(ROOT, tree, ignore=ignored)
        results = []
        for fault in chosen:
            results.append(check(tree, fault))
            print(results[-1], flush=True)
    caught = sum(result.startswith("caught") for result in results)
    print(f"{caught} of {len(chosen)} faults caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
