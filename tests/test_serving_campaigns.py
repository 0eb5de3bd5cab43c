"""The campaigns of `benchmarks/serve_load.py` and `benchmarks/serve_fuzz.py`, for a moment."""

import json
import os
from collections.abc import Iterator

import pytest

from softvq.serving.limits import Limits
from tests import serving_campaigns as campaigns
from tests.generators import make_generator
from tests.program import photograph, png
from tests.serving import Served, load, serving

PHOTO = png(photograph())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("campaigns")
    make_generator(folder)
    with serving(load(folder), Limits(queue=8, batch=4, images=4, steps=5, body_bytes=50_000)) as found:
        yield found


def test_nothing_is_lost_at_far_more_than_it_can_do(served: Served) -> None:
    ask = lambda number: campaigns.Ask("POST", "/v1/reconstruct", PHOTO)  # noqa: E731
    single = campaigns.closed_loop(served.port, ask, clients=1, seconds=0.2)
    assert 0 < single["p50"] <= single["p99"]
    found = campaigns.overload(served.port, ask, rate=600.0, seconds=0.5, pid=os.getpid())
    assert found["lost_or_other"] == {}
    assert found["answered"] > 0
    assert found["refused"] > 0
    assert found["answered"] + found["refused"] == found["sent"]
    text = served("GET", "/metrics").body.decode()
    assert f'softvq_requests_total{{endpoint="/v1/reconstruct",status="503"}} {float(found["refused"])}' in text
    assert campaigns.batch_difference(served.port, 1, 4) <= 1


# that the server's thread draws random numbers too, and that photographs have a long repr
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_a_schema_fuzz_finds_nothing(served: Served) -> None:
    found = campaigns.fuzz(served.port, PHOTO, 60)
    assert found["requests"] >= 50
    assert {"200", "404", "422"} <= set(found["by_status"]), json.dumps(found)
