import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.surrogates.link import Identity, Link, Sigmoid, Softplus

LINKS = [Identity(), Sigmoid(), Softplus()]


@pytest.mark.parametrize("link", LINKS, ids=lambda link: type(link).__name__)
@given(predictor=st.floats(-6.0, 6.0))
def test_inverse_undoes_forward(link: Link, predictor: float) -> None:
    assert link.inverse(link.forward(np.array([predictor]))) == pytest.approx(predictor, abs=1e-9)


@pytest.mark.parametrize("link", LINKS, ids=lambda link: type(link).__name__)
@given(predictor=st.floats(-8.0, 8.0))
def test_derivative_is_the_difference_quotient(link: Link, predictor: float) -> None:
    step = 1e-5
    ends = link.forward(np.array([predictor - step, predictor + step]))
    assert link.derivative(np.array([predictor])) == pytest.approx((ends[1] - ends[0]) / (2 * step), abs=1e-8)


def test_scores_are_those_of_the_formulas() -> None:
    predictor = np.linspace(-5, 5, 11)
    np.testing.assert_allclose(Sigmoid().forward(predictor), 1 / (1 + np.exp(-predictor)), rtol=1e-12)
    np.testing.assert_allclose(Softplus().forward(predictor), np.log(1 + np.exp(predictor)), rtol=1e-12)


@pytest.mark.parametrize("link", LINKS, ids=lambda link: type(link).__name__)
def test_far_predictors_overflow_nowhere(link: Link) -> None:
    far = np.array([-1e4, 1e4])  # a warning is an error here
    assert np.isfinite(link.forward(far)).all()
    assert (link.derivative(far) >= 0).all()


def test_the_ends_of_a_range_have_finite_predictors() -> None:
    """Of 50 items, none right and half an item right cannot be told apart."""
    link = Sigmoid(epsilon=1 / 100)
    np.testing.assert_allclose(link.inverse(np.array([0.0, 0.005, 1.0])), [-np.log(99), -np.log(99), np.log(99)])
    assert link.inverse(np.array([0.02])) == pytest.approx(-np.log(49))  # one item is as it is
    loss = Softplus(epsilon=1e-3)
    assert loss.forward(loss.inverse(np.array([0.0, 800.0]))) == pytest.approx([1e-3, 800.0])


def test_scores_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected numbers in \[0, 1\], got -0.1 to 0.5"):
        Sigmoid().inverse(np.array([-0.1, 0.5]))
    with pytest.raises(ValueError, match=r"expected numbers in \[0, inf\]"):
        Softplus().inverse(np.array([-0.1]))
    with pytest.raises(ValueError, match="expected numbers in"):
        Sigmoid().inverse(np.array([np.nan]))
