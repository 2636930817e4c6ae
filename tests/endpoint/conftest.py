"""A prepared model, and a server around it that the tests of a module share."""

import pytest
from prepared_model import PreparedModel, serving
from shipped import FOLDER

from tokenizer_util import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def _served(tokenizer):
    model = PreparedModel(tokenizer)
    with serving(model, max_waiting=40, max_request_bytes=100_000, max_messages=50) as server:
        yield model, server


@pytest.fixture
def model(_served):
    """The served model, as new."""
    model, server = _served
    model.restore()
    yield model
    model.may_go_on.set()
    assert not server.worker.is_closed


@pytest.fixture
def server(_served):
    return _served[1]


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
