"""No gap between solvers and kinds of Factors: each pair has a test of its definition, or a refusal that helps."""

import inspect
import re

import pytest
import test_eva
import test_fngd
import test_hylo
import test_kbfgs
import test_kronecker_solvers
import test_mkor
import test_seng
import test_shampoo
import test_singd
import test_soap
import test_solvers
import test_spring
import test_switch
import torch
from blocks import embedding, grouped, linear, sequence

from curvlib import solvers
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.solvers import Solver

KINDS = [linear, sequence, grouped, embedding]
ALIASES = {"table": "embedding"}
DEFINITIONS = {
    "Dense": test_solvers.test_solve_is_the_explicit_damped_solve,
    "Diagonal": test_kronecker_solvers.test_diagonal_divides_by_averaged_squares,
    "EKFAC": test_kronecker_solvers.test_ekfac_rescales_in_the_eigenbasis,
    "Eva": test_eva.test_eva_solves_with_the_product_of_the_mean_vectors,
    "FNGD": test_fngd.test_later_epochs_share_the_weights_of_the_first,
    "Identity": test_kronecker_solvers.test_identity_passes_the_gradient_through,
    "KBFGS": test_kbfgs.test_steps_are_those_of_the_paper,
    "KFAC": test_kronecker_solvers.test_kfac_is_its_textbook_definition,
    "KID": test_hylo.test_all_rows_are_interpolated_from_the_largest,
    "KIS": test_hylo.test_sampled_rows_stand_for_all,
    "MKOR": test_mkor.test_mkor_inverts_what_its_updates_stand_for,
    "MinSR": test_spring.test_steps_are_those_of_the_paper,
    "SENG": test_seng.test_kernel_and_products_are_sketched_and_the_last_product_is_whole,
    "SINGD": test_singd.test_updates_are_the_papers,
    "SKFAC": test_kronecker_solvers.test_skfac_is_kfac_of_the_current_batch,
    "SOAP": test_soap.test_every_step_is_the_algorithms,
    "SPRING": test_spring.test_steps_are_those_of_the_paper,
    "Shampoo": test_shampoo.test_shampoo_divides_by_roots_of_both_sides,
    "Switch": test_switch.test_each_solver_serves_its_updates,
    "Woodbury": test_solvers.test_solve_is_the_explicit_damped_solve,
}

OPTIONS = {"Switch": {"solvers": (solvers.KID(), solvers.KIS()), "until": (1,)}}
PUBLIC = sorted(name for name in solvers.__all__ if issubclass(getattr(solvers, name), Solver) and name != "Solver")


def made(name):
    return getattr(solvers, name)(**OPTIONS.get(name, {}))


def kinds_of(test):
    """Names of the Factors that a test is parametrised by."""
    (builds,) = [mark.args[1] for mark in test.pytestmark if mark.args[0] == "build"]
    return {ALIASES.get(build.__name__, build.__name__) for build in builds}


@pytest.mark.parametrize("kind", KINDS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("name", PUBLIC)
def test_each_kind_has_a_definition_or_a_refusal(name, kind):
    test = DEFINITIONS[name]
    solver, factors = made(name), kind(torch.from_numpy, 0, columns=1)
    assert re.search(rf"\b({name}\(|solver\b)", inspect.getsource(test)), "the test is not of this solver"
    if kind.__name__ in kinds_of(test):
        solver.factorize(solver.update(None, factors), 0.1)
    else:
        with pytest.raises(ConfigurationError, match=r"use Woodbury, .* for this block"):
            solver.update(None, factors)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_need_for_a_kronecker_form_is_declared(name):
    """`compose` refuses by the declaration what `update` would refuse at the first step."""
    rows = DenseRows(weight=torch.eye(6).double().reshape(6, 2, 3))
    if made(name).of_kronecker_rows:
        with pytest.raises(ConfigurationError, match="have no Kronecker form: use Woodbury, Dense or Diagonal"):
            made(name).update(None, rows)
    else:
        made(name).update(None, rows)


def test_rows_reduced_over_positions_need_one_too():
    for solver in (solvers.KIS(sharing="reduce"), solvers.KID(sharing="reduce")):
        assert solver.of_kronecker_rows
