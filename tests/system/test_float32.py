import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slablm.system import float32
from slablm.system.float32 import fast_float32


@pytest.fixture
def matmul():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


def test_products_keep_the_precision_of_float32(matmul):
    a, b = torch.randn(300, 700), torch.randn(700, 200)
    exact = a.double() @ b.double()
    with fast_float32():
        assert (a @ b - exact).norm() / exact.norm() < 2e-6


def test_the_setting_is_put_back(matmul):
    before = matmul.fp32_precision
    with pytest.raises(KeyError), fast_float32():
        raise KeyError
    assert matmul.fp32_precision == before


def test_a_precision_that_would_be_lost_is_not_allowed(matmul, monkeypatch):
    monkeypatch.setattr(float32, "_keeps_precision", lambda: False)
    before = matmul.fp32_precision
    with fast_float32():
        assert matmul.fp32_precision == before


def test_a_precision_the_user_chose_stays(matmul):
    matmul.fp32_precision = "bf16"
    with fast_float32():
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == "bf16"


def test_threads_that_come_at_once_leave_the_setting_alone(matmul, monkeypatch):
    before, trials, available = matmul.fp32_precision, [], torch.backends.mkldnn.is_available

    def slowly():
        trials.append(matmul.fp32_precision)
        time.sleep(0.05)
        return available()

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", slowly)
    float32._trial.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: float32._keeps_precision(), range(4)))) == 1
    assert trials == [before]
    assert matmul.fp32_precision == before
