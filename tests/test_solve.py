"""The shared solve: its two forms, its optimality, its limits, and that samples stay apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weft.engine.solve import Factors, Prior, double, exact, ridge
from weft.errors import InputError, UsageError

D_IN, D_OUT = 12, 7


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int = 9) -> torch.Tensor:
    """A covariance with eigenvalues spread over three decades."""
    basis = torch.linalg.qr(random(seed, D_IN, D_IN)).Q
    return basis @ torch.diag(torch.logspace(-2, 1, D_IN, dtype=torch.float64)) @ basis.T


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def priors() -> dict[str, float | Prior]:
    return {"number": 0.7, "matrix": Prior.scaled(moment(), 3.0), "jitter": Prior.scaled(moment()[:, :5] @ moment()[:5], 0.4, jitter=0.01)}


@pytest.mark.parametrize("kind", priors())
@pytest.mark.parametrize("count", [1, 5, 12, 40])
def test_dual_is_primal_and_auto_is_one_of_them(kind, count):
    keys, residuals, prior = random(1, count, D_IN), random(2, count, D_OUT), priors()[kind]
    dual, primal, auto = (ridge(keys, residuals, prior, form=form) for form in ("dual", "primal", "auto"))
    assert dual.A.shape == (count, D_IN) and dual.B.shape == (D_OUT, count)
    assert apart(dual.A, primal.A) <= 1e-10 and apart(dual.increment, primal.increment) <= 1e-10
    assert torch.equal(auto.A, dual.A if count <= D_IN else primal.A)
    assert torch.equal(dual.B, residuals.T) and dual.A.dtype == torch.float64


@pytest.mark.parametrize("kind", priors())
def test_it_is_the_minimum(kind):
    keys, residuals, prior = random(3, 20, D_IN), random(4, 20, D_OUT), priors()[kind]
    cost = prior.scale * prior.matrix if isinstance(prior, Prior) else prior * torch.eye(D_IN, dtype=torch.float64)

    def objective(change: torch.Tensor) -> torch.Tensor:
        return (keys @ change.T - residuals).square().sum() + (change @ cost * change).sum()

    for form in ("dual", "primal"):
        best = ridge(keys, residuals, prior, form=form).increment.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(best), best)
        (scale,) = torch.autograd.grad(objective(2 * best), best)
        assert float(slope.norm()) <= 1e-10 * float(scale.norm())


def test_the_formula_with_keys_as_columns():
    keys, residuals, C = random(5, 6, D_IN), random(6, 6, D_OUT), moment()
    K, R = keys.T, residuals.T
    written = R @ K.T @ torch.linalg.inv(2.5 * C + K @ K.T)
    assert apart(ridge(keys, residuals, Prior.scaled(C, 2.5)).increment, written) <= 1e-10


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_taking_a_sample_out_is_solving_with_its_residual_at_zero(form):
    keys, residuals, prior = random(7, 9, D_IN), random(8, 9, D_OUT), Prior.scaled(moment(), 1.5)
    whole = ridge(keys, residuals, prior, form=form)
    left = [k for k in range(9) if k != 4]
    zeroed = residuals.clone()
    zeroed[4] = 0
    assert apart(Factors(whole.A[left], whole.B[:, left]).increment, ridge(keys, zeroed, prior, form=form).increment) <= 1e-12


def test_one_key_is_romes_formula_exactly_and_in_the_limit():
    w, k, target, C = random(10, D_OUT, D_IN), random(11, D_IN), random(12, D_OUT), moment()
    u = torch.linalg.solve(C, k)
    rome = torch.outer(target - w @ k, u) / (k @ u)
    residual = (target - w @ k)[None]
    assert apart(exact(k[None], residual, Prior.scaled(C, 1.0)).increment, rome) <= 1e-10
    gaps = [apart(ridge(k[None], residual, Prior.scaled(C, scale)).increment, rome) for scale in (1e-2, 1e-5, 1e-8)]
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2] and gaps[2] <= 1e-7
    after = w + exact(k[None], residual, Prior.scaled(C, 40.0)).increment
    assert apart(after @ k, target) <= 1e-10


def test_emmet_is_memit_with_the_product_of_its_two_numbers():
    keys, residuals, C = random(13, 8, D_IN), random(14, 8, D_OUT), moment()
    emmet = exact(keys, residuals, Prior.scaled(C, 30.0), eps=0.2)
    memit = ridge(keys, residuals, Prior.scaled(C, 6.0), form="primal")
    assert apart(emmet.increment, memit.increment) <= 1e-10
    assert apart(exact(keys, residuals, 30.0, eps=0.2).increment, ridge(keys, residuals, 6.0).increment) <= 1e-10


def test_exact_interpolates_at_least_cost():
    keys, residuals, C = random(15, 8, D_IN), random(16, 8, D_OUT), moment()
    found = exact(keys, residuals, Prior.scaled(C, 2.0)).increment
    assert apart(keys @ found.T, residuals) <= 1e-10
    null = torch.linalg.svd(keys).Vh[8:]  # changes that the keys do not see
    other = found + random(17, D_OUT, len(null)) @ null
    assert float((found @ C * found).sum()) < float((other @ C * other).sum())
    assert float((found @ C @ null.T).norm()) <= 1e-10 * float((found @ C).norm())  # so no such change makes it cheaper


@pytest.mark.parametrize("seed", range(18, 30))  # of some, rounding leaves a positive last pivot
def test_exact_with_dependent_keys_shares_residuals_out(seed):
    keys, residuals = random(seed, 4, D_IN), random(19, 4, D_OUT)
    keys = torch.cat([keys, keys[1:2]])  # the same key with two wishes
    residuals = torch.cat([residuals, random(20, 1, D_OUT)])
    got = keys @ exact(keys, residuals, Prior.scaled(moment(), 1.0)).increment.T
    between = (residuals[1] + residuals[4]) / 2
    assert apart(got[[0, 2, 3]], residuals[[0, 2, 3]]) <= 1e-8
    assert apart(got[1], between) <= 1e-8 and apart(got[4], between) <= 1e-8


def test_more_keys_than_entries_are_met_as_well_as_can_be():
    keys, residuals = random(21, 30, D_IN), random(22, 30, D_OUT)
    best = torch.linalg.lstsq(keys, residuals).solution.T
    assert apart(exact(keys, residuals, 1.0).increment, best) <= 1e-8


def test_float32_and_numpy_are_taken_and_solved_in_float64():
    keys, residuals = random(23, 3, D_IN).float(), random(24, 3, D_OUT).float()
    one = ridge(keys, residuals, 1.0)
    other = ridge(keys.numpy(), residuals.double().numpy(), 1.0)
    assert one.A.dtype == torch.float64 and torch.equal(one.A, other.A) and torch.equal(one.B, other.B)
    grown = keys.clone().requires_grad_()
    assert not ridge(grown, residuals, 1.0).A.requires_grad


def test_a_prior_is_factored_once(monkeypatch):
    prior, sizes = Prior.scaled(moment(), 1.0), []
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m, **kw: (sizes.append(len(m)), real(m, **kw))[1])
    for seed in range(3):
        ridge(random(seed, 4, D_IN), random(seed + 5, 4, D_OUT), prior)
    assert sizes == [D_IN, 4, 4, 4]


def test_jitter_is_relative_to_the_mean_of_the_diagonal():
    C = moment()
    jittered = Prior.scaled(C, 1.0, jitter=0.5).matrix
    assert torch.allclose(jittered, C + 0.5 * C.trace() / D_IN * torch.eye(D_IN, dtype=torch.float64), rtol=1e-14, atol=0)
    assert torch.equal(C, moment())  # what was given is left alone


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_a_singular_matrix_is_told_with_the_way_out(form):
    few = random(25, 3, D_IN)
    C = few.T @ few / 3
    keys, residuals = random(26, 2, D_IN), random(27, 2, D_OUT)
    with pytest.raises(InputError, match="singular") as caught:
        ridge(keys, residuals, Prior.scaled(C, 1.0), form=form)
    assert "jitter" in caught.value.hint
    assert ridge(keys, residuals, Prior.scaled(C, 1.0, jitter=1e-6), form=form).increment.isfinite().all()
    with pytest.raises(InputError, match="singular"):
        ridge(keys, residuals, Prior.scaled(-moment(), 1.0), form=form)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_priors_must_be_positive(value):
    with pytest.raises(UsageError, match="positive and finite"):
        ridge(random(1, 2, D_IN), random(2, 2, D_OUT), value)
    with pytest.raises(UsageError, match="positive and finite"):
        Prior.scaled(moment(), value)


def test_what_does_not_fit_is_told():
    keys, residuals = random(1, 3, D_IN), random(2, 3, D_OUT)
    with pytest.raises(InputError, match="3 keys and 2 residuals"):
        ridge(keys, residuals[:2], 1.0)
    with pytest.raises(InputError, match=r"prior's matrix is 12 x 12, the keys have 5"):
        ridge(keys[:, :5], residuals, Prior.scaled(moment(), 1.0))
    with pytest.raises(InputError, match="expected a matrix"):
        ridge(keys[0], residuals, 1.0)
    with pytest.raises(InputError, match="expected a matrix"):
        exact(keys[:0], residuals[:0], 1.0)
    broken = residuals.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(InputError, match="residuals: row 1 has entries that are not finite"):
        exact(keys, broken, 1.0)
    with pytest.raises(UsageError, match="did you mean 'dual'"):
        ridge(keys, residuals, 1.0, form="duel")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="eps must not be negative"):
        exact(keys, residuals, 1.0, eps=-0.1)
    with pytest.raises(UsageError, match="jitter must not be negative"):
        Prior.scaled(moment(), 1.0, jitter=-1)
    with pytest.raises(InputError, match="not symmetric"):
        Prior.scaled(moment() + torch.triu(torch.ones(D_IN, D_IN), 1), 1.0)
    with pytest.raises(InputError, match="must be square"):
        Prior.scaled(moment()[:3], 1.0)


def test_a_device_without_float64_is_left_for_the_cpu():
    class Poor(torch.Tensor):
        def to(self, *args, **kwargs):  # what Apple's GPUs say
            raise TypeError("no float64 here")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    made = double(torch.ones(2, 3).as_subclass(Poor))
    assert type(made) is torch.Tensor and made.dtype == torch.float64
    assert double(np.ones((2, 3), np.float32)).dtype == torch.float64
