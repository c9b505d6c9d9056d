"""Several blocks at once, decomposed side by side in threads, have the states that each would have by itself."""

import pytest
import torch

from curvlib.arrays import pack
from curvlib.factors import OuterProduct
from curvlib.solvers import EKFAC, KFAC, SOAP, Shampoo

SOLVERS = {
    "KFAC": KFAC(),
    "KFAC, inverse": KFAC(form="inverse"),
    "KFAC, eigen": KFAC(form="eigen"),
    "KFAC, exact damping": KFAC(damping="exact"),
    "EKFAC": EKFAC(),
    "EKFAC, qr": EKFAC(basis="qr", basis_every=2),
    "Shampoo": Shampoo(),
    "SOAP": SOAP(basis_every=2),
}


def rows(seed, d_in, d_out, n=8):
    generator = torch.Generator().manual_seed(seed)
    inputs, cotangents = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
    return OuterProduct(inputs, cotangents, weight="weight", bias="bias")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SOLVERS)
def test_states_and_directions_are_those_of_each_block(name, two_threads):
    solver, sizes = SOLVERS[name], [(140, 3), (5, 150), (130, 131)]
    apart, together = [None] * 3, [None] * 3
    for step in range(4):
        given = [rows(10 * step + place, *size) for place, size in enumerate(sizes)]
        apart = [solver.update(one, own) for one, own in zip(apart, given, strict=True)]
        together = solver.update_all(together, given)
        inverses = solver.factorize_all(together, [0.1, 0.2, 0.3])
        for place, own in enumerate(given):
            mine = solver.solve(solver.factorize(apart[place], 0.1 * (place + 1)), own)
            theirs = solver.solve(inverses[place], own)
            for parameter in mine:
                torch.testing.assert_close(theirs[parameter], mine[parameter], rtol=1e-8, atol=1e-10)
    assert [set(pack(one)) for one in together] == [set(pack(one)) for one in apart]
